"""The vision-language family: its tasks, and the training of its models in a small variant."""

from __future__ import annotations

import shutil
import sys
from random import Random

import numpy as np
import pytest
from places import SAMPLES
from safetensors.numpy import load_file

from mergeline.tasks.workspace import Workspace

sys.path.insert(0, str(SAMPLES))
from make import vision_language_tasks as tasks  # noqa: E402


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "SIZES", {"train": 600, "fit": 4, "val": 8, "test": 8})


@pytest.mark.parametrize("name", tasks.TASKS)
def test_pictures_are_the_same_every_time_and_no_two_are_alike(name, few):
    splits, again = tasks.task(name), tasks.task(name)
    examples = [example for split in splits.values() for example in split]
    assert [e.answer for split in again.values() for e in split] == [e.answer for e in examples]
    assert len({example.pixels.tobytes() for example in examples}) == len(examples)
    assert {example.pixels.shape for example in examples} == {(32, 32, 3)}


def test_boxes_hold_their_shapes():
    random = Random(0)
    for _ in range(30):
        picture = tasks._Picture(random, smooth=False)
        empty = picture.pixels()
        *_, (left, top, right, bottom) = picture.shape(random)
        changed = (picture.pixels() != empty).any(-1)
        rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
        # The outermost pixels of a drawn line may lie just outside.
        assert abs(top * 4 - rows.min()) <= 1 and abs(bottom * 4 - 1 - rows.max()) <= 1
        assert abs(left * 4 - columns.min()) <= 1 and abs(right * 4 - 1 - columns.max()) <= 1


def test_the_tokenizer_gives_back_every_text(few):
    from make.vision_language_family import _processor

    tokenizer, random = _processor().tokenizer, Random(0)
    examples = [e for name in tasks.TASKS for e in tasks.task(name)["train"]]
    examples += [tasks.caption(random) for _ in range(200)]
    texts = sorted({text for e in examples for text in (e.question, e.answer)})
    rows = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(rows) == texts and tokenizer.unk_token_id not in sum(rows, [])


@pytest.mark.slow
def test_a_family_of_few_steps_goes_through_the_pipeline(tmp_path, monkeypatch, few):
    from make import vision_language_family as family

    monkeypatch.chdir(tmp_path)
    made = tmp_path / "family"
    family.write_data(made / "data")
    assert "of captions right" in family.write_base(made / "base", steps=10)
    for name in family.EXPERTS:
        family.write_expert(name, made / "base", made / name, steps=3)
    first = (made / "place/model.safetensors").read_bytes()
    family.write_expert("place", made / "base", made / "place", steps=3)
    assert (made / "place/model.safetensors").read_bytes() == first
    base, expert = (load_file(made / name / "model.safetensors") for name in ("base", "place"))
    for key, tensor in expert.items():
        assert np.array_equal(tensor, base[key]) == ("vision_tower" in key), key

    shutil.copy(SAMPLES / "vision_language/params.yaml", tmp_path)
    workspace = Workspace(tmp_path / "params.yaml")
    for stage in workspace.stages:
        if stage.step != "compare":  # it needs experts that have something right
            workspace.run(stage)
    for name in workspace.params.merges:
        kept = load_file(tmp_path / "build/evaluations" / name / "predictions.safetensors")
        assert all(((0 <= scores) & (scores <= 1)).all() for scores in kept.values()), name
        assert kept["test/place"].shape == (8,)
