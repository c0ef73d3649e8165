"""Which tensors the modules of mergekit's architectures have, by how their names begin.

From the architectures of several modules in mergekit 0.1.5 (`_data/architectures/*.json`), with the names that
transformers 4 and 5 write. Models that it has none for get a module for each tower of layers, under what stands before
their numbers, and `default` for all else (`architecture/auto.py`).
"""

from __future__ import annotations

import glob
from typing import Iterable

_REST = "default"
_PREFIXES = {
    "text_decoder": (
        "language_model.", "model.language_model.", "model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.",
    ),
    "vision_tower": ("vision_tower.", "model.vision_tower.", "visual.", "model.visual."),
    "vision_model": ("vision_model.", "model.vision_model."),
    "multi_modal_projector": (
        "multi_modal_projector.", "model.multi_modal_projector.", "visual.merger.", "model.visual.merger.",
        "model.visual.deepstack_merger_list.",
    ),
    "encoder": ("encoder.", "model.encoder."),
    "decoder": ("decoder.", "model.decoder."),
    "shared": ("shared.", "lm_head."),
}  # fmt: skip
NAMED = (*_PREFIXES, _REST)


def prefixes(module: str, names: Iterable[str]) -> list[str]:
    """How the names of a module's tensors begin, of those that a model has; [] if it has none of the module.

    A tensor belongs to the module with the longest beginning of its name.
    """
    known = ("",) if module == _REST else _PREFIXES.get(module, (f"{module}.",))
    return [prefix for prefix in known if any(name.startswith(prefix) for name in names)]


def patterns(prefix: str, within: str | None = None) -> list[str]:
    """Shell patterns of all names that begin with `prefix` and have `within` anywhere; None: whatever follows."""
    start = glob.escape(prefix)
    if within is None or within in prefix:
        return [f"{start}*"]
    across = [k for k in range(1, len(within)) if prefix.endswith(within[:k])]
    return [f"{start}*{glob.escape(within)}*", *(f"{start}{glob.escape(within[k:])}*" for k in across)]
