"""How alike experts are, and who does not belong: who is akin to none, too long, a copy."""

from __future__ import annotations

import pytest
import torch
from faulty_families import State, Taus, base_state, diagnosed, told, unrelated


def akin(base: State, taus: Taus, but: str = "") -> None:
    """All experts but these share a part of what they changed: cosines of one half."""
    shared = unrelated("x", base, seed=2)["x"]
    for name in set(taus) - set(but):
        taus[name] = {key: value + shared[key] for key, value in taus[name].items()}


def longer(taus: Taus, name: str, factor: float) -> None:
    taus[name] = {key: factor * value for key, value in taus[name].items()}


def test_a_family_of_equals_has_nobody_who_does_not_belong(tmp_path):
    assert diagnosed(tmp_path / "unrelated")["advice"] == []
    assert diagnosed(tmp_path / "akin", akin)["advice"] == []
    assert diagnosed(tmp_path / "two", akin, names="ab")["advice"] == []
    assert diagnosed(tmp_path / "twice", lambda base, taus: longer(taus, "b", 2.0))["advice"] == []


def test_who_is_akin_to_none_is_named(tmp_path):
    found = diagnosed(tmp_path, lambda base, taus: akin(base, taus, but="c"))
    assert told(found) == [("kinship", ["c"], None)]
    assert "expert 'c' is akin to none" in found["advice"][0]["sentence"]


@pytest.mark.parametrize(("factor", "weight", "words"), [(5.0, 0.2, "drowns"), (0.2, 5.0, "is lost")])
def test_whose_change_is_out_of_line_is_named(factor, weight, words, tmp_path):
    found = diagnosed(tmp_path, lambda base, taus: longer(taus, "b", factor))
    (advice,) = [advice for advice in found["advice"] if advice["diagnosis"] == "kinship"]
    assert advice["experts"] == ["b"] and words in advice["sentence"]
    assert advice["rules"] == [{"expert": "b", "params": {"weights": pytest.approx(weight, rel=0.1)}}]


def test_near_copies_are_named(tmp_path):
    def plant(base: State, taus: Taus) -> None:
        taus["d"] = {key: taus["b"][key] + 0.2 * value for key, value in taus["d"].items()}

    found = diagnosed(tmp_path, plant)
    assert told(found) == [("kinship", ["b", "d"], None)]
    assert "nearly copies" in found["advice"][0]["sentence"]


def test_who_is_of_another_base_is_told_that_alone(tmp_path):
    """Nothing is said of its scope, its length or its conflicts, and nobody else is blamed for them."""

    def plant(base: State, taus: Taus) -> None:
        stranger = torch.Generator().manual_seed(9)
        taus["b"] = {
            key: 2 * torch.randn(value.shape, generator=stranger) - value for key, value in base.items()
        }

    assert told(diagnosed(tmp_path, plant)) == [("origins", ["b"], None)]


def test_kinship_is_what_its_definitions_say(tmp_path):
    base = base_state()

    def plant(base: State, taus: Taus) -> None:
        for name, shift in zip("abc", (0.1, 0.0, -0.2)):
            taus[name] = {key: value + shift for key, value in taus[name].items()}

    taus = unrelated("abc", base)
    plant(base, taus)
    flat_TD = torch.stack([torch.cat([t.double().flatten() for t in tau.values()]) for tau in taus.values()])
    found = diagnosed(tmp_path, plant, names="abc")["kinship"]
    torch.testing.assert_close(
        torch.tensor(found["pearson"]), torch.corrcoef(flat_TD).float(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        torch.tensor(found["distance"]), torch.cdist(flat_TD, flat_TD).float(), rtol=1e-4, atol=1e-4
    )
    by_layer = torch.tensor(found["by_layer"][:-1])  # without what lies outside of blocks
    torch.testing.assert_close(torch.tensor(found["median_cosine"]), by_layer.quantile(0.5, dim=0))
