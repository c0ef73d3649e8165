"""DOP, ACE-Merging, ResMerge, DRM and FR-Merging, against their formulas written out in float64."""

from __future__ import annotations

import pytest
import torch
from checkpoints import State, refused
from hypothesis import given
from hypothesis import strategies as st
from small_models import SEEDS, close, few, merged
from torch import Tensor

from mergeline.merging.methods import get_method

NAME = "visual.blocks.0.attn.out_proj.weight"
BIAS = "visual.blocks.0.attn.out_proj.bias"
NORM = "visual.blocks.0.ln_1.weight"
SHAPES = [(6, 4), (4, 9), (5, 5)]
few_shapes = st.sampled_from(SHAPES)


def drawn(seed: int, shape: tuple[int, ...], count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def around_zero(taus: list[Tensor], name: str = NAME) -> tuple[State, dict[str, State]]:
    return {name: torch.zeros_like(taus[0])}, {f"e{t}": {name: tau} for t, tau in enumerate(taus)}


def update_of(method: str, taus: list[Tensor], name: str = NAME, **params: object) -> Tensor:
    """What a method makes of task vectors of one tensor, around a base of zeros."""
    base, experts = around_zero(taus, name)
    return merged(method, experts, base, **params)[name]


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


# --------------------------------------------------------------------------------------- dop


def dop_loss(merged_MN: Tensor, tau_MN: Tensor, epsilon: float, space: str) -> Tensor:
    """As the official code has it."""
    u, s, vh = torch.linalg.svd(tau_MN, full_matrices=True)
    share = s.cumsum(0) / s.sum()
    k = len(s) if epsilon == 1 else int(torch.searchsorted(share, epsilon))
    u, s, v = u[:, :k], s[:k], vh.T[:, :k]
    apart_MN = merged_MN - tau_MN
    by_u = (torch.diag(s) @ u.T @ apart_MN).square().sum()
    by_v = (apart_MN @ v @ torch.diag(s)).square().sum()
    return {"u": by_u, "v": by_v, "uv": by_u + by_v}[space]


@few
@given(SEEDS, few_shapes, st.sampled_from(["uv", "u", "v"]), st.sampled_from([1.0, 0.99999, 0.6]))
def test_dop_of_two_experts_is_where_the_official_loss_has_no_slope(seed, shape, space, epsilon):
    taus = drawn(seed, shape, 2)
    params = {"alpha": 0.7, "svd_epsilon": epsilon, "svd_proj_space": space}
    merged_MN = update_of("dop", taus, **params).requires_grad_()
    losses = [dop_loss(merged_MN, tau, epsilon, space) for tau in taus]
    (0.7 * losses[0] + 0.3 * losses[1]).backward()
    assert merged_MN.grad.abs().max() < 1e-9
    mean = [dop_loss(sum(taus) / 2, tau, epsilon, space) for tau in taus]
    assert 0.7 * losses[0] + 0.3 * losses[1] <= 0.7 * mean[0] + 0.3 * mean[1] + 1e-12


@few
@given(SEEDS, few_shapes)
def test_dop_is_the_sylvester_equation_of_the_specification_by_scipy(seed, shape):
    from scipy.linalg import solve_sylvester

    taus = drawn(seed, shape, 2)
    rows, columns = (torch.zeros(side, side, dtype=torch.float64) for side in shape)
    right = torch.zeros(shape, dtype=torch.float64)
    for weight, tau in zip((0.8, 0.2), taus):
        rows += weight * tau @ tau.T
        columns += weight * tau.T @ tau
        right += weight * 2 * tau @ tau.T @ tau
    expected = torch.from_numpy(solve_sylvester(rows.numpy(), columns.numpy(), right.numpy()))
    assert torch.allclose(update_of("dop", taus, svd_epsilon=1.0), expected, atol=1e-8)


def test_dop_folds_over_the_experts_in_their_order():
    taus = drawn(1, (6, 4))
    two = update_of("dop", taus[:2])
    assert torch.allclose(update_of("dop", taus), update_of("dop", [two, taus[2]]), atol=1e-12)
    assert not torch.allclose(update_of("dop", taus), update_of("dop", taus[::-1]), atol=1e-3)
    assert torch.equal(update_of("dop", taus[:1]), taus[0])


def test_dop_leaves_the_mean_where_no_loss_says_anything():
    first, second = torch.zeros(3, 3), torch.zeros(3, 3)
    first[0, 0], second[1, 1], second[2, 2] = 4.0, 2.0, 1.0
    # Strict: of the first nothing is kept, and of the second not the triplet with which the share is reached.
    found = update_of("dop", [first.double(), second.double()], alpha=0.5)
    assert torch.allclose(found, torch.diag(torch.tensor([2.0, 2.0, 0.5])).double())


@few
@given(SEEDS, st.sampled_from([0.1, 10.0]))
def test_dop_scales_with_the_task_vectors(seed, factor):
    taus = drawn(seed, (6, 4))
    scaled = update_of("dop", [factor * tau for tau in taus])
    assert torch.allclose(scaled, factor * update_of("dop", taus), atol=1e-8 * factor)


def test_dop_averages_other_tensors_one_after_the_other():
    taus = drawn(0, (5,), 3)
    found = update_of("dop", taus, BIAS, scale=2.0)
    assert torch.allclose(found, 2 * (((taus[0] + taus[1]) / 2 + taus[2]) / 2))


def test_a_weight_of_one_side_alone_is_noted():
    [note] = get_method("dop").warnings(get_method("dop").resolve({"alpha": 1.0}), 3)
    assert "first expert" in note
    assert not list(get_method("dop").warnings(get_method("dop").resolve({}), 3))


# --------------------------------------------------------------------------------------- ace


ACE_TOY = [
    torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64),
    torch.tensor([[0.0, 1.0], [2.0, 0.0], [-1.0, 1.0]], dtype=torch.float64),
]


