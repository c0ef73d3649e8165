"""The classes that a configuration names, as transformers writes them under `architectures`."""

from __future__ import annotations

from typing import Any, Mapping

_CAUSAL = ("ForCausalLM", "LMHeadModel")


def classes_of(config: Mapping[str, Any]) -> list[str]:
    """The names of the classes; none where there is no list of them."""
    listed = config.get("architectures")
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether it is a causal language model's."""
    return any(name.endswith(_CAUSAL) for name in classes_of(config))
