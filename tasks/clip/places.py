"""Where in build/ lies what image models are measured with."""

from __future__ import annotations

from pathlib import Path


def heads(build: Path) -> Path:
    """The zero-shot heads of all tasks: one (C, d) float32 tensor a task."""
    return build / "heads.safetensors"
