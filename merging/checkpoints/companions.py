"""What lies beside weights: configuration, tokenizer, and where they were fetched from."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Mapping

from mergeline.merging.files import read_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# How names of files of weights begin, with `.safetensors` after them, or that and `.index.json`: of transformers, and
# of diffusers.
STEMS = ("model", "diffusion_pytorch_model")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pth.tar", ".ckpt")
CONFIG = "config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of PEFT
TOKENIZER = "tokenizer.json"
# What describes the weights and lies beside them.
CONFIG_FILES = (
    CONFIG, "generation_config.json", ADAPTER_CONFIG, "preprocessor_config.json",
    "open_clip_config.json", TOKENIZER, "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "source.spm", "target.spm", "chat_template.json", "chat_template.jinja",
    "processor_config.json", "video_preprocessor_config.json", "audio_preprocessor_config.json",
    "scheduler_config.json", "model_index.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json",
)  # fmt: skip
PROVENANCE = "provenance.json"  # where `mergeline fetch` writes what a checkpoint was fetched from
_FILES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".json",
    ".yaml",
)  # no repository's name ends so


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint folder; empty if there is none (raises UserError if it is no JSON object)."""
    return read_object(folder / CONFIG)


def adapted_class(adapter: Mapping[str, Any]) -> str | None:
    """The class of the model that an adapter was trained on; None where its configuration does not say it."""
    mapping = adapter.get("auto_mapping")
    kind = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return kind if isinstance(kind, str) else None


def stem_of(config: Mapping[str, Any]) -> str:
    """How the names of files of weights begin that the library of a configuration opens."""
    return STEMS["_diffusers_version" in config]


def source_of(checkpoint: Path) -> str | None:
    """The URI that a checkpoint folder was fetched from, of the Hub with the commit; None where nothing says so."""
    provenance = read_object(checkpoint / PROVENANCE)
    source, revision = provenance.get("source"), provenance.get("revision")
    if not isinstance(source, str) or "://" not in source:
        return None
    if isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40,64}", revision):
        return re.sub(r"^(hf://[\w.-]+/[\w.-]+)(@[^/]+)?", rf"\1@{revision}", source)
    return source


def is_repository(name: str, path: Path) -> bool:
    """Whether a name is that of a repository of the Hub, `org/name`, and `path`, which it may name, is not there."""
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.lower().endswith(_FILES)
    return bool(named) and not os.path.lexists(path)


def hub_id(source: str | None) -> str | None:
    """`org/name` of a URI of the Hugging Face hub."""
    found = re.match(r"hf://([\w.-]+/[\w.-]+)", source or "")
    return found.group(1) if found else None
