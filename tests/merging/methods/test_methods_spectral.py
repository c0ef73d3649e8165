"""What is special to the spectral and data-free optimised methods, against dense formulas on small random models."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from checkpoints import State, is_matrix, refused, same_tensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import MATRIX, SEEDS, close, family, few, merged
from torch import Tensor

from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.algebra import decompositions, directions
from mergeline.merging.engine.cache import store_at
from mergeline.merging.engine.planning import make_plan


def task_vectors(base: State, experts: dict[str, State], name: str = MATRIX) -> Tensor:
    return torch.stack([expert[name].double() - base[name].double() for expert in experts.values()])


def around_zero(*taus_MN: Tensor) -> tuple[State, dict[str, State]]:
    """A zero base and experts of one matrix in a block."""
    name = "blocks.0.mlp.weight"
    return {name: torch.zeros_like(taus_MN[0])}, {f"e{t}": {name: tau} for t, tau in enumerate(taus_MN)}


def svd_polar(a_MN: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(a_MN, full_matrices=False)
    return u @ vh


# --------------------------------------------------------------------------------------- iso_cts


@few
@given(SEEDS, st.sampled_from([(2, 0.5), (4, 0.0), (3, 0.3)]))
def test_iso_cts_replaces_the_weakest_common_directions(seed, setting):
    count, fraction = setting
    base, experts = family(seed, count)
    taus_TMN = task_vectors(base, experts)
    each = round((4 - int(4 * fraction)) / count)
    common = 4 - each * count
    u, s, vh = torch.linalg.svd(taus_TMN.sum(0), full_matrices=False)
    us, ss, vs = [u[:, :common]], [s[:common]], [vh[:common].T]
    for tau_MN in taus_TMN:
        own = torch.linalg.svd(tau_MN - us[0] @ us[0].T @ tau_MN, full_matrices=False)
        us, ss, vs = [*us, own[0][:, :each]], [*ss, own[1][:each]], [*vs, own[2][:each].T]
    update_MN = torch.cat(ss).mean() * svd_polar(torch.cat(us, -1)) @ svd_polar(torch.cat(vs, -1)).T
    found = merged("iso_cts", experts, base, common_fraction=fraction, scale=0.5)
    assert torch.allclose(found[MATRIX].double(), base[MATRIX] + 0.5 * update_MN, atol=1e-5)
    mean_N = task_vectors(base, experts, "blocks.1.bias").mean(0)
    assert torch.allclose(found["blocks.1.bias"].double(), base["blocks.1.bias"] + 0.5 * mean_N, atol=1e-6)


@few
@given(SEEDS)
def test_iso_cts_whose_tasks_get_no_direction_is_iso_c(seed):
    base, experts = family(seed)
    for fraction in (0.8, 1.0):  # one direction left for three tasks, and none
        assert close(
            merged("iso_cts", experts, base, common_fraction=fraction), merged("iso_c", experts, base), 1e-6
        )


def test_iso_cts_leaves_out_directions_in_which_nothing_changed():
    tau_MN = torch.zeros(6, 4)
    tau_MN[:2, :2] = torch.eye(2)
    [found] = merged("iso_cts", *reversed(around_zero(tau_MN, tau_MN)), common_fraction=0.5).values()
    # Two common directions of singular value 2, of four; nothing is left for the tasks.
    assert torch.allclose(found, tau_MN)


# --------------------------------------------------------------------------------------- wudi, optmerge, swudi


def truncated(a_MN: Tensor, k: int) -> Tensor:
    u, s, vh = torch.linalg.svd(a_MN, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


def loss(merged_MN: Tensor, taus_TMN: Tensor) -> Tensor:
    """WUDI's, as the paper has it."""
    return sum(((merged_MN - tau) @ tau.T).square().sum() / tau.square().sum() for tau in taus_TMN)


def update_of(method: str, experts: dict[str, State], base: State, **params: object) -> Tensor:
    return (merged(method, experts, base, **params)[MATRIX] - base[MATRIX]).double()


def family64(seed: int, experts: int = 3) -> tuple[State, dict[str, State]]:
    base, states = family(seed, experts)
    return (
        {k: v.double() for k, v in base.items()},
        {e: {k: v.double() for k, v in state.items()} for e, state in states.items()},
    )


