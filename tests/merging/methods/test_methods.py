"""What the algebra of each method promises, on small random models; the catalogue itself."""

from __future__ import annotations

from math import acos, cos, pi, sin, sqrt
from unittest.mock import patch

import pytest
import torch
from checkpoints import (
    State,
    is_matrix,
    random_state,
    refused,
    same_tensors,
)
from hypothesis import given
from hypothesis import strategies as st
from small_models import MATRIX, SEEDS, close, family, few, merged
from torch import Tensor
from uses import OF_FITS, USES, by_use, cuts_weights

from mergeline.merging import merge_state_dicts
from mergeline.merging.algebra import slots
from mergeline.merging.api import merge_state_dicts_points
from mergeline.merging.laws import gathered
from mergeline.merging.methods import catalogue, get_method
from mergeline.merging.methods.bound import bind
from mergeline.merging.methods.contract import Mean

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])

every_use = by_use("method")
first_use = by_use("method", others_slow=True)  # of costly tests
# Methods that are about the order of the experts, or whose parameters count them.
ORDERED = {"opcm", "dop", "ema", "metrics_weighted", "greedy_soup"}


def around_zero(rows: list[list[float]]) -> tuple[State, dict[str, State]]:
    """Task vectors as they are, one a row: a zero base and the experts of one tensor `w`."""
    return {"w": torch.zeros(len(rows[0]))}, {f"e{t}": {"w": torch.tensor(row)} for t, row in enumerate(rows)}


def task_vector(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --------------------------------------------------------------------------------------- all methods


@few
@given(SEEDS, DTYPES, st.integers(2, 5))
@first_use
def test_copies_of_the_base_come_back_bit_for_bit(method, params, seed, dtype, count):
    if cuts_weights(method, params):
        return
    state = random_state(seed, dtype)
    scaled = count if (method, params) == ("linear", {"normalize": False}) else 1
    expected = {name: (scaled * tensor.double()).to(dtype) for name, tensor in state.items()}
    assert same_tensors(merged(method, dict.fromkeys("abcde"[:count], state), state, **params), expected)


@few
@given(SEEDS, DTYPES, st.integers(2, 5))
@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("average", {}),
        ("linear", {"weights": [3.0, 0.1, 0.7, 2.0, 0.3]}),
        ("task_arithmetic", {"scale": 1.0, "normalize": True}),
        ("slerp", {"t": 0.3}),
        ("karcher", {}),
        ("model_stock", {}),
        ("model_stock", {"scope": "row"}),
        ("model_stock", {"variant": "fusion_bench"}),
        ("cart", {"rank": 0.3, "scale": 1.7}),
        ("cart", {"reduce": "tsv"}),
        ("cart", {"rank_rule": "energy"}),
        ("cart_indexing", {"rank": 0.3, "task": 1}),
    ],
)
def test_copies_of_an_expert_come_back(method, params, seed, dtype, count):
    """Around any base, and bit for bit unless 16-bit inputs, or a cosine, are rounded on the way from the base."""
    [expert] = family(seed, 1, dtype)[1].values()
    base = {name: tensor + 9 for name, tensor in random_state(seed + 1, dtype).items()}
    experts = dict.fromkeys("abcde"[:count], expert)
    if "weights" in params:
        params = {"weights": params["weights"][:count]}
    needs_base = "base" in get_method(method).needs_of(get_method(method).parameters)
    for given_base in (base,) if needs_base else (base, None):
        found = merged(method, experts, given_base, **params)
        if needs_base and (dtype != torch.float32 or "variant" in params):
            assert close(found, expert, 1e-5)
        else:
            assert same_tensors(found, expert)


@few
@given(SEEDS, DTYPES)
@first_use
def test_scale_zero_is_the_reference_bit_for_bit(method, params, seed, dtype):
    base, experts = family(seed, dtype=dtype)
    if "scale" not in get_method(method).resolve(params) or method in ("passthrough", "robust_merge"):
        return  # robust_merge averages experts that are no adapters, the other has no reference
    found = merged(method, experts, base, **{**params, "scale": 0.0})
    wrapped = params.get("inner", method) if method in ("lines", "core_space") else method
    if wrapped == "twin":  # of what the experts share alone
        return
    if method == "around":
        if params.get("inner") != "cart":
            start = "average" if params.get("origin", "mean") == "mean" else params["origin"]
            own = {k.removeprefix("origin_"): v for k, v in params.items() if k.startswith("origin_")}
            assert same_tensors(found, merged(start, experts, base, **own))
    elif method == "expo":  # it starts at the expert
        assert same_tensors(found, experts["e0"])
    elif wrapped not in ("cart", "cart_indexing", "cart_wudi"):
        assert same_tensors(found, base)
    elif params.get("origin", "mean") == "mean" and wrapped == method:
        assert same_tensors(found, merged("average", experts))


