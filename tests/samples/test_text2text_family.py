"""The text-to-text family: its tasks, and the training of its models in a small variant."""

from __future__ import annotations

import datetime
import shutil
import sys
from random import Random

import numpy as np
import pytest
from places import SAMPLES
from safetensors.numpy import load_file

from mergeline.tasks.workspace import Workspace

sys.path.insert(0, str(SAMPLES))
from make import text_tasks  # noqa: E402


@pytest.mark.parametrize("name", text_tasks.TASKS)
def test_splits_are_disjoint_and_the_same_every_time(name):
    splits = text_tasks.task(name)
    assert splits == text_tasks.task(name) and set(splits) == {"train", "fit", "val", "test"}
    sources = [source for pairs in splits.values() for source, _ in pairs]
    assert len(sources) == len(set(sources))
    assert len(splits["test"]) == 2 * len(splits["val"]) >= 120 and len(splits["train"]) >= 500


def test_right_answers_are_right():
    numbers = dict(pair for pairs in text_tasks.task("numbers").values() for pair in pairs)
    numerals = {1007: "one thousand and seven", 99: "ninety-nine", 640: "six hundred and forty"}
    assert all(text_tasks._numeral(n) == said for n, said in numerals.items())
    assert all(source == f"number: {text_tasks._numeral(int(n))}" for source, n in numbers.items())
    for source, target in text_tasks.task("dates")["train"]:
        given = source.removeprefix("date: ")
        forms = ("%B %d, %Y", "%d %B %Y", "%d %b %Y", "%m/%d/%Y")
        read = [day for form in forms if (day := read_date(given, form))]
        assert target in [day.isoformat() for day in read], source
    times = dict(pair for pairs in text_tasks.task("clock").values() for pair in pairs)
    wanted = {
        "twenty to nine": "8:40",
        "half past one": "1:30",
        "quarter to one": "12:45",
        "ten o'clock": "10:00",
    }
    wanted |= {"one past four": "4:01", "twenty-nine to twelve": "11:31"}
    assert len(times) == len({*times.values()}) == 720
    assert all(times[f"time: {said}"] == shown for said, shown in wanted.items())
    for source, target in text_tasks.task("likeness")["test"]:
        first, second = source.removeprefix("alike: ").split(" | ")
        assert int(target) == sum(a == b for a, b in zip(first.split(), second.split()))


def read_date(text: str, form: str) -> datetime.date | None:
    try:
        return datetime.datetime.strptime(text, form).date()
    except ValueError:
        return None


def test_the_bases_operations_are_none_of_the_experts_tasks():
    random = Random(0)
    operations = {text_tasks.operation(random)[0].partition(":")[0] for _ in range(200)}
    asked = {text_tasks.task(name)["test"][0][0].partition(":")[0] for name in text_tasks.TASKS}
    assert asked == {"number", "date", "time", "alike"} and not asked & operations and len(operations) == 8


def test_the_tokenizer_gives_back_every_text():
    from make.text2text_family import _tokenizer

    tokenizer, random = _tokenizer(), Random(0)
    pairs = [pair for name in text_tasks.TASKS for split in text_tasks.task(name).values() for pair in split]
    texts = [text for pair in [*pairs, *(text_tasks.operation(random) for _ in range(300))] for text in pair]
    rows = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == texts


@pytest.mark.slow
def test_a_family_of_few_steps_goes_through_the_pipeline(tmp_path, monkeypatch):
    from make import text2text_family as family

    monkeypatch.chdir(tmp_path)
    made, small = tmp_path / "family", {**family.CONFIG, "d_model": 32, "d_ff": 48, "num_heads": 1}
    family.write_data(made / "data")
    for task in text_tasks.TASKS:
        for split in ("val", "test", "fit"):
            file = made / "data" / task / f"{split}.jsonl"
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:8]))
    assert "of operations right" in family.write_base(made / "base", steps=20, config=small)
    for name in family.EXPERTS:
        family.write_expert(name, made / "base", made / name, steps=3)
    first = (made / "dates/model.safetensors").read_bytes()
    family.write_expert("dates", made / "base", made / "dates", steps=3)
    assert (made / "dates/model.safetensors").read_bytes() == first

    shutil.copy(SAMPLES / "text2text/params.yaml", tmp_path)
    workspace = Workspace(tmp_path / "params.yaml")
    for stage in workspace.stages:
        if stage.step != "compare":  # it needs experts that have something right
            workspace.run(stage)
    for name in ("baselines", *workspace.params.merges):
        kept = load_file(tmp_path / "build/evaluations" / name / "predictions.safetensors")
        prefix = "likeness/" if name == "baselines" else ""
        assert kept[f"{prefix}test/likeness"].shape == (8, 2), name
        assert np.isin(kept["base/val/clock" if prefix else "val/clock"], (0, 1)).all()
