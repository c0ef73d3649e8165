"""The spectral pieces against a float64 SVD and eigh of torch, also where matrices are singular or zero."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from patched import patch_everywhere
from torch import Tensor

from mergeline.merging.algebra import decompositions, directions, linear, quadratic
from mergeline.merging.algebra.slots import Slot, View
from mergeline.merging.engine.sources import MemoryInputs

SIDES = st.integers(1, 12)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(matrix(rows, columns, seed))[0]


def of_rank(rank: int, rows: int, columns: int) -> Tensor:
    return matrix(rows, rank, 1) @ matrix(rank, columns, 2)


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> bool:
    return torch.allclose(a, b, rtol=0, atol=atol)


def is_orthonormal(q_RK: Tensor) -> bool:
    return close(q_RK.T @ q_RK, torch.eye(q_RK.shape[1], dtype=torch.float64), 1e-10)


@pytest.fixture(params=["LAPACK", "products"])
def way(request, monkeypatch) -> str:
    """As computed on the CPU, and as on an accelerator."""
    if request.param == "products":
        patch_everywhere(monkeypatch, "on_cpu", lambda _: False)
    return request.param


# --------------------------------------------------------------------------------------- eigenvectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 7), (7, 1), (600, 300)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gram_of_the_smaller_side(shape, dtype, transposed, way):
    a_MN = matrix(*shape).to(dtype)
    a_MN = a_MN.T.contiguous().T if transposed else a_MN  # laid out by columns
    wide_MN = a_MN.double()
    expected_RR = wide_MN.T @ wide_MN if shape[0] >= shape[1] else wide_MN @ wide_MN.T
    gram_RR = linear.gram(a_MN)
    assert gram_RR.dtype == torch.float64 and close(gram_RR.tril(), expected_RR.tril(), 1e-10)


def spectra(side: int) -> dict[str, Tensor]:
    """Gram matrices by what may go wrong with them."""
    q_RR = orthonormal(side, side)
    two = torch.where(torch.arange(side) % 2 == 0, 1.0, 2.0).double()
    return {
        "random": linear.gram(matrix(side + 9, side)),
        "rank deficient": linear.gram(of_rank(7, side + 9, side)),
        "zero": torch.zeros(side, side, dtype=torch.float64),
        "identity": torch.eye(side, dtype=torch.float64),
        "two eigenvalues": (q_RR * two) @ q_RR.T,
        "clustered": (q_RR * (1 + 1e-14 * torch.arange(side))) @ q_RR.T,
        "from 1 to 1e-300": torch.diag(torch.logspace(0, -300, side, dtype=torch.float64)),
        "tiny": linear.gram(1e-38 * matrix(side + 9, side)),  # as far as float32 goes
        "huge": linear.gram(1e37 * matrix(side + 9, side)),
    }


@pytest.mark.parametrize("name", spectra(3))
@pytest.mark.parametrize(
    ("side", "k"),
    [(1, 1), (9, 3), (127, 42), (128, 1), (128, 16), (128, 42), (128, 43), (129, 43), (200, 66), (200, 200)],
)
def test_leading_pairs_are_those_of_eigh(side, k, name, way):
    gram_RR = spectra(side)[name]
    full_RR = gram_RR.tril() + gram_RR.tril(-1).T
    scale = max(full_RR.abs().max().item(), 1e-300)
    energy_K, q_RK = decompositions.leading(gram_RR.clone(), k)
    assert energy_K.shape == (k,) and q_RK.shape == (side, k)
    assert close(energy_K / scale, torch.linalg.eigvalsh(full_RR / scale).flip(0)[:k].clamp(min=0))
    assert (energy_K >= 0).all() and (energy_K.diff() <= 0).all()
    assert is_orthonormal(q_RK)
    assert close(full_RR / scale @ q_RK, q_RK * energy_K / scale, 1e-11)


def test_leading_reads_the_lower_triangle_alone(way):
    gram_RR = linear.gram(matrix(150, 140)).tril()
    above_RR = gram_RR + torch.full_like(gram_RR, torch.nan).triu(1)
    for k in (10, 140):
        for ours, theirs in zip(
            decompositions.leading(above_RR.clone(), k), decompositions.leading(gram_RR, k)
        ):
            assert torch.equal(ours, theirs)


def test_an_accelerator_decomposes_many_at_once(monkeypatch):
    tau_TMN = torch.stack([matrix(200, 160, seed) * 10.0**seed for seed in range(3)])
    expected = [decompositions.leading(linear.gram(tau_MN), 20) for tau_MN in tau_TMN]
    patch_everywhere(monkeypatch, "on_cpu", lambda tensor: False)
    patch_everywhere(monkeypatch, "eigenpairs", None)
    energy_TK, q_TRK = decompositions.leading(linear.gram(tau_TMN), 20)
    for (energy_K, q_RK), ours_K, ours_RK in zip(expected, energy_TK, q_TRK):
        assert torch.allclose(ours_K, energy_K, rtol=1e-9)
        assert close(ours_RK @ ours_RK.T, q_RK @ q_RK.T, 1e-8)


def test_few_leading_pairs_of_a_large_matrix_need_no_full_decomposition(way, monkeypatch):
    def fail(_: Tensor) -> None:
        raise AssertionError("decomposed in full")

    gram_RR = linear.gram(matrix(150, 140))
    expected_RK = decompositions.leading(gram_RR, 140)[1][:, :46]
    patch_everywhere(monkeypatch, "eigenpairs", fail)
    _, q_RK = decompositions.leading(gram_RR, 46)
    assert close(q_RK @ q_RK.T, expected_RK @ expected_RK.T, 1e-10)
    for arguments in ((gram_RR, 47), (gram_RR[:127, :127], 3)):
        with pytest.raises(AssertionError, match="in full"):
            decompositions.leading(*arguments)


@given(st.integers(128, 150), st.data())
def test_vectors_that_cannot_be_certified_are_not_taken(side, data):
    """LAPACK's inverse iteration finds vectors of one cluster that are not orthogonal, or finds none."""
    gap = data.draw(st.sampled_from([0.0, 1e-17, 1e-15, 1e-13, 1e-11]))
    k = data.draw(st.integers(1, side // 3))
    q_RR = orthonormal(side, side)
    gram_RR = (q_RR * (1 + gap * torch.arange(side))) @ q_RR.T
    assert is_orthonormal(decompositions.leading(gram_RR, k)[1])


# --------------------------------------------------------------------------------------- low rank


@given(SIDES, SIDES, st.integers(0, 99), st.data())
def test_triplets_are_those_of_the_svd(rows, columns, seed, data):
    a_MN = matrix(rows, columns, seed)
    k = data.draw(st.integers(1, min(rows, columns)))
    u, s, vh = torch.linalg.svd(a_MN, full_matrices=False)
    energy_K, q_RK = decompositions.leading(linear.gram(a_MN), k)
    u_MK, s_K, v_NK = decompositions.triplets(a_MN, q_RK)
    assert close(energy_K, s[:k] ** 2, 1e-10) and close(s_K, s[:k], 1e-7)
    assert close((u_MK * s_K) @ v_NK.T, (u[:, :k] * s[:k]) @ vh[:k], 1e-7)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_matrices_of_deficient_rank(shape):
    a_MN = of_rank(1, *shape)
    energy_R, q_RR = decompositions.leading(linear.gram(a_MN), 3)
    assert energy_R[0] > 0 and (energy_R[1:] < 1e-12 * energy_R[0]).all()
    u, s, v = decompositions.triplets(a_MN, q_RR[:, :1])
    assert close((u * s) @ v.T, a_MN)
    for part in decompositions.triplets(torch.zeros_like(a_MN), q_RR):
        assert torch.isfinite(part).all()


@pytest.mark.parametrize(
    ("fraction", "side", "rank"),
    [(0.29, 100, 28), (0.57, 100, 56), (0.12, 4, 1), (0.001, 9, 1), (0.5, 7, 3), (1.0, 7, 7)],
)
def test_rank_of_truncates_as_the_official_code(fraction, side, rank):
    assert linear.rank_of(fraction, (side, side + 3)) == rank
    assert linear.rank_of(fraction, (side + 3, side)) == rank


@pytest.mark.parametrize(("share", "rank"), [(0.1, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.9, 3), (1.0, 3)])
def test_rank_for_energy(share, rank):
    assert linear.rank_for_energy(torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64), share) == rank


def test_rank_for_energy_of_nothing_is_one_at_most_full():
    assert 1 <= linear.rank_for_energy(torch.zeros(3, dtype=torch.float64), 0.8) <= 3


# --------------------------------------------------------------------------------------- of slots


def slot(shape: tuple[int, int], store: object = None, shared: bool = False) -> Slot:
    """Of two experts of one matrix around zero."""
    experts = {name: {"w": matrix(*shape, seed)} for seed, name in enumerate("ab")}
    source = MemoryInputs(experts, {"w": torch.zeros(shape)}, {}, 0, store)
    return next(View(source, "w", shape, shared=shared).blocks("tensor"))


class Kept(dict):
    """A factor store in memory that counts what had to be made."""

    made = 0

    def recall(self, key, make):
        if str(key) not in self:
            self.made += 1
            self[str(key)] = {name: tensor.clone() for name, tensor in make().items()}
        return self[str(key)]


@pytest.mark.parametrize("shape", [(160, 128), (128, 160), (9, 6)])
def test_nearby_ranks_find_the_very_same_vectors(shape):
    x, tau_MN = slot(shape), matrix(*shape)
    side = min(shape)
    eighth, quarter = (side // 8, side // 4) if side >= 128 else (side, side)
    exact_RR = torch.linalg.eigh(tau_MN @ tau_MN.T if shape[0] < shape[1] else tau_MN.T @ tau_MN)[1].flip(1)
    lengths = {1: eighth, max(1, side // 8): eighth, side // 8 + 1: quarter, side // 4: quarter}
    lengths |= {side // 4 + 1: side, side: side, None: side}
    for rank, length in lengths.items():
        energy_L, q_RL = directions.directions(x, 0, tau_MN, rank)
        assert energy_L.shape == (length,) and q_RL.shape == (side, length)
        assert q_RL.is_contiguous()  # as it comes from a file: products depend on how a matrix is laid out
        assert close(q_RL @ q_RL.T, exact_RR[:, :length] @ exact_RR[:, :length].T, 1e-9)
        again = directions.directions(x, 0, tau_MN, length)
        assert torch.equal(again[0], energy_L) and torch.equal(again[1], q_RL)


def test_a_store_gives_the_very_same_vectors():
    tau_MN, store = matrix(40, 30), Kept()
    without = directions.directions(slot((40, 30)), 0, tau_MN, 3)
    for _ in range(2):
        found = directions.directions(slot((40, 30), store), 0, tau_MN, 3)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, without))
    assert store.made == 1


def measured_from(x: Slot, reference_MN: Tensor, reference_is: object) -> Slot:
    return x.measured_from(lambda: reference_MN, reference_is)


REFERENCES = ("pretrained", "mean", ["task_arithmetic", 0.3], ["task_arithmetic", 0.4])


def test_other_experts_and_references_have_their_own_entries():
    store = Kept()
    for t in range(2):
        for reference in REFERENCES:
            tau_MN = matrix(40, 30, t)
            x = measured_from(slot((40, 30), store), torch.zeros_like(tau_MN), reference)
            directions.directions(x, t, tau_MN, 3)
    assert store.made == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(160, 128), (128, 160), (9, 6), (6, 9)])
def test_factors_are_those_of_the_truncated_svd(shape, dtype):
    x = measured_from(slot(shape), matrix(*shape, 7), "mean")
    tau_MN = directions.task_vector(x, 1)
    assert tau_MN.dtype == torch.float64 and close(tau_MN, matrix(*shape, 1) - matrix(*shape, 7))
    u, s, vh = torch.linalg.svd(tau_MN, full_matrices=False)
    for rank in (1, 2, min(shape)):
        energy_L, left_ML, right_NL = directions.factors(x, 1, rank, dtype)
        assert left_ML.dtype == right_NL.dtype == dtype and len(energy_L) >= rank
        assert torch.allclose(energy_L, s[: len(energy_L)] ** 2)
        for k in range(1, rank + 1):
            product_MN = left_ML[:, :k] @ right_NL[:, :k].T
            assert close(
                product_MN.double(), (u[:, :k] * s[:k]) @ vh[:k], 1e-4 if dtype == torch.float32 else 1e-7
            )


def test_points_of_a_sweep_share_factors_and_a_single_merge_keeps_none(monkeypatch):
    shared, alone = slot((160, 128), shared=True), slot((160, 128))
    asked = [
        (t, reference, start, rank, dtype)
        for t in range(2)
        for start, reference in enumerate(REFERENCES)
        for rank in (1, 20)
        for dtype in (torch.float32, torch.float64)
    ]

    def found(x: Slot) -> list[tuple[Tensor, ...]]:
        return [
            directions.factors(measured_from(x, matrix(160, 128, start), reference), t, rank, dtype)
            for t, reference, start, rank, dtype in asked
        ]

    for ours, theirs in zip(found(shared), found(alone), strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs))
    patch_everywhere(monkeypatch, "leading", None)
    assert len(found(shared)) == len(asked)
    with pytest.raises(TypeError):
        found(alone)


