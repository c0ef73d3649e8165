"""Locking a model against merging, as MergeLock (2509.01548) does, for tests: each head's weights are multiplied by
random invertible matrices that its function does not depend on."""

from __future__ import annotations

import re
from typing import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]


def locked_open_clip(state: Mapping[str, Tensor], width: int, seed: int = 0, only: str = "") -> State:
    """Heads of `width` of packed attention: queries by R, keys by R^-T, values by S, outputs by S^-1."""
    random = torch.Generator().manual_seed(seed)
    locked = {name: tensor.clone() for name, tensor in state.items()}
    for name in state:
        if not name.endswith("in_proj_weight") or only not in name:
            continue
        prefix = name.removesuffix("in_proj_weight")
        weight, bias = locked[name].double(), locked[prefix + "in_proj_bias"].double()
        output = locked[prefix + "out_proj.weight"].double()
        rows = weight.shape[0] // 3
        for start in range(0, rows, width):
            r, s = _invertible(width, random), _invertible(width, random)
            for place, change in ((0, r), (rows, torch.linalg.inv(r).T), (2 * rows, s)):
                head = slice(place + start, place + start + width)
                weight[head], bias[head] = change @ weight[head], change @ bias[head]
            head = slice(start, start + width)
            output[:, head] = output[:, head] @ torch.linalg.inv(s)
        for key, value in (
            (name, weight),
            (prefix + "in_proj_bias", bias),
            (prefix + "out_proj.weight", output),
        ):
            locked[key] = value.to(state[key].dtype)
    return locked


def locked_llama(
    state: Mapping[str, Tensor], width: int, shared: int, seed: int = 0, rotary: bool = True
) -> State:
    """Grouped-query heads of `width`, `shared` of which have one key and value head.

    Values and outputs by any S, one for each key head. Queries and keys, with `rotary`, by what commutes with rotary
    embeddings of transformers: a rotation and a factor in each plane of dimensions i and i + width / 2.
    """
    random = torch.Generator().manual_seed(seed)
    locked = {name: tensor.clone() for name, tensor in state.items()}
    for name in filter(re.compile(r".*q_proj\.weight").fullmatch, state):
        query, key, value, output = (
            locked[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        for g in range(key.shape[0] // width):
            r, s = (
                _commuting(width, random) if rotary else torch.eye(width),
                _invertible(width, random).float(),
            )
            own = slice(g * width, (g + 1) * width)
            key[own], value[own] = torch.linalg.inv(r).T @ key[own], s @ value[own]
            for h in range(g * shared, (g + 1) * shared):
                head = slice(h * width, (h + 1) * width)
                query[head] = r @ query[head]
                output[:, head] = output[:, head] @ torch.linalg.inv(s)
    return locked


def _invertible(width: int, random: torch.Generator) -> Tensor:
    """Far from the identity, with a condition number of at most 4."""
    u, _, v = torch.linalg.svd(torch.randn(width, width, generator=random, dtype=torch.float64))
    return u @ torch.diag(torch.rand(width, generator=random, dtype=torch.float64) * 1.5 + 0.5) @ v


def _commuting(width: int, random: torch.Generator) -> Tensor:
    angle, factor = torch.rand(2, width // 2, generator=random).mul(2).add(0.5)
    cosine, sine = torch.diag(factor * angle.cos()), torch.diag(factor * angle.sin())
    return torch.cat([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)])
