"""What is special to the elementwise and geometric methods: formulas by hand, limits, equalities between methods."""

from __future__ import annotations

import math
from math import acos, cos, exp, log, sin, sqrt, tanh
from typing import Any

import pytest
import torch
from checkpoints import State, random_state, refused, same_tensors
from hypothesis import given
from hypothesis import strategies as st
from small_models import SEEDS, few
from torch import Tensor

from mergeline.merging import merge_state_dicts
from mergeline.merging.algebra import combine

ROWS = st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=2, max_size=4)


def merged(
    method: str,
    rows: Any,
    base: list[float] | Tensor | None = None,
    seed: int = 0,
    statistics: Any = None,
    no_base: bool = False,
    **params: Any,
) -> Tensor:
    """The merge of experts of one tensor `w`, whose task vectors are `rows`, around a base of zeros or `base`."""
    rows = [torch.as_tensor(row, dtype=torch.float64) for row in rows]
    base = torch.zeros_like(rows[0]) if base is None else torch.as_tensor(base, dtype=torch.float64)
    experts = {f"e{t}": {"w": base + row} for t, row in enumerate(rows)}
    given_base = None if no_base else {"w": base}
    return merge_state_dicts(method, experts, given_base, params=params, seed=seed, statistics=statistics)[
        "w"
    ]


def model(seed: int, experts: int = 3) -> tuple[State, dict[str, State]]:
    """A base and its experts, in float64."""
    base, *taus = (random_state(seed + 1000 * t, torch.float64) for t in range(experts + 1))
    return base, {f"e{t}": {k: base[k] + tau[k] for k in base} for t, tau in enumerate(taus)}


def close(a: State, b: State, atol: float = 1e-12) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=atol) for k in a)


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------- one expert


def test_wise_ft_goes_from_the_base_to_the_expert():
    assert merged("wise_ft", [[4.0, -2.0]], [1.0, 1.0]).tolist() == [4.0, -0.5]
    assert merged("wise_ft", [[4.0, -2.0]], [1.0, 1.0], scale=1.0).tolist() == [5.0, -1.0]
    with refused("wise_ft", "at most 1"):
        merged("wise_ft", [[1.0], [2.0]])
    with refused("wise_ft: scale"):
        merged("wise_ft", [[1.0]], scale=1.1)


def test_expo_goes_beyond_the_expert():
    assert merged("expo", [[4.0, -2.0]], [1.0, 1.0]).tolist() == [7.0, -2.0]
    assert merged("expo", [[4.0, -2.0]], [1.0, 1.0], scale=-1.0).tolist() == [1.0, 1.0]


@given(st.lists(st.floats(-1, 1), min_size=5, max_size=5), st.floats(1e-5, 0.5))
def test_nearswap_interpolates_as_published(row, threshold):
    """By the weight min(1, t / |difference|)."""
    found = merged("nearswap", [row], [0.3] * 5, threshold=threshold)
    weight = [min(1.0, threshold / max(abs(x), 1e-6)) for x in row]
    assert found.tolist() == pytest.approx([0.3 + w * x for w, x in zip(weight, row)], abs=1e-12)


def test_arcee_fusion_takes_over_what_is_important():
    base, tau = random_rows(0, 6, 4), random_rows(1, 6, 4)
    found = merged("arcee_fusion", [tau], base)
    importance = torch.zeros(6, 4, dtype=torch.float64)
    for i in range(6):
        p, q = (row.softmax(0) + 1e-8 for row in ((base + tau)[i], base[i]))
        divergence = sum(a * log(a / b) for a, b in zip(p.tolist(), q.tolist()))
        importance[i] = tau[i].abs() * divergence
    ordered = sorted(importance.flatten().tolist())
    low, median, high = (ordered[int(23 * q)] for q in (0.25, 0.5, 0.75))
    taken = importance >= median + 1.5 * (high - low)
    assert 0 < taken.sum() < 8
    assert torch.allclose(found, base + tau * taken, atol=1e-12)


# --------------------------------------------------------------------------------------- entry by entry


