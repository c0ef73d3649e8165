"""Groups of experts, and what they become: as published code does on small inputs, and by the laws of each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDENS
from safetensors.torch import load_file

from mergeline.merging.algebra import assignment, expert_groups

LAYERS, EXPERTS, TOP, AVERAGE = 3, 6, 2, 3
BLOCK = "model.layers.{}.block_sparse_moe"


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / f"{name}.safetensors")


def groups_of(labels: torch.Tensor) -> list[list[int]]:
    values = labels.tolist()
    return expert_groups.in_order([i for i, v in enumerate(values) if v == one] for one in set(values))


@pytest.fixture(scope="module")
def mcsmoe() -> dict[str, torch.Tensor]:
    return golden("unit-mcsmoe-group_and_merge")


def logits(held: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    return held["router_logits"][:, layer].reshape(-1, EXPERTS).double()


def usage(held: dict[str, torch.Tensor], layer: int) -> np.ndarray:
    chosen = logits(held, layer).topk(TOP).indices.flatten()
    counts = torch.bincount(chosen, minlength=EXPERTS).double()
    return (counts / counts.sum()).numpy()


def similarity(held: dict[str, torch.Tensor], layer: int) -> np.ndarray:
    x_TE = logits(held, layer)
    return (expert_groups.cosines((x_TE.T @ x_TE).numpy()) + 1) / 2


def test_router_logits_and_usage_give_the_groups_of_the_official_code(mcsmoe):
    usages = [usage(mcsmoe, layer) for layer in range(LAYERS)]
    leaders = expert_groups.dominants(usages, AVERAGE)
    for layer in range(LAYERS):
        block = BLOCK.format(layer)
        np.testing.assert_allclose(usages[layer], mcsmoe[f"usage.{block}"], atol=1e-6)
        found = similarity(mcsmoe, layer)
        np.testing.assert_allclose(found, mcsmoe[f"sim.{block}"], atol=1e-5)
        assert expert_groups.joined(found, leaders[layer]) == groups_of(mcsmoe[f"group.{block}"])


def test_usage_weighs_the_members_of_a_group_as_in_the_official_code(mcsmoe):
    for layer in range(LAYERS):
        block, used = BLOCK.format(layer), usage(mcsmoe, layer)
        for group in groups_of(mcsmoe[f"group.{block}"]):
            weights = expert_groups.shares([used[e] for e in group])
            for part in ("w1", "w2", "w3"):
                members = [mcsmoe[f"in.{block}.experts.{e}.{part}.weight"] for e in group]
                merged = sum(w * m for w, m in zip(weights, members))
                for e in group:
                    torch.testing.assert_close(
                        merged, mcsmoe[f"out.{layer}.{e}.{part}"], atol=1e-6, rtol=2e-5
                    )


def test_hidden_units_are_matched_as_in_the_official_code():
    held = golden("unit-mcsmoe-permutation")
    (ref_in, ref_out), (in_, out) = (
        [held[f"perm.{who}.{part}"] for part in ("wi", "wo")] for who in ("ref", "tgt")
    )
    assert assignment.matched([ref_in], [in_]).equal(held["perm.vec_wi_only"])
    assert assignment.matched([ref_in, ref_out.T], [in_, out.T]).equal(held["perm.vec_with_wo"])


def test_outputs_are_clustered_and_matrices_joined_as_in_the_reimplementation_of_sub_moe():
    held = golden("unit-submoe")
    act_EKTD = held["act"].double()
    unit = torch.nn.functional.normalize(act_EKTD.flatten(1, 2), dim=-1)
    similar_EE = torch.einsum("etd,ftd->ef", unit, unit) / unit.shape[1]
    torch.testing.assert_close(similar_EE.float(), held["sim"], atol=1e-5, rtol=1e-4)
    assert expert_groups.clustered(1 - similar_EE.numpy(), 3, seed=42) == groups_of(held["labels"])
    matrices = [held[f"W.{i}"].double() for i in range(3)]
    weights = held["rel_freq"].tolist()
    assert expert_groups.shares([5, 3, 2]) == pytest.approx(weights)
    average = sum(w * m for w, m in zip(weights, matrices))
    gram = sum(m @ m.T for m in matrices)
    for rank, name in ((8, "aligned_full_rank"), (4, "ours.truncated_k4")):
        found = expert_groups.projected(average, gram, rank).float()
        torch.testing.assert_close(found, held[name], atol=1e-5, rtol=1e-4)


@given(seed=st.integers(0, 99), hidden=st.integers(1, 7), width=st.integers(1, 5))
def test_a_permuted_expert_is_brought_back(seed, hidden, width):
    draws = torch.Generator().manual_seed(seed)
    parts = [torch.randn(hidden, width, generator=draws, dtype=torch.float64) for _ in range(3)]
    order = torch.randperm(hidden, generator=draws)
    found = assignment.matched(parts, [p[order] for p in parts])
    gained = sum(float((p * p[order][found]).sum()) for p in parts)
    assert gained >= sum(float((p * p).sum()) for p in parts) - 1e-9


@given(seed=st.integers(0, 99), experts=st.integers(1, 9), data=st.data())
def test_every_expert_is_in_one_group_and_no_group_is_empty(seed, experts, data):
    count = data.draw(st.integers(1, experts))
    rows = np.random.default_rng(seed).normal(size=(experts, 3)).round(data.draw(st.integers(0, 2)))
    leaders = expert_groups.most_used(np.abs(rows[:, 0]), count)
    found = expert_groups.joined(rows @ rows.T, leaders), expert_groups.clustered(rows, count, seed)
    for groups in found:
        assert len(groups) == count and all(groups)
        assert sorted(e for group in groups for e in group) == list(range(experts))


def test_dominants_are_counted_exactly_where_shares_are_equal():
    even = [np.full(4, 0.25), np.full(4, 0.25)]
    assert expert_groups.dominants(even, 2) == [[0, 1, 2], [0]]
    assert sum(map(len, expert_groups.dominants(even, 3))) == 6


def test_a_group_that_nobody_used_is_averaged():
    assert expert_groups.shares([0, 0]) == [0.5, 0.5]
