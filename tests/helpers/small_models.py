"""Small random families that methods are tried on in memory."""

from __future__ import annotations

from typing import Any

import torch
from checkpoints import State, random_state
from hypothesis import settings
from hypothesis import strategies as st

from mergeline.merging import merge_state_dicts
from mergeline.merging.laws import gathered
from mergeline.merging.methods import get_method

SEEDS = st.integers(0, 1000)
MATRIX = "blocks.0.attn.weight"  # of the small models: (6, 4)
few = settings(max_examples=max(1, settings().max_examples // 5))  # of whole merges


def family(seed: int, experts: int = 3, dtype: torch.dtype = torch.float32) -> tuple[State, dict[str, State]]:
    base = random_state(seed, dtype)
    taus = [random_state(seed + 10_000 * (t + 1)) for t in range(experts)]
    return base, {
        f"e{t}": {k: (v + 0.1 * tau[k]).to(dtype) for k, v in base.items()} for t, tau in enumerate(taus)
    }


def merged(method: str, experts: dict[str, State], base: State | None = None, **params: Any) -> State:
    """The merge of as many of the experts as the method takes, with statistics if it reads any."""
    experts = dict(list(experts.items())[: get_method(method).experts[1]])
    statistics = gathered(method, experts, params)
    return merge_state_dicts(method, experts, base, params=params, statistics=statistics)


def close(a: State, b: State, atol: float = 1e-6) -> bool:
    return a.keys() == b.keys() and all(
        torch.allclose(a[k].double(), b[k].double(), rtol=0, atol=atol) for k in a
    )
