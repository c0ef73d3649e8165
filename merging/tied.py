"""Tied weights: an output matrix that repeats the embedding is no tensor of its own."""

from __future__ import annotations

from merging.checkpoint import Checkpoint
from merging.companions import read_config

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def without_tied_head(checkpoint: Checkpoint) -> Checkpoint:
    """Leave out an output matrix that the configuration says is the embedding, so that it is not merged beside it.

    transformers ignores such a tensor, and writes none (`tie_word_embeddings`).

    Raises:
        UserError: a configuration that is no JSON object.
    """
    heads = [name for name in checkpoint.tensors if name.endswith(_HEAD)]
    embedded = any(name.endswith(_EMBEDDING) for name in checkpoint.tensors)
    if not heads or not embedded or read_config(checkpoint.folder).get("tie_word_embeddings") is not True:
        return checkpoint
    return checkpoint.view({name: info for name, info in checkpoint.tensors.items() if name not in heads})