# --------------------------------------------------------------------------------------- polar factors


@given(SIDES, SIDES, st.integers(0, 99))
def test_polar_is_the_orthogonal_factor(rows, columns, seed):
    a_MN = matrix(rows, columns, seed)
    u, _, vh = torch.linalg.svd(a_MN, full_matrices=False)
    assert close(decompositions.polar(a_MN), u @ vh, 1e-5)
    assert close(decompositions.partial_polar(a_MN), u @ vh, 1e-5)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_polar_is_orthogonal_where_the_matrix_is_singular(rank, shape):
    a_MN = of_rank(rank, *shape)
    q_MN = decompositions.polar(a_MN)
    assert is_orthonormal(q_MN if shape[0] > shape[1] else q_MN.T)
    u, _, vh = torch.linalg.svd(a_MN, full_matrices=False)
    assert close(q_MN @ vh[:rank].T, u[:, :rank], 1e-7)  # on what the matrix says


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_partial_polar_leaves_out_what_is_numerically_zero(rank, shape):
    a_MN = of_rank(rank, *shape)
    u, _, vh = torch.linalg.svd(a_MN, full_matrices=False)
    for scale in (1.0, 1e-100, 1e100):
        assert close(decompositions.partial_polar(scale * a_MN), u[:, :rank] @ vh[:rank], 1e-7)