@few
@given(SEEDS, st.permutations(range(3)))
@first_use
def test_the_order_of_experts_does_not_matter(method, params, seed, order):
    if method in ORDERED:
        return
    if method == "around" and params.get("inner") == "ties":
        return  # entries of all experts sum to 0 around their mean, and rounding elects the sign
    base, experts = family(seed)
    if get_method(method).store:  # it gives back the expert of a number
        params, other = {**params, "task": order[0]}, params
    else:
        other = params
    order = [i for i in order if i < (get_method(method).experts[1] or 3)]
    shuffled = {f"e{i}": experts[f"e{i}"] for i in order}
    assert close(merged(method, experts, base, **params), merged(method, shuffled, base, **other), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@every_use
def test_every_tensor_keeps_its_dtype_and_shape(method, params, dtype):
    shapes = {
        "blocks.0.w": (4, 6),
        "blocks.1.w": (1, 3),
        "column": (5, 1),
        "vector": (7,),
        "one": (1,),
        "scalar": (),
        "conv": (2, 3, 2, 2),
        "empty": (0,),
        "blocks.1.empty": (0, 3),
        "blocks.2.empty": (3, 0),
    }
    base, *experts = (random_state(seed, dtype, shapes) for seed in range(4))
    for state in (base, *experts):
        state["ids"] = torch.arange(3)
    found = merged(method, dict(zip("abc", experts)), base, **params)
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {
        k: (v.dtype, v.shape) for k, v in base.items()
    }
    assert all(torch.isfinite(v).all() for v in found.values())
    assert torch.equal(found["ids"], base["ids"])


@every_use
def test_float64_inputs_are_merged_in_float64(method, params):
    a, b, c = ({k: t + 1e-9 for k, t in random_state(seed, torch.float64).items()} for seed in range(3))
    before = {k: t.clone() for k, t in a.items()}
    copies = merged(method, {"a": a, "b": a, "c": a}, a, **params)
    scaled = 3 if (method, params) == ("linear", {"normalize": False}) else 1
    assert cuts_weights(method, params) or close(copies, {k: scaled * t for k, t in a.items()}, 1e-14)
    for tensor in merged(method, {"a": a, "b": b, "c": c}, a, **params).values():
        assert (tensor != tensor.float().double()).all()  # no number was ever rounded to float32
    assert same_tensors(a, before)  # nor the inputs written to, which are not converted


@every_use
def test_models_without_anything_to_merge(method, params):
    for state in (
        {"ids": torch.arange(3)},
        {"blocks.0.empty": torch.ones(0, 3), "none": torch.ones(0)},
        {"blocks.0.zero": torch.zeros(3, 4), "zero": torch.zeros(())},
    ):
        assert same_tensors(merged(method, dict.fromkeys("abc", state), state, **params), state)


@few
@given(SEEDS, st.integers(1, 60))
@first_use
def test_how_tensors_are_cut_into_blocks_changes_nothing(method, params, seed, size):
    """Sums over blocks may be rounded in another way; thresholds and draws may not move."""
    base, experts = family(seed)
    whole = merged(method, experts, base, **params)
    with patch.object(slots, "_BLOCK", size):
        found = merged(method, experts, base, **params)
    sums = {"opcm", "sce", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "lines"}
    sums |= {"metagpt", "delta_guided", "lata", "fisher", "ota", "widen", "emr", "free"}
    if sums & {method, *map(str, params.values())} or params.get("variant") == "mergekit":
        assert close(found, whole)
    else:
        assert same_tensors(found, whole)


@pytest.mark.parametrize("method", sorted(catalogue().keys() - OF_FITS))
def test_points_of_a_sweep_are_what_each_is_alone(method):
    """They share the blocks and what methods remember of them."""
    points = []
    for params in [params for name, params in USES if name == method]:
        has_scale = "scale" in get_method(method).resolve(params)
        points += [params, *({**params, "scale": scale} for scale in (0.9, 0.2) if has_scale)]
    base, experts = family(0, get_method(method).experts[1] or 3)
    statistics = gathered(method, experts, points[0])
    found = merge_state_dicts_points(method, experts, base, points=points, statistics=statistics)
    for params, state in zip(points, found, strict=True):
        assert same_tensors(state, merged(method, experts, base, **params))


def test_all_methods_are_in_the_tests_above():
    assert {method for method, _ in USES} == set(catalogue()) - OF_FITS


# --------------------------------------------------------------------------------------- task arithmetic, linear


@few
@given(SEEDS)
def test_task_arithmetic_of_scale_one_over_t_is_the_average(seed):
    base, experts = family(seed)
    assert close(
        merged("task_arithmetic", experts, base, scale=1.0, normalize=True), merged("average", experts)
    )


def test_weights_negate_and_combine():
    base = {"w": torch.tensor([1.0, 10.0])}
    a, b, c = ({"w": base["w"] + torch.tensor(tau)} for tau in ([1.0, 0.0], [0.0, 2.0], [4.0, 4.0]))
    assert merged("task_arithmetic", {"a": a}, base, scale=0.5, weights=[-1.0])["w"].tolist() == [0.5, 10.0]
    analogy = merged("task_arithmetic", {"a": a, "b": b, "c": c}, base, scale=1.0, weights=[-1.0, 1.0, 1.0])
    assert analogy["w"].tolist() == [4.0, 16.0]


def test_linear_is_the_weighted_mean_or_sum():
    experts = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([5.0, -2.0])}}
    assert merged("linear", experts)["w"].tolist() == [3.0, 0.0]
    assert merged("linear", experts, weights=[3.0, 1.0])["w"].tolist() == [2.0, 1.0]
    assert merged("linear", experts, weights=[3.0, 1.0], normalize=False)["w"].tolist() == [8.0, 4.0]
    assert merged("linear", experts, normalize=False)["w"].tolist() == [6.0, 0.0]


# --------------------------------------------------------------------------------------- ties


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    st.sampled_from(["official", "mergelm", "mergekit"]),
)
def test_ties_that_trims_nothing_is_the_mean_of_what_agrees_with_the_elected_sign(rows, variant):
    base = {"w": torch.arange(6, dtype=torch.float32)}
    experts = {f"e{i}": {"w": base["w"] + torch.tensor(row).float()} for i, row in enumerate(rows)}
    sums = [sum(column) for column in zip(*rows)]
    # Where a sum is zero, the official code takes the majority of all signs, or else negative; mergelm's port takes
    # nothing where there is no majority, mergekit positive.
    majority = sum((s > 0) - (s < 0) for s in sums)
    undecided = {"official": majority or -1, "mergelm": majority, "mergekit": 1}[variant]
    expected = []
    for start, total, column in zip(base["w"].tolist(), sums, zip(*rows)):
        agreeing = [x for x in column if x * (total or undecided) > 0]
        expected.append(start + (sum(agreeing) / len(agreeing) if agreeing else 0))
    found = merged("ties", experts, base, density=1.0, variant=variant)
    assert torch.allclose(found["w"], torch.tensor(expected))


def test_ties_trims_over_the_whole_model():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    expert = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([10.0, 20, 30, 40])}
    # The threshold of the official code is the largest entry that it ought to drop, so one more is kept.
    whole = merged("ties", {"e": expert}, base, density=0.5)
    assert whole["a"].tolist() == [0, 0, 0, 4] and whole["b"].tolist() == [10, 20, 30, 40]
    each = merged("ties", {"e": expert}, base, density=0.5, scope="tensor")
    assert each["a"].tolist() == [0, 2, 3, 4] and each["b"].tolist() == [0, 20, 30, 40]
    exactly = merged("ties", {"e": expert}, base, density=0.5, variant="mergekit")
    assert exactly["a"].tolist() == [0, 0, 3, 4] and exactly["b"].tolist() == [0, 0, 30, 40]


