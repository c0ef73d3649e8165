"""Quantised checkpoints, read as the floats that they stand for: a file a family of formats."""