@few
@given(SEEDS, st.sampled_from([("adam", 1e-3, 0.0), ("sgd", 0.05, 0.0)]), st.integers(1, 4))
def test_wudi_takes_the_steps_of_torchs_optimiser_on_its_loss(seed, setting, count):
    optimizer, rate, momentum = setting
    base, experts = family64(seed, count)
    taus_TMN = task_vectors(base, experts)
    merged_MN = taus_TMN.sum(0).requires_grad_()
    steps = {
        "adam": lambda: torch.optim.Adam([merged_MN], lr=rate),
        "sgd": lambda: torch.optim.SGD([merged_MN], lr=rate, momentum=momentum),
    }[optimizer]()
    for _ in range(5):
        steps.zero_grad()
        loss(merged_MN, taus_TMN).backward()
        steps.step()
    found = update_of("wudi", experts, base, iterations=5, learning_rate=rate, optimizer=optimizer)
    # Adam follows the sign of what is only noise: the slope around a single task vector.
    assert torch.allclose(found, merged_MN.detach(), atol=1e-4 if count == 1 else 1e-9)


@few
@given(SEEDS, st.sampled_from([0.01, 1.0]))
def test_wudi_direct_is_where_the_damped_loss_has_no_slope(seed, damping):
    base, experts = family64(seed)
    taus_TMN = task_vectors(base, experts)
    mean_eigenvalue = len(taus_TMN) / taus_TMN.shape[-1]  # each of C's summands has trace 1
    merged_MN = update_of("wudi", experts, base, solver="direct", damping=damping).requires_grad_()
    (loss(merged_MN, taus_TMN) + damping * mean_eigenvalue * merged_MN.square().sum()).backward()
    assert merged_MN.grad.abs().max() < 1e-10


@few
@given(SEEDS)
def test_wudi_direct_of_one_expert_is_that_expert_but_for_the_damping(seed):
    base, experts = family64(seed, 1)
    assert close(
        merged("wudi", experts, base, solver="direct", damping=1e-8, other="sum"), experts["e0"], 1e-5
    )
    assert close(merged("wudi", experts, base, other="sum"), experts["e0"], 1e-5)


@few
@given(SEEDS)
def test_cart_wudi_is_cart_beside_the_least_interference_around_the_mean(seed):
    """Without flattening and low-rank parts its loss has no slope; with them it adds what CART adds to the mean."""
    base, experts = family64(seed)
    taus_TMN = task_vectors(base, experts)
    mean_MN = taus_TMN.mean(0)
    plain = {"scale": 1.0, "power": 1.0, "low_rank": 0.0, "damping": 0.1}
    moved_MN = (update_of("cart_wudi", experts, base, **plain) - mean_MN).requires_grad_()
    damped = 0.1 * len(taus_TMN) / taus_TMN.shape[-1] * moved_MN.square().sum()
    (loss(mean_MN + moved_MN, taus_TMN) + damped).backward()
    assert moved_MN.grad.abs().max() < 1e-10

    cart_MN = update_of("cart", experts, base, rank=0.5) - mean_MN
    both_MN = update_of("cart_wudi", experts, base, **plain | {"low_rank": 0.7, "rank": 0.5, "scale": 2.0})
    assert torch.allclose(both_MN, mean_MN + 2 * (moved_MN + 0.7 * cart_MN), atol=1e-9)
    bias = "blocks.1.bias"
    assert torch.allclose(
        merged("cart_wudi", experts, base)[bias], sum(e[bias] for e in experts.values()) / len(experts)
    )


@few
@given(SEEDS, st.sampled_from([0.0, 0.5, 1.0]))
def test_raising_singular_values_to_a_power_keeps_the_norm_and_the_vectors(seed, power):
    a_MN = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    a_MN = a_MN[:, :4] @ a_MN[:4]  # of rank 4: the fifth singular value stays 0
    u, s, vh = torch.linalg.svd(a_MN, full_matrices=False)
    raised = s[:4] ** power
    expected = (u[:, :4] * raised * s.norm() / raised.norm()) @ vh[:4]
    assert torch.allclose(decompositions.raised_to(a_MN, power), expected, atol=1e-8)


@few
@given(SEEDS)
def test_what_wudi_does_to_other_tensors(seed):
    base, experts = family(seed)
    tau_TN = task_vectors(base, experts, "blocks.1.bias")
    updates = {"pretrained": 0 * tau_TN[0], "mean": tau_TN.mean(0), "sum": tau_TN.sum(0)}
    for other, expected_N in updates.items():
        for method in ("wudi", "optmerge", "swudi"):
            found = merged(method, experts, base, other=other, scale=0.5)["blocks.1.bias"]
            assert torch.allclose(found.double(), base["blocks.1.bias"] + 0.5 * expected_N, atol=1e-6)


