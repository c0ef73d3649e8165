"""Blocks of tensors: where they are cut, what they read, and how often."""

from __future__ import annotations

from math import prod
from typing import Any
from unittest.mock import patch

import pytest
import torch
from checkpoints import State, refused
from hypothesis import given
from hypothesis import strategies as st

from mergeline.merging.algebra import slots
from mergeline.merging.algebra.slots import ChangedView, View, Views
from mergeline.merging.engine.sources import MemoryInputs

SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


def state(shape: tuple[int, ...], first: int) -> State:
    return {"w": torch.arange(first, first + prod(shape), dtype=torch.float32).reshape(shape)}


def source(shape: tuple[int, ...], experts: int = 2, base: bool = True) -> MemoryInputs:
    """Experts 100.., 200.., ... around a base 0.."""
    given = {f"e{t}": state(shape, 100 * (t + 1)) for t in range(experts)}
    return MemoryInputs(given, state(shape, 0) if base else None, {}, 0)


class Counting(MemoryInputs):
    """Counts what is read."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.reads: list[str] = []

    def stored(self, origin: str, name: str, start: int, stop: int) -> torch.Tensor:
        self.reads.append(origin)
        return super().stored(origin, name, start, stop)


@given(SHAPES, st.integers(1, 3), st.integers(1, 40), st.sampled_from(["element", "row", "tensor"]))
def test_blocks_cover_a_tensor_once_in_order(shape, experts, size, unit):
    with patch.object(slots, "_BLOCK", size):
        blocks = list(View(source(shape, experts), "w", shape).blocks(unit))
    elements = prod(shape)
    for get in (lambda x: x.base, lambda x: x.experts[experts - 1] - 100 * experts):
        parts = [get(x).reshape(-1) for x in blocks]
        assert torch.cat([*parts, torch.empty(0)]).tolist() == list(range(elements))
    position = 0
    for x in blocks:
        assert x.start == position and x.elements > 0 and x.base.shape == x.shape == x.experts[0].shape
        assert x.tensor_shape == (shape or (1,))
        position += x.elements
        width = shape[-1] if shape else 1
        if unit == "element":
            assert len(x.shape) == 1 and x.elements <= max(1, size // experts)
        elif unit == "row":
            assert x.shape == (x.elements // width, width) and x.elements <= max(width, size // experts)
        else:
            assert x.shape == (shape or (1,)) and len(blocks) == 1


def test_blocks_get_smaller_with_more_experts():
    assert slots.block_elements(8) * 8 == slots.block_elements(2) * 2 == slots.block_elements(0)
    assert slots.block_elements(1 << 40) == 1


@pytest.mark.parametrize(("unit", "reads"), [("element", 1), ("row", 1), ("tensor", 3)])
def test_small_blocks_are_read_once_and_whole_tensors_when_asked_for(unit, reads):
    made = source((3, 4))
    counting = Counting({"e0": made.states["e0"], "e1": made.states["e1"]}, made.states["base"], {}, 0)
    [x] = View(counting, "w", (3, 4)).blocks(unit)
    assert counting.reads == []
    for _ in range(3):
        assert x.experts[1].flatten()[0] == 200 and x.base.flatten()[0] == 0
    assert counting.reads.count("e1") == counting.reads.count("base") == reads
    assert counting.reads.count("e0") == 0


def test_experts_are_a_sequence():
    [x] = View(source((2, 3), experts=3), "w", (2, 3)).blocks("element")
    assert [len(x.experts), *(e[0].item() for e in x.experts)] == [3, 100, 200, 300]
    with pytest.raises(IndexError):
        x.experts[3]
    assert torch.equal(x.experts.stacked, torch.stack(list(x.experts)))
    assert torch.equal(x.task_vectors, x.experts.stacked - x.base)
    [whole] = View(source((2, 3), experts=3), "w", (2, 3)).blocks("tensor")
    assert torch.equal(whole.experts.stacked, x.experts.stacked.reshape(3, 2, 3))


def test_without_a_base_there_is_none():
    [x] = View(source((2,), base=False), "w", (2,)).blocks("element")
    assert x.base is None


def test_what_is_remembered_is_made_once():
    [x] = View(source((2,)), "w", (2,)).blocks("element")
    made: list[int] = []
    for _ in range(2):
        assert x.given(None, "").remember("key", lambda: made.append(1) or 5) == 5  # shared by points
    assert made == [1]
    assert x.given("found", "setting").found == "found" and x.found is None


def test_changed_experts_are_changed_lazily_and_leave_the_slot_as_it_was():
    [x] = View(source((2,)), "w", (2,)).blocks("element")
    assert torch.equal(x.task_vectors[0], torch.tensor([100.0, 100.0]))
    changed = x.with_experts(lambda t, expert: expert + t + 1)
    assert torch.equal(changed.task_vectors, torch.tensor([[101.0, 101.0], [202.0, 202.0]]))
    assert torch.equal(x.task_vectors, torch.tensor([[100.0, 100.0], [200.0, 200.0]]))


def test_a_changed_view_changes_every_block():
    with patch.object(slots, "_BLOCK", 4):
        view = ChangedView(View(source((5,)), "w", (5,)), lambda x: x.with_experts(lambda t, e: e - x.base))
        found = torch.cat([x.experts[1] for x in view.blocks("element")])
    assert found.tolist() == [200.0] * 5 and (view.name, view.shape) == ("w", (5,))


def test_a_changed_view_of_whole_tensors_may_have_another_shape():
    asked = []

    def first_row(x: slots.Slot) -> slots.Slot:
        asked.append(x.shape)
        return x.replaced((1, 3), x.base[:1], lambda t: x.experts[t][:1] + 1)

    with patch.object(slots, "_BLOCK", 2):
        view = ChangedView(View(source((4, 3)), "w", (4, 3)), first_row, "tensor", reshapes=True)
        assert not asked and view.elements == 3 and view.shape == (1, 3)
        [x] = view.blocks("tensor")
        assert [part.shape for part in view.blocks("element")] == [(1,)] * 3
        assert [part.shape for part in view.blocks("row")] == [(1, 3)]
    asked = asked[:2]
    assert asked == [(4, 3), (4, 3)] and x.shape == (1, 3)
    assert x.task_vectors.tolist() == [[[101.0] * 3], [[201.0] * 3]]
    plain, nothing = (
        View(source((4, 3)), "w", (4, 3)),
        lambda x: x.replaced((0, 3), x.base[:0], lambda t: x.base[:0]),
    )
    nothing = ChangedView(plain, nothing, "tensor", reshapes=True)
    assert nothing.elements == 0 and not list(nothing.blocks("element"))


def test_a_pre_pass_sees_every_tensor_that_has_elements():
    shapes = {"a": (2, 3), "b": (0, 4), "c": ()}
    given = {"e": {name: torch.zeros(shape) for name, shape in shapes.items()}}
    source = MemoryInputs(given, None, {}, 0)
    inputs = Views([source.view(name) for name in source.names])
    assert inputs.elements == 7 and list(inputs.each(lambda view: view.name)) == ["a", "c"]
    changed = inputs.changed(lambda view: ChangedView(view, lambda x: x.with_experts(lambda t, e: e + 1)))
    assert [next(view.blocks("element")).experts[0][0].item() for view in changed.views] == [1.0, 1.0]


@pytest.mark.parametrize("unit", ["element", "row", "tensor"])
def test_statistics_are_cut_like_the_tensor(unit):
    shape = (3, 4)
    experts = {"e0": state(shape, 0), "e1": state(shape, 0)}
    statistics = {
        "gradients": [state(shape, 0), state(shape, 100)],
        "masks": {"0/w": state(shape, 0)["w"], "1/w": state(shape, 100)["w"]},
        "instruction": state(shape, 7),
    }
    with patch.object(slots, "_BLOCK", 8):
        blocks = list(View(MemoryInputs(experts, None, statistics, 0), "w", shape).blocks(unit))
    for x in blocks:
        for kind in ("gradients", "masks"):
            assert torch.equal(x.statistic(kind, 1) - 100, x.statistic(kind, 0))
            assert torch.equal(x.statistic(kind, 0), x.experts[0])
        assert torch.equal(x.statistic("instruction") - 7, x.experts[0])
    assert blocks[0].has_statistic("masks", 1) and not blocks[0].has_statistic("masks")
    with refused("'instruction'", "'1/w'", "missing"):
        blocks[0].statistic("instruction", 1)


# --------------------------------------------------------------------------------------- what reading finds


@given(st.integers(1, 30), st.integers(1, 30), st.booleans())
def test_the_hash_of_a_tensor_does_not_depend_on_how_it_was_read(elements, size, ahead):
    given = {"e": {"w": torch.randn(elements)}}
    whole = MemoryInputs(given, None, {}, 0).digest("e", "w")
    read = MemoryInputs(given, None, {}, 0)
    if ahead:  # a stretch out of order is no part of the first reading
        read.read("e", "w", elements // 2, elements)
    for start in range(0, elements, size):
        read.read("e", "w", start, min(start + size, elements))
        read.read("e", "w", 0, 1)
    assert read.hashes[("e", "w")] == read.digest("e", "w") == whole
    half = MemoryInputs(given, None, {}, 0)
    half.read("e", "w", 0, elements // 2)
    assert half.digest("e", "w") == whole


@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (-float("inf"), "Inf")]
)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_nan_and_inf_are_found_wherever_they_are(value, kind, place):
    tensor = torch.ones(5)
    tensor[place] = value
    inputs = MemoryInputs({"e": {"w": tensor}}, None, {}, 0)
    with refused("'e'", "'w'", kind):
        for start in range(5):
            inputs.read("e", "w", start, start + 1)


def test_finite_numbers_whose_sum_overflows_are_no_inf():
    tensor = torch.full((4,), 3e38)
    assert MemoryInputs({"e": {"w": tensor}}, None, {}, 0).read("e", "w", 0, 4).tolist() == tensor.tolist()


@pytest.mark.parametrize("room", [0, 2, 4, 100])
def test_masks_are_left_for_one_reading_while_there_is_room(room):
    view = View(source((3, 5)), "w", (3, 5))
    mask_MN = (torch.arange(15) % 3 > 0).float().reshape(3, 5)
    with patch.object(slots, "MASK_BYTES", room), patch.object(slots, "_BLOCK", 20):
        for x in view.blocks("row"):
            for t in range(2):
                x.leave_mask(t, mask_MN[: x.shape[0]] * t)
        assert sum(bits.nbytes for bits in view.masks.values()) <= room
        assert len(view.masks) == {0: 0, 2: 1, 4: 2, 100: 4}[room]
        for x in view.blocks("row"):
            for t in range(2):
                left = len(view.masks)
                found = x.left_mask(t)
                assert (found is not None) == (len(view.masks) < left)
                assert found is None or torch.equal(found, mask_MN[: x.shape[0]] * t)
    assert not view.masks and not view.mask_bytes