def test_magmax_takes_the_largest_and_of_equals_the_last():
    rows = [[1.0, -3.0, 2.0, 0.0], [-2.0, 1.0, -2.0, 0.0], [1.5, 3.0, 0.5, 0.0]]
    assert merged("magmax", rows, scale=1.0).tolist() == [-2.0, 3.0, -2.0, 0.0]
    assert merged("magmax", rows, [1.0] * 4).tolist() == [0.0, 2.5, 0.0, 1.0]
    assert merged("magmax", rows[::-1], scale=1.0).tolist() == [-2.0, -3.0, 2.0, 0.0]


def test_random_mix_draws_every_expert_equally_often_and_each_entry_for_itself():
    rows = [[float(t + 1)] * 6000 for t in range(3)]
    found = merged("random_mix", rows)
    counts = found.long().bincount(minlength=4).tolist()
    assert counts[0] == 0 and all(abs(count - 2000) < 6 * sqrt(6000 * 2 / 9) for count in counts[1:])
    again = sum(found[i] == found[i + 1] for i in range(0, 6000, 2))  # of neighbours, a third
    assert abs(int(again) - 1000) < 6 * sqrt(3000 * 2 / 9)
    assert torch.equal(found, merged("random_mix", rows))
    assert not torch.equal(found, merged("random_mix", rows, seed=1))
    assert torch.equal(merged("random_mix", rows, [0.5] * 6000, scale=2.0), 2 * found + 0.5)


@given(ROWS)
def test_ram_averages_what_is_shared_and_boosts_what_is_not(rows):
    rows = [[0.5 * x for x in row] for row in rows]
    plain, plus = [], []
    active = [[abs(x) > 0.6 for x in row] for row in rows]
    counts = [sum(column) for column in zip(*active)]
    shared = [sum(a and c > 1 for a, c in zip(row, counts)) for row in active]
    alone = [sum(a and c == 1 for a, c in zip(row, counts)) for row in active]
    boost = [1 + 0.3 * min(s / u, 0.5) if u else 1.0 for s, u in zip(shared, alone)]
    for i, count in enumerate(counts):
        entries = [(row[i], boost[t]) for t, row in enumerate(rows) if active[t][i]]
        plain.append(sum(x for x, _ in entries) / max(count, 1))
        plus.append(plain[-1] if count != 1 else entries[0][0] * entries[0][1])
    params = {"threshold": 0.6, "rescale_factor": 0.3, "rescale_cap": 0.5}
    assert merged("ram", rows, **params).tolist() == pytest.approx(plain)
    assert merged("ram", rows, **params, variant="ram_plus").tolist() == pytest.approx(plus)


# --------------------------------------------------------------------------------------- consensus


