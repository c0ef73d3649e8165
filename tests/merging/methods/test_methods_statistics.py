"""Methods that weigh experts by statistics, or by what changed in them: hand-computed examples, limits, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, refused, same_tensors, save_family
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDENS
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.engine.planning import make_plan

SEEDS = st.integers(0, 1000)


def of(*rows: list[float]) -> dict[str, State]:
    return {f"e{t}": {"w": torch.tensor(row)} for t, row in enumerate(rows)}


def merged(
    method: str, experts: dict[str, State], kind: str | None, *rows: Any, base: Any = None, **params: Any
) -> Tensor:
    """The merged `w`, of one list of statistics an expert."""
    statistics = {kind: [{"w": torch.tensor(row)} for row in rows]} if kind else {}
    base = None if base is None else {"w": torch.tensor(base)}
    return merge_state_dicts(method, experts, base, params=params, statistics=statistics)["w"]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------- fisher


def test_fisher_of_equal_statistics_is_the_average():
    found = merged("fisher", of([1.0, 2.0], [3.0, 6.0]), "fisher", [5.0, 7.0], [5.0, 7.0])
    assert found.tolist() == pytest.approx([2.0, 4.0])


def test_fisher_weighs_entry_by_entry():
    experts = of([1.0, 2.0], [3.0, 6.0])
    plain = {"normalize_fisher": "none", "floor": 0.0}
    assert merged("fisher", experts, "fisher", [1.0, 3.0], [3.0, 1.0], **plain).tolist() == [2.5, 3.0]
    found = merged("fisher", experts, "fisher", [1.0, 3.0], [3.0, 1.0], weights=[3.0, 1.0], **plain)
    assert found.tolist() == pytest.approx([2.0, 2.4])
    # Where no expert has any information, the mean.
    assert merged("fisher", experts, "fisher", [0.0, 3.0], [0.0, 1.0], **plain).tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("variant", "favor_target", "expected"),
    [
        (
            "official",
            True,
            [(0.5 * 1 + 0.1 * 3) / 0.6, (2 * 2 + 0.1 * 6) / 2.1],
        ),  # max(F, 0.5), the first's alone
        ("official", False, [2.0, (2 * 2 + 0.5 * 6) / 2.5]),
        ("mergelm", True, [(0.7 * 1 + 0.6 * 3) / 1.3, (2.5 * 2 + 0.6 * 6) / 3.1]),  # F + 0.5, all experts'
        ("dataless", True, [(0.7 * 1 + 0.6 * 3) / 1.3, (2.5 * 2 + 0.6 * 6) / 3.1]),
    ],
)
def test_the_floor_of_fisher_is_what_the_variant_says(variant, favor_target, expected):
    params = {"variant": variant, "favor_target": favor_target, "floor": 0.5, "normalize_fisher": "none"}
    found = merged("fisher", of([1.0, 2.0], [3.0, 6.0]), "fisher", [0.2, 2.0], [0.1, 0.1], **params)
    assert found.tolist() == pytest.approx(expected)


@given(SEEDS, st.sampled_from(["global", "tensor"]), st.sampled_from(["official", "mergelm", "dataless"]))
def test_fisher_does_not_see_the_unit_of_an_experts_statistics(seed, normalize, variant):
    names = ("v", "w")
    experts = {e: {n: random(seed + i + 10 * t, 4) for i, n in enumerate(names)} for t, e in enumerate("ab")}
    fishers = [{n: random(seed + 50 + i + 10 * t, 4).square() for i, n in enumerate(names)} for t in range(2)]
    louder = [fishers[0], {n: 1000 * value for n, value in fishers[1].items()}]
    params = {"floor": 0.0, "normalize_fisher": normalize, "variant": variant}

    def found(statistics: list[State]) -> State:
        return merge_state_dicts("fisher", experts, params=params, statistics={"fisher": statistics})

    for name in names:
        assert torch.allclose(found(fishers)[name], found(louder)[name])
    norms = [
        torch.cat([f[n] for n in names]).norm() if normalize == "global" else f["w"].norm() for f in fishers
    ]
    weights = [f["w"] / norm for f, norm in zip(fishers, norms)]
    expected = sum(w * e["w"] for w, e in zip(weights, experts.values())) / sum(weights)
    assert torch.allclose(found(fishers)["w"], expected)


def test_statistics_are_not_modified():
    fishers = [{"w": torch.ones(2, dtype=torch.float64)} for _ in "ab"]
    experts = {e: {"w": random(0, 2)} for e in "ab"}
    merge_state_dicts("fisher", experts, params={"weights": [3.0, 2.0]}, statistics={"fisher": fishers})
    merge_state_dicts("ota", experts, params={"normalize": "global"}, statistics={"fisher": fishers})
    assert all(fisher["w"].tolist() == [1.0, 1.0] for fisher in fishers)


# --------------------------------------------------------------------------------------- regmean


def test_regmean_is_the_golden_toy():
    """Of tanganke/fusion_bench@54c9e8c9: sums over rows for means, which changes nothing for equal counts."""
    held = load_file(GOLDENS / "unit-regmean-toy.safetensors")
    experts = {f"e{t}": {"l.0.weight": held[f"W.{t}"], "l.0.bias": held[f"b.{t}"]} for t in range(3)}
    grams = [{"l.0.weight": held[f"X.{t}"].double().T @ held[f"X.{t}"].double()} for t in range(3)]
    for nondiagonal in (1.0, 0.9):
        found = merge_state_dicts(
            "regmean", experts, params={"nondiagonal": nondiagonal}, statistics={"gram": grams}
        )
        for part in ("weight", "bias"):
            expected = held[f"out.{nondiagonal}.{part}"]
            assert torch.allclose(found[f"l.0.{part}"], expected, atol=1e-4, rtol=1e-4)


@given(SEEDS)
def test_regmean_gives_each_expert_its_way_on_its_own_inputs(seed):
    """Inputs that only one expert ever saw go through its own weights, those that none saw through the mean's."""
    a_MN, b_MN = random(seed, 3, 5), random(seed + 1, 3, 5)
    gram_a, gram_b = torch.zeros(5, 5), torch.zeros(5, 5)
    gram_a[:2, :2] = (random(seed + 2, 2, 9) @ random(seed + 2, 2, 9).T).float()
    gram_b[2, 2] = 3.0
    experts = {"a": {"l.0.w": a_MN}, "b": {"l.0.w": b_MN}}
    statistics = {"gram": [{"l.0.w": gram_a}, {"l.0.w": gram_b}]}
    found = merge_state_dicts("regmean", experts, params={"nondiagonal": 1.0}, statistics=statistics)["l.0.w"]
    expected = torch.cat([a_MN[:, :2], b_MN[:, 2:3], (a_MN[:, 3:] + b_MN[:, 3:]) / 2], dim=1)
    assert torch.allclose(found, expected, atol=1e-6)