@few
@given(SEEDS, st.booleans())
def test_optmerge_takes_the_steps_of_torchs_optimiser_on_its_loss(seed, official):
    base, experts = family64(seed)
    taus_TMN, k = task_vectors(base, experts), 2
    mean_MN = taus_TMN.mean(0)
    terms = []
    for tau_MN in taus_TMN:
        low_MN = truncated(tau_MN, k)
        target_MN = low_MN if official else truncated(tau_MN - mean_MN, k) + mean_MN
        terms.append((target_MN, low_MN, tau_MN.square().sum()))
    merged_MN = (mean_MN if official else taus_TMN.sum(0)).clone().requires_grad_()
    steps = (
        torch.optim.SGD([merged_MN], lr=1e-2, momentum=0.9)
        if official
        else torch.optim.Adam([merged_MN], lr=1e-2)
    )
    for _ in range(5):
        steps.zero_grad()
        sum(((merged_MN - to) @ low.T).square().sum() / size for to, low, size in terms).backward()
        steps.step()
    variant = "official" if official else "fusion_bench"
    setting = {"iterations": 5, "learning_rate": 1e-2, "rank": 0.5, "variant": variant}
    assert torch.allclose(update_of("optmerge", experts, base, **setting), merged_MN.detach(), atol=1e-9)


def test_optmerge_without_a_direction_for_each_task_is_the_mean():
    base, experts = family(0, 7)
    mean_MN = task_vectors(base, experts).mean(0)
    assert torch.allclose(update_of("optmerge", experts, base), mean_MN, atol=1e-6)


@few
@given(SEEDS, st.sampled_from(["exponential", "tikhonov", "landweber"]), st.sampled_from(["swudi", "iwudi"]))
def test_swudi_filters_the_way_from_the_sum_to_the_minimum(seed, filter, variant):
    base, experts = family64(seed)
    taus_TMN = task_vectors(base, experts)
    size_T = taus_TMN.square().sum((1, 2))[:, None, None]
    inner_TNN = taus_TMN.mT @ taus_TMN / size_T
    energy_N, q_NN = torch.linalg.eigh(inner_TNN.sum(0))
    minimum_MN = (taus_TMN @ inner_TNN).sum(0) @ inner_TNN.sum(0).inverse()
    f_N = {
        "exponential": 1 - (-energy_N * 7.0).exp(),
        "tikhonov": energy_N / (energy_N + 0.3),
        "landweber": 1 - (1 - 0.9 * energy_N / energy_N.max()) ** 4,
    }[filter]
    if variant == "swudi":
        f_N[:-3] = 0  # ceil(0.65 * 4) leading directions
    start_MN = taus_TMN.sum(0)
    expected_MN = start_MN + (minimum_MN - start_MN) @ (q_NN * f_N) @ q_NN.T
    setting = {"filter": filter, "variant": variant, "time": 7.0, "alpha": 0.3, "iterations": 4}
    assert torch.allclose(update_of("swudi", experts, base, **setting), expected_MN, atol=1e-8)


def test_aswudi_counts_the_directions_that_matter():
    """Eigenvalues of C: 0.9 + 0.8 and 0.1 + 0.2. They count as (1.7^.5 + 0.3^.5)^2 / 2 = 1.7, so both are kept."""
    a, b = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, 1.0]))
    found = merged("swudi", *reversed(around_zero(a, b)), variant="aswudi")["blocks.0.mlp.weight"]
    minimum = torch.diag(torch.tensor([(2.7 + 1.6) / 1.7, (0.1 + 0.2) / 0.3]))
    assert torch.allclose(found, minimum)
    # With nothing in the second direction, only the first is.
    one = torch.diag(torch.tensor([3.0, 0.0]))
    found = merged("swudi", *reversed(around_zero(one, 2 * one)), variant="aswudi")["blocks.0.mlp.weight"]
    assert torch.allclose(found, 1.5 * one)


@few
@given(SEEDS)
def test_iwudi_without_time_is_the_sum_and_with_all_of_it_wudis_minimum(seed):
    base, experts = family64(seed)
    start_MN = task_vectors(base, experts).sum(0)
    assert torch.allclose(update_of("swudi", experts, base, variant="iwudi", time=1e-9), start_MN, atol=1e-6)
    direct_MN = update_of("wudi", experts, base, solver="direct", damping=1e-10)
    found = update_of("swudi", experts, base, variant="iwudi", time=1e6)
    assert torch.allclose(found, direct_MN, atol=1e-5)


