"""What is special to the spectral and data-free optimised methods, against dense formulas on small random models."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_methods import MATRIX, SEEDS, close, family, few, merged, task_vector
from torch import Tensor


def task_vectors(base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]], name: str = MATRIX) -> Tensor:
    return torch.stack([expert[name].double() - base[name].double() for expert in experts.values()])


def around_zero(*taus_MN: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
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
