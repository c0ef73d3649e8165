"""What `merge_state_dicts` takes: state dicts or modules, by name or in a list; and how it refuses anything else."""

from __future__ import annotations

import pytest
import torch
from checkpoints import random_state, refused, same_tensors

from mergeline.merging import merge_state_dicts

A, B, BASE = random_state(1), random_state(2), random_state(0)


def modules() -> list[torch.nn.Module]:
    """With parameters, and BatchNorm's buffers and counters."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        found.append(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)))
    return found


def test_a_list_stands_for_names():
    expected = merge_state_dicts("ties", {"a": A, "b": B}, BASE)
    assert same_tensors(merge_state_dicts("ties", [A, B], BASE), expected)
    assert same_tensors(merge_state_dicts("ties", (A, B), BASE), expected)


def test_a_module_stands_for_its_state_dict():
    base, a, b = modules()
    states = {"a": a.state_dict(), "b": b.state_dict()}
    expected = merge_state_dicts("task_arithmetic", states, base.state_dict())
    assert same_tensors(merge_state_dicts("task_arithmetic", [a, b], base), expected)
    assert same_tensors(merge_state_dicts("task_arithmetic", {"a": a, "b": states["b"]}, base), expected)
    base.load_state_dict(expected)


@pytest.mark.parametrize(
    ("experts", "base", "parts"),
    [
        (torch.ones(2), BASE, ["experts are a Tensor", "a.state_dict()"]),
        ("a.safetensors", BASE, ["experts are a str"]),
        (None, BASE, ["experts are a NoneType"]),
        ([A, 1], BASE, ["'1' is a int", "state dict"]),
        ({"a": [A]}, BASE, ["'a' is a list"]),
        ({"a": A, "b": "b.safetensors"}, BASE, ["'b' is a str"]),
        ({"a": A}, "base.safetensors", ["the base is a str"]),
        ({"a": {**A, "epoch": 3}}, BASE, ["'a' is no state dict", "'epoch' is a int"]),
        ({"a": {"state_dict": A}}, BASE, ["'state_dict' is a dict", "give its ['state_dict']"]),
        ({"a": {1: torch.ones(1)}}, BASE, ["'a' is no state dict", "its 1 is"]),
        ({"a": {**A, "x\n\x1b": None}}, BASE, ["'x\\n\\x1b'"]),
        ([], BASE, ["needs at least 1 expert"]),
        (A, BASE, ["'blocks.0.attn.weight' is a Tensor"]),
    ],
)  # fmt: skip
def test_what_is_no_state_dict_is_refused(experts, base, parts):
    with refused(*parts):
        merge_state_dicts("ties", experts, base)
