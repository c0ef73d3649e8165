"""Who undoes what others changed, in which layers, and whether the scales that are advised end it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from faulty_families import LAYERS, State, Taus, base_state, diagnosed, of_layers, save, told, unrelated

from mergeline.merging.diagnoses.interference import undone, undone_by_chance
from mergeline.merging.diagnoses.sums import Sums
from mergeline.merging.engine.planning import make_plan


def against_others(base: State, taus: Taus, layers: tuple[int, int] = (2, 3), tower: str = "") -> None:
    """In these layers expert d takes back half of what the others changed."""
    for name in of_layers(base, *layers, tower):
        taus["d"][name] = taus["d"][name] - 0.5 * (taus["a"][name] + taus["b"][name] + taus["c"][name])


def test_experts_that_know_nothing_of_one_another_are_not_at_odds(tmp_path):
    found = diagnosed(tmp_path)
    assert found["advice"] == []
    lost, by_chance = (torch.tensor(found["interference"][key]) for key in ("undone", "by_chance"))
    assert (lost.abs() < 4 * by_chance).all()


def test_who_takes_back_what_others_changed_is_named_and_where(tmp_path):
    found = diagnosed(tmp_path, against_others)
    (advice,) = found["advice"]
    assert told(found) == [("interference", ["d"], (2, 3))]
    assert "expert 'd' conflicts in layers 2-3" in advice["sentence"]
    [rule] = advice["rules"]
    assert f"'a' changed; lower its scale there to {rule['params']['weights']}" in advice["sentence"]
    assert rule | {"params": {}} == {"expert": "d", "layers": [2, 3], "params": {}}


def test_the_rule_is_a_recipes_and_the_best_of_its_kind(tmp_path):
    """It changes the weight of this expert in these layers alone; no other makes the sum more alike all experts."""
    base = base_state()
    taus = unrelated("abcd", base)
    against_others(base, taus)
    family = save(tmp_path, base, taus)
    rules = diagnosed(tmp_path, against_others)["advice"][0]["rules"]
    recipe = {"method": "task_arithmetic", **family, "params": {"weights": [1.0] * 4}, "rules": rules}
    weights = {entry.name: entry.bound.params["weights"] for entry in make_plan(recipe).entries}
    changed = {name for name, own in weights.items() if own != [1.0] * 4}
    [(*others, advised)] = {tuple(weights[name]) for name in changed}
    assert changed == set(of_layers(base, 2, 3)) and others == [1, 1, 1]

    flat = {t: torch.cat([tau[n].flatten() for n in of_layers(base, 2, 3)]) for t, tau in taus.items()}

    def likeness(weight: float) -> float:
        merged = flat["a"] + flat["b"] + flat["c"] + weight * flat["d"]
        return sum(float(torch.cosine_similarity(merged, tau, dim=0)) for tau in flat.values())

    assert advised == max((step / 20 for step in range(21)), key=likeness)


def test_a_conflict_of_equals_is_mended_by_no_weight(tmp_path):
    def plant(base: State, taus: Taus) -> None:
        for name in of_layers(base, 1, 1):
            taus["b"][name] = 0.87 * taus["b"][name] - 0.5 * taus["a"][name]

    [advice] = diagnosed(tmp_path, plant, names="ab")["advice"]
    assert "conflicts in layer 1" in advice["sentence"] and "no weight mends that" in advice["sentence"]
    assert advice["rules"] == []


def test_of_two_towers_the_one_is_named(tmp_path):
    towers = ("image.", "text.")
    found = diagnosed(tmp_path, lambda *family: against_others(*family, (0, 1), "text."), towers=towers)
    (advice,) = found["advice"]
    assert "in layers 0-1 of text.blocks" in advice["sentence"] and advice["tower"] == "text.blocks."
    assert advice["rules"][0]["match"] == "text.blocks.*"


def test_of_two_experts_the_longer_gives_way(tmp_path):
    def plant(base: State, taus: Taus) -> None:
        for name in of_layers(base, 1, 1):
            taus["b"][name] = 1.5 * taus["b"][name] - taus["a"][name]

    assert told(diagnosed(tmp_path, plant, names="ab")) == [("interference", ["b"], (1, 1))]


def test_who_is_undone_and_harms_none_is_raised(tmp_path):
    """A short change, against which each of the others goes a little."""

    def plant(base: State, taus: Taus) -> None:
        for name in of_layers(base, 0, 0):
            taus["d"][name] = -0.06 * (taus["a"][name] + taus["b"][name] + taus["c"][name])
            taus["d"][name] += 0.3 * unrelated("x", base, seed=2)["x"][name]

    found = diagnosed(tmp_path, plant)
    assert ("interference", ["d"], (0, 0)) in told(found)
    assert "is undone in layer 0" in found["advice"][-1]["sentence"]
    assert found["advice"][-1]["rules"][0]["params"]["weights"] > 1


def test_numbers_are_what_their_formulas_say(tmp_path):
    base = base_state()
    taus = unrelated("abc", base)
    found = diagnosed(tmp_path, names="abc")["interference"]
    for layer, t in product(range(LAYERS), range(3)):
        flat = [
            torch.cat([tau[n].double().flatten() for n in of_layers(base, layer, layer)])
            for tau in taus.values()
        ]
        own, others = flat[t], sum(flat[j] for j in range(3) if j != t)
        assert found["undone"][layer][t] == pytest.approx(float(-own @ others / own.square().sum()), abs=1e-6)
        pairs = [(own, flat[j]) for j in range(3) if j != t]
        opposed = sum(float((a * b).clamp(max=0).abs().sum()) for a, b in pairs)
        shared = sum(float((a * b).abs().sum()) for a, b in pairs)
        assert found["sign_conflict"][layer][t] == pytest.approx(opposed / shared, rel=1e-4)


def test_chance_is_how_far_random_signs_lead():
    """The deviation over draws of signs, of changes of uneven sizes."""
    random = torch.Generator().manual_seed(0)
    size_TD = torch.randn(3, 60, generator=random, dtype=torch.float64).exp()

    def sums(tau_TD: torch.Tensor) -> Sums:
        squares_TD = tau_TD.square()
        return Sums.zero(3)._replace(products_TT=tau_TD @ tau_TD.T, squares_TT=squares_TD @ squares_TD.T)

    draws = []
    for _ in range(4000):
        sign_TD = torch.randint(0, 2, (3, 60), generator=random).double() * 2 - 1
        draws.append(undone(sums(size_TD * sign_TD)))
    torch.testing.assert_close(torch.stack(draws).std(0), undone_by_chance(sums(size_TD)), rtol=0.05, atol=0)


def test_one_expert_undoes_nothing(tmp_path):
    found: dict[str, Any] = diagnosed(tmp_path, names="a")
    assert found["advice"] == [] and found["interference"]["undone"] == [[0.0]] * (LAYERS + 1)
