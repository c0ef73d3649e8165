"""Functions of the algebra replaced in every module that uses them."""

from __future__ import annotations

from typing import Any

import pytest

from mergeline.merging.algebra import decompositions, directions, linear, quadratic, quantiles

_MODULES = (decompositions, directions, linear, quadratic, quantiles)


def patch_everywhere(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    """Put `value` in the place of the function of that name, wherever it was imported."""
    modules = [module for module in _MODULES if hasattr(module, name)]
    assert modules, f"there is no {name}"
    for module in modules:
        monkeypatch.setattr(module, name, value)
