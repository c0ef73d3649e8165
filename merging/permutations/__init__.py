"""Models that were trained independently, brought to one order of their hidden units."""
