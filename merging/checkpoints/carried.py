"""What is carried beside merged weights: configuration, tokenizer and chat template of one of the inputs, the donor."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any, Iterable, Sequence

from mergeline.merging.checkpoints.checkpoint import DTYPES
from mergeline.merging.checkpoints.companions import (
    CONFIG,
    CONFIG_FILES,
    PICKLE_SUFFIXES,
    PROVENANCE,
    TOKENIZER,
)
from mergeline.merging.checkpoints.components import (
    component_folders,
    configurations,
    is_pipeline,
    parts_of_pipeline,
)
from mergeline.merging.checkpoints.modules import read_modules
from mergeline.merging.checkpoints.remote import REMOTE
from mergeline.merging.checkpoints.vocabulary import Alignment
from mergeline.merging.checkpoints.writer import TensorSpec
from mergeline.merging.files import read_object
from mergeline.merging.reading import safe_name

# transformers wrote the first until version 5.
_DTYPE_KEYS = ("torch_dtype", "dtype")
_TERMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_TEMPLATES = ("additional_chat_templates",)  # of transformers
_CODE = "auto_map"
_CODED = (CONFIG, "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
_OTHER_WEIGHTS = (
    ".safetensors",
    ".index.json",
    *PICKLE_SUFFIXES,
    ".gguf",
    ".msgpack",
    ".h5",
    ".onnx",
    ".sig",
)
# What Mergeline lays beside weights itself, or makes anew.
_OURS = ("README.md", "manifest.json", PROVENANCE, REMOTE, "heads", "adapters", "__pycache__")
_QUANTISATION_KEYS = ("quantization_config", "compression_config")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


def carry(
    donor: Path,
    specs: Iterable[TensorSpec],
    folder: Path,
    alignment: Alignment | None = None,
    layers: Sequence[int] | None = None,
    quantised: bool = False,
    untied: bool = False,
) -> None:
    """Copy what describes the donor's weights, and make it true of what was written.

    config.json names the dtype that most of the tensors have, the rows of the vocabulary and the layers of a stack, but
    no quantisation unless the weights are `quantised` again, and says whether the output matrix is no longer the
    embedding (`untied`); the tokenizer knows the tokens that were added to it.

    Raises:
        UserError: as `carried_files`.
    """
    for name, path in carried_files(donor).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    specs = list(specs)
    for prefix, written in configurations(donor).items():
        own = [spec for spec in specs if spec.name.startswith(prefix) and (prefix or "/" not in spec.name)]
        config, dtype = written if quantised else without_quantisation(written), main_dtype(own)
        changed = config != written
        if changed | (bool(dtype) and _replace(config, _DTYPE_KEYS, dtype)):
            _write(folder / prefix / CONFIG, config)
    config, changed = read_object(folder / CONFIG), False
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
    if untied:
        _replace(config, ("tie_word_embeddings",), False)
        config["tie_word_embeddings"], changed = False, True
    if changed:
        _write(folder / CONFIG, config)


def carried_files(donor: Path) -> dict[str, Path]:
    """The files of a folder that are carried, and those of its parts: name, with the sub-folder -> where it lies.

    Code is copied, never run, and only where a configuration asks for it (`auto_map`).

    Raises:
        UserError: a link leads out of the folder, who knows where to; as `component_folders`.
    """
    found = _carried_from(donor)
    modules = [module.folder for module in read_modules(donor) if module.folder and module.is_known]
    for part in [*parts_of_pipeline(donor), *modules, *_TEMPLATES]:
        if (donor / part).is_dir():
            found |= {
                f"{part}/{name}": path for name, path in _carried_from(safe_name(donor, part, donor)).items()
            }
    return found


def _carried_from(folder: Path) -> dict[str, Path]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    asks = any(_CODE in read_object(folder / name) for name in names if name in _CODED)
    suffixes = (".jinja", ".tiktoken", *((".py",) if asks else ()))
    wanted = [n for n in names if n in CONFIG_FILES or n.endswith(suffixes) or n.upper().startswith(_TERMS)]
    return {name: safe_name(folder, name, folder) for name in wanted}


def left_out(donor: Path) -> list[str]:
    """What lies in a folder and is neither weights nor carried, sorted: names of files, and of folders with `/`."""
    carried = carried_files(donor)
    inside = {name.partition("/")[0] for name in [*carried, *component_folders(donor)]}
    found, others = [], _OTHER_WEIGHTS[1:] if is_pipeline(donor) else _OTHER_WEIGHTS
    for path in donor.iterdir():
        name = path.name
        known = name in inside or name.startswith(".") or name in _OURS or name.endswith(others)
        if not known:
            found.append(f"{name}/" if path.is_dir() else name)
    return sorted(found)


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


def without_quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and its parts, of weights that are not quantised."""
    parts = {key: value for key, value in config.items() if key not in _QUANTISATION_KEYS}
    return {
        key: without_quantisation(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in parts.items()
    }


def _replace(config: dict[str, Any], keys: Sequence[str], new: Any) -> bool:
    """Put a value where the configuration, or one of its parts, has another; whether there was one."""
    changed = False
    for key, value in config.items():
        if key in keys and value not in (None, new):
            config[key], changed = new, True
        elif isinstance(value, dict) and key.endswith("_config"):
            changed |= _replace(value, keys, new)
    return changed
