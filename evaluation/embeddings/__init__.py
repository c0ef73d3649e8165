"""Evaluation of embedding models: similarity of pairs of texts, and retrieval of documents."""