# --------------------------------------------------------------------------------------- dare, della


@few
@given(SEEDS, DTYPES)
@pytest.mark.parametrize("inner", ["task_arithmetic", "average", "ties"])
@pytest.mark.parametrize("variant", ["official", "mergekit"])
def test_dare_that_drops_nothing_is_its_inner_method_and_all_the_base(variant, inner, seed, dtype):
    base, experts = family(seed, dtype=dtype)
    params = {"inner": inner, "variant": variant}
    if dtype == torch.float32:
        nothing = merged("dare", experts, base, drop_rate=0.0, **params)
        assert close(nothing, merged(inner, experts, base), 1e-6)
    assert same_tensors(merged("dare", experts, base, drop_rate=1.0, **params), base)


@few
@given(SEEDS, st.sampled_from([0.1, 0.5, 0.9]))
@pytest.mark.parametrize("variant", ["official", "mergekit"])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_rescales_what_it_keeps(rescale, variant, seed, drop_rate):
    tau_MN = task_vector(seed, 30, 20)
    zero, expert = {"w": torch.zeros(30, 20)}, {"e": {"w": tau_MN}}
    params = {"drop_rate": drop_rate, "rescale": rescale, "variant": variant, "scale": 1.0}
    found = merge_state_dicts("dare", expert, zero, params=params, seed=seed)["w"]
    kept = found != 0
    assert abs(kept.float().mean().item() - (1 - drop_rate)) < 6 * sqrt(drop_rate * (1 - drop_rate) / 600)
    factor = {
        "official": 1 / (1 - drop_rate),
        "mergekit": (tau_MN.abs().sum() / tau_MN[kept].abs().sum()).item(),
    }
    assert torch.allclose(found[kept], tau_MN[kept] * (factor[variant] if rescale else 1.0), rtol=1e-5)


@pytest.mark.parametrize(("method", "params"), [("dare", {"drop_rate": 0.5}), ("della", {})])
def test_draws_depend_on_seed_expert_and_tensor_alone(method, params):
    tau_N = task_vector(0, 200)
    base = {name: torch.zeros(200) for name in ("v", "w")}

    def kept(experts: dict[str, Tensor], seed: int = 0, names: str = "vw") -> dict[str, Tensor]:
        states = {e: {name: tau for name in names} for e, tau in experts.items()}
        found = merge_state_dicts(method, states, {n: base[n] for n in names}, params=params, seed=seed)
        return {name: tensor != 0 for name, tensor in found.items()}

    alone = kept({"a": tau_N})
    assert not torch.equal(alone["v"], alone["w"])
    assert torch.equal(kept({"a": tau_N}, names="w")["w"], alone["w"])
    silent = torch.zeros(200)
    assert torch.equal(kept({"b": silent, "a": tau_N, "c": silent})["w"], alone["w"])
    for other in (kept({"b": tau_N}), kept({"a": tau_N}, seed=1)):
        assert not torch.equal(other["w"], alone["w"])


@few
@given(SEEDS, st.booleans(), st.booleans())
def test_della_merges_what_is_kept_by_its_elected_sign(seed, rescale, normalize):
    """Against a loop, with masks that are given."""
    rows, columns, weights = 3, 5, [1.0, 2.0, 0.5]
    base, experts = family(seed)
    density, epsilon, scale = 0.5, 0.2, 0.9
    generator = torch.Generator().manual_seed(seed)
    masks = [
        {
            name: torch.randint(2, tensor.shape, generator=generator).to(torch.uint8)
            for name, tensor in base.items()
        }
        for _ in experts
    ]
    params = {
        "density": density, "epsilon": epsilon, "weights": weights, "scale": scale,
        "rescale": rescale, "normalize": normalize, "masks": "given",
    }  # fmt: skip
    name = "blocks.0.mlp.weight"
    assert base[name].shape == (rows, columns)
    found = merge_state_dicts("della", experts, base, params=params, statistics={"masks": masks})
    tau_TMN = torch.stack([e[name] - base[name] for e in experts.values()]).double()
    ranks_TMN = tau_TMN.abs().argsort(-1).argsort(-1)
    keep_TMN = density - epsilon + 2 * epsilon * ranks_TMN / (columns - 1)
    mask_TMN = torch.stack([mask[name] for mask in masks]).double()
    entry_TMN = tau_TMN * mask_TMN / (keep_TMN if rescale else 1.0)
    for i in range(rows):
        for j in range(columns):
            weighted = [(w * x, w) for w, x in zip(weights, entry_TMN[:, i, j].tolist())]
            sign = 1 if sum(v for v, _ in weighted) >= 0 else -1
            agree = [(v, w) for v, w in weighted if v * sign > 0]
            value = sum(v for v, _ in agree) / (sum(w for _, w in agree) if normalize and agree else 1.0)
            assert found[name][i, j].item() == pytest.approx(
                base[name][i, j].item() + scale * value, abs=1e-5
            )


@pytest.mark.parametrize("left", [0, 6, 1 << 20])
def test_della_in_two_readings_draws_the_same_masks(left):
    """What the first reading does not leave, because it is too large, the second draws again."""
    base, experts = family(0)
    params = {"density": 0.5, "epsilon": 0.3, "variant": "mergekit"}
    expected = merge_state_dicts("della", experts, base, params=params)
    with patch.object(slots, "MASK_BYTES", left), patch.object(slots, "_BLOCK", 60):
        points = [params, {**params, "density": 0.4}, params]
        first, other, last = merge_state_dicts_points("della", experts, base, points=points)
    for name, value in expected.items():
        assert torch.allclose(first[name], value, atol=1e-6) and torch.equal(first[name], last[name])
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("inner", "params"), [("della", {"density": 0.5, "variant": "mergekit"}), ("sce", {"density": 0.5})]
)
def test_masks_are_left_for_the_method_that_made_them(inner, params):
    """An origin and what stands around it have the same parameters, but see other task vectors."""
    base, experts = family(0)
    params = {"inner": inner, "origin": inner, **params, **{f"origin_{k}": v for k, v in params.items()}}
    found = merge_state_dicts("around", experts, base, params=params)
    with patch.object(slots, "MASK_BYTES", 0):
        expected = merge_state_dicts("around", experts, base, params=params)
    assert all(torch.equal(found[name], expected[name]) for name in base)


