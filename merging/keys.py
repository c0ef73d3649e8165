"""Which tensors get the matrix treatment of a spectral method."""

from __future__ import annotations

import re
from typing import Literal, Sequence

Keys = Literal["block_linear", "matrices", "block_linear+proj"]
Other = Literal["pretrained", "mean", "sum"]  # which merge of the task vectors the remaining tensors add to the base

_PROJECTION = re.compile(r"(^|[._])proj(ection)?(\.weight)?$")
_BLOCK = re.compile(r"(^|\.)\d+\.")
_NOT_LINEAR = re.compile(r"(^|[._])(ln|norm|layernorm|bias|embed\w*)([._\d]|$)", re.IGNORECASE)


def is_matrix(name: str, shape: Sequence[int], keys: Keys) -> bool:
    """Whether a tensor gets the matrix treatment.

    `matrices`: every 2-D tensor but a text tower's projection. `block_linear`: the 2-D weights of linear layers inside
    numbered blocks, no norms, biases or embeddings; on open_clip names the same set as the official substring rule.
    `block_linear+proj`: these, and what projects the last block's output into the space of both towers.
    """
    if len(shape) != 2:
        return False
    if keys == "matrices":
        return "text_projection" not in name
    if keys == "block_linear+proj" and _PROJECTION.search(name):
        return True
    return bool(_BLOCK.search(name)) and not _NOT_LINEAR.search(name)
