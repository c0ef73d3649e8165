"""What is carried beside merged weights: configuration, tokenizer and chat template of one of the inputs, the donor."""

from __future__ import annotations

import copy
import json
import shutil
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

from mergeline.merging.checkpoints.chat_templates import TEMPLATE, TOKENIZER_CONFIG
from mergeline.merging.checkpoints.checkpoint import DTYPES
from mergeline.merging.checkpoints.companions import (
    CONFIG,
    CONFIG_FILES,
    PICKLE_SUFFIXES,
    PROVENANCE,
    TOKENIZER,
    read_config,
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
    ".distcp",
    ".msgpack",
    ".h5",
    ".onnx",
    ".sig",
)
# What Mergeline lays beside weights itself, or makes anew.
_OURS = ("README.md", "manifest.json", PROVENANCE, "heads", "adapters", "__pycache__", REMOTE)
_QUANTISATION_KEYS = ("quantization_config", "compression_config")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
# Which part of a configuration is a tower's, by words in its name, and what its number of layers is called there; a row
# that is the last for its words ends the search.
_TEXT = ("text_config", "llm_config", "language_config")
_TOWERS = (
    (("vis", "image"), ("vision_config",), ("depth", *_LAYER_KEYS), True),
    (("audio",), ("audio_config",), ("encoder_layers", *_LAYER_KEYS), True),
    (("decoder",), ("text_config", "decoder"), ("decoder_layers", "num_decoder_layers"), False),
    (("decoder",), _TEXT, ("num_hidden_layers", "n_layer"), True),
    (("encoder",), ("text_config", "encoder"), ("encoder_layers", "num_encoder_layers", *_LAYER_KEYS), True),
    (("",), _TEXT, _LAYER_KEYS, True),
)


class Changes(NamedTuple):
    """What was written otherwise than the donor's files say.

    alignment: of vocabularies; the tokenizer knows the tokens that were added to it. layers: folder and layer, as which
    each layer of a stack is described, by tower; "" where a model has but one. chat_template: in place of the donor's.
    quantised: whether the weights are in the donor's own format; else config.json says no quantisation. untied: whether
    the output matrix is no longer the embedding. configured: what becomes of config.json where another kind, or size,
    of model was written.
    """

    alignment: Alignment | None = None
    layers: Mapping[str, Sequence[tuple[Path, int]]] = MappingProxyType({})
    chat_template: str | None = None
    quantised: bool = False
    untied: bool = False
    configured: Callable[[dict[str, Any]], dict[str, Any]] | None = None


_NONE = Changes()


def carry(donor: Path, specs: Iterable[TensorSpec], folder: Path, changes: Changes = _NONE) -> None:
    """Copy what describes the donor's weights, and make it true of what was written: dtype, rows, layers and the rest.

    Raises:
        UserError: as `carried_files`.
    """
    alignment, layers, chat_template, quantised, untied, configured = changes
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
        if alignment.added or alignment.removed:
            tokenizer = read_object(folder / TOKENIZER)
            _leave_out(tokenizer, {*alignment.removed})
            tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or ()), *alignment.added]
            _write(folder / TOKENIZER, tokenizer)
        _set_tokenizer_config(folder, {*alignment.removed}, None)
    if chat_template is not None:
        (folder / TEMPLATE).write_text(chat_template)
        _set_tokenizer_config(folder, set(), chat_template)
    for tower, taken in layers.items():
        configs = {path: read_config(path) for path, _ in taken if path.is_dir()}
        if tower:
            part, keys = layer_keys(config, tower)
            parts = {path: found.get(part) or {} if part else found for path, found in configs.items()}
            _number(config[part] if part else config, taken, parts, keys)
            changed = True
        else:
            changed |= _stacked(config, taken, configs)
    if configured is not None:
        config, changed = configured(config), True
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


def _leave_out(tokenizer: dict[str, Any], tokens: set[str]) -> None:
    """Take tokens, and merges that make them or are of them, out of what `tokenizer.json` says."""
    kept = [entry for entry in tokenizer.get("added_tokens") or () if entry["content"] not in tokens]
    tokenizer["added_tokens"] = kept
    model = tokenizer["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: id for token, id in model["vocab"].items() if token not in tokens}
    else:
        model["vocab"] = [piece for piece in model["vocab"] if piece[0] not in tokens]
    if tokens and isinstance(model.get("merges"), list):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            merge
            for merge, pair in zip(model["merges"], pairs)
            if tokens.isdisjoint(pair) and "".join(pair) not in tokens
        ]