@pytest.mark.parametrize("method", ["dare", "della"])
def test_masks_must_be_given_where_they_are_wanted_and_only_there(method):
    base, experts = family(0)
    masks = [{k: torch.ones(v.shape, dtype=torch.uint8) for k, v in base.items()}] * 3
    with refused(method, "'masks'", "name their file"):
        merge_state_dicts(method, experts, base, params={"masks": "given"})
    with refused(method, "takes no statistics 'masks'"):
        merge_state_dicts(method, experts, base, statistics={"masks": masks})


# --------------------------------------------------------------------------------------- breadcrumbs


@given(
    SEEDS, st.integers(1, 40), st.floats(0.01, 1), st.floats(0, 0.99), st.booleans(),
    st.sampled_from([("official", "row"), ("official", "tensor"), ("mergellm", "tensor"), ("mergekit", "tensor")]),
)  # fmt: skip
def test_breadcrumbs_keeps_the_stated_counts(seed, columns, density, outlier_rate, remove_first, way):
    variant, scope = way
    tau_MN = task_vector(seed, 3, columns)
    params = {"density": density, "outlier_rate": outlier_rate, "remove_first": remove_first, "scale": 1.0}
    params |= {"variant": variant, "scope": scope}
    if variant == "mergellm":
        params["bottom_rate"] = bottom_rate = min(outlier_rate, 1 - density)
    found = merged("breadcrumbs", {"e": {"w": tau_MN}}, {"w": torch.zeros(3, columns)}, **params)["w"]
    rows = zip(tau_MN, found) if scope == "row" else [(tau_MN.flatten(), found.flatten())]
    for tau_N, found_N in rows:
        n = len(tau_N)
        order = tau_N.abs().argsort()  # from the smallest
        top, kept = int(n * outlier_rate), int(n * density)
        if variant == "mergellm":  # between two order statistics, both of which it keeps
            bottom = int(n * bottom_rate)
            first, last = max(0, bottom - 1), min(n - 1, n - 1 - (int(n * (1 - density)) - bottom))
        elif variant == "mergekit":  # outliers go first; what then lacks is made up for by smaller ones
            first = max(0, n - kept - top)
            last = first + kept - 1
        elif remove_first:
            first, last = max(0, n - top - kept), n - top - 1
        else:  # outliers are among those that would have been kept
            first, last = n - max(top, kept), n - top - 1
        expected_N = torch.zeros(n)
        expected_N[order[first : last + 1]] = tau_N[order[first : last + 1]]
        assert torch.equal(found_N, expected_N)


def test_breadcrumbs_variants_refuse_what_they_do_not_do():
    base, experts = family(0)
    with refused("breadcrumbs", "bottom_rate"):
        merged("breadcrumbs", experts, base, variant="mergellm", scope="tensor")
    for variant in ("mergekit", "mergellm"):
        with refused("breadcrumbs", variant, "scope"):
            merged("breadcrumbs", experts, base, variant=variant, bottom_rate=0.1)


# --------------------------------------------------------------------------------------- sce


@given(SEEDS, st.integers(2, 4), st.sampled_from([0.1, 0.4, 1.0]), st.sampled_from([1.0, 1e-4]))
def test_sce_is_its_three_steps(seed, count, density, size):
    tau_TN = size * task_vector(seed, count, 20)
    tau_TN[:, :3] = 0.0  # what no expert changed does not vary
    base, experts = around_zero(tau_TN.tolist())
    found = merged("sce", experts, base, density=density)["w"]
    tau_TN = tau_TN.double()
    if density < 1:
        variance_N = tau_TN.var(0, correction=0)
        chosen = variance_N.argsort(descending=True)[: int((variance_N > 0).sum() * density)]
        selected_TN = torch.zeros_like(tau_TN)
        selected_TN[:, chosen] = tau_TN[:, chosen]
    else:
        selected_TN = tau_TN
    energy_T = selected_TN.square().mean(1)
    uniform = torch.full_like(energy_T, 1 / count)
    weight_T1 = (energy_T / energy_T.sum() if energy_T.sum() >= 1e-6 else uniform)[:, None]
    sign_N = torch.where(selected_TN.sum(0) >= 0, 1.0, -1.0)
    agree_TN = selected_TN * sign_N > 0
    expected_N = (weight_T1 * selected_TN * agree_TN).sum(0) / (weight_T1 * agree_TN).sum(0).clamp(min=1e-6)
    assert torch.allclose(found.double(), expected_N, rtol=1e-4, atol=1e-6 * size)


def test_sce_at_the_edges_of_the_official_code():
    # A sum of zero counts as positive.
    base, experts = around_zero([[1.0, 2.0], [-1.0, 2.0]])
    assert merged("sce", experts, base)["w"].tolist() == pytest.approx([1.0, 2.0])
    # Where only an expert of weight 1e-8 has an entry, the sum of weights counts as 1e-6.
    base, experts = around_zero([[1.0, 0.0], [0.0, 1e-4]])
    assert merged("sce", experts, base)["w"].tolist() == pytest.approx([1.0, 1e-6])


def test_sce_that_selects_nothing_is_the_base():
    base, experts = around_zero([[1.0, 2.0, 5.0], [1.0, 2.0, 6.0]])
    assert torch.equal(merged("sce", experts, base, density=0.4)["w"], base["w"])


# --------------------------------------------------------------------------------------- geometry


@few
@given(SEEDS, DTYPES)
def test_slerp_ends_at_its_experts(seed, dtype):
    _, experts = family(seed, 2, dtype)
    assert same_tensors(merged("slerp", experts, t=0.0), experts["e0"])
    assert same_tensors(merged("slerp", experts, t=1.0), experts["e1"])


@given(SEEDS, st.floats(0, 1), st.floats(0.1, 10))
def test_slerp_stays_on_the_sphere(seed, t, size):
    """Of experts of one norm, at an angle in proportion to t."""
    a, b = (size * torch.nn.functional.normalize(task_vector(s, 9), dim=0) for s in (seed, seed + 5000))
    found = merged("slerp", {"a": {"w": a}, "b": {"w": b}}, t=t)["w"].double()
    a, b = a.double(), b.double()
    angle = acos((torch.dot(a, b) / a.norm() / b.norm()).clamp(-1, 1).item())
    if abs(cos(angle)) > 0.999:
        return
    assert found.norm().item() == pytest.approx(size, rel=1e-4)
    assert torch.dot(found, a).item() / size**2 == pytest.approx(cos(t * angle), abs=1e-4)
    assert torch.dot(found, b).item() / size**2 == pytest.approx(cos((1 - t) * angle), abs=1e-4)