# --------------------------------------------------------------------------------------- opcm


@few
@given(SEEDS, st.sampled_from([0.2, 0.5]))
def test_opcm_adds_what_is_orthogonal_and_keeps_the_mean_norm_after_each_expert(seed, threshold):
    """As the official code goes on: full bases, and a rescaling of the whole model after every expert."""
    base, experts = family64(seed)
    taus = [{name: state[name] - base[name] for name in base} for state in experts.values()]
    norms = [sum(tau.square().sum() for tau in state.values()).sqrt() for state in taus]
    found, last = dict(taus[0]), 1.0
    for t, state in enumerate(taus[1:], start=1):
        for name, tau in state.items():
            if tau.ndim == 2:
                u, s, vh = torch.linalg.svd(found[name], full_matrices=True)
                split = int((s.cumsum(0) / s.sum() > threshold).float().argmax())
                core = u.T @ tau @ vh.T
                core.diagonal().fill_(0)
                core[:split, :split] = 0
                tau = u @ core @ vh
            found[name] = last * found[name] + tau
        norm, target = sum(v.square().sum() for v in found.values()).sqrt(), sum(norms[: t + 1]) / (t + 1)
        found = {name: value * target / norm for name, value in found.items()}
        last = norm / target
    expected = {name: base[name] + value for name, value in found.items()}
    assert close(merged("opcm", experts, base, threshold=threshold, keys="matrices"), expected, 1e-8)


def test_opcm_of_one_expert_is_that_expert_and_the_order_of_others_matters():
    base, experts = family(0)
    assert close(merged("opcm", {"e0": experts["e0"]}, base), experts["e0"])
    backwards = dict(reversed(experts.items()))
    assert not close(merged("opcm", experts, base), merged("opcm", backwards, base), 1e-3)


def test_which_tensors_are_projections():
    names = ["visual.proj", "text_projection", "visual_projection.weight", "blocks.0.attn.in_proj_weight"]
    others = ["visual.positional_embedding", "conv1.weight", "project.weight", "blocks.0.ln_1.weight"]
    assert all(is_matrix(name, (3, 2), "block_linear+proj") for name in names)
    assert not any(is_matrix(name, (3, 2), "block_linear+proj") for name in others)


# --------------------------------------------------------------------------------------- doge


