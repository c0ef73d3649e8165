"""Every gate passes and fails, and says so with numbers."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from mergeline.tasks.gates import Champion, Checks, Gates, judge
from mergeline.tasks.language.gates import LanguageGates
from mergeline.tasks.language.gates import findings as of_language

ROW = {"mean": 0.70, "norm_ratio": 1.5, "finite": True}
BASE = Checks(base_accuracy={"digits": 0.5, "shapes": 0.5})


def hits(digits: int, shapes: int, n: int = 400) -> dict[str, np.ndarray]:
    return {"digits": np.arange(n) < digits, "shapes": np.arange(n) < shapes}


def champion(digits: int, shapes: int) -> Champion:
    return Champion("3", hits(digits, shapes))


def verdict(gates: dict, row: dict = ROW, correct=None, rival=None, checks=BASE):
    return judge(row, correct or hits(280, 280), rival, Gates(**gates), checks)


def finding(gate: str, *args, **kwargs):
    return next(f for f in verdict(*args, **kwargs).findings if f.gate == gate)


def language_verdict(gates: dict, row: dict = ROW, base: dict | None = None):
    """Of a language model, beside the row of its base."""
    asked = LanguageGates(**gates)
    return judge(row, hits(280, 280), None, asked, BASE, of_language(row, base or {}, asked))


def language_finding(gate: str, *args, **kwargs):
    return next(f for f in language_verdict(*args, **kwargs).findings if f.gate == gate)


@pytest.mark.parametrize("seen", ["none", "unlabelled", "labelled"])
@pytest.mark.parametrize("limit", ["none", "unlabelled", "labelled"])
def test_what_a_candidate_may_have_seen_is_limited(seen, limit):
    order = ["none", "unlabelled", "labelled"]
    row = {**ROW, "seen": {"data": seen, "words": f"5 {seen}"}}
    found = finding("largest_data", {"largest_data": limit}, row)
    assert found.passed == (order.index(seen) <= order.index(limit)) and f"5 {seen}" in found.sentence


def test_what_was_fitted_to_test_examples_never_passes():
    seen = {"data": "unlabelled", "split": "test", "words": "5 unlabelled a task of test"}
    found = verdict({}, {**ROW, "seen": seen})
    assert not found.passed and [f.gate for f in found.findings if not f.passed] == ["unseen_test"]


def test_without_rules_the_weights_must_be_sound():
    sound = verdict({})
    assert sound.passed and [f.gate for f in sound.findings] == ["reload", "finite"]
    assert not verdict({}, row={**ROW, "finite": False}).passed
    broken = verdict({}, checks=Checks("The files have another digest."))
    assert not broken.passed and broken.findings[0].sentence == "The files have another digest."


@pytest.mark.parametrize(("gate", "limit", "passes"), [
    ("minimum_mean", 0.70, True), ("minimum_mean", 0.71, False),
    ("largest_norm_ratio", 1.5, True), ("largest_norm_ratio", 1.4, False),
    ("largest_drop", 0.0, True),
])  # fmt: skip
def test_limits_are_inclusive(gate, limit, passes):
    found = finding(gate, {gate: limit})
    assert found.passed is passes and f"{limit:.2f}" in found.sentence


@pytest.mark.parametrize("key", ["mean", "norm_ratio"])
def test_not_a_number_never_passes(key):
    assert not verdict(
        {"minimum_mean": 0.1, "largest_norm_ratio": 9.0}, row={**ROW, key: float("nan")}
    ).passed


def test_a_clear_gain_passes_and_an_unclear_one_does_not():
    assert finding("minimum_gain", {"minimum_gain": 0.0}, rival=champion(250, 250)).passed
    unclear = finding("minimum_gain", {"minimum_gain": 0.0}, rival=champion(279, 280))
    assert not unclear.passed
    assert "champion version 3" in unclear.sentence and "95% paired interval" in unclear.sentence
    assert not finding("minimum_gain", {"minimum_gain": 0.0}, rival=champion(280, 280)).passed
    assert not finding("minimum_gain", {"minimum_gain": 0.1}, rival=champion(250, 250)).passed


def test_a_small_loss_may_be_tolerated():
    assert finding("minimum_gain", {"minimum_gain": -0.05}, rival=champion(281, 281)).passed


def test_confidence_widens_the_interval():
    rival = champion(274, 280)  # six examples: lower end above zero at 80 %, not at 99.9 %
    assert finding("minimum_gain", {"minimum_gain": 0.0, "confidence": 0.8}, rival=rival).passed
    assert not finding("minimum_gain", {"minimum_gain": 0.0, "confidence": 0.999}, rival=rival).passed


def test_the_first_candidate_needs_no_gain_but_may_not_fall_below_the_base():
    assert "no champion" in finding("minimum_gain", {"minimum_gain": 0.5}).sentence
    assert verdict({"minimum_gain": 0.5, "largest_drop": 0.05}).passed
    fallen = finding("largest_drop", {"largest_drop": 0.05}, correct=hits(400, 160))
    assert not fallen.passed
    assert fallen.sentence.startswith("Against the base the largest drop in accuracy is 0.1000 (task shapes)")


def test_one_task_may_not_pay_for_the_others():
    found = verdict(
        {"minimum_gain": 0.0, "largest_drop": 0.05}, correct=hits(400, 250), rival=champion(280, 280)
    )
    assert {f.gate: f.passed for f in found.findings} == {
        "reload": True, "finite": True, "minimum_gain": True, "largest_drop": False,
    }  # fmt: skip
    assert (
        "champion version 3" in found.findings[-1].sentence and "task shapes" in found.findings[-1].sentence
    )


def test_what_cannot_be_compared_fails_only_the_gates_that_compare():
    rival = Champion("3", obstacle="The test data changed.")
    found = verdict({"minimum_mean": 0.5, "minimum_gain": 0.0, "largest_drop": 1.0}, rival=rival)
    failed = {f.gate: f.sentence for f in found.findings if not f.passed}
    assert failed == {"minimum_gain": "The test data changed.", "largest_drop": "The test data changed."}
    assert verdict({"minimum_mean": 0.5}, rival=rival).passed


@pytest.mark.parametrize(
    "gates", [{"minimum_men": 0.5}, {"minimum_mean": 60}, {"confidence": 1.0}, {"largest_drop": float("nan")}]
)
def test_malformed_gates_are_refused(gates):
    with pytest.raises(ValidationError):
        Gates(**gates)


@pytest.mark.parametrize("check", ["finite", "round_trip", "generates"])
def test_a_language_model_must_work(check):
    checks = {"finite": True, "round_trip": True, "generates": True}
    assert language_finding("works", {}, row={**ROW, "checks": checks}).passed
    broken = language_verdict({}, row={**ROW, "checks": {**checks, check: False}})
    assert not broken.passed
    assert [f.gate for f in verdict({}).findings] == ["reload", "finite"]  # of image models it is not asked


@pytest.mark.parametrize(("value", "passes"), [(15.0, True), (15.1, False), (float("nan"), False)])
def test_perplexity_may_grow_by_a_factor(value, passes):
    base = {"perplexity": {"prose": {"value": 10.0}, "news": {"value": 20.0}}}
    row = {**ROW, "perplexity": {"prose": {"value": value}, "news": {"value": 21.0}}}
    found = language_finding(
        "largest_perplexity_ratio", {"largest_perplexity_ratio": 1.5}, row=row, base=base
    )
    assert found.passed is passes and "prose" in found.sentence and "1.500" in found.sentence


def test_a_perplexity_that_was_not_measured_does_not_pass():
    assert not language_finding("largest_perplexity_ratio", {"largest_perplexity_ratio": 1.5}).passed


def test_that_the_task_is_known_at_use_is_among_the_findings():
    known = finding("at_use", {}, row={**ROW, "at_use": {"task": "known"}})
    assert known.passed and "is known to it at use" in known.sentence
    assert "at_use" not in {f.gate for f in verdict({}).findings}


def test_a_store_has_no_norm_ratio_and_passes_no_limit_of_it():
    store = {**ROW, "norm_ratio": None, "at_use": {"task": "found"}}
    assert verdict({}, row=store).passed
    limited = finding("largest_norm_ratio", {"largest_norm_ratio": 4.0}, row=store)
    assert not limited.passed and "has no norm ratio; at most 4.000" in limited.sentence