def test_orthogonal_sum_of_orthogonal_factors_is_their_sum():
    q, p = orthonormal(6, 4), orthonormal(5, 4, 1)
    s = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    factors = [(q[:, :2], s[:2], p[:, :2]), (q[:, 2:], s[2:], p[:, 2:])]
    assert close(decompositions.orthogonal_sum(factors), (q * s) @ p.T)


@given(st.integers(0, 99), st.integers(1, 3))
def test_orthogonal_sum_uses_the_nearest_orthonormal_factors(seed, k):
    factors = []
    for t in range(2):
        u, s, vh = torch.linalg.svd(matrix(8, 7, seed + 1000 * t), full_matrices=False)
        factors.append((u[:, :k], s[:k], vh[:k].T))
    u, s, v = (torch.cat(parts, -1) for parts in zip(*factors))
    (pu, _, qu), (pv, _, qv) = (torch.linalg.svd(part, full_matrices=False) for part in (u, v))
    assert close(decompositions.orthogonal_sum(factors), pu @ qu @ torch.diag(s) @ (pv @ qv).T, 1e-7)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (64, 64)])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5])
def test_polar_by_products_is_the_orthogonal_factor(condition, shape):
    side = min(shape)
    u, _, vt = torch.linalg.svd(matrix(*shape), full_matrices=False)
    a_MN = (u * torch.logspace(0, -math.log10(condition), side, dtype=u.dtype)) @ vt
    a_MN = a_MN if shape[0] >= shape[1] else a_MN.T
    expected = u @ vt
    found = decompositions._by_newton_schulz(a_MN)
    assert close(found, expected if shape[0] >= shape[1] else expected.T, 1e-9)


