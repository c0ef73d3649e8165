"""Suites, datasets, scores and pictures: how good a checkpoint is, with intervals."""
