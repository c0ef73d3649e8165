"""Tied weights: an output matrix that repeats the embedding is no tensor of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Mapping

from mergeline.merging.architecture import Role, classes_of, describe, memory_name
from mergeline.merging.checkpoints.checkpoint import Checkpoint
from mergeline.merging.checkpoints.companions import read_config


def without_tied_head(checkpoint: Checkpoint, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Leave out an output matrix that the configuration says is the embedding, so that it is not merged beside it.

    transformers ignores such a tensor, and writes none (`tie_word_embeddings`). config: by default that of its folder.

    Raises:
        UserError: a configuration that is no JSON object.
    """
    config = read_config(checkpoint.folder) if config is None else config
    if config.get("tie_word_embeddings") is not True:
        return checkpoint
    tensors = describe({name: info.shape for name, info in checkpoint.tensors.items()}, config).tensors
    heads = {name for name, tensor in tensors.items() if tensor.role is Role.HEAD}
    if not heads or not any(tensor.role is Role.EMBEDDING for tensor in tensors.values()):
        return checkpoint
    return checkpoint.view({name: info for name, info in checkpoint.tensors.items() if name not in heads})


HEAD = "lm_head.weight"
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_WITH_MATRIX = (*_WITH_HEAD, "ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True)
class TiedHead:
    """A language model's output matrix that is its embedding, and no tensor of its own; both by their names.

    in_memory: what transformers calls the embedding.
    """

    embedding: str
    in_memory: str
    head: str = HEAD

    def is_head(self, name: str) -> bool:
        """Whether an adapter means the output matrix by this name."""
        return name == self.head

    def is_either(self, name: str) -> bool:
        """Whether an adapter means one of the two by this name."""
        return name == self.head or self.in_memory in (name, name.partition(".")[2]) or name == self.embedding


def tied_head(checkpoint: Checkpoint) -> TiedHead | None:
    """Of a language model without an output matrix in its files; None of any other model.

    Raises:
        UserError: a configuration that is no JSON object.
    """
    config = read_config(checkpoint.folder)
    if (
        not any(name.endswith(_WITH_HEAD) for name in classes_of(config))
        or config.get("tie_word_embeddings") is False
    ):
        return None
    tensors = describe({name: info.shape for name, info in checkpoint.tensors.items()}, config).tensors
    found = [
        name for name, tensor in tensors.items() if tensor.role is Role.EMBEDDING and len(tensor.shape) == 2
    ]
    has_head = any(tensor.role is Role.HEAD for tensor in tensors.values())
    if has_head or len(found) != 1 or found[0].endswith("shared.weight"):
        return None
    return TiedHead(found[0], memory_name(found[0], config))


def shares_embedding(checkpoint: Checkpoint, name: str) -> bool:
    """Whether several modules have an embedding in a way that `tied_head` does not know, as of T5 or masked LMs."""
    config = read_config(checkpoint.folder)
    if name.endswith("shared.weight"):
        return True
    if config.get("tie_word_embeddings") is False or not any(
        kind.endswith(_WITH_MATRIX) for kind in classes_of(config)
    ):
        return False
    tensors = describe({n: info.shape for n, info in checkpoint.tensors.items()}, config).tensors
    return not any(tensor.role is Role.HEAD for tensor in tensors.values())


def untied(checkpoint: Checkpoint, tied: TiedHead) -> Checkpoint:
    """The same checkpoint with the embedding as its output matrix, too, unless it has one."""
    if tied.head in checkpoint.tensors or tied.embedding not in checkpoint.tensors:
        return checkpoint
    head = replace(checkpoint.tensors[tied.embedding], name=tied.head)
    return checkpoint.view({**checkpoint.tensors, tied.head: head})
