"""Random numbers by what they are for: the same in any order and chunking, different for everything else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeline.merging.algebra.draws import uniform

COUNT = 300


@given(st.lists(st.integers(0, COUNT), max_size=6), st.randoms(use_true_random=False))
def test_any_split_of_a_tensor_gives_the_same_numbers_in_any_order(cuts, random):
    whole = uniform(0, "e", "w", 0, COUNT)
    edges = [0, *sorted(cuts), COUNT]
    stretches = list(zip(edges, edges[1:]))
    random.shuffle(stretches)
    for start, stop in stretches:
        assert torch.equal(uniform(0, "e", "w", start, stop - start), whole[start:stop])


@pytest.mark.parametrize("start", [2**31 + 3, 2**32 + 5, 2**40 + 1])
def test_elements_far_into_a_tensor(start):
    whole = uniform(0, "e", "w", start, 40)
    assert torch.equal(uniform(0, "e", "w", start + 13, 9), whole[13:22])
    assert not torch.equal(whole, uniform(0, "e", "w", start % 2**30, 40))


def test_seed_expert_and_tensor_each_give_other_numbers():
    keys = [
        (0, "e", "w"),
        (1, "e", "w"),
        (-1, "e", "w"),
        (0, "f", "w"),
        (0, "e", "v"),
        (0, "w", "e"),
        (0, "ew", ""),
    ]
    drawn = torch.stack([uniform(*key, 0, 4000) for key in keys])
    assert torch.equal(uniform(*keys[0], 0, 4000), drawn[0])
    assert (drawn.corrcoef().fill_diagonal_(0).abs() < 5 / 4000**0.5).all()


def test_numbers_are_uniform_and_independent():
    count = 1 << 17
    drawn = uniform(0, "e", "w", 0, count)
    assert drawn.dtype == torch.float32 and (drawn >= 0).all() and (drawn < 1).all()
    assert torch.equal(drawn * 2**24, (drawn * 2**24).round())  # 24 bits each
    shares = torch.histc(drawn, 64, 0, 1) / count
    assert (abs(shares - 1 / 64) < 5 * (1 / 64 / count) ** 0.5).all()
    for lag in (1, 2, 4, 8):  # up to the period of the counter's words
        assert abs(torch.stack([drawn[lag:], drawn[:-lag]]).corrcoef()[0, 1]) < 5 / count**0.5


def test_the_numbers_stay_what_they_are():
    """Merges of earlier versions must be reproducible: these are Philox4x64-10 under a hashed key."""
    import hashlib

    import numpy as np

    key = np.frombuffer(hashlib.sha256(b"7\0expert\0tensor").digest()[:16], dtype="<u8")
    words = np.random.Philox(key=key).random_raw(8).view("<u4")
    assert uniform(7, "expert", "tensor", 0, 16).tolist() == [(word >> 8) / 2**24 for word in words.tolist()]