@given(ROWS, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_a_task_mask_is_strict(rows, threshold):
    merged_tau = [sum(column) for column in zip(*rows)]
    for row in rows:
        found = combine.task_mask(torch.tensor(row).float(), torch.tensor(merged_tau).float(), threshold)
        assert found.tolist() == [abs(x) > threshold * abs(m - x) for x, m in zip(row, merged_tau)]


def test_consensus_counts_whom_an_entry_serves():
    rows = [[2.0, 2.0, 1.0, 5.0], [1.0, -1.0, -1.0, 0.1]]
    sums = [3.0, 1.0, 0.0, 5.1]
    served = [[abs(x) > 0.6 * abs(s - x) for x, s in zip(row, sums)] for row in rows]
    assert served == [[True, True, True, True], [False, False, True, False]]
    for least, kept in [(0, [1, 1, 1, 1]), (1, [1, 1, 1, 1]), (2, [0, 0, 1, 0]), (3, [0, 0, 0, 0])]:
        found = merged("consensus_ta", rows, [1.0] * 4, threshold=0.6, min_tasks=least, scale=0.5)
        assert found.tolist() == pytest.approx([1 + 0.5 * k * s for k, s in zip(kept, sums)])


@few
@given(SEEDS)
def test_consensus_without_a_minimum_is_the_merge_itself_and_with_too_large_a_one_the_base(seed):
    base, experts = model(seed)

    def found(method: str, **params: Any) -> State:
        return merge_state_dicts(method, experts, base, params={"scale": 0.7, **params})

    assert close(found("consensus_ta", min_tasks=0), found("task_arithmetic"))
    for reduce in ("mean", "sum", "max"):
        of = {"density": 0.5, "reduce": reduce}
        assert close(found("consensus_ties", min_tasks=0, **of), found("ties", **of))
    for method in ("consensus_ta", "consensus_ties"):
        assert same_tensors(found(method, min_tasks=4), base)


@few
@given(SEEDS)
def test_consensus_ties_masks_by_the_untrimmed_task_vectors(seed):
    base, experts = model(seed)
    ties = merge_state_dicts("ties", experts, base, params={"density": 0.3, "reduce": "sum"})
    params = {"density": 0.3, "threshold": 0.5, "min_tasks": 2, "scale": 1.0}
    found = merge_state_dicts("consensus_ties", experts, base, params=params)
    for name in base:
        merged_tau = ties[name] - base[name]
        taus = [e[name] - base[name] for e in experts.values()]
        count = sum((tau.abs() > 0.5 * (merged_tau - tau).abs()).int() for tau in taus)
        assert torch.allclose(found[name], base[name] + merged_tau * (count >= 2), atol=1e-12)


# --------------------------------------------------------------------------------------- pruning


def test_magnitude_prune_keeps_the_largest_and_their_equals():
    rows = [[1.0, -4.0, 3.0, 2.0], [2.0, -2.0, 2.0, 1.0]]
    assert merged("magnitude_prune", rows, density=0.5, scale=1.0).tolist() == [2.0, -6.0, 5.0, 0.0]
    assert merged("magnitude_prune", rows, density=0.01, scale=1.0).tolist() == [2.0, -6.0, 2.0, 0.0]


def test_magnitude_prune_looks_at_the_whole_model_or_at_each_tensor():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    expert = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([10.0, 20, 30, 40])}
    params = {"density": 0.5, "scale": 1.0}
    whole = merge_state_dicts("magnitude_prune", {"e": expert}, base, params=params)
    assert whole["a"].tolist() == [0, 0, 0, 0] and whole["b"].tolist() == [10, 20, 30, 40]
    each = merge_state_dicts("magnitude_prune", {"e": expert}, base, params={**params, "scope": "tensor"})
    assert each["a"].tolist() == [0, 0, 3, 4] and each["b"].tolist() == [0, 0, 30, 40]


@few
@given(SEEDS)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_magnitude_prune_of_everything_is_task_arithmetic(scope, seed):
    base, experts = model(seed)
    found = merge_state_dicts("magnitude_prune", experts, base, params={"density": 1.0, "scope": scope})
    assert close(found, merge_state_dicts("task_arithmetic", experts, base))


# --------------------------------------------------------------------------------------- pcb


def pcb_by_hand(rows: list[list[float]], density: float, clamp: float, scale: float, variant: str) -> list:
    """The official code in loops."""
    count, n = len(rows), len(rows[0])
    clamped, unit = [], []
    for row in rows:
        ordered = sorted(map(abs, row))
        low, high = ordered[int(n * clamp)], ordered[int(n * (1 - clamp) - 1)]
        clamped.append([min(max(abs(x), low), high) * ((x > 0) - (x < 0)) for x in row])
        unit.append([(min(max(abs(x), low), high) - low) / (high - low) for x in row])
    signed = [[u * ((x > 0) - (x < 0)) for u, x in zip(us, row)] for us, row in zip(unit, rows)]
    weight = []
    for t in range(count):
        strength = []
        for i in range(n):
            if variant == "es":
                support = sum(tanh(signed[t][i] * signed[j][i]) for j in range(count))
            else:
                support = tanh(rows[t][i] * sum(z[i] for z in (signed if variant == "vision" else rows)))
            strength.append(exp(count * unit[t][i] ** 2) * support)
        least = sorted(strength)[int(n * (1 - density))]
        top = max(strength)
        weight.append([(max(s, least) - least) / (top - least) for s in strength])
    totals = [sum(w[i] for w in weight) for i in range(n)]
    sums = [sum(c[i] * w[i] for c, w in zip(clamped, weight)) for i in range(n)]
    return [scale * s / max(total, 1e-12) for s, total in zip(sums, totals)]