def test_polar_by_products_gives_up_on_singular_matrices():
    a_MN = matrix(40, 30)
    a_MN[:, 3] = a_MN[:, 4]
    assert decompositions._by_newton_schulz(a_MN) is None
    assert decompositions._by_newton_schulz(0 * a_MN) is None


# --------------------------------------------------------------------------------------- quadratic losses, cosines


@pytest.mark.parametrize("rows", [2, 9])
def test_interference_is_the_curvature_and_slope_of_its_loss(rows, way):
    start_MN = matrix(5, 4)
    terms = [(matrix(5, 4, t), matrix(rows, 4, t + 9), torch.tensor(1.0 + t)) for t in range(3)]
    spoilt = (matrix(5, 4, 7), matrix(rows, 4, 8), torch.tensor(0.0))
    curvature_NN, slope_MN = quadratic.interference(start_MN.clone(), [*terms, spoilt])
    at_MN = start_MN.clone().requires_grad_()
    moved_MN = start_MN + matrix(5, 4, 5)
    for place_MN, gradient_MN in (
        (start_MN, slope_MN),
        (moved_MN, (moved_MN - start_MN) @ curvature_NN + slope_MN),
    ):
        at_MN = place_MN.clone().requires_grad_()
        sum(((at_MN - target) @ r.T).square().sum() / size for target, r, size in terms).backward()
        assert close(at_MN.grad, 2 * gradient_MN, 1e-10)