@given(SEEDS, st.sampled_from([0.0, 0.5, 1.0]))
def test_regmean_solves_the_normal_equations(seed, nondiagonal):
    weights, names = [0.5, 0.3, 0.2], "abc"
    experts = {e: {"l.0.w": random(seed + t, 2, 4)} for t, e in enumerate(names)}
    grams = [x.T @ x for x in (random(seed + 10 + t, 9, 4) for t in range(3))]
    found = merge_state_dicts(
        "regmean",
        experts,
        params={"nondiagonal": nondiagonal, "weights": weights},
        statistics={"gram": [{"l.0.w": gram} for gram in grams]},
    )["l.0.w"]
    kept = [w * (g * nondiagonal + (1 - nondiagonal) * g.diag().diag()) for w, g in zip(weights, grams)]
    right = sum(e["l.0.w"] @ g for e, g in zip(experts.values(), kept))
    assert torch.allclose(found @ sum(kept), right, atol=1e-7)


def test_regmean_averages_what_has_no_gram_matrix_or_is_excluded():
    experts = {e: {"l.0.w": random(t, 2, 3), "l.0.b": random(t + 9, 2)} for t, e in enumerate("ab")}
    grams = {"gram": [{"l.0.w": (t + 1) * torch.eye(3)} for t in range(2)]}
    weights = [1.0, 3.0]
    mean = merge_state_dicts("linear", experts, params={"weights": weights})
    found = merge_state_dicts("regmean", experts, params={"weights": weights}, statistics=grams)
    assert torch.equal(found["l.0.b"], mean["l.0.b"])
    assert torch.allclose(found["l.0.w"], (experts["a"]["l.0.w"] + 6 * experts["b"]["l.0.w"]) / 7)
    params = {"weights": weights, "exclude": ["0.w"]}
    found = merge_state_dicts("regmean", experts, params=params, statistics=grams)
    assert torch.equal(found["l.0.w"], mean["l.0.w"])
    empty = {"gram": [{"l.0.w": torch.zeros(3, 3)}] * 2}
    found = merge_state_dicts("regmean", experts, params={"weights": weights}, statistics=empty)
    assert torch.equal(found["l.0.w"], mean["l.0.w"])


