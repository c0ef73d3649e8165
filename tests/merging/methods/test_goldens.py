"""Every merge equals what published reference implementations give on small inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import is_matrix, same_tensors, shard
from golden_cases import CASES, WITHOUT_A_CASE, beyond, compared, in_memory, loaded, path_of, recipe
from safetensors.torch import load_file

from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.methods import catalogue


def each(kind: str) -> pytest.MarkDecorator:
    cases = [case for case in CASES if case["kind"] == kind]
    return pytest.mark.parametrize("case", cases, ids=[case["case"] for case in cases])


def one_a_method() -> pytest.MarkDecorator:
    """A merge by every method; its other cases are slow."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for case in CASES:
        if case["kind"] == "merge":
            cases.setdefault(case["method"], []).append(case)
    marked = [
        pytest.param(case, id=case["case"], marks=[pytest.mark.slow] if number else [])
        for found in cases.values()
        for number, case in enumerate(found)
    ]
    return pytest.mark.parametrize("case", marked)


def test_every_method_has_a_case():
    assert set(catalogue()) - {case["method"] for case in CASES} == WITHOUT_A_CASE


@each("merge")
def test_equals_the_reference(case, tmp_path):
    wrong = 0
    for key, a, b in compared(case, tmp_path):
        assert a.shape == b.shape, key
        wrong += beyond(case, a, b)
    assert wrong <= case["max_mismatch_elements"]


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if "loss_bound_to_reach" in case.get("official_params", {})],
    ids=lambda case: case["case"],
)
def test_reaches_the_loss_of_the_reference(case):
    """Over block matrices and tasks of |(W - tau) tau^T|^2 / |tau|^2; optmerge takes tau's leading part."""
    given, merged = loaded(case), in_memory(case["case"])
    loss = 0.0
    for key in (key for key, tensor in merged.items() if is_matrix(key, tensor.shape, "block_linear")):
        start_MN = given["base"][key].double()
        for expert in given["experts"].values():
            tau_MN = expert[key].double() - start_MN
            kept = len(case["experts"]) if case["params"].get("rank") == "1/T" else 1
            u, s, vh = torch.linalg.svd(tau_MN, full_matrices=False)
            k = len(s) // kept
            rows_MN = (u[:, :k] * s[:k]) @ vh[:k]
            apart_MM = (merged[key].double() - start_MN - rows_MN) @ rows_MN.T
            loss += float(apart_MM.square().sum() / tau_MN.square().sum())
    assert loss <= case["official_params"]["loss_bound_to_reach"]


@one_a_method()
def test_inputs_are_not_modified(case):
    given, again = loaded(case), loaded(case)
    merge_state_dicts(**given)
    assert all(same_tensors(given["experts"][stem], again["experts"][stem]) for stem in case["experts"])
    assert given["base"] is None or same_tensors(given["base"], again["base"])
    for kind, held in given["statistics"].items():
        other = again["statistics"][kind]
        pairs = zip(held, other) if isinstance(held, list) else [(held, other)]
        assert all(same_tensors(*pair) for pair in pairs)


@one_a_method()
def test_files_give_what_memory_gives_in_any_shards_and_with_any_number_of_workers(case, tmp_path):
    first = case["experts"][0]
    sharded = recipe(case)
    sharded["experts"] |= {first: shard(load_file(path_of(case, first)), tmp_path / "shards", 3)}
    manifests, files = [], []
    for number, (made_of, workers) in enumerate([(recipe(case), 1), (sharded, 2)]):
        out = tmp_path / f"{number}.safetensors"
        manifests.append(merge(made_of, out, workers=workers))
        files.append(out.read_bytes())
        assert same_tensors(load_file(out), in_memory(case["case"]))
    assert files[0] == files[1]
    for key in ("output", "recipe_digest"):
        assert manifests[0][key] == manifests[1][key]


@each("stochastic")
def test_draws_over_many_seeds_follow_the_stated_distribution(case):
    name, expected = case["tensor"], case["expected_statistics"]
    given = loaded(case)
    [expert] = given["experts"].values()
    tau_MN = expert[name] - given["base"][name]  # around zero: no rounding between it and what comes out
    params, zero = {**case["params"], "scale": 1.0}, torch.zeros_like(tau_MN)
    seeds = expected["measured"]["seeds"]
    out_SMN = torch.stack(
        [
            merge_state_dicts(case["method"], {"e": {name: tau_MN}}, {name: zero}, params=params, seed=seed)[
                name
            ]
            for seed in range(seeds)
        ]
    )
    kept_SMN = out_SMN != 0

    # The probability of each entry: the same for all (dare), or growing with the rank in the row (della).
    if "keep_prob_min" in expected:
        ranks_MN = tau_MN.abs().argsort(-1).argsort(-1).double()
        low, high = expected["keep_prob_min"], expected["keep_prob_max"]
        keep_MN = low + (high - low) * ranks_MN / (tau_MN.shape[-1] - 1)
        factors, zeros = expected["rescale_factor_range"], expected["expected_zero_fraction_per_row"]
    else:
        keep_MN = torch.full_like(tau_MN, 1 - expected["expected_zero_fraction"], dtype=torch.float64)
        factors, zeros = [expected["rescale_factor"]] * 2, expected["expected_zero_fraction"]

    # How often each was kept, in standard deviations: of mean 0 and deviation 1 over the entries.
    deviation_MN = (keep_MN * (1 - keep_MN) / seeds).sqrt()
    score_MN = (kept_SMN.double().mean(0) - keep_MN) / deviation_MN
    assert abs(score_MN.mean()) < 4 / score_MN.numel() ** 0.5
    assert abs(score_MN.std() - 1) < 4 / (2 * score_MN.numel()) ** 0.5
    zeros_S = (~kept_SMN).double().mean((1, 2))
    deviation = (keep_MN * (1 - keep_MN)).sum().sqrt().item() / keep_MN.numel()
    assert zeros_S.mean().item() == pytest.approx(zeros, abs=4 * deviation / seeds**0.5)
    assert zeros_S.std().item() == pytest.approx(deviation, rel=4 / (2 * seeds) ** 0.5)

    # Survivors are rescaled by exactly one over their probability, so that the mean over seeds is the task vector.
    ratio_SMN = (out_SMN / tau_MN).double()
    assert torch.allclose(ratio_SMN[kept_SMN], (1 / keep_MN).expand_as(ratio_SMN)[kept_SMN], rtol=1e-5)
    assert ratio_SMN[kept_SMN].aminmax() == pytest.approx(factors, rel=1e-5)
    bias = (out_SMN.double().mean(0) - tau_MN).abs().mean() / tau_MN.abs().mean()
    assert bias.item() == pytest.approx(expected["measured"]["rel_mean_abs_bias"], rel=0.05)
