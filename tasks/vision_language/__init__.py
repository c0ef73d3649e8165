"""The modality `vision_language`: models that read an image and a text, measured by the texts that they write."""
