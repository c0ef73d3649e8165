"""The modality `embeddings`: models of sentence-transformers, measured by similarity and retrieval."""