@pytest.mark.parametrize("b", [[2.0, 0.0], [-2.0, 0.0], [0.0, 0.0], [2.0, 1e-3]])
def test_slerp_of_nearly_collinear_tensors_is_linear(b):
    experts = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor(b)}}
    if b[0] == 0.0:  # a zero has no direction: its cosine counts as none
        half = [cos(pi / 4), 0.0]
    else:
        half = [(1 + b[0]) / 2, b[1] / 2]
    assert merged("slerp", experts)["w"].tolist() == pytest.approx(half)
    assert torch.isfinite(merged("slerp", experts, dot_threshold=1.0)["w"]).all()


@given(SEEDS, st.floats(0.05, 0.95))
@pytest.mark.parametrize("with_base", [True, False])
def test_karcher_of_two_is_the_point_on_their_arc(with_base, seed, weight):
    a, b = task_vector(seed, 3, 4), 3 * task_vector(seed + 5000, 3, 4)
    base = {"w": task_vector(seed + 9000, 3, 4)} if with_base else None
    experts = {name: {"w": tau + (base["w"] if base else 0)} for name, tau in (("a", a), ("b", b))}
    if base:
        a, b = (experts[name]["w"] - base["w"] for name in "ab")
    a, b, weights = a.double(), b.double(), [1 - weight, weight]
    found = merged("karcher", experts, base, weights=weights, iterations=100, tolerance=1e-9)["w"].double()
    angle = acos((a.flatten() @ b.flatten() / a.norm() / b.norm()).item())
    arc = sin((1 - weight) * angle) * a / a.norm() + sin(weight * angle) * b / b.norm()
    expected = arc / sin(angle) * ((1 - weight) * a.norm() + weight * b.norm())
    assert torch.allclose(found - (base["w"].double() if base else 0), expected, atol=1e-5)


@given(SEEDS, st.integers(2, 5))
def test_karcher_is_where_the_pulls_of_the_experts_cancel(seed, count):
    rows_TN = torch.stack([task_vector(seed + 5000 * t, 12) + 1 for t in range(count)]).double()
    experts = {f"e{t}": {"w": row} for t, row in enumerate(rows_TN)}
    found = merged("karcher", experts, iterations=100, tolerance=1e-8)["w"]
    assert found.norm().item() == pytest.approx(rows_TN.norm(dim=1).mean().item())
    unit_N, unit_TN = found / found.norm(), rows_TN / rows_TN.norm(dim=1, keepdim=True)
    dot_T = unit_TN @ unit_N
    tangent_TN = (unit_TN - dot_T[:, None] * unit_N) * (dot_T.arccos() / dot_T.arccos().sin())[:, None]
    assert tangent_TN.mean(0).norm() < 1e-7


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
        ([[0.0, 0.0], [0.0, 4.0]], [0.0, 2.0]),  # a zero has no direction, but a norm
        ([[3.0, 0.0], [0.0, 3.0]], [3 * cos(pi / 4), 3 * cos(pi / 4)]),
        ([[1.0, 0.0], [3.0, 0.0]], [2.0, 0.0]),
    ],
)
def test_karcher_of_particular_vectors(rows, expected):
    base, experts = around_zero(rows)
    for of in (base, None):
        assert merged("karcher", experts, of)["w"].tolist() == pytest.approx(expected, abs=1e-6)
    opposite = merged("karcher", around_zero([[1.0, 2.0], [-1.0, -2.0]])[1])["w"]
    assert torch.isfinite(opposite).all() and opposite.norm().item() == pytest.approx(sqrt(5))


@pytest.mark.parametrize(
    ("rows", "factor"),
    [
        ([[1.0, 0.0], [1.0, 0.0]], 1.0),
        ([[1.0, 0.0], [0.0, 1.0]], 0.0),
        ([[1.0, 0.0], [0.5, sqrt(0.75)]], 2 / 3),  # cosine 1/2: 2c / (1 + c)
        ([[1.0, 0.0], [-0.5, sqrt(0.75)]], -2.0),  # not clamped
        ([[1.0, 0.0], [-1.0, 0.0]], 0.0),  # 1 + (N - 1) c = 0
        ([[1.0, 0.0], [-0.5, sqrt(0.75)], [-0.5, -sqrt(0.75)]], 0.0),
        ([[2.0, 0.0], [0.5, sqrt(0.75)], [0.5, -sqrt(0.75)]], 3 * (1 / 6) / (1 + 2 / 6)),
        ([[0.0, 0.0], [0.0, 0.0]], 0.0),
    ],
)
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_model_stock_goes_as_far_as_the_cosine_says(start, scope, rows, factor):
    base, experts = around_zero(rows)
    for state in (base, *experts.values()):
        state["w"] = (state["w"] + start).expand(3, 2).contiguous()
    for variant in ("mergekit", "fusion_bench"):
        if variant == "fusion_bench" and (len(rows) > 2 or scope == "row" or not any(rows[0])):
            continue  # the mean of the angles is another one
        found = merged("model_stock", experts, base, scope=scope, variant=variant)["w"]
        expected = start + factor * torch.tensor(rows).mean(0)
        assert torch.allclose(found, expected.expand(3, 2), atol=1e-5), variant


@few
@given(SEEDS, st.integers(2, 4))
def test_model_stock_by_rows_treats_each_row_as_a_tensor(seed, count):
    base, experts = family(seed, count)
    found = merged("model_stock", experts, base, scope="row")[MATRIX]
    for i in range(6):
        row = merged(
            "model_stock", {n: {"w": e[MATRIX][i]} for n, e in experts.items()}, {"w": base[MATRIX][i]}
        )
        assert torch.allclose(found[i], row["w"], atol=1e-6)


# --------------------------------------------------------------------------------------- spectral


@few
@given(SEEDS, st.integers(1, 5))
@pytest.mark.parametrize(
    "params", [{"rank": 1.0}, {"rank_rule": "energy", "energy": 1.0}, {"rank": 1.0, "keys": "matrices"}]
)
def test_cart_of_full_rank_is_the_average(params, seed, count):
    _, experts = family(seed, count)
    assert close(merged("cart", experts, **params), merged("average", experts))


