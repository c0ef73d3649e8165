"""Which examples of a task the report shows, as each modality shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_language_model import save_tasks, skill

from mergeline.evaluation.datasets import load
from mergeline.evaluation.language.documents import document
from mergeline.evaluation.language.settings import Language
from mergeline.merging.errors import UserError
from mergeline.merging.files import write_json
from mergeline.tasks.clip.modality import Clip
from mergeline.tasks.custom.modality import Custom
from mergeline.tasks.examples import shown_examples
from mergeline.tasks.params import load_params

TASK = "digits"


@pytest.fixture
def of_digits(workspace: Path, mergeline: Any) -> tuple[Path, np.ndarray]:
    """A workspace with data, and the labels of the test examples of its task."""
    assert mergeline("data", "--params", workspace / "params.yaml", TASK).code == 0
    return workspace, load(workspace / "build/data" / TASK).split("test")[1]


def shown(root: Path, base_N: np.ndarray, merge_N: np.ndarray) -> Any:
    for name, answers in (("baselines", {f"base/test/{TASK}": base_N}), ("ties", {f"test/{TASK}": merge_N})):
        folder = root / "build/evaluations" / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(answers, folder / "predictions.safetensors")
    board = {"candidate": "ties", "measure": "accuracy", "tasks": [TASK]}
    return shown_examples(Clip(), load_params(root / "params.yaml"), root / "build", board)


def test_pictures_that_the_merge_gets_right_and_the_base_wrong_and_the_reverse(of_digits):
    root, label_N = of_digits
    base_N, merge_N = label_N.astype(np.int32), label_N.astype(np.int32)
    base_N[3:12] = (base_N[3:12] + 1) % 10
    merge_N[[40, 50]] = (merge_N[[40, 50]] + 2) % 10
    [found] = shown(root, base_N, merge_N)
    assert (found.task, found.better, found.worse) == (TASK, 9, 2)
    assert (len(found.gained), len(found.lost)) == (6, 2)
    images = load(root / "build/data" / TASK).split("test")[0]
    from mergeline.evaluation.pages.examples import example

    assert [e.picture for e in found.gained] == [example(images[i], "").picture for i in range(3, 9)]
    assert [e.picture for e in found.lost] == [example(images[i], "").picture for i in (40, 50)]
    right, wrong = label_N[40], (label_N[40] + 2) % 10
    names = [name for name, _ in found.confusion.rows]
    assert found.lost[0].caption == f"{names[right]}; base: {names[right]}; ties: {names[wrong]}"
    cells = dict(found.confusion.rows)[names[right]]
    assert sum(int(cell.text or 0) for cell in cells) == (label_N == right).sum()
    assert int(cells[wrong].text) == 1 + (label_N[50] == right)


def test_an_answer_of_no_class_is_called_so(of_digits):
    root, label_N = of_digits
    merge_N = label_N.astype(np.int32)
    merge_N[7] = -1
    [found] = shown(root, label_N.astype(np.int32), merge_N)
    assert found.lost[0].caption.endswith("ties: none of the classes") and found.gained == []


def test_data_that_are_gone_are_refused_in_one_line(of_digits):
    root, label_N = of_digits
    (root / "build/data" / TASK / "meta.json").unlink()
    with pytest.raises(UserError, match="not a prepared dataset"):
        shown(root, label_N.astype(np.int32), label_N.astype(np.int32))


def test_an_example_of_the_users_own_measure_is_its_id(tmp_path):
    base = {"examples": {"test/left": ["a", "b"], "val/left": ["c"]}}
    write_json(tmp_path / "evaluations/baselines/scores.json", {"models": {"base": base}})
    assert Custom().show(None, tmp_path, "test", "left", 1) == "b"  # type: ignore[arg-type]


def test_an_example_of_a_language_task_is_what_is_asked_and_wanted(tmp_path):
    pairs = skill(0)
    save_tasks(tmp_path / "tasks", {"one": pairs})
    language = Language(tasks=str(tmp_path / "tasks"), suites={"one": ["one"]})
    for index in (0, 5):
        asked, wanted = pairs[index]
        assert document(language, 0, "test", "one", index) == f"{asked} → {wanted}"
