"""Learned methods, one a file: see `merging.learning.contract`."""