@few
@given(SEEDS, st.integers(2, 4), st.sampled_from([0.2, 0.5, 0.95]), st.sampled_from([0.01, 0.1]))
@pytest.mark.parametrize("variant", ["es", "root", "nlp", "vision"])
def test_pcb_is_its_official_code(variant, seed, count, density, clamp):
    """Also where the quantile of the strengths is negative; of a float64 task vector, but quantiles are float32."""
    rows = random_rows(seed, count, 40).float().double().tolist()
    found = merged("pcb", rows, density=density, clamp=clamp, scale=1.1, variant=variant)
    expected = pcb_by_hand(rows, density, clamp, 1.1, variant)
    assert found.tolist() == pytest.approx(expected, rel=2e-4, abs=2e-4)


def test_pcb_of_many_experts_does_not_overflow():
    rows = random_rows(0, 100, 30).float()
    experts = {f"e{t}": {"w": row} for t, row in enumerate(rows)}
    found = merge_state_dicts("pcb", experts, {"w": torch.zeros(30)})
    assert torch.isfinite(found["w"]).all() and found["w"].any()


# --------------------------------------------------------------------------------------- tatr


@few
@given(SEEDS, st.integers(2, 4), st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.booleans())
def test_tatr_merges_where_no_task_is_sensitive_to_another(seed, count, density, with_gradients):
    rows = random_rows(seed, count, 20).float().double()
    slopes = random_rows(seed + 5000, count, 20).abs() if with_gradients else rows.abs()
    statistics = {"gradients": [{"w": slope} for slope in slopes]} if with_gradients else None
    params = {"gradients": "given"} if with_gradients else {}
    found = merged("tatr", rows, density=density, scale=0.5, statistics=statistics, **params)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    sensitivity = sum(slopes[i] * rows[j].abs() for i, j in pairs)
    bound = sensitivity.sort().values[min(int(20 * density), 19)]
    expected = 0.5 * rows.sum(0) * (sensitivity < bound)
    assert torch.allclose(found, expected, atol=1e-12)


def test_tatr_wants_gradients_only_where_they_are_to_be_given():
    with refused("tatr", "'gradients'", "name their file"):
        merged("tatr", [[1.0], [2.0]], gradients="given")
    with refused("tatr", "takes no statistics 'gradients'"):
        merged("tatr", [[1.0], [2.0]], statistics={"gradients": []})


# --------------------------------------------------------------------------------------- weights from norms