@few
@given(SEEDS, st.sampled_from([2, 4]))
def test_doge_takes_the_projected_steps_of_torchs_adam_on_its_loss(seed, subspace):
    base, experts = family64(seed, 2)
    taus_TMN = task_vectors(base, experts)
    rate_T11 = (0.5 / taus_TMN.norm(dim=(1, 2)))[:, None, None]
    lefts = [torch.linalg.svd(tau, full_matrices=False).U[:, :2] for tau in taus_TMN]
    shared = torch.linalg.svd(torch.cat(lefts, -1), full_matrices=False).U[:, : 4 // subspace]
    moved_MN = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([moved_MN], lr=1e-2)
    for _ in range(5):
        adam.zero_grad()
        gaps_TMN = taus_TMN * (taus_TMN - (rate_T11 * (taus_TMN + moved_MN)).sum(0))
        gaps_TMN.sum(-1).square().sum().backward()
        moved_MN.grad -= shared @ shared.T @ moved_MN.grad
        adam.step()
    setting = {"scale": 0.5, "subspace": subspace, "iterations": 5, "learning_rate": 1e-2, "density": 1.0}
    expected_MN = (rate_T11 * (taus_TMN + moved_MN.detach())).sum(0)
    assert torch.allclose(update_of("doge", experts, base, **setting), expected_MN, atol=1e-9)


def test_doge_keeps_the_largest_entries_of_all_matrices_or_each():
    base = {f"blocks.{i}.mlp.weight": torch.zeros(2, 2) for i in range(2)} | {"bias": torch.zeros(2)}
    expert = {
        "blocks.0.mlp.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "blocks.1.mlp.weight": torch.tensor([[10.0, 20.0], [30.0, 40.0]]),
        "bias": torch.tensor([100.0, 100.0]),
    }
    kept = {}
    for scope in ("global", "tensor"):
        found = merged("doge", {"e": expert}, base, scale=1.0, density=0.5, iterations=0, scope=scope)
        kept[scope] = [(found[f"blocks.{i}.mlp.weight"] != 0).flatten().tolist() for i in range(2)]
        assert not found["bias"].any()
    assert kept["global"] == [[False, False, False, True], [True] * 4]  # one more than half, as in ties
    assert kept["tensor"] == [[False, True, True, True]] * 2


# --------------------------------------------------------------------------------------- dc_merge, star, svc


@few
@given(SEEDS, st.sampled_from([0.1, 0.5]))
def test_dc_merge_merges_by_sign_in_the_basis_that_covers_all(seed, density):
    base, experts = family64(seed, 2)
    parts = [torch.linalg.svd(tau, full_matrices=False) for tau in task_vectors(base, experts)]
    left = svd_polar(torch.cat([u[:, :2] for u, _, _ in parts], -1))
    right = svd_polar(torch.cat([vh[:2].T for _, _, vh in parts], -1))
    cores = []
    for u, s, vh in parts:
        core = left.T @ (u[:, :2] * s[:2]) @ vh[:2] @ right
        kept = max(1, int(density * 16))
        cores.append(core * (core.abs() >= core.abs().flatten().sort().values[-kept]))
    core = torch.zeros(4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            column = torch.stack([c[i, j] for c in cores])
            agreeing = column[column.sign() * column.sum().sign() > 0]
            core[i, j] = agreeing.mean() if len(agreeing) and i // 2 == j // 2 else 0
    found = update_of("dc_merge", experts, base, density=density, scale=0.5)
    assert torch.allclose(found, 0.5 * left @ core @ right.T, atol=1e-8)


@few
@given(SEEDS)
def test_dc_merge_of_one_expert_is_that_expert(seed):
    base, experts = family(seed, 1)
    assert close(merged("dc_merge", experts, base, density=1.0), experts["e0"], 1e-5)


@few
@given(SEEDS, st.sampled_from([0.3, 0.7, 1.0]))
def test_star_keeps_the_nuclear_norm_of_each_task_vector(seed, energy):
    base, experts = family64(seed)
    expected_MN = torch.zeros(6, 4, dtype=torch.float64)
    for tau_MN in task_vectors(base, experts):
        s = torch.linalg.svdvals(tau_MN)
        k = next(k for k in range(1, 5) if s[:k].sum() >= energy * s.sum() - 1e-12)
        expected_MN += truncated(tau_MN, k) * s.sum() / s[:k].sum() / 3
    assert torch.allclose(update_of("star", experts, base, energy=energy), expected_MN, atol=1e-8)


@few
@given(SEEDS, st.sampled_from([0.1, 1.0]))
def test_svc_divides_by_how_often_tasks_were_counted(seed, alpha):
    base, experts = family64(seed)
    update_MN = update_of("task_arithmetic", experts, base, scale=1.0)
    u, s, vh = torch.linalg.svd(update_MN, full_matrices=False)
    for r in range(4):
        counted = 0.0
        for tau_MN in task_vectors(base, experts):
            own_N = u[:, r] @ tau_MN
            counted += max(alpha, float(s[r] * vh[r] @ own_N / (own_N @ own_N)))
        s[r] *= 3 / counted
    found = update_of("svc", experts, base, alpha=alpha, scale=1.0)
    assert torch.allclose(found, (u * s) @ vh, atol=1e-6)


def test_svc_of_experts_that_agree_gives_them_back():
    base, experts = family(0, 1)
    copies = {name: experts["e0"] for name in "abc"}
    found = merged("svc", copies, base, scale=1.0)  # the sum counts them three times
    assert torch.allclose(found[MATRIX], experts["e0"][MATRIX], atol=1e-5)
    whole = base["blocks.1.bias"] + 3 * (experts["e0"]["blocks.1.bias"] - base["blocks.1.bias"])
    assert torch.allclose(found["blocks.1.bias"], whole, atol=1e-5)


# --------------------------------------------------------------------------------------- knots


@few
@given(SEEDS)
@pytest.mark.parametrize("inner", ["task_arithmetic", "average"])
def test_knots_of_a_linear_merge_is_that_merge_of_matrices(inner, seed):
    base, experts = family(seed)
    found, plain = merged("knots", experts, base, inner=inner), merged(inner, experts, base)
    if inner == "task_arithmetic":
        plain = merged(inner, experts, base, scale=0.6)
    for name in base:
        linear = is_matrix(name, base[name].shape, "block_linear")
        assert torch.allclose(found[name], plain[name] if linear else base[name], atol=1e-5)


@few
@given(SEEDS, st.sampled_from([2, 3]), st.sampled_from(["global", "tensor"]))
def test_knots_is_its_inner_method_on_all_matrices_in_their_common_basis(seed, count, scope):
    """Low-rank experts have fewer rows there, of which a share is kept."""
    names, generator = [f"blocks.{i}.mlp.weight" for i in range(2)], torch.Generator().manual_seed(seed)
    base = {name: torch.randn(6, 4, generator=generator, dtype=torch.float64) for name in names}
    base["head"] = torch.zeros(2, 2, dtype=torch.float64)

    def rank_one() -> Tensor:
        left, right = torch.randn(6, 1, generator=generator), torch.randn(1, 4, generator=generator)
        return left.double() @ right.double()

    taus = [{name: (i + 1) * rank_one() for i, name in enumerate(names)} for _ in range(count)]
    experts = {
        f"e{t}": {name: base[name] + tau.get(name, 9.0) for name in base} for t, tau in enumerate(taus)
    }
    basis = {
        n: torch.linalg.svd(torch.cat([tau[n] for tau in taus], -1)).U[:, :count].contiguous() for n in names
    }
    rotated = {f"e{t}": {n: basis[n].T @ tau[n] for n in names} for t, tau in enumerate(taus)}
    zero = {n: torch.zeros(count, 4, dtype=torch.float64) for n in names}
    params = {"density": 0.4, "scale": 0.7, "scope": scope}
    inner = merged("ties", rotated, zero, **params)
    expected = {n: base[n] + basis[n] @ inner[n] for n in names} | {"head": base["head"]}
    assert close(merged("knots", experts, base, **params), expected, 1e-8)


@few
@given(SEEDS)
def test_knots_drops_entries_of_what_its_inner_method_sees(seed):
    base, experts = family(seed)
    assert same_tensors(merged("knots", experts, base, drop_rate=1.0), base)
    found = merged("knots", experts, base, inner="average", drop_rate=0.5)[MATRIX]
    assert not torch.allclose(found, merged("average", experts)[MATRIX], atol=1e-3)


def test_knots_leaves_out_small_singular_values():
    a, b = torch.diag(torch.tensor([3.0, 0.1])), torch.diag(torch.tensor([1.0, 0.1]))
    params = {"inner": "average", "threshold": 0.2}
    [found] = merged("knots", *reversed(around_zero(a, b)), **params).values()
    assert torch.allclose(found, torch.diag(torch.tensor([2.0, 0.0])))


def test_knots_decomposes_once_with_a_factor_store(tmp_path):
    base, experts = family(0)
    with patch.object(directions, "leading", wraps=decompositions.leading) as leading:
        plain = merge_state_dicts("knots", experts, base)
        assert leading.call_count > 2
        leading.reset_mock()
        stored = merge_state_dicts("knots", experts, base, factors=store_at(tmp_path))
        assert leading.call_count == 2  # a matrix
    assert same_tensors(stored, plain)


# --------------------------------------------------------------------------------------- cosine basis


@few
@given(SEEDS)
def test_cosine_columns_of_the_largest_norm_stand_in_for_singular_vectors(seed):
    base, experts = family64(seed)
    place = torch.arange(4, dtype=torch.float64)
    basis = torch.cos(torch.pi / 4 * (place[:, None] + 0.5) * place) / 2**0.5
    basis[:, 0] /= 2**0.5
    taus_TMN = task_vectors(base, experts)
    methods = (("lowrank_task_arithmetic", 0.3, 0), ("cart", 1.7, taus_TMN.mean(0)))
    for (method, scale, centre), (name, norm) in itertools.product(methods, (("dct", 2), ("dct_l1", 1))):
        expected_MN = centre + 0 * taus_TMN[0]
        for tau_MN in taus_TMN - centre:
            kept = basis[:, (tau_MN @ basis).norm(norm, dim=0).argsort(descending=True)[:2]]
            expected_MN = expected_MN + scale * tau_MN @ kept @ kept.T
        found = update_of(method, experts, base, basis=name, rank=0.5, scale=scale)
        assert torch.allclose(found, expected_MN, atol=1e-9)


def test_cosine_basis_of_full_rank_is_the_method_itself_and_has_no_singular_vectors_to_orthogonalise():
    base, experts = family(0)
    for params in ({"rank": 1.0}, {"rank_rule": "energy", "energy": 1.0}):
        whole = merged("cart", experts, base, scale=1.7, **params)
        found = merged("cart", experts, base, scale=1.7, basis="dct", **params)
        assert torch.allclose(found[MATRIX], whole[MATRIX], atol=1e-5)
    with refused("cart", "set basis to svd"):
        merged("cart", experts, base, basis="dct", reduce="tsv")


# --------------------------------------------------------------------------------------- core_space


def adapters(seed: int, ranks: tuple[int, ...] = (1, 2)) -> tuple[State, dict[str, State]]:
    """A base, and bare factors for one of its tensors."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(6, 4, generator=generator) for name in ("blocks.0.mlp.weight", "head.weight")}
    experts = {
        f"e{t}": {
            "blocks.0.mlp.weight.lora_A": torch.randn(rank, 4, generator=generator),
            "blocks.0.mlp.weight.lora_B": torch.randn(6, rank, generator=generator),
        }
        for t, rank in enumerate(ranks)
    }
    return base, experts


def product(factors: State) -> Tensor:
    return factors["blocks.0.mlp.weight.lora_B"] @ factors["blocks.0.mlp.weight.lora_A"]


@few
@given(SEEDS, st.sampled_from([(1,), (1, 2), (3, 3, 3)]))
def test_bare_factors_are_experts_of_a_base_in_memory_and_in_files(seed, ranks):
    base, experts = adapters(seed, ranks)
    expected = base["blocks.0.mlp.weight"] + 0.5 * sum(map(product, experts.values()))
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.safetensors") for name in (*experts, "base", "out")}
        for name, state in {**experts, "base": base}.items():
            save_file(state, files[name])
        for method, params in (
            ("task_arithmetic", {}),
            ("core_space", {"inner": "task_arithmetic"}),
        ):
            found = merged(method, experts, base, scale=0.5, **params)
            recipe = {"method": method, "params": {"scale": 0.5, **params}, "base": files["base"]}
            merge({**recipe, "experts": {name: files[name] for name in experts}}, files["out"])
            assert torch.allclose(found["blocks.0.mlp.weight"], expected, atol=1e-5)
            assert torch.equal(found["head.weight"], base["head.weight"])
            assert same_tensors(load_file(files["out"]), found)


@few
@given(SEEDS, st.sampled_from(["tsv_merge", "cart", "iso_c"]))
def test_core_space_merges_in_bases_of_all_factors_which_may_be_any(seed, inner):
    base, experts = adapters(seed, (1, 1, 1))
    lefts, rights = (
        torch.stack([e[f"blocks.0.mlp.weight.lora_{side}"].double().flatten() for e in experts.values()], 1)
        for side in "BA"
    )
    # Other bases than those of QR: singular vectors.
    left, right = (torch.linalg.svd(side, full_matrices=False).U for side in (lefts, rights))
    cores = {name: {"blocks.0.w": left.T @ product(pair).double() @ right} for name, pair in experts.items()}
    zero = {"blocks.0.w": torch.zeros(3, 3, dtype=torch.float64)}
    params = {"rank": 0.5} if inner == "cart" else {}
    rounding = {"rank_rounding": "ceil"} if params else {}
    core = merged(inner, cores, zero, scale=0.7, **params, **rounding)
    found = merged("core_space", experts, base, inner=inner, scale=0.7, **params)["blocks.0.mlp.weight"]
    expected = base["blocks.0.mlp.weight"] + left @ core["blocks.0.w"] @ right.T
    assert torch.allclose(found.double(), expected, atol=1e-4)
    # Without a base, what is added; the factors themselves are nothing that can be averaged.
    delta = merged("core_space", experts, inner=inner, scale=0.7, **params)
    assert delta.keys() == {"blocks.0.mlp.weight"}
    added = expected - base["blocks.0.mlp.weight"]
    assert torch.allclose(delta["blocks.0.mlp.weight"].double(), added, atol=1e-4)
    assert merged("average", experts).keys() == experts["e0"].keys()


@few
@given(SEEDS)
def test_core_space_of_experts_that_span_everything_is_its_inner_method(seed):
    base, experts = family(seed)
    for inner in ("tsv_merge", "iso_c"):
        found, plain = merged("core_space", experts, base, inner=inner), merged(inner, experts, base)
        assert torch.allclose(found[MATRIX], plain[MATRIX], atol=1e-4)
        assert torch.equal(found["blocks.1.bias"], base["blocks.1.bias"])


def test_bare_factors_that_do_not_fit_are_refused(tmp_path):
    base, experts = adapters(0, (1, 2))
    files = {name: tmp_path / f"{name}.safetensors" for name in ("e0", "e1", "base")}
    for name, state in {**experts, "base": base}.items():
        save_file(state, files[name])
    recipe = {"method": "average", "experts": {"e0": files["e0"], "e1": files["e1"]}, "base": files["base"]}
    save_file({"blocks.0.mlp.weight": torch.ones(5, 4)}, files["base"])
    with refused("e0", "[1, 4]", "[6, 1]", "[5, 4]", "base that they were trained on"):
        merge(recipe, tmp_path / "out.safetensors")
    save_file({"blocks.0.mlp.weigth": torch.ones(6, 4)}, files["base"])
    with refused("e0", "'blocks.0.mlp.weight'", "did you mean 'blocks.0.mlp.weigth'?"):
        merge(recipe, tmp_path / "out.safetensors")
    save_file(base, files["base"])
    experts["e0"]["blocks.0.mlp.weight.lora_A"][0, 1] = float("nan")
    save_file(experts["e0"], files["e0"])
    with refused("'e0'", "'blocks.0.mlp.weight'", "NaN"):
        merge({**recipe, "method": "core_space"}, tmp_path / "out.safetensors")


# --------------------------------------------------------------------------------------- memory


def test_the_plan_counts_what_a_method_holds_beside_the_matrices_of_the_smaller_side(tmp_path):
    files = {name: tmp_path / f"{name}.safetensors" for name in ("base", "a", "b")}
    recipe = {"experts": {n: files[n] for n in "ab"}, "base": files["base"]}
    for file in files.values():
        save_file({"blocks.0.w": torch.zeros(2, 50)}, file)
    peaks = {
        name: make_plan({**recipe, "method": name}).peak_bytes for name in ("cart", "wudi", "doge", "knots")
    }
    assert peaks["wudi"] >= peaks["cart"] + 8 * 5 * 50 * 50  # squares of the inputs' side
    assert peaks["doge"] >= peaks["cart"] + 8 * 2 * 2 * 50
    wrapped = make_plan({**recipe, "method": "svc", "params": {"inner": "wudi"}}).peak_bytes
    assert wrapped > peaks["wudi"]


# --------------------------------------------------------------------------------------- robust_merge


def test_robust_merge_prunes_and_rescales_factors():
    """By hand: what is below the second smallest of 4 entries goes; of two ratios the smaller is raised, or is not."""
    name = "blocks.0.mlp.weight"
    experts = {
        "a": {
            f"{name}.lora_A": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            f"{name}.lora_B": torch.tensor([[1.0, 5.0], [6.0, 7.0]]),
        },
        "b": {
            f"{name}.lora_A": torch.tensor([[8.0, 9.0], [-2.0, 6.0]]),
            f"{name}.lora_B": torch.tensor([[3.0, 0.0], [0.0, 3.0]]),
        },
    }
    # int(4 * 0.6) = 2: what is at least the second smallest stays. Ratios: a 3/2 and 1, b 1 and 8/6.
    down = torch.tensor([[0.0, 2.0], [3.0, 4.0]]) + torch.tensor([[8.0, 9.0], [0.0, 6.0]])
    ratios = {0.6: ([1.5, 1.0], [1.0, 4 / 3]), 0.4: ([1.5, 1.5], [4 / 3, 4 / 3])}
    ups = torch.tensor([[0.0, 5.0], [6.0, 7.0]]), torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    for att_ratio, (a, b) in ratios.items():
        a, b = torch.tensor(a), torch.tensor(b)
        up = (ups[0] * a + ups[1] * b) / (a + b)
        found = merged("robust_merge", experts, mask_ratio=0.4, att_ratio=att_ratio, scale=0.5)
        assert torch.allclose(found[name], 0.25 * up @ down)
    experts["a"] = {
        key: tensor[:, :1] if key.endswith("B") else tensor[:1] for key, tensor in experts["a"].items()
    }
    with refused("robust_merge", "different ranks, [1, 2]", name):
        merged("robust_merge", experts)


@few
@given(SEEDS)
def test_robust_merge_of_one_adapter_that_is_not_pruned_is_that_adapter(seed):
    base, experts = adapters(seed, (2,))
    found = merged("robust_merge", experts, base, mask_ratio=0.999, scale=1.0)["blocks.0.mlp.weight"]
    expected = base["blocks.0.mlp.weight"] + product(experts["e0"])
    assert torch.allclose(found, expected, atol=1e-5)
