"""What lies beside weights: configuration, tokenizer, and where they were fetched from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mergeline.merging.files import read_object

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
PROVENANCE = "provenance.json"  # where `mergeline fetch` writes what a checkpoint was fetched from


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