def _set_tokenizer_config(folder: Path, removed: set[str], chat_template: str | None) -> None:
    """Make `tokenizer_config.json`, where there is one, true of tokens that were left out, and of a chat template."""
    path = folder / TOKENIZER_CONFIG
    config = read_object(path)
    listed = config.get("added_tokens_decoder")
    if removed and isinstance(listed, dict):
        config["added_tokens_decoder"] = {
            id: token
            for id, token in listed.items()
            if not isinstance(token, dict) or token.get("content") not in removed
        }
    if chat_template is not None:
        config["chat_template"] = chat_template
    if config and (removed or chat_template is not None):
        _write(path, config)


def layer_keys(config: Mapping[str, Any], tower: str) -> tuple[str, tuple[str, ...]]:
    """Which part of a configuration says how many layers a tower has ("": itself), and under which keys; no keys where
    none does.
    """
    for words, parts, keys, is_last in _TOWERS:
        if any(word in tower for word in words):
            part = next((part for part in parts if isinstance(config.get(part), dict)), "")
            own = config[part] if part else config
            found = [key for key in keys if isinstance(own.get(key), int)]
            if found or is_last:
                return part, tuple(key for key in found if own[key] == own[found[0]])
    return "", ()


def _stacked(
    config: dict[str, Any], layers: Sequence[tuple[Path, int]], configs: Mapping[Path, dict[str, Any]]
) -> bool:
    """Make a configuration, and its parts, true of other layers; whether one was about layers."""
    keys = [key for key in _LAYER_KEYS if isinstance(config.get(key), int)]
    _number(config, layers, configs, keys)
    changed = bool(keys)
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("_config"):
            nested = {path: own.get(name) or {} for path, own in configs.items()}
            changed |= _stacked(value, layers, nested)
    return changed


def _number(
    config: dict[str, Any],
    layers: Sequence[tuple[Path, int]],
    configs: Mapping[Path, dict[str, Any]],
    keys: Sequence[str],
) -> None:
    """Write the number of layers under its keys.

    What is listed layer by layer is that of each one's own model; what lists numbers of layers gets their new ones.
    """
    found = [(config if path not in configs else configs[path], layer) for path, layer in layers]
    for key in keys:
        for listing in [
            name for name, value in config.items() if "layer" in name and isinstance(value, list)
        ]:
            kinds = [_kind(own.get(listing), own.get(key), layer) for own, layer in found]
            if any(kind is not None for kind in kinds):
                config[listing] = kinds
            elif all(isinstance(i, int) for i in config[listing]):
                numbered = [layer in (own.get(listing) or ()) for own, layer in found]
                config[listing] = [i for i, listed in enumerate(numbered) if listed]
        config[key] = len(layers)


def _kind(listed: Any, count: Any, layer: int) -> Any:
    """What a list with one entry a layer says of a layer; None if it is another list."""
    return (
        listed[layer] if isinstance(listed, list) and len(listed) == count and layer < len(listed) else None
    )


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


def replaced(config: dict[str, Any], keys: Sequence[str], new: Any) -> dict[str, Any]:
    """A configuration with a value where it, or one of its parts, has another under these keys."""
    config = copy.deepcopy(config)
    _replace(config, keys, new)
    return config


def values_in(config: Mapping[str, Any], keys: Sequence[str]) -> list[Any]:
    """What a configuration, and its parts, say under these keys, but None."""
    found = []
    for key, value in config.items():
        if key in keys and value is not None:
            found.append(value)
        elif isinstance(value, dict) and key.endswith("_config"):
            found += values_in(value, keys)
    return found


def _replace(config: dict[str, Any], keys: Sequence[str], new: Any) -> bool:
    """Put a value where the configuration, or one of its parts, has another; whether there was one."""
    changed = False
    for key, value in config.items():
        if key in keys and value not in (None, new):
            config[key], changed = new, True
        elif isinstance(value, dict) and key.endswith("_config"):
            changed |= _replace(value, keys, new)
    return changed