def test_what_gram_matrices_are_not_read_and_what_matrices_have_none_is_said(tmp_path):
    names = ("l.0.a", "l.0.b", "head.weight")
    experts = {e: tmp_path / f"{e}.safetensors" for e in "ab"}
    for t, file in enumerate(experts.values()):
        save_file({name: random(t, 2, 3).float() for name in names}, file)
    grams = [tmp_path / f"gram{t}.safetensors" for t in range(2)]
    for file in grams:
        save_file({name: torch.eye(3) for name in ("l.0.a", "head.weight")}, file)
    recipe = {"method": "regmean", "experts": experts, "statistics": {"gram": grams}}
    plan = make_plan(recipe)
    told = {entry.name: entry.treatment for entry in plan.entries}
    assert told == {"head.weight": "mean", "l.0.a": "matrix", "l.0.b": "matrix, no gram"}
    assert not plan.problems and ["1 of 2 matrices have none" in w for w in plan.warnings] == [True, False]
    assert "'head.weight', which is no matrix to regmean" in plan.warnings[1]
    assert len(make_plan({**recipe, "params": {"keys": "matrices"}}).warnings) == 1
    save_file({"l.0.b": torch.eye(3)}, grams[1])
    assert "of expert 'b' lack the tensor 'l.0.a'" in make_plan(recipe).problems[0]
    with refused("regmean", "weights"):
        states = {e: load_file(file) for e, file in experts.items()}
        given = {"gram": [{}, {}]}
        merge_state_dicts("regmean", states, params={"weights": [1.0, -1.0]}, statistics=given)