def ace_written_out(
    taus: list[Tensor], epsilon: float, threshold: float, rank: float, official: bool
) -> Tensor:
    logs = torch.stack([tau.square().sum().log() for tau in taus])
    spread = logs.var() / logs.mean().square() > threshold
    one = torch.eye(taus[0].shape[1], dtype=torch.float64)
    covariances, regular, weights = [], [], []
    for tau in taus:
        centred = tau - tau.mean(0, keepdim=True)
        raw = centred.T @ centred
        trace = raw.trace()
        covariances.append(raw / trace if spread else raw)
        ridge = epsilon if official and not spread else epsilon / trace
        regular.append(covariances[-1] + ridge * one)
        weights.append(centred if official else tau)
    shift = sum(covariances).mean(0, keepdim=True).expand_as(one)
    if official and spread:
        shift = shift / torch.stack([tau.square().sum() for tau in taus]).mean()
    found = sum(w @ s for w, s in zip(weights, regular)) @ torch.linalg.inv(sum(regular) + shift)
    if not spread:
        return found
    mean = sum(regular if official else covariances) / len(taus)
    u, s, vh = torch.linalg.svd(found + sum(tau @ (c - mean) for tau, c in zip(taus, covariances)))
    k = max(1, int(rank * len(s)))
    return found + s[:k].mean() * u[:, :k] @ vh[:k]


def test_ace_is_the_toy_of_its_specification():
    found = update_of("ace", ACE_TOY)
    expected = [[-0.218749, -0.343747], [1.437499, 1.687498], [-0.937498, 0.312503]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=5e-7)


@few
@given(SEEDS, st.sampled_from(["paper", "official"]), st.sampled_from([0.3, 0.0]), st.integers(2, 4))
def test_ace_is_its_formula(seed, variant, threshold, count):
    official = variant == "official"
    for shape in SHAPES:
        taus = [tau * size for tau, size in zip(drawn(seed, shape, count), (0.1, 0.2, 0.01, 0.3))]
        # In the null space of a wide matrix's rows the ridge alone is divided by.
        params = {"variant": variant, "threshold": threshold, "rank": 0.5, "epsilon": 1e-3}
        expected = ace_written_out(taus, 1e-3, threshold, 0.5, official)
        assert torch.allclose(update_of("ace", taus, **params), expected, atol=1e-9)


def test_ace_has_the_ridge_of_its_variant():
    taus = drawn(0, (6, 4))
    for variant, epsilon in (("paper", 1e-5), ("official", 1e-2)):
        found = update_of("ace", taus, variant=variant)
        assert torch.equal(found, update_of("ace", taus, variant=variant, epsilon=epsilon))


def test_ace_of_task_vectors_without_a_covariance_is_their_mean():
    alike = [torch.full((3, 4), value, dtype=torch.float64) for value in (1.0, 3.0)]
    assert torch.equal(update_of("ace", alike), torch.full((3, 4), 2.0, dtype=torch.float64))
    taus = drawn(0, (6, 4))
    with_the_base = [*taus, torch.zeros(6, 4, dtype=torch.float64)]
    assert torch.allclose(update_of("ace", with_the_base), update_of("ace", taus), atol=1e-12)


