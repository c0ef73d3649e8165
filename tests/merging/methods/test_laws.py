"""Laws over all methods, with parameters that are used and drawn; and that the checks see breaches."""

from __future__ import annotations

from random import Random
from typing import Any, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from uses import USES, by_use

from mergeline.merging import laws
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods import catalogue, contract, get_method, method

RANDOM = st.integers(0, 1 << 20).map(Random)
few = settings(max_examples=4)
every_method = pytest.mark.parametrize("id", catalogue())
every_use = by_use("id")
first_use = pytest.mark.parametrize(("id", "params"), dict(reversed(USES)).items(), ids=dict(reversed(USES)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_use
def test_what_a_slot_gives_is_read_only(id, params, dtype):
    laws.check_reads_only(id, params, dtype)


@few
@given(random=RANDOM)
@every_method
def test_two_legal_settings_in_one_sweep_are_what_each_is_alone(id, random):
    first = laws.legal_params(id, random)
    laws.check_sweep(id, [first, laws.legal_params(id, random, like=first)])
    laws.check_sweep(id, laws.with_other_scales(id, first))


def test_numbers_that_are_equal_and_mean_different_things_are_told_apart():
    """A rank of 0.1 is one direction, and so equals an energy of 1."""
    params = {"rank": 0.1, "energy": 1.0}
    points = [{**params, "rank_rule": rule} for rule in ("fraction", "energy")]
    laws.check_sweep("cart", points)
    base, experts = laws.family("cart")
    one, other = laws.merged("cart", experts, base, points)
    assert not torch.equal(one["layers.0.attn.weight"], other["layers.0.attn.weight"])


@pytest.mark.parametrize(
    ("id", "params"),
    # Around equal singular values rounding chooses directions, on a device as anywhere.
    [use for use in USES if use[1].get("inner") != "iso_c"],
    ids=str,
)
def test_nothing_of_the_cpu_meets_what_lies_on_a_device(id, params):
    laws.check_device(id, params)


@first_use
def test_copies_of_the_base_come_back(id, params):
    laws.check_copies_of_the_base(id, params)


@first_use
def test_dtypes_and_shapes_are_kept(id, params):
    laws.check_dtypes_and_shapes(id, params)


@first_use
def test_cuts_into_blocks_change_nothing(id, params):
    laws.check_cuts(id, params)


# --------------------------------------------------------------------------------------- drawn parameters


@given(random=RANDOM)
@settings(max_examples=20)
@every_method
def test_drawn_parameters_are_all_there_are_and_legal(id, random):
    drawn, entry = laws.legal_params(id, random), get_method(id)
    assert entry.resolve(drawn).keys() == drawn.keys()
    kinds = dict.fromkeys(laws.kinds_of(id, drawn))
    assert not list(entry.misuses(entry.resolve(drawn), laws.count_for(entry, drawn), True, kinds))


def test_given_parameters_stay_as_they_are():
    for seed in range(20):
        drawn = laws.legal_params("lines", Random(seed), {"inner": "cart", "beta": 0.7})
        assert drawn["inner"] == "cart" and drawn["beta"] == 0.7 and "rank" in drawn


# --------------------------------------------------------------------------------------- breaches are seen


@pytest.fixture
def outside() -> Iterator[None]:
    """Methods that are registered in the block are forgotten after it."""
    catalogue()
    before = dict(contract._METHODS)
    yield
    contract._METHODS.clear()
    contract._METHODS.update(before)


def test_a_method_from_outside_that_keeps_the_laws(outside):
    @method(paper="none", scale=0.5, needs=("base",))
    def kept(x: Slot, *, power: float = 1.0) -> Tensor:
        """The sum."""
        return x.task_vectors.sum(0) * power

    laws.check_method("kept")
    laws.check_method("kept", {"power": 2.0})


def breaches() -> Iterator[tuple[str, Any]]:
    """What a check says, and a method that does it."""

    @method(paper="none", needs=("base",))
    def base_written(x: Slot) -> Tensor:
        return x.base.mul_(2)

    yield "writes to base", base_written

    @method(paper="none", needs=("base",))
    def experts_written(x: Slot) -> Tensor:
        return x.experts[0].sub_(x.base)

    yield "writes to expert", experts_written

    @method(paper="none", needs=("base",))
    def vectors_written(x: Slot) -> Tensor:
        return x.task_vectors.mul_(0.5).sum(0)

    yield "writes to task vectors", vectors_written

    @method(paper="none", scale=1.0, needs=("base",))
    def key_forgets(x: Slot, *, power: float = 1.0) -> Tensor:
        return x.remember("scaled", lambda: x.task_vectors.sum(0) * power)

    yield "the points", key_forgets

    @method(paper="none", needs=("base",))
    def base_ignored(x: Slot) -> Tensor:
        return torch.ones(x.shape, dtype=x.dtype)

    yield "copies of the base", base_ignored

    @method(paper="none", needs=("base",))
    def divides(x: Slot) -> Tensor:
        return x.task_vectors.sum(0) / (x.task_vectors != x.task_vectors).sum(0) * 0

    yield "copies of the base|holds NaN", divides

    @method(paper="none", needs=("base",))
    def block_matters(x: Slot) -> Tensor:
        return x.task_vectors.sum(0) / x.elements

    yield "blocks of 1 elements", block_matters

    @method(paper="none", needs=("base",))
    def strays(x: Slot) -> Tensor:
        return x.task_vectors.sum(0) * torch.ones(x.shape, dtype=x.dtype)

    yield "fails on an accelerator.*device=", strays


@pytest.mark.parametrize("what", range(8))
def test_a_breach_is_said(what, outside):
    sentence, function = list(breaches())[what]
    with pytest.raises(AssertionError, match=sentence):
        laws.check_method(function.__name__)