@pytest.mark.parametrize(
    ("name", "shape", "keys"),
    [
        ("transformer.h.0.mlp.c_fc.weight", (3, 5), "block_linear"),  # Conv1D: (inputs, outputs)
        ("visual.proj", (3, 5), "block_linear+proj"),  # x @ P
        ("layer1.0.conv1.weight", (5, 2, 2, 2), "block_linear"),
    ],
)
def test_regmean_and_esm_take_maps_as_they_are_applied(name, shape, keys, tmp_path):
    """In files and in memory, and the same as for a weight (M, N) that holds the same map."""
    others = {
        "visual.proj": {"visual.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(9, 3)},
        "layer1.0.conv1.weight": {"layer1.0.bn1.weight": torch.ones(5)},
    }.get(name, {"transformer.h.0.attn.c_attn.weight": torch.zeros(3, 9)})
    states = {e: {name: random(t, *shape).float(), **others} for t, e in enumerate(("base", "a", "b"))}
    base, width = states.pop("base"), 8 if len(shape) == 4 else 3
    grams = [{name: (x.T @ x).float()} for x in (random(10 + t, 2 * width, width) for t in range(2))]

    def plain(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(1) if tensor.ndim == 4 else tensor.T

    for method, params in (("regmean", {"keys": keys}), ("esm", {"polarization": 0.0})):
        found = merge_state_dicts(method, states, base, params=params, statistics={"gram": grams})[name]
        straight = {e: {"l.0.w": plain(state[name]).contiguous()} for e, state in states.items()}
        expected = merge_state_dicts(
            method, straight, {"l.0.w": plain(base[name]).contiguous()},
            params={k: v for k, v in params.items() if k != "keys"},
            statistics={"gram": [{"l.0.w": gram[name]} for gram in grams]},
        )["l.0.w"]  # fmt: skip
        assert torch.allclose(plain(found), expected, atol=1e-5), method
        files = {}
        for key, state in {"base": base, **states, "g0": grams[0], "g1": grams[1]}.items():
            files[key] = tmp_path / f"{key}.safetensors"
            save_file(state, files[key])
        recipe = {
            "method": method, "params": params, "base": files["base"],
            "experts": {e: files[e] for e in states}, "statistics": {"gram": [files["g0"], files["g1"]]},
        }  # fmt: skip
        merge(recipe, tmp_path / "out.safetensors")
        assert torch.equal(load_file(tmp_path / "out.safetensors")[name], found), method


def test_regmean_weighs_rows_of_embeddings_by_their_usage():
    name = "model.embed_tokens.weight"
    experts = {e: {name: random(t, 4, 3)} for t, e in enumerate("ab")}
    usage = [{name: torch.tensor(counts)} for counts in ([6.0, 2.0, 0.0, 0.0], [1.0, 0.0, 3.0, 0.0])]
    for keys in ("block_linear", "matrices"):
        params = {"embeddings": "usage", "keys": keys}
        statistics = {"gram": [{}, {}], "usage": usage}
        found = merge_state_dicts("regmean", experts, params=params, statistics=statistics)[name]
        a, b = (state[name] for state in experts.values())
        expected = torch.stack([(0.75 * a[0] + 0.25 * b[0]), a[1], b[2], (a[3] + b[3]) / 2])
        assert torch.allclose(found.double(), expected.double())


# --------------------------------------------------------------------------------------- esm


def esm(taus: list[Tensor], grams: list[Tensor], **params: Any) -> Tensor:
    """What is added to the only matrix of a model."""
    base = random(99, *taus[0].shape)
    experts = {f"e{t}": {"l.0.w": base + tau} for t, tau in enumerate(taus)}
    statistics = {"gram": [{"l.0.w": gram} for gram in grams]}
    return (
        merge_state_dicts("esm", experts, {"l.0.w": base}, params=params, statistics=statistics)["l.0.w"]
        - base
    )


@given(SEEDS, st.sampled_from([(6, 4), (4, 6), (5, 5)]), st.sampled_from(["vision", "language"]))
def test_esm_does_not_see_the_unit_of_gram_matrices(seed, shape, variant):
    taus = [random(seed + t, *shape) for t in range(2)]
    grams = [x.T @ x for x in (random(seed + 10 + t, 9, shape[1]) for t in range(2))]
    found = esm(taus, grams, variant=variant)
    assert torch.allclose(found, esm(taus, [1000 * grams[0], grams[1] / 7], variant=variant), atol=1e-9)
    assert not torch.allclose(found, esm(taus, grams[::-1], variant=variant), atol=1e-3)


@given(SEEDS, st.sampled_from([(6, 4), (4, 6), (5, 5)]))
def test_esm_of_all_directions_of_one_expert_evens_its_singular_values(seed, shape):
    tau_MN = random(seed, *shape)
    x = random(seed + 1, 9, shape[1])
    found = esm([tau_MN], [x.T @ x], variant="language", eigenvalue_power=0.0)
    u_MR, s_R, vt_RN = torch.linalg.svd(tau_MN, full_matrices=False)
    assert torch.allclose(found, s_R.mean() * u_MR @ vt_RN, atol=1e-7)


@given(SEEDS)
def test_esm_keeps_what_moves_the_outputs_of_the_samples_most(seed):
    """Of inputs nearly all in one direction, rank 1 keeps how that moves the outputs."""
    q_NN = torch.linalg.qr(random(seed, 6, 6)).Q
    tau_MN = random(seed + 1, 5, 6)
    gram_NN = 100 * torch.outer(q_NN[:, 0], q_NN[:, 0]) + 1e-9 * torch.outer(q_NN[:, 1], q_NN[:, 1])
    moved_M = tau_MN @ q_NN[:, 0] / (tau_MN @ q_NN[:, 0]).norm()
    found = esm([tau_MN], [gram_NN], rank=0.2, variant="language")
    assert torch.allclose(found, torch.outer(moved_M, moved_M @ tau_MN), atol=1e-5)


def test_esm_scales_layers_by_the_powers_of_their_norms():
    """Task vectors twice as long in the second layer, of the mean norm 3/2: 2/3 and 4/3, to the power of 2 besides."""
    bases = {f"l.{layer}.w": random(9 + layer, 4, 6) for layer in range(2)}
    taus = [random(t, 4, 6) for t in range(2)]
    experts = {
        f"e{t}": {n: bases[n] + (1 + i) * tau for i, n in enumerate(bases)} for t, tau in enumerate(taus)
    }
    statistics = {"gram": [{n: torch.eye(6) for n in bases}] * 2}

    def updates(**params: Any) -> list[Tensor]:
        found = merge_state_dicts("esm", experts, bases, params=params, statistics=statistics)
        return [found[name] - base for name, base in bases.items()]

    for variant in ("vision", "language"):
        first, second = updates(variant=variant)
        assert torch.allclose(second, 8 * first, atol=1e-9)
    plain = updates(variant="language", polarization=0.0)
    assert torch.allclose(plain[1], 2 * plain[0], atol=1e-9)
    assert torch.allclose(first, plain[0] * (2 / 3) ** 2, atol=1e-9)


def test_esm_of_matrices_without_a_gram_matrix_is_tsv_merge():
    experts = {e: {"l.0.w": random(t, 4, 6), "l.0.b": random(t + 9, 4)} for t, e in enumerate("ab")}
    base = {"l.0.w": random(20, 4, 6), "l.0.b": random(21, 4)}
    found = merge_state_dicts("esm", experts, base, params={"scale": 1.5}, statistics={"gram": [{}, {}]})
    expected = merge_state_dicts("tsv_merge", experts, base, params={"scale": 1.5})
    assert all(torch.equal(found[name], expected[name]) for name in base)


def test_esm_of_nothing_and_of_the_same_twice():
    zero, tau = torch.zeros(4, 6, dtype=torch.float64), random(1, 4, 6)
    eye = torch.eye(6)
    assert not esm([zero, zero], [eye, eye]).any()
    assert not esm([tau, tau], [torch.zeros(6, 6)] * 2).any()
    twice = esm([tau, tau], [eye, eye], variant="language")
    assert torch.isfinite(twice).all() and twice.any()
    assert torch.allclose(twice, esm([tau, tau], [2 * eye, 2 * eye], variant="language"), atol=1e-9)
    assert torch.isfinite(esm([zero, tau], [eye, eye])).all()


# --------------------------------------------------------------------------------------- ffg, ota


def test_ffg_grafts_what_matters():
    experts, moments = (
        of([1.0, 5.0, 2.0, 0.0]),
        [4.0, 0.01, 1.0, 9.0],
    )  # scores 4, 0.16, 1, 0 from the base 0, 1, 1, 0
    base = [0.0, 1.0, 1.0, 0.0]
    assert merged("ffg", experts, "fisher", moments, base=base, threshold=1.0).tolist() == [1, 1, 2, 0]
    assert merged("ffg", experts, "fisher", moments, base=base, density=0.75).tolist() == [1, 5, 2, 0]
    assert merged("ffg", experts, "fisher", moments, base=base, density=0.5).tolist() == [1, 1, 2, 0]
    assert merged("ffg", experts, "fisher", moments, base=base, density=1.0).tolist() == [1, 5, 2, 0]


def test_ffg_ranks_moments_that_a_float32_of_their_scores_could_not_hold():
    moments = [1e-36, 4e-36, 9e-36, 16e-36]
    found = merged("ffg", of([1e-4] * 4), "fisher", moments, base=[0.0] * 4, density=0.5)
    assert found.tolist() == pytest.approx([0, 0, 1e-4, 1e-4])


@given(SEEDS, st.sampled_from([0.25, 0.5, 1.0]))
def test_a_density_is_the_threshold_that_keeps_it(seed, density):
    experts = {e: {"w": random(seed + t, 40).float()} for t, e in enumerate("ab")}
    base = {"w": random(seed + 7, 40).float()}
    moments = [{"w": random(seed + 8 + t, 40).float().square()} for t in range(2)]
    scores = [m["w"].double() * (e["w"] - base["w"]).double() ** 2 for e, m in zip(experts.values(), moments)]
    keep = int(40 * density)
    thresholds = [score.sort(descending=True).values[keep - 1].item() * (1 - 1e-5) for score in scores]
    for more in ({}, {"merge": "linear"}, {"merge": "ties"}):
        by_density, by_threshold = (
            merge_state_dicts("ota", experts, base, params={**one, **more}, statistics={"fisher": moments})[
                "w"
            ]
            for one in ({"density": density}, {"threshold": thresholds})
        )
        assert torch.equal(by_density, by_threshold)


def test_ota_weighs_by_powers_of_the_moments():
    experts, moments = of([1.0, 2.0], [3.0, 6.0]), ([1.0, 9.0], [9.0, 1.0])
    assert merged("ota", experts, "fisher", *moments).tolist() == pytest.approx([2.5, 3.0])
    assert merged("ota", experts, "fisher", *moments, power=1.0).tolist() == pytest.approx([2.8, 2.4])
    assert merged("ota", experts, "fisher", *moments, base=[7.0, 7.0]).tolist() == pytest.approx([2.5, 3.0])
    # Divided by their means, 2 and 3, the roots 1, 3 and 2, 4 are 1/2, 3/2 and 2/3, 4/3.
    found = merged("ota", experts, "fisher", [1.0, 9.0], [4.0, 16.0], normalize="global")
    assert found.tolist() == pytest.approx([(0.5 + 2) / (7 / 6), (3 + 8) / (17 / 6)])
    assert merged("ota", experts, "fisher", [0.0, 1.0], [0.0, 1.0]).tolist() == pytest.approx([2.0, 4.0])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [3.0, 10.0, 7.0]),  # both, the second alone, none: the base
        ({"fallback_to_base": False}, [3.0, 10.0, 7.0 + 0.15]),
        ({"merge": "linear"}, [3.0, 5.0, 7.0]),
        ({"merge": "ties"}, [5.0, 5.0, 7.0]),  # the sum of 4 and 10, over two
    ],
)
def test_ota_masks_what_is_insignificant(params, expected):
    experts, base = of([-1.0 + 0.0, 0.1, 7.1], [7.0, 10.0, 7.2]), [0.0, 0.0, 7.0]
    if params.get("merge") == "ties":
        experts = of([-4.0 + 8.0, 0.1, 7.1], [6.0, 10.0, 7.2])
    found = merged("ota", experts, "fisher", [1.0] * 3, [1.0] * 3, base=base, threshold=[1.0, 1.0], **params)
    assert found.tolist() == pytest.approx(expected)


