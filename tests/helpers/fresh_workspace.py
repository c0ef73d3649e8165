"""A workspace in which nothing has run, with models that were made once for all tests of a file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Mapping

import pytest
from ruamel.yaml import YAML


def fresh_workspace(
    made: Path, params: Mapping[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder `root` with a copy of made/in and these params.yaml, as the current folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(root)
    shutil.copytree(made / "in", root / "in")
    YAML().dump(dict(params), root / "params.yaml")
    return root
