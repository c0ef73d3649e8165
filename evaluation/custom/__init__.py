"""Evaluation by the user's own function or command: a score for every example."""