def test_metagpt_weighs_by_squared_norms_over_the_model_and_delta_guided_by_norms_of_each_tensor():
    base = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([5.0])}
    taus = [{"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0])}, {"a": torch.tensor([0.0, 0.0])}]
    taus[1]["b"] = torch.tensor([10.0])
    experts = {f"e{t}": {k: base[k] + tau[k] for k in base} for t, tau in enumerate(taus)}
    found = merge_state_dicts("metagpt", experts, base)
    assert found["a"].tolist() == pytest.approx([1 + 0.2 * 3, 1 + 0.2 * 4])
    assert found["b"].tolist() == pytest.approx([5 + 0.8 * 10])
    found = merge_state_dicts("delta_guided", experts, base)
    assert found["a"].tolist() == pytest.approx([4, 5]) and found["b"].tolist() == pytest.approx([15])
    assert merged("delta_guided", [[3.0, 4.0], [0.0, 15.0]]).tolist() == pytest.approx([0.75, 12.25])


# --------------------------------------------------------------------------------------- lata


def test_lata_drops_what_goes_as_instruction_tuning_did():
    angles = {"a": 0.1, "b": 2.0, "c": 1.0}  # between expert and instruction: rank 0, 2, 1
    base = {name: torch.tensor([1.0, 1.0], dtype=torch.float64) for name in angles}
    turned = {k: torch.tensor([cos(a), sin(a)], dtype=torch.float64) for k, a in angles.items()}
    expert = {k: base[k] + 3 * turned[k] for k in base}
    instruction = {k: base[k] + torch.tensor([2.0, 0.0]) for k in base}

    def weights(**params: Any) -> list[float]:
        params, statistics = {"scale": 0.5, **params}, {"instruction": instruction}
        found = merge_state_dicts("lata", {"e": expert}, base, params=params, statistics=statistics)
        return [float((found[k] - base[k]) @ turned[k]) / 1.5 for k in "abc"]

    assert weights() == pytest.approx([0, 1, 0.5])
    assert weights(mode="threshold") == pytest.approx([0, 1, 1])
    assert weights(mode="threshold", threshold=0.5) == pytest.approx([0, 1, 0])


def test_lata_ranks_each_expert_for_itself_and_needs_the_instruction_model():
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    along, across = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    experts = {"x": {"a": along, "b": across}, "y": {"a": across, "b": along}}
    statistics = {"instruction": {"a": along, "b": along}}
    found = merge_state_dicts("lata", experts, base, params={"scale": 1.0}, statistics=statistics)
    assert torch.equal(found["a"], across) and torch.equal(found["b"], across)
    with refused("lata", "'instruction'", "name their file"):
        merge_state_dicts("lata", experts, base)


# --------------------------------------------------------------------------------------- averages in time


@given(st.integers(1, 6), st.floats(0.05, 0.95), st.none() | st.integers(1, 8))
def test_ema_is_the_recurrence_over_the_last_checkpoints(count, decay, window):
    values = [float((7 * t) % 5) for t in range(count)]
    kept = values[-min(window or count, count) :]
    expected = kept[0]
    for value in kept[1:]:
        expected = decay * expected + (1 - decay) * value
    params = {"decay": decay, "window": window}
    assert merged("ema", [[v] for v in values], **params).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "schedule, decay",
    [
        ("linear", lambda s: 1 - s),
        ("cosine", lambda s: 0.5 + 0.5 * math.cos(math.pi * s)),
        ("1-sqrt", lambda s: 1 - s**0.5),
    ],
)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=8))
def test_a_schedule_gives_the_checkpoint_of_a_run_whose_updates_decay(schedule, decay, values):
    expected = float(values[0])
    for t, (before, after) in enumerate(zip(values, values[1:]), start=1):
        expected += decay(t / len(values)) * (after - before)
    found = merged("linear", [[float(v)] for v in values], schedule=schedule).item()
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_linear_decay_is_the_mean_and_a_schedule_takes_no_weights():
    rows = [[1.0], [2.0], [6.0]]
    assert merged("linear", rows, schedule="linear").item() == pytest.approx(3)
    with refused("weights and schedule say the same"):
        merged("linear", rows, schedule="cosine", weights=[1, 2, 3])


def test_greedy_soup_is_the_mean_of_its_members():
    rows = [[1.0], [2.0], [6.0]]
    assert merged("greedy_soup", rows).item() == pytest.approx(3)
    assert merged("greedy_soup", rows, members=[2, 0]).item() == pytest.approx(3.5)
    assert merged("greedy_soup", rows, members=[1], no_base=True).item() == 2
    for wrong in ([], [3], [0, 0]):
        with refused("greedy_soup", "members", "3 experts"):
            merged("greedy_soup", rows, members=wrong)
    with refused("greedy_soup: members"):
        merged("greedy_soup", rows, members=[-1])