@few
@given(SEEDS)
def test_ace_turns_with_the_inputs_but_for_the_column_means(seed):
    """Permuting inputs permutes the merge: nothing in it has a place."""
    taus, order = drawn(seed, (6, 4)), [2, 0, 3, 1]
    turned = update_of("ace", [tau[:, order] for tau in taus])
    assert torch.allclose(turned, update_of("ace", taus)[:, order], atol=1e-9)


def test_ace_of_one_expert_is_not_that_expert():
    [tau] = drawn(0, (6, 4), 1)
    found = update_of("ace", [tau])
    assert torch.allclose(found, ace_written_out([tau, tau], 1e-5, 0.3, 0.3, False), atol=1e-9)
    assert not torch.allclose(found, tau, atol=1e-2)


def test_ace_gives_other_tensors_the_mean():
    taus = drawn(0, (5,))
    assert torch.allclose(update_of("ace", taus, BIAS), sum(taus) / 3)


# --------------------------------------------------------------------------------------- resmerge


def resmerge_written_out(taus: list[Tensor], rank: int, least: float, most: float, budget: float) -> Tensor:
    """Pair by pair, as the official code has it."""
    heads, residuals = [], []
    for tau in taus:
        u, s, vh = torch.linalg.svd(tau, full_matrices=False)
        heads.append((u[:, :rank] * s[:rank]) @ vh[:rank])
        residuals.append(tau - heads[-1])
    count = len(taus)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    units = [residual / residual.norm() for residual in residuals]
    source = sum(units) / sum(units).norm()
    coherence = sum(cosine(unit, source) for unit in units) / count
    agree = sum(cosine(units[i], units[j]) for i, j in pairs) / len(pairs) if pairs else 1.0
    if coherence <= 1 / count**0.5:
        backbone = sum(residuals) / count
    else:
        beta = most - (most - least) * ((agree + 1) / 2 + (coherence + 1) / 2) / 2
        backbone = coherence**beta * sum(r.norm() for r in residuals) / count * source
    reliable = sum(max(0, cosine(heads[i], heads[j])) for i, j in pairs) / len(pairs) if pairs else 1.0
    return backbone + budget * reliable * backbone.norm() * sum(heads) / sum(heads).norm()


@few
@given(SEEDS, few_shapes, st.integers(1, 4), st.integers(1, 2), st.sampled_from([0.0, 1.0]))
def test_resmerge_is_its_formula(seed, shape, count, rank, common):
    shared = drawn(seed + 5000, shape, 1)[0]
    taus = [tau + common * shared for tau in drawn(seed, shape, count)]
    expected = resmerge_written_out(taus, rank, 0.7, 1.0, 0.2)
    assert torch.allclose(update_of("resmerge", taus, rank_topk=rank), expected, atol=1e-9)


def test_resmerge_is_the_toy_of_its_specification():
    """Unit residuals at a cosine of .6, beside leading parts that are the same, in another row."""
    taus = []
    for angle in (0.0, 0.6):
        tau = torch.zeros(3, 4, dtype=torch.float64)
        tau[0, 0] = 5.0
        tau[1, 1], tau[1, 2] = (1.0, 0.0) if not angle else (angle, (1 - angle**2) ** 0.5)
        taus.append(tau)
    found = update_of("resmerge", taus, head_ratio_budget=0.0)
    assert found[1:].norm() == pytest.approx(0.894427**0.737918, abs=1e-6)
    assert found[1:].norm() == pytest.approx(0.920967, abs=1e-6)
    with_heads = update_of("resmerge", taus)
    assert torch.allclose(with_heads[1:], found[1:])
    assert float(with_heads[0, 0]) == pytest.approx(0.2 * 0.920967, abs=1e-6)


def test_resmerge_outside_of_blocks_has_the_exponent_of_no_agreement():
    taus = [tau + 1 for tau in drawn(0, (6, 4))]
    outside = update_of("resmerge", taus, "head.weight", keys="matrices")
    assert torch.allclose(outside, resmerge_written_out(taus, 1, 1.0, 1.0, 0.2), atol=1e-9)


@few
@given(SEEDS, st.sampled_from([0.1, 10.0]))
def test_resmerge_scales_with_the_task_vectors_and_gives_others_the_mean(seed, factor):
    taus = drawn(seed, (6, 4))
    scaled = update_of("resmerge", [factor * tau for tau in taus])
    assert torch.allclose(scaled, factor * update_of("resmerge", taus), atol=1e-8)
    biases = drawn(seed, (5,))
    assert torch.allclose(update_of("resmerge", biases, BIAS), sum(biases) / 3)


def test_residuals_that_are_only_rounding_count_as_none():
    generator = torch.Generator().manual_seed(0)
    taus = [
        torch.outer(*(torch.randn(side, generator=generator, dtype=torch.float64) for side in (6, 4)))
        for _ in range(3)
    ]
    assert torch.equal(update_of("resmerge", taus), torch.zeros(6, 4, dtype=torch.float64))


