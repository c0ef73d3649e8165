"""Small families of transformers whose experts' changes are made up: unrelated to one another, until a test plants a
fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import torch
from checkpoints import State
from safetensors.torch import save_file
from torch import Tensor

from mergeline.merging.describe import describe_family

LAYERS = 4
NAMES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
LENGTH = 0.1  # of changes, beside the base
Taus = dict[str, State]


def base_state(towers: tuple[str, ...] = ("",)) -> State:
    random = torch.Generator().manual_seed(0)
    names = [f"{tower}blocks.{i}.{name}" for tower in towers for i in range(LAYERS) for name in NAMES]
    return {name: torch.randn(24, 16, generator=random) for name in [*names, "embed.weight"]}


def unrelated(names: str, base: Mapping[str, Tensor], seed: int = 1) -> Taus:
    """Changes of experts of these one-letter names, which know nothing of one another."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: {key: LENGTH * torch.randn(value.shape, generator=random) for key, value in base.items()}
        for name in names
    }


def of_layers(state: Mapping[str, Tensor], first: int, last: int, tower: str = "") -> Iterator[str]:
    """The names of the tensors of these blocks."""
    starts = tuple(f"{tower}blocks.{i}." for i in range(first, last + 1))
    yield from (name for name in state if name.startswith(starts))


def save(folder: Path, base: State, taus: Taus) -> dict[str, Any]:
    """The base and its experts as files; what names them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(base, folder / "base.safetensors")
    for name, tau in taus.items():
        save_file({key: base[key] + tau[key] for key in base}, folder / f"{name}.safetensors")
    return {
        "base": folder / "base.safetensors",
        "experts": {name: folder / f"{name}.safetensors" for name in taus},
    }


def diagnosed(
    folder: Path,
    plant: Callable[[State, Taus], None] = lambda base, taus: None,
    names: str = "abcd",
    towers: tuple[str, ...] = ("",),
) -> dict[str, Any]:
    """The diagnoses of unrelated experts, after a fault was planted among their changes."""
    base = base_state(towers)
    taus = unrelated(names, base)
    plant(base, taus)
    family = save(folder, base, taus)
    return describe_family(family["base"], family["experts"], ranks=(1.0,), workers=1)["diagnoses"]


def told(found: Mapping[str, Any]) -> list[tuple[str, list[str], tuple[int, int] | None]]:
    """Of each advice: the diagnosis, whom it names, and the first and last layer."""
    return [(a["diagnosis"], a["experts"], a["layers"]) for a in found["advice"]]