@few
@given(SEEDS)
def test_cart_of_two_experts_is_their_average(seed):
    _, experts = family(seed, 2)
    assert close(merged("cart", experts, rank=0.3), merged("average", experts))


def truncated(a_MN: Tensor, k: int) -> Tensor:
    u, s, vh = torch.linalg.svd(a_MN, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


@few
@given(SEEDS)
def test_cart_keeps_the_leading_directions_of_centred_task_vectors(seed):
    _, experts = family(seed)
    found = merged("cart", experts, rank=0.5, scale=2.0)
    stack_TMN = torch.stack([e[MATRIX] for e in experts.values()]).double()
    mean_MN = stack_TMN.mean(0)
    expected_MN = mean_MN + 2 * sum(truncated(expert - mean_MN, 2) for expert in stack_TMN)
    assert torch.allclose(found[MATRIX].double(), expected_MN, atol=1e-5)
    mean_N = torch.stack([e["blocks.1.bias"] for e in experts.values()]).mean(0)
    assert torch.allclose(found["blocks.1.bias"], mean_N)


@few
@given(SEEDS, st.floats(0.1, 2))
@pytest.mark.parametrize("origin", ["task_arithmetic", "tsv_merge", "cart"])
def test_cart_around_another_merge(origin, seed, scale):
    base, experts = family(seed)
    start = {
        "task_arithmetic": lambda: merged("task_arithmetic", experts, base, scale=0.2),
        "tsv_merge": lambda: merged("tsv_merge", experts, base, keys="block_linear"),
        "cart": lambda: merged("cart", experts, rank=0.5, scale=0.2),
    }[origin]()
    found = merged(
        "cart", experts, base, origin=origin, origin_scale=0.2, origin_rank=0.5, rank=0.5, scale=scale
    )
    taus = [e[MATRIX].double() - start[MATRIX].double() for e in experts.values()]
    expected_MN = start[MATRIX].double() + scale * sum(truncated(tau_MN, 2) for tau_MN in taus)
    assert torch.allclose(found[MATRIX].double(), expected_MN, atol=1e-4)
    whole = sum(e["blocks.1.bias"] - start["blocks.1.bias"] for e in experts.values())
    assert torch.allclose(found["blocks.1.bias"], start["blocks.1.bias"] + scale * whole, atol=1e-5)


@few
@given(SEEDS, st.integers(0, 2))
def test_cart_indexing_of_full_rank_gives_an_expert_back(seed, task):
    _, experts = family(seed)
    assert close(merged("cart_indexing", experts, rank=1.0, task=task), experts[f"e{task}"])
    found = merged("cart_indexing", experts, rank=0.5, scale=2.0, task=task)
    stack_TMN = torch.stack([e[MATRIX] for e in experts.values()]).double()
    mean_MN = stack_TMN.mean(0)
    expected_MN = mean_MN + 2 * truncated(stack_TMN[task] - mean_MN, 2)
    assert torch.allclose(found[MATRIX].double(), expected_MN, atol=1e-5)


def test_cart_indexing_of_a_task_that_is_none():
    with refused("cart_indexing", "task 3", "3 experts"):
        merged("cart_indexing", family(0)[1], task=3)


@few
@given(SEEDS, st.floats(-1, 2))
def test_lowrank_task_arithmetic_of_full_rank_is_task_arithmetic(seed, scale):
    base, experts = family(seed)
    found = merged("lowrank_task_arithmetic", experts, base, rank=1.0, scale=scale)
    assert close(found, merged("task_arithmetic", experts, base, scale=scale))
    found = merged("lowrank_task_arithmetic", experts, base, rank=0.5, scale=scale)
    update_MN = sum(truncated((e[MATRIX] - base[MATRIX]).double(), 2) for e in experts.values())
    assert torch.allclose(found[MATRIX].double(), base[MATRIX] + scale * update_MN, atol=1e-5)


@few
@given(SEEDS)
def test_tsv_merge_of_one_expert_of_full_rank_is_that_expert(seed):
    base, experts = family(seed, 1)
    assert close(merged("tsv_merge", experts, base), experts["e0"])


@few
@given(SEEDS, st.sampled_from(["1/T", 0.5]))
@pytest.mark.parametrize("orthogonalize", [True, False])
def test_tsv_merge_is_the_sum_of_orthogonalised_singular_vectors(orthogonalize, seed, rank):
    base, experts = family(seed, 2)
    found = merged("tsv_merge", experts, base, rank=rank, scale=0.7, orthogonalize=orthogonalize)
    us, ss, vs = [], [], []
    for expert in experts.values():
        u, s, vh = torch.linalg.svd((expert[MATRIX] - base[MATRIX]).double(), full_matrices=False)
        us, ss, vs = [*us, u[:, :2]], [*ss, s[:2]], [*vs, vh[:2].T]
    u, s, v = (torch.cat(parts, -1) for parts in (us, ss, vs))
    if orthogonalize:
        (p, _, qt), (r, _, wt) = (torch.linalg.svd(part, full_matrices=False) for part in (u, v))
        u, v = p @ qt, r @ wt
    expected_MN = base[MATRIX] + 0.7 * (u * s) @ v.T
    assert torch.allclose(found[MATRIX].double(), expected_MN, atol=1e-4)
    mean_N = sum(e["blocks.1.bias"] - base["blocks.1.bias"] for e in experts.values()) / 2
    assert torch.allclose(found["blocks.1.bias"], base["blocks.1.bias"] + 0.7 * mean_N, atol=1e-6)


def test_tsv_merge_of_more_experts_than_directions_leaves_matrices_alone():
    base, experts = family(0, 7)
    found = merged("tsv_merge", experts, base)
    assert torch.equal(found[MATRIX], base[MATRIX])  # int(4 / 7) directions each
    assert not torch.equal(found["blocks.1.bias"], base["blocks.1.bias"])


@few
@given(SEEDS, st.integers(1, 4))
def test_iso_c_makes_all_singular_values_their_mean(seed, count):
    base, experts = family(seed, count)
    found = merged("iso_c", experts, base, scale=0.5)
    total_MN = sum((e[MATRIX] - base[MATRIX]).double() for e in experts.values())
    u, s, vh = torch.linalg.svd(total_MN, full_matrices=False)
    assert torch.allclose(found[MATRIX].double(), base[MATRIX] + 0.5 * s.mean() * u @ vh, atol=1e-5)
    mean_N = sum(e["blocks.1.bias"] - base["blocks.1.bias"] for e in experts.values()) / count
    assert torch.allclose(found["blocks.1.bias"], base["blocks.1.bias"] + 0.5 * mean_N, atol=1e-6)


def test_iso_c_leaves_out_directions_in_which_nothing_changed():
    tau_MN = torch.outer(torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.0, 2.0]))
    found = merged("iso_c", {"e": {"w": tau_MN}}, {"w": torch.zeros(3, 2)})["w"]
    assert torch.allclose(found, tau_MN / 2)  # one singular value of two: the mean is its half