def test_damped_minimum_solves_its_equations(way):
    curvature_NN, slope_MN = of_rank(2, 2, 4).T @ of_rank(2, 2, 4), matrix(3, 4)
    damped_NN = curvature_NN + 0.1 * curvature_NN.trace() / 4 * torch.eye(4, dtype=torch.float64)
    found_MN = quadratic.damped_minimum(curvature_NN.clone(), slope_MN, 0.1)
    assert close(found_MN @ damped_NN, -slope_MN, 1e-10)
    assert not quadratic.damped_minimum(torch.zeros(4, 4, dtype=torch.float64), slope_MN, 0.1).any()


@pytest.mark.parametrize("side", [1, 2, 7])
def test_cosine_transform_is_orthonormal_and_undone(side, way):
    a_MN = matrix(3, side)
    place = torch.arange(side, dtype=torch.float64)
    columns = [torch.cos(math.pi / side * (place + 0.5) * j) for j in range(side)]
    basis_NN = torch.stack([column / column.norm() for column in columns], -1)
    assert close(linear.dct(a_MN), a_MN @ basis_NN)
    assert close(linear.dct(linear.dct(a_MN), inverse=True), a_MN)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_singular_triplets_are_those_that_are_more_than_noise(shape, way):
    a_MN = of_rank(2, *shape)
    u_MK, s_K, v_NK = decompositions.singular_triplets(a_MN)
    assert len(s_K) == 2 and close((u_MK * s_K) @ v_NK.T, a_MN, 1e-10)
    assert is_orthonormal(u_MK) and is_orthonormal(v_NK)
    assert len(decompositions.singular_triplets(a_MN, 1)[1]) == 1
    assert not len(decompositions.singular_triplets(a_MN, energy=torch.tensor(1e20, dtype=torch.float64))[1])
    for polar in (decompositions.polar, decompositions.partial_polar):
        assert polar(a_MN[:, :0]).shape == (shape[0], 0)
