"""What lies beside weights: configuration, tokenizer, and where they were fetched from."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mergeline.merging.files import read_object

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
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
