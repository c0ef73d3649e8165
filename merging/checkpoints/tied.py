"""Tied weights: an output matrix that repeats the embedding is no tensor of its own."""

from __future__ import annotations

from mergeline.merging.architecture import Role, describe
from mergeline.merging.checkpoints.checkpoint import Checkpoint
from mergeline.merging.checkpoints.companions import read_config


def without_tied_head(checkpoint: Checkpoint) -> Checkpoint:
    """Leave out an output matrix that the configuration says is the embedding, so that it is not merged beside it.

    transformers ignores such a tensor, and writes none (`tie_word_embeddings`).

    Raises:
        UserError: a configuration that is no JSON object.
    """
    config = read_config(checkpoint.folder)
    if config.get("tie_word_embeddings") is not True:
        return checkpoint
    tensors = describe({name: info.shape for name, info in checkpoint.tensors.items()}, config).tensors
    heads = {name for name, tensor in tensors.items() if tensor.role is Role.HEAD}
    if not heads or not any(tensor.role is Role.EMBEDDING for tensor in tensors.values()):
        return checkpoint
    return checkpoint.view({name: info for name, info in checkpoint.tensors.items() if name not in heads})