def test_ota_gives_masked_task_vectors_their_norm_back():
    tau_MN = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    ones = {"fisher": [{"m": torch.ones(2, 2), "v": torch.ones(2), "k": torch.ones(1, 1, 2)}]}
    expert = {"e": {"m": tau_MN, "v": torch.tensor([4.0, 3.0]), "k": torch.tensor([[[4.0, 3.0]]])}}
    base = {name: torch.zeros_like(tensor) for name, tensor in expert["e"].items()}
    params = {"threshold": [9.5], "merge": "linear", "rescale": True}
    found = merge_state_dicts("ota", expert, base, params=params, statistics=ones)
    assert found["m"].tolist() == [[0, 0], [0, 0]]  # nothing is left to rescale
    assert found["v"].tolist() == pytest.approx([5.0, 0.0])
    assert found["k"].flatten().tolist() == [4.0, 0.0]
    expert["e"]["m"] = torch.tensor([[3.0, 3.0], [3.0, 4.0]])
    found = merge_state_dicts("ota", expert, base, params=params, statistics=ones)["m"]
    largest = torch.linalg.matrix_norm(expert["e"]["m"], ord=2)
    assert found.flatten().tolist() == pytest.approx([0, 0, 0, largest.item()])


def test_ota_of_rank_one_knows_row_and_column_sums_alone():
    experts = of([[1.0, 1.0], [1.0, 1.0]], [[3.0, 3.0], [3.0, 3.0]])
    first, second = [[1.0, 2.0], [3.0, 6.0]], [[4.0, 0.0], [0.0, 4.0]]  # the first is of rank one
    found = merged("ota", experts, "fisher", first, second, rank1=True, power=1.0)
    expected = [(v + 3 * 2.0) / (v + 2.0) for v in (1.0, 2.0, 3.0, 6.0)]
    assert found.flatten().tolist() == pytest.approx(expected)
    none = merged("ota", experts, "fisher", [[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2, rank1=True)
    assert none.flatten().tolist() == pytest.approx([2.0] * 4)


def test_what_ota_refuses():
    experts, moments = of([1.0], [3.0]), ([1.0], [1.0])
    with refused("ota", "1 numbers in threshold for 2 experts"):
        merged("ota", experts, "fisher", *moments, threshold=[0.1])
    with refused("ota", "leave one out"):
        merged("ota", experts, "fisher", *moments, threshold=[0.1, 0.1], density=0.5)
    with refused("ota", "base"):
        merged("ota", experts, "fisher", *moments, merge="ties")
    with refused("ota", "negative"):
        merged("ota", experts, "fisher", *moments, threshold=[0.1, -0.1])


# --------------------------------------------------------------------------------------- widen


def widened(base_MN: Tensor, experts: list[Tensor], turned: bool, t: float, s: float) -> Tensor:
    """The definition, column by column."""
    if turned:
        base_MN, experts = base_MN.T, [e.T for e in experts]
    columns = base_MN.shape[1]
    scores = torch.zeros(2, len(experts), columns, dtype=torch.float64)
    for kind in range(2):
        changes = torch.stack([
            (e.norm(dim=0) - base_MN.norm(dim=0)).abs()
            if kind == 0 else 1 - torch.cosine_similarity(e, base_MN, dim=0)
            for e in experts
        ])  # fmt: skip
        rank = changes.argsort(dim=1, stable=True).argsort(dim=1).double() / columns
        scores[kind] = torch.where(rank > t * rank.mean(1, keepdim=True), s, rank.softmax(0))
    merged_MN = base_MN + sum((e - base_MN) * score for e, score in zip(experts, scores.mean(0)))
    return merged_MN.T if turned else merged_MN


@given(SEEDS, st.booleans(), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.0, 1.0]), st.integers(1, 3))
def test_widen_scores_columns_by_the_ranks_of_their_changes(seed, turned, threshold, calibration, count):
    name = "model.embed_tokens.weight" if turned else "w"
    base_MN = random(seed, 4, 6)
    experts = [base_MN + random(seed + 1 + i, 4, 6) for i in range(count)]
    params = {"threshold": threshold, "calibration": calibration}
    states = {f"e{i}": {name: e} for i, e in enumerate(experts)}
    found = merge_state_dicts("widen", states, {name: base_MN}, params=params)
    assert torch.allclose(found[name], widened(base_MN, experts, turned, threshold, calibration), atol=1e-12)