def test_metrics_weighted_prefers_low_losses_and_late_steps():
    rows = [[1.0], [2.0]]
    assert merged("metrics_weighted", rows, metric="loss", values=[1.0, 0.5]).item() == pytest.approx(5 / 3)
    squared = merged("metrics_weighted", rows, metric="loss", values=[1.0, 0.5], power=2.0)
    assert squared.item() == pytest.approx(9 / 5)
    assert merged("metrics_weighted", rows, values=[100, 300]).item() == pytest.approx(7 / 4)
    assert merged("metrics_weighted", rows).item() == pytest.approx(5 / 3)  # steps 1, 2
    assert merged("metrics_weighted", rows, values=[100, 300], power=0.0).item() == pytest.approx(1.5)
    best = merged("metrics_weighted", rows, metric="loss", values=[1e-3, 1e-5], power=1000.0)
    assert best.item() == pytest.approx(2)
    with refused("metrics_weighted", "each expert's loss"):
        merged("metrics_weighted", rows, metric="loss")
    with refused("metrics_weighted", "3 values for 2 experts"):
        merged("metrics_weighted", rows, values=[1, 2, 3])
    with refused("metrics_weighted: values"):
        merged("metrics_weighted", rows, values=[0, 1])


# --------------------------------------------------------------------------------------- arcs


