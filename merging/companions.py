"""What lies beside merged weights: configuration, tokenizer and chat template of one of the inputs, the donor."""

from __future__ import annotations

import json
import re
import shutil
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Sequence

from merging.checkpoint import CONFIG_FILES, DTYPES
from merging.files import read_object
from merging.writer import TensorSpec

if TYPE_CHECKING:
    from merging.vocabulary import Alignment

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
PROVENANCE = "provenance.json"  # where `mergeline fetch` writes what a checkpoint was fetched from
# transformers wrote the first until version 5.
_DTYPE_KEYS = ("torch_dtype", "dtype")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint folder; empty if there is none (raises UserError if it is no JSON object)."""
    return read_object(folder / CONFIG)


def source_of(checkpoint: Path) -> str | None:
    """The URI that a checkpoint folder was fetched from; None where nothing says so."""
    source = read_object(checkpoint / PROVENANCE).get("source")
    return source if isinstance(source, str) and "://" in source else None


def hub_id(source: str | None) -> str | None:
    """`org/name` of a URI of the Hugging Face hub."""
    found = re.match(r"hf://([\w.-]+/[\w.-]+)", source or "")
    return found.group(1) if found else None


def carry(
    donor: Path,
    specs: Iterable[TensorSpec],
    folder: Path,
    alignment: Alignment | None = None,
    layers: Sequence[int] | None = None,
) -> None:
    """Copy what describes the donor's weights, and make it true of what was written.

    config.json names the dtype that most of the tensors have, the rows of the vocabulary, and the layers of a stack;
    the tokenizer knows the tokens that were added to it.
    """
    for name in CONFIG_FILES:
        if (donor / name).is_file():
            shutil.copyfile(donor / name, folder / name)
    config, dtype = read_config(donor), main_dtype(specs)
    changed = bool(dtype) and _replace(config, _DTYPE_KEYS, dtype)
    if alignment:
        changed |= _replace(config, ("vocab_size",), alignment.rows)
        if alignment.added:
            tokenizer = read_object(folder / TOKENIZER)
            tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or ()), *alignment.added]
            _write(folder / TOKENIZER, tokenizer)
    if layers is not None:
        changed |= _replace(config, _LAYER_KEYS, len(layers))
        kinds = config.get("layer_types")
        if isinstance(kinds, list) and max(layers) < len(kinds):
            config["layer_types"] = [kinds[layer] for layer in layers]
    if changed:
        _write(folder / CONFIG, config)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main_dtype(specs: Iterable[TensorSpec]) -> str | None:
    """torch's name of the float dtype that most elements have; None where there are no floats."""
    elements: dict[str, int] = {}
    for spec in specs:
        name = DTYPES[spec.dtype][0]
        if "float" in name:
            elements[name] = elements.get(name, 0) + prod(spec.shape)
    return max(elements, key=elements.__getitem__, default=None)


def _replace(config: dict[str, Any], keys: Sequence[str], new: Any) -> bool:
    """Put a value where the configuration, or one of its parts, has another; whether there was one."""
    changed = False
    for key, value in config.items():
        if key in keys and value not in (None, new):
            config[key], changed = new, True
        elif isinstance(value, dict) and key.endswith("_config"):
            changed |= _replace(value, keys, new)
    return changed
