"""Evaluation of Decision Transformers: the returns of their episodes in environments of gymnasium."""
