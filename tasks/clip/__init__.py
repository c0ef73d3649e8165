"""The modality `clip`: image towers with zero-shot heads."""