# --------------------------------------------------------------------------------------- wrappers


@few
@given(SEEDS)
@pytest.mark.parametrize(
    ("inner", "params"),
    [
        ("task_arithmetic", {}),
        ("ties", {"density": 0.4}),
        ("karcher", {}),
        ("cart", {"rank": 0.5}),
        ("della", {}),
    ],
)
def test_lines_without_a_slope_is_its_inner_method(inner, params, seed):
    base, experts = family(seed)
    own = {**params, **({"scale": 1.0} if inner in ("task_arithmetic", "della") else {})}
    found = merged("lines", experts, base, inner=inner, alpha=1.0, beta=0.0, **params)
    assert close(found, merged(inner, experts, base, **own), 1e-7)


def test_lines_grows_with_the_depth_of_each_tower():
    names = ["a.0.w", "a.1.w", "a.2.w", "b.0.w", "b.1.w", "only.0.w", "head"]
    base = {name: torch.zeros(2) for name in names}
    experts = {t: {name: torch.ones(2) for name in names} for t in "xy"}
    found = merged("lines", experts, base, alpha=0.5, beta=2.0, scale=0.5)  # the inner method gives 1
    assert [found[name][0].item() for name in names] == [0.5, 1.5, 2.5, 0.5, 2.5, 0.5, 0.5]


@few
@given(SEEDS, st.integers(2, 4))
@pytest.mark.parametrize("inner", ["task_arithmetic", "ties"])
def test_the_alpha_that_lines_finds_makes_up_for_what_was_lost(inner, seed, count):
    base, experts = family(seed, count)
    whole = merged(inner, experts, base, scale=1.0)
    summed = sum((sum(e[k] for e in experts.values()) - count * base[k]).abs().sum() for k in base)
    alpha = (summed / sum((whole[k] - base[k]).abs().sum() for k in base) / count).item()
    assert inner == "ties" or alpha == pytest.approx(1 / count, rel=1e-4)
    found = merged("lines", experts, base, inner=inner, beta=0.0)
    assert close(found, {k: base[k] + alpha * (whole[k] - base[k]) for k in base}, 1e-5)


def test_the_parameters_of_what_is_wrapped_stand_beside_the_wrappers():
    lines, dare = get_method("lines"), get_method("dare")
    assert lines.resolve({})["scale"] == 1.0  # not the 0.3 of task arithmetic by itself
    assert lines.resolve({"scale": 0.4, "inner": "ties", "density": 0.7}).items() >= {
        "inner": "ties", "alpha": "auto", "beta": 0.5, "scale": 0.4, "density": 0.7, "reduce": "mean",
    }.items()  # fmt: skip
    assert lines.resolve({"inner": "karcher"}).keys() == {
        "inner", "alpha", "beta", "weights", "iterations", "tolerance", "scope",
    }  # fmt: skip
    found = dare.resolve({"inner": "ties", "variant": "mergekit", "inner_variant": "mergelm"})
    assert (found["variant"], found["inner_variant"], found["scale"]) == ("mergekit", "mergelm", 1.0)
    bound = bind(dare, found)
    assert bound.params["variant"] == "mergekit" and bound.inner.params["variant"] == "mergelm"
    assert bound.flat == found
    for inner in catalogue():
        if not get_method(inner).wraps:
            params = {"bottom_rate": 0.1} if inner == "breadcrumbs" else {}
            resolved = lines.resolve({"inner": inner, **params})
            assert lines.resolve(resolved) == bind(lines, resolved).flat == resolved


@pytest.mark.parametrize(
    ("method", "params", "parts"),
    [
        ("lines", {"alhpa": 1}, ["lines: unknown parameter 'alhpa'", "did you mean 'alpha'?"]),
        ("lines", {"scael": 1}, ["lines: unknown parameter 'scael'", "did you mean 'scale'?"]),
        (
            "lines",
            {"inner": "ties", "desnity": 1},
            ["unknown parameter 'desnity'", "did you mean 'density'?"],
        ),
        (
            "lines",
            {"density": 0.2},
            ["unknown parameter 'density'", "known: inner, alpha, beta, weights, normalize, scale"],
        ),
        ("dare", {"inner": "ties", "inner_varaint": 1}, ["did you mean 'inner_variant'?"]),
        ("dare", {"inner_scale": 1.0}, ["unknown parameter 'inner_scale'"]),
        ("lines", {"inner": "tie"}, ["unknown method 'tie'", "did you mean 'ties'?"]),
        ("lines", {"inner": 3}, ["lines: inner = 3", "name a method"]),
        ("lines", {"inner": "dare", "inner_inner": "tie"}, ["unknown method 'tie'", "did you mean 'ties'?"]),
        ("lines", {"inner": "dare", "drop_rat": 1}, ["lines", "'drop_rat'", "did you mean 'drop_rate'?"]),
        ("around", {"origin": "lines"}, ["around: origin 'lines'", "name a plain one"]),
        ("around", {"origin": "carts"}, ["unknown method 'carts'", "did you mean 'cart'?"]),
        ("around", {"origin": "cart", "origin_rnk": 1}, ["did you mean 'origin_rank'?"]),
        ("around", {"origin_rank": 0.5}, ["unknown parameter 'origin_rank'"]),
        ("around", {"origin": "cart", "origin_rank": 2}, ["cart: rank = 2"]),
        ("lines", {"inner": "ties", "density": 2}, ["density = 2"]),
        ("lines", {"beta": -1}, ["lines: beta = -1"]),
        ("lines", {"alpha": "some"}, ["lines: alpha"]),
        ("dare", {"inner": "ties", "inner_variant": "other"}, ["variant = 'other'"]),
        ("dare", {"drop_rat": 1}, ["unknown parameter 'drop_rat'", "did you mean 'drop_rate'?"]),
    ],
)
def test_parameters_of_wrappers_are_refused_as_all_others(method, params, parts):
    with refused(*parts):
        get_method(method).resolve(params)


