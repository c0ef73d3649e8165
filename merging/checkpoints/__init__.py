"""Checkpoints on the disk: headers, tensors, adapters, vocabularies, and what lies beside the weights."""