def test_an_exponent_of_agreement_above_that_of_none_is_refused():
    with refused("src_beta_min 2", "src_beta_max 1"):
        update_of("resmerge", drawn(0, (6, 4)), src_beta_min=2.0)


# --------------------------------------------------------------------------------------- drm


def drm_written_out(taus: list[Tensor], drop: float) -> Tensor:
    """Side by side, by the steps of the official code."""
    u, s, vh = torch.linalg.svd(torch.cat(taus, 1), full_matrices=False)
    kept = s > s.max() * 1e-2
    u, s, vh = u[:, kept], s[kept], vh[kept]
    rights, values = [], []
    for right in vh.split(taus[0].shape[1], 1):
        norm = right.norm(dim=1, keepdim=True)
        rights.append(right / norm)
        values.append(s[:, None] * norm)
    right, value = torch.stack(rights), torch.stack(values)
    dropped = right.numel() - round(right.numel() * (1 - drop))
    if dropped:
        right = right * (right.abs() >= right.abs().flatten().kthvalue(dropped).values)
    rotated = right * value
    signs = rotated.sum(0).sign()
    signs[signs == 0] = signs.sum().sign()
    rotated = rotated * (rotated.sign() == signs)
    return u @ (rotated.sum(0) / rotated.count_nonzero(0).clamp(min=1))


@few
@given(SEEDS, few_shapes, st.sampled_from([0.8, 0.5, 0.0]), st.integers(1, 4))
def test_drm_is_its_formula_in_both_directions(seed, shape, drop, count):
    taus = drawn(seed, shape, count)
    found = update_of("drm", taus, drop_rate=drop)
    assert torch.allclose(found, drm_written_out(taus, drop), atol=1e-9)
    tall = update_of("drm", taus, drop_rate=drop, direction="vertical")
    assert torch.allclose(tall, drm_written_out([tau.T for tau in taus], drop).T, atol=1e-9)


@few
@given(SEEDS)
def test_drm_keeps_the_largest_of_each_rows_share_whatever_the_rows_length(seed):
    taus = drawn(seed, (6, 4))
    scaled = update_of("drm", [3 * tau for tau in taus])
    assert torch.allclose(scaled, 3 * update_of("drm", taus), atol=1e-9)


def test_drm_that_drops_nothing_of_one_expert_is_that_expert_and_says_so():
    [tau] = drawn(0, (4, 9), 1)
    assert torch.allclose(update_of("drm", [tau], drop_rate=0.0), tau, atol=1e-9)
    drm = get_method("drm")
    [note] = drm.warnings(drm.resolve({"drop_rate": 0.0}), 3)
    assert "drops nothing" in note
    assert not list(drm.warnings(drm.resolve({}), 3))


def test_drm_leaves_out_directions_below_a_hundredth_of_the_largest():
    tau = torch.diag(torch.tensor([1.0, 0.5, 0.009], dtype=torch.float64))
    found = update_of("drm", [tau], drop_rate=0.0)
    assert torch.allclose(found, torch.diag(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)))


def test_drm_merges_other_tensors_by_sign():
    taus = [torch.tensor(row, dtype=torch.float64) for row in ([1.0, -1.0, 2.0], [3.0, 3.0, -2.0])]
    assert torch.equal(update_of("drm", taus, BIAS), torch.tensor([2.0, 3.0, 0.0], dtype=torch.float64))


# --------------------------------------------------------------------------------------- free


def filtered(tau: Tensor, ratio: float) -> Tensor:
    """Two masks of the whole transform, one after the other, as in the official code."""
    rows, columns = tau.shape
    low, high = min(rows, columns) // 10, min(rows, columns) * ratio
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    distance = torch.sqrt((x - columns // 2) ** 2 + (y - rows // 2) ** 2)
    found = torch.fft.fft2(tau)
    masks = distance <= low, (distance >= low) & (distance <= high)
    return sum(torch.fft.ifft2(found * mask).real for mask in masks)


@few
@given(
    SEEDS,
    st.sampled_from([*SHAPES, (25, 30), (31, 20), (20, 20), (1, 3)]),
    st.sampled_from([0.7, 0.3, 0.05, 0.0]),
    st.booleans(),
)
def test_free_is_its_formula(seed, shape, ratio, align):
    parts = [filtered(tau, ratio) for tau in drawn(seed, shape)]
    sizes = [float(part.abs().mean()) or 1.0 for part in parts]
    factors = [max(sizes) / size for size in sizes] if align else [1.0] * 3
    expected = 0.7 * sum(factor * part for factor, part in zip(factors, parts))
    found = update_of("free", drawn(seed, shape), filter_ratio=ratio, with_align=align)
    assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "share"), [((768, 768), 0.9998), ((2304, 768), 0.423), ((3072, 768), 0.317)]
)
def test_free_keeps_a_share_of_the_frequencies_that_depends_on_the_aspect_ratio(shape, share):
    impulse = torch.zeros(shape)
    impulse[0, 0] = 1.0  # all frequencies alike: what is left of it is the mean of the mask
    found = float(update_of("free", [impulse], scale=1.0)[0, 0])
    assert found == pytest.approx(share, abs=6e-4)
    free = get_method("free")
    [note] = free.warnings(free.resolve({}), 3)
    assert "square" in note