@pytest.mark.parametrize(
    ("method", "experts", "params", "parts"),
    [
        ("lines", 3, {"inner": "slerp"}, ["slerp", "at most 2", "got 3"]),
        ("lines", 1, {"inner": "karcher"}, ["karcher", "at least 2", "got 1"]),
        ("lines", 2, {"weights": [1.0]}, ["task_arithmetic", "1 weights for 2 experts"]),
        ("lines", 2, {"inner": "della", "epsilon": 0.5}, ["della", "narrow the window"]),
        ("dare", 2, {"inner": "task_arithmetic", "weights": [1.0, -1.0], "normalize": True}, ["sum to 0"]),
    ],
)
def test_what_is_wrapped_is_checked_too(method, experts, params, parts):
    base, given_experts = family(0, experts)
    with refused(*parts):
        merge_state_dicts(method, given_experts, base, params=params)


# --------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("visual.transformer.resblocks.0.attn.in_proj_weight", True),
        ("visual.transformer.resblocks.0.attn.out_proj.weight", True),
        ("visual.transformer.resblocks.11.mlp.c_fc.weight", True),
        ("visual.transformer.resblocks.0.ln_1.weight", False),
        ("visual.transformer.resblocks.0.mlp.c_fc.bias", False),
        ("visual.proj", False),
        ("visual.positional_embedding", False),
        ("token_embedding.weight", False),
        ("model.layers.3.self_attn.q_proj.weight", True),
        ("model.layers.3.input_layernorm.weight", False),
        ("model.embed_tokens.weight", False),
    ],
)
def test_which_tensors_are_block_linear(name, linear):
    assert is_matrix(name, (2, 3), "block_linear") is linear
    assert is_matrix(name, (2, 3), "matrices") is True
    for shape in ((), (6,)):
        assert not is_matrix(name, shape, "block_linear") and not is_matrix(name, shape, "matrices")


@pytest.mark.parametrize("keys", ["block_linear", "matrices"])
def test_convolutions_are_matrices_inside_of_numbered_layers_alone(keys):
    assert is_matrix("layer1.0.conv1.weight", (2, 3, 1, 1), keys)
    assert not is_matrix("conv1.weight", (2, 3, 1, 1), keys)
    assert not is_matrix("layer1.0.conv1.weight", (2, 1, 3, 3), keys)  # depthwise


def test_integer_tensors_are_copied_and_must_agree():
    buffer = torch.tensor([1, 2, 3])
    experts = {name: {"w": torch.ones(2), "ids": buffer.clone()} for name in "abc"}
    assert torch.equal(merge_state_dicts("average", experts)["ids"], buffer)
    experts["b"]["ids"][1] = 9
    with refused("'b'", "'ids'"):
        merge_state_dicts("average", experts)


def test_tensors_that_only_the_base_has_are_returned():
    base = {"w": torch.zeros(2), "extra": torch.ones(3)}
    merged = merge_state_dicts("task_arithmetic", {"a": {"w": torch.ones(2)}}, base)
    assert torch.equal(merged["extra"], base["extra"])


# --------------------------------------------------------------------------------------- refusals


def test_state_dicts_that_do_not_match_are_refused():
    one = {"w": torch.ones(2)}
    with refused("'b'", "'v'"):
        merge_state_dicts("average", {"a": one, "b": {**one, "v": torch.ones(1)}})
    with refused("'base'", "'w'"):
        merge_state_dicts("task_arithmetic", {"a": one}, {"v": torch.ones(1)})
    with refused("'w'", "[2]", "[3]", "'b'"):
        merge_state_dicts("average", {"a": one, "b": {"w": torch.ones(3)}})


@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (-float("inf"), "Inf")]
)
def test_nan_and_inf_are_named(value, kind):
    bad = {"w": torch.tensor([1.0, value])}
    with refused("'b'", "'w'", kind):
        merge_state_dicts("average", {"a": {"w": torch.ones(2)}, "b": bad})


def test_a_call_that_cannot_work_is_refused():
    one = {"a": {"w": torch.ones(2)}}
    with refused("unknown method 'tie'", "did you mean 'ties'?"):
        merge_state_dicts("tie", one)
    with refused("unknown parameter 'scael'", "did you mean 'scale'?"):
        merge_state_dicts("cart", one, params={"scael": 1})
    with refused("ties", "base"):
        merge_state_dicts("ties", one)
    with refused("cart", "base"):
        merge_state_dicts("cart", one, params={"origin": "task_arithmetic"})
    with refused("at least 1"):
        merge_state_dicts("average", {})
    with refused("statistics"):
        merge_state_dicts("average", one, statistics={"fisher": []})
    with refused("weights"):
        merge_state_dicts("task_arithmetic", {**one, "b": one["a"]}, one["a"], params={"weights": [1.0]})


@pytest.mark.parametrize(
    ("method", "params", "name"),
    [
        ("ties", {"density": 0}, "density"),
        ("ties", {"density": 1.1}, "density"),
        ("ties", {"variant": "other"}, "variant"),
        ("cart", {"rank": "much"}, "rank"),
        ("cart", {"scale": float("nan")}, "scale"),
        ("cart", {"scale": float("inf")}, "scale"),
        ("task_arithmetic", {"weights": [1, "x"]}, "weights"),
        ("task_arithmetic", {"weights": [float("nan")]}, "weights"),
    ],
)
def test_values_out_of_range_are_refused(method, params, name):
    with refused(f"{method}: {name}"):
        get_method(method).resolve(params)


# --------------------------------------------------------------------------------------- the catalogue


@pytest.mark.parametrize("entry", catalogue().values(), ids=list(catalogue()))
def test_every_method_documents_itself_and_has_legal_defaults(entry):
    resolved = entry.resolve({})
    assert entry.summary.endswith(".") and entry.paper
    assert entry.reference_of(resolved) in ("pretrained", "mean", "none", Mean())
    assert resolved.items() >= entry.parameters.items() and entry.resolve(resolved) == resolved