def arc_by_hand(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point at t of the arc between two vectors."""
    angle = acos(max(-1.0, min(1.0, float(a @ b / (a.norm() * b.norm())))))
    return (sin((1 - t) * angle) * a + sin(t * angle) * b) / sin(angle)


@few
@given(SEEDS, st.floats(0.05, 0.95))
@pytest.mark.parametrize("no_base", [True, False])
@pytest.mark.parametrize("shape", [(4, 5), (5, 1), (3, 2, 2, 2), (6,)])
def test_nuslerp_goes_along_the_arcs_of_its_scope(shape, no_base, seed, weight):
    rows = random_rows(seed, 2, *shape)
    base = torch.zeros(shape) if no_base else random_rows(seed + 1, *shape)
    params = {"weights": [3 * (1 - weight), 3 * weight], "no_base": no_base}

    def found(scope: str) -> Tensor:
        return merged("nuslerp", rows, base, scope=scope, **params) - base

    a, b = rows
    assert torch.allclose(found("tensor"), arc_by_hand(a.flatten(), b.flatten(), weight).reshape(shape))
    if len(shape) == 1:
        assert torch.allclose(found("row"), found("tensor")) and torch.allclose(
            found("column"), found("tensor")
        )
        return
    by_row = found("row").reshape(-1, shape[-1])
    for i, (u, v) in enumerate(zip(a.reshape(-1, shape[-1]), b.reshape(-1, shape[-1]))):
        straight = (1 - weight) * u + weight * v  # rows of one number have one line
        assert torch.allclose(by_row[i], straight if shape[-1] == 1 else arc_by_hand(u, v, weight))
    by_column = found("column").reshape(shape[0], -1)
    for i, (u, v) in enumerate(zip(a.reshape(shape[0], -1).T, b.reshape(shape[0], -1).T)):
        assert torch.allclose(by_column[:, i], arc_by_hand(u, v, weight))


@pytest.mark.parametrize("scope", ["tensor", "row", "column"])
def test_nuslerp_at_its_edges(scope):
    def found(rows: Any, weights: list[float] | None = None) -> list[float]:
        params = {"scope": scope, "weights": weights}
        return merged("nuslerp", rows, no_base=True, **params).tolist()

    assert found([[1.0, 2.0], [3.0, 6.0]], [1.0, 3.0]) == pytest.approx([2.5, 5.0])  # one line
    assert found([[1.0, 2.0], [-1.0, -2.0]], [1.0, 3.0]) == pytest.approx([-0.5, -1.0])
    assert found([[0.0, 0.0], [0.0, 4.0]]) == pytest.approx([0.0, 4 * sqrt(0.5)])  # zero: at a right angle
    assert found([[1.0, 0.0], [0.0, 1.0]], [1.0, -1.0]) == pytest.approx([sqrt(0.5)] * 2)  # sum 0: half
    assert found([[1.0, 2.0], [3.0, -4.0]], [1.0, 0.0]) == pytest.approx([1.0, 2.0])


def test_nuslerp_is_slerp_where_that_is_not_linear():
    a, b = random_state(0, torch.float64), random_state(1, torch.float64)
    experts = {"a": {k: v for k, v in a.items() if v.dim()}, "b": {k: v for k, v in b.items() if v.dim()}}
    slerp = merge_state_dicts("slerp", experts, params={"t": 0.3})
    assert close(merge_state_dicts("nuslerp", experts, params={"weights": [0.7, 0.3]}), slerp)


@few
@given(SEEDS, st.integers(2, 4), st.booleans())
def test_multislerp_is_the_mean_direction_with_the_mean_norm(seed, count, no_base):
    rows = random_rows(seed, count, 3, 4)
    base = torch.zeros(3, 4) if no_base else random_rows(seed + 1, 3, 4)
    weights = [0.5 + t for t in range(count)]
    found = merged("multislerp", rows, base, weights=weights, no_base=no_base) - base
    share = [w / sum(weights) for w in weights]
    direction = sum(w * row / row.norm() for w, row in zip(share, rows))
    norm = sum(w * row.norm() for w, row in zip(share, rows))
    assert torch.allclose(found, direction / direction.norm() * norm, atol=1e-6)


def test_multislerp_of_particular_vectors():
    assert merged("multislerp", [[3.0, 0.0], [0.0, 1.0]]).tolist() == pytest.approx([sqrt(2)] * 2)
    assert merged("multislerp", [[2.0, 2.0], [0.0, 0.0]]).tolist() == pytest.approx([1.0, 1.0])
    # What cancels has no direction: the weighted mean.
    assert merged("multislerp", [[1.0, 2.0], [-3.0, -6.0]], epsilon=1e-6).tolist() == pytest.approx([-1, -2])
    with refused("multislerp", "sum to 0"):
        merged("multislerp", [[1.0], [2.0]], weights=[1.0, -1.0])


# --------------------------------------------------------------------------------------- subspace boosting


@few
@given(SEEDS, st.sampled_from([0.0, 0.3, 0.7, 1.0]))
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_subspace_boosting_raises_small_singular_values(shape, seed, beta):
    base, rows = random_rows(seed + 1, *shape), random_rows(seed, 2, *shape)
    found = merged("subspace_boosting", rows, base, beta=beta, keys="matrices", scale=0.7) - base
    u, s, vt = torch.linalg.svd(0.7 * rows.sum(0), full_matrices=False)
    first = int((s.cumsum(0) / s.sum() >= beta - 1e-12).nonzero()[0])
    assert torch.allclose(found, u @ torch.diag(s.clamp(min=s[first].item())) @ vt, atol=1e-9)


def test_subspace_boosting_at_its_edges():
    base, experts = model(0)
    plain = merge_state_dicts("task_arithmetic", experts, base, params={"scale": 1.0})
    whole = merge_state_dicts("subspace_boosting", experts, base, params={"beta": 1.0})
    assert close(whole, plain, 1e-9)
    boosted = merge_state_dicts("subspace_boosting", experts, base)
    assert torch.equal(boosted["blocks.1.bias"], plain["blocks.1.bias"])  # no matrix
    # Directions that nothing went in are not boosted.
    row = torch.outer(random_rows(0, 4), random_rows(1, 5))
    assert torch.allclose(merged("subspace_boosting", [row], keys="matrices"), row, atol=1e-9)
    assert not merged("subspace_boosting", [torch.zeros(3, 3)], keys="matrices").any()


def test_subspace_boosting_takes_packed_attention_in_three():
    name, taus = "blocks.0.attn.in_proj_weight", random_rows(0, 3, 4, 4)
    packed = {name: taus.reshape(12, 4)}
    zero = {name: torch.zeros(12, 4, dtype=torch.float64)}
    params = {"beta": 0.5}
    found = merge_state_dicts("subspace_boosting", {"e": packed}, zero, params=params)[name]
    each = [merged("subspace_boosting", [tau], keys="matrices", beta=0.5) for tau in taus]
    assert torch.allclose(found, torch.cat(each))
    whole = merge_state_dicts("subspace_boosting", {"e": packed}, zero, params={**params, "split_qkv": False})
    assert not torch.allclose(whole[name], found)