@few
@given(SEEDS)
def test_free_is_linear_without_alignment_and_of_equal_lengths_with_it(seed):
    taus = drawn(seed, (25, 30))
    apart = [update_of("free", [tau], with_align=False) for tau in taus]
    assert torch.allclose(update_of("free", taus, with_align=False), sum(apart), atol=1e-9)
    scaled = [update_of("free", [tau, size * taus[1]]) for tau, size in ((taus[0], 1.0), (taus[0], 1e-3))]
    largest = max(float(update_of("free", [tau]).abs().mean()) for tau in taus[:2])
    first = float(update_of("free", taus[:1]).abs().mean())
    assert torch.allclose(scaled[1] * (largest / first), scaled[0], atol=1e-9)


def test_free_adds_the_biases_of_attention_and_leaves_other_tensors_the_bases():
    taus = [torch.tensor(row, dtype=torch.float64) for row in ([1.0, 3.0], [-1.0, 0.0], [0.0, 0.0])]
    base = {name: torch.ones(2, dtype=torch.float64) for name in (BIAS, NORM)}
    experts = {f"e{t}": {name: 1 + tau for name in base} for t, tau in enumerate(taus)}
    for align, expected in ((False, [1.0, 3.1]), (True, [-1.1, 3.1])):
        found = merged("free", experts, base, with_align=align)
        assert torch.equal(found[NORM], base[NORM])
        assert torch.allclose(found[BIAS], torch.tensor(expected, dtype=torch.float64))


# --------------------------------------------------------------------------------------- norms of wudi


@few
@given(SEEDS, few_shapes)
def test_wudi_without_norms_is_actmerge(seed, shape):
    taus = [tau * size for tau, size in zip(drawn(seed, shape), (1.0, 0.5, 2.0))]
    slope = sum(tau @ tau.T @ tau for tau in taus)
    expected = slope @ torch.linalg.pinv(sum(tau.T @ tau for tau in taus))
    found = update_of("wudi", taus, solver="direct", norm_power=0.0, damping=1e-10)
    assert torch.allclose(found, expected, atol=1e-5)
    endless = update_of("swudi", taus, variant="iwudi", norm_power=0.0, time=1e12)
    assert torch.allclose(endless, expected, atol=1e-5)
    assert not torch.allclose(update_of("wudi", taus, solver="direct", damping=1e-10), expected, atol=1e-2)


@few
@given(SEEDS, st.sampled_from([0.0, 1.0, 3.0]))
def test_powers_of_norms_weigh_tasks_and_leave_the_trace(seed, power):
    """The damped minimum, with each task's weight written out and the damping of the usual trace."""
    taus = [tau * size for tau, size in zip(drawn(seed, (6, 4)), (1.0, 0.5, 2.0))]
    weights = [float(tau.norm()) ** -power for tau in taus]
    unit = sum(w * float(tau.square().sum()) for w, tau in zip(weights, taus)) / len(taus)
    curvature = sum(w / unit * tau.T @ tau for w, tau in zip(weights, taus))
    assert curvature.trace() == pytest.approx(3.0)
    slope = sum(w / unit * tau @ tau.T @ tau for w, tau in zip(weights, taus))
    expected = slope @ torch.linalg.inv(curvature + 0.01 * 3 / 4 * torch.eye(4, dtype=torch.float64))
    assert torch.allclose(update_of("wudi", taus, solver="direct", norm_power=power), expected, atol=1e-9)


@few
@given(SEEDS)
def test_of_equal_norms_their_power_does_not_matter(seed):
    base, experts = around_zero([tau / tau.norm() for tau in drawn(seed, (6, 4))])
    for method in ("wudi", "swudi"):
        usual, none = (merged(method, experts, base, norm_power=power) for power in (2.0, 0.0))
        assert close(usual, none, 1e-6)