def test_widen_scores_entries_of_vectors_by_how_far_they_went():
    experts, base = of([1.0, 0.0, 5.0], [0.0, 0.0, 1.0]), [0.0, 0.0, 0.0]
    found = merged("widen", experts, None, base=base)
    e = torch.tensor(1.0).exp().item()
    # The means are 2 and 1/3: 5 and 1 are calibrated to 1, and the other 1 has the softmax of (1, 0).
    assert found.tolist() == pytest.approx([e / (e + 1), 0.0, 6.0])


def test_widen_of_columns_of_zeros_is_finite():
    base = [[0.0, 1.0], [0.0, 1.0]]
    for expert in (base, [[0.0, 2.0], [0.0, 1.0]], [[1.0, 2.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]):
        assert torch.isfinite(merged("widen", of(expert, base), None, base=base)).all()


# --------------------------------------------------------------------------------------- files of statistics


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    recipe = save_family(tmp_path, method="fisher")
    paths = []
    for name, path in recipe["experts"].items():
        paths.append(tmp_path / f"fisher-{name}.safetensors")
        save_file({k: v.double().square().float() for k, v in load_file(path).items()}, paths[-1])
    return {**recipe, "statistics": {"fisher": paths}}


def test_one_file_holds_the_statistics_of_all_experts_or_of_the_only_one(family, tmp_path):
    each = merge(family, tmp_path / "each.safetensors")
    together = tmp_path / "all.safetensors"
    held = [load_file(path) for path in family["statistics"]["fisher"]]
    save_file({f"{t}/{k}": v for t, state in enumerate(held) for k, v in state.items()}, together)
    one = merge({**family, "statistics": {"fisher": together}}, tmp_path / "one.safetensors")
    assert each["output"]["digest"] == one["output"]["digest"]
    [name, path] = next(iter(family["experts"].items()))
    single = {**family, "method": "ffg", "experts": {name: path}}
    first = family["statistics"]["fisher"][0]
    found = [
        merge({**single, "statistics": {"fisher": files}}, tmp_path / f"{i}.safetensors")["output"]["digest"]
        for i, files in enumerate((first, [first], together))
    ]
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda state: state.pop("logit_scale"), ["'fisher' of expert 'b' lack the tensor 'logit_scale'"]),
        (lambda state: state["blocks.1.bias"].fill_(float("nan")), ["'fisher'", "1/blocks.1.bias", "NaN"]),
        (lambda state: state["blocks.1.bias"].fill_(-1.0), ["'fisher'", "1/blocks.1.bias", "negative"]),
        (lambda state: state.update({"blocks.1.bias": torch.ones(3)}), ["'fisher'", "shape [3]", "[7]"]),
    ],
)
@pytest.mark.parametrize("normalize", ["global", "none"])
def test_statistics_that_do_not_fit_are_named(normalize, change, parts, family, tmp_path):
    path = family["statistics"]["fisher"][1]
    state = load_file(path)
    change(state)
    save_file(state, path)
    with refused(*parts):
        merge({**family, "params": {"normalize_fisher": normalize}}, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_gram_matrices_have_a_row_and_a_column_for_each_input(family, tmp_path):
    name, paths = "blocks.0.attn.weight", []
    for t, expert in enumerate(family["experts"]):
        paths.append(tmp_path / f"gram-{expert}.safetensors")
        save_file({name: (t + 1) * torch.eye(4)}, paths[-1])
    recipe = {**family, "method": "regmean", "statistics": {"gram": paths}}
    merge(recipe, tmp_path / "out.safetensors")
    states = {e: load_file(path) for e, path in family["experts"].items()}
    expected = merge_state_dicts("linear", states, params={"weights": [1.0, 2.0, 3.0]})[name]
    assert torch.allclose(load_file(tmp_path / "out.safetensors")[name], expected)
    alone = merge_state_dicts("regmean", states, statistics={"gram": [load_file(p) for p in paths]})
    assert same_tensors(alone, load_file(tmp_path / "out.safetensors"))
    save_file({name: torch.eye(6)}, paths[0])
    assert "shape [6, 6]" in make_plan(recipe).problems[0]


def test_the_plan_knows_how_large_gram_matrices_are(family, tmp_path):
    for path in (*family["experts"].values(), family["base"]):
        save_file({"l.0.w": torch.zeros(2, 900)}, path)
    save_file({f"{t}/l.0.w": torch.eye(900) for t in range(3)}, tmp_path / "gram.safetensors")
    plan = make_plan({**family, "method": "regmean", "statistics": {"gram": tmp_path / "gram.safetensors"}})
    assert not plan.problems and plan.peak_bytes > 4 * 8 * 900**2
