"""What steps say of themselves: verbs, items, downloads, the device, and which outputs belong to an item."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import REPOSITORY

from mergeline.tasks.modalities import modalities
from mergeline.tasks.params import load_params
from mergeline.tasks.steps import commands, steps
from mergeline.tasks.workspace import Workspace

EVERY = ("fetch", "collect", "extract", "baselines", "fit", "search", "merge-all", "evaluate", "compare")


@pytest.mark.parametrize(
    ("name", "own"), [("clip", ("data", "heads")), ("language", ())], ids=["clip", "language"]
)
def test_every_modality_has_the_common_steps_and_its_own(name, own):
    assert [step.name for step in steps(modalities()[name])] == [EVERY[0], *own, *EVERY[1:]]


def test_verbs_are_those_of_all_modalities_once_each():
    found = {command.name: command for command in commands()}
    assert sorted(found) == sorted([*EVERY, "data", "heads"]) and len(found) == len(commands())
    whole = {name for name, command in found.items() if not command.takes_names}
    assert whole == {"heads", "extract", "baselines", "compare"}
    assert all(command.help and command.help[0].islower() for command in found.values())


def test_downloads_and_the_device_are_said():
    found = steps(modalities()["clip"])
    assert {step.name for step in found if step.downloads} == {"fetch", "data"}
    assert {step.name for step in found if step.on_device} == {
        "collect", "fit", "search", "merge-all", "evaluate", "baselines",
    }  # fmt: skip


def test_a_template_fills_in_keys_items_and_values_of_the_parameters():
    params = load_params(REPOSITORY / "params.yaml")
    found = {s.name: s for step in steps(modalities()["clip"]) for s in step.stages(params, "code", 0)}
    fetch = found["checkpoint-file@digits"]
    assert fetch.deps == ("samples/experts/digits.safetensors", "code/tasks/fetch.py")
    assert fetch.params == ("checkpoints.files.digits", "checkpoints.layout")
    assert (fetch.out, fetch.item, fetch.step) == ("build/checkpoints/digits", "digits", "fetch")
    assert {"build/checkpoints/base", "samples/suite.yaml"} < set(found["heads"].deps)


def test_tidy_removes_what_belongs_to_no_item(workspace: Path):
    gone = [
        "checkpoints/old", "data/old", "merges/old", "search/old.json", "evaluations/old",
        "merges/.cart.partial", "fits/old",
    ]  # fmt: skip
    stay = [
        "checkpoints/base", "data/digits", "merges/cart", "search/cart.json", "evaluations/cart",
        "evaluations/baselines", "fits/cart", "extract", "leaderboard", "heads.safetensors", "report.html",
    ]  # fmt: skip
    for name in (*gone, *stay):
        (workspace / "build" / name / "inside").mkdir(parents=True)
    Workspace(workspace / "params.yaml").tidy()
    left = {name for name in (*gone, *stay) if (workspace / "build" / name).exists()}
    assert left == set(stay)
