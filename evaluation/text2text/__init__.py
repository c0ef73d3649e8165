"""Evaluation of sequence-to-sequence models: the texts that they write, scored example by example."""
