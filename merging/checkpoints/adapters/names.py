"""Names in adapters, and those of the base's tensors: of modules in memory, where files may have others."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any, Iterator, Mapping, NamedTuple

from mergeline.merging.architecture import Model, TensorRole, describe, in_memory, memory_name, on_disk
from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo
from mergeline.merging.checkpoints.companions import read_config

PREFIX = "base_model.model."
# How parts of modules are called, by the kind of the adapter: what stands after the name of the module.
_PARTS = {
    "LORA": re.compile(
        r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.default)?(\.weight|\.bias)?"
    ),
    "LOHA": re.compile(r"(.+)\.hada_(w1_a|w1_b|w2_a|w2_b|t1|t2)(?:\.default)?()"),
    "LOKR": re.compile(r"(.+)\.lokr_(w1|w1_a|w1_b|w2|w2_a|w2_b|t2)(?:\.default)?()"),
    "IA3": re.compile(r"(.+)\.ia3_(l)(?:\.default)?()"),
    "OFT": re.compile(r"(.+)\.oft_(R|embedding_R)(?:\.default)?(\.weight)?"),
    "VERA": re.compile(r"(.+)\.vera_(lambda_b|lambda_d|A|B)(?:\.default)?()"),
    "HRA": re.compile(r"(.+)\.hra_(u)(?:\.default)?()"),
    "SVFIT": re.compile(r"(.+)\.svfit_(values)(?:\.default)?()"),
}
_TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")
_WRAPPERS = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")


class Parts(NamedTuple):
    """The tensors of an adapter.

    modules: of each module, by the part. whole: what is kept whole (`modules_to_save`, biases), by name.
    tokens: rows of some tokens, by module.
    """

    modules: dict[str, dict[str, TensorInfo]]
    whole: dict[str, TensorInfo]
    tokens: dict[str, TensorInfo]


def parts_of(adapter: Checkpoint, kind: str) -> Parts:
    """What the tensors of an adapter are by their names."""
    parts = Parts({}, {}, {})
    for key, info in adapter.tensors.items():
        plain = key.removeprefix(PREFIX)
        found = _PARTS[kind].fullmatch(plain) if kind in _PARTS else None
        if found:
            name = found[2] + (found[3] if found[3] == ".bias" else "")
            parts.modules.setdefault(found[1], {})[name] = info
        elif token := _TOKENS.fullmatch(plain):
            parts.tokens[token[1]] = info
        elif ".original_module." not in plain:  # the base's own, which PEFT does not use
            parts.whole[_WRAPPERS.sub("", plain)] = info
    return parts


class BaseNames:
    """What the base's tensors are called, on disk and in memory."""

    def __init__(self, base: Checkpoint):
        self.tensors = base.tensors
        self.config: dict[str, Any] = read_config(base.folder)

    @cached_property
    def in_memory(self) -> Mapping[str, list[str]]:
        """Names on disk by those in memory."""
        return on_disk(self.tensors, self.config)

    def find(self, name: str) -> str | None:
        """The base's tensor of an adapter's name: of that name, or of that of the bare model inside of it."""
        inner = name.partition(".")[2]
        for plain in (name, inner):
            if plain in self.tensors:
                return plain
        for plain in (name, inner):
            if len(found := self.in_memory.get(memory_name(plain, self.config), [])) == 1:
                return found[0]
        return None

    def parameters(self, module: str) -> Iterator[tuple[str, list[str]]]:
        """The parameters of a module, in memory: the last part of the name, and the names of its tensors on disk."""
        for start in (module, module.partition(".")[2]):
            prefix = memory_name(f"{start}.", self.config)
            found = {n.removeprefix(prefix): d for n, d in self.in_memory.items() if n.startswith(prefix)}
            if found:
                yield from ((name, disk) for name, disk in found.items() if "." not in name)
                return

    def transposed(self, name: str, otherwise: bool) -> bool:
        """Whether a weight is (in, out); as is said, of architectures that no row knows.

        PEFT sees the module, and may save another `fan_in_fan_out` than the module has.
        """
        return self._model.tensors[name].transposed if self._model.architecture != "unknown" else otherwise

    @cached_property
    def _model(self) -> Model:
        return describe({name: info.shape for name, info in self.tensors.items()}, self.config)

    def role(self, name: str) -> TensorRole:
        """What a tensor of the base is."""
        return self._model.tensors[name]

    def parts_of_expert(self, name: str) -> int:
        """Of how many tensors on disk like this one an expert consists in memory."""
        return in_memory(name, self.config).parts
