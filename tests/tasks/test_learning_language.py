"""Language models as learners see them: prompts of their own part of a task, hidden states, and logits by the head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from small_language_model import TOKENS, save_model, save_tasks, skill

from mergeline.evaluation.state import load_state
from mergeline.merging.learning.watching import watched
from mergeline.tasks.fit import examples_of
from mergeline.tasks.modalities import modality_of
from mergeline.tasks.params import load_params
from mergeline.tasks.schema import Params

SKILLS = {"first": skill(0), "second": skill(20)}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A workspace with a base and two experts in build/checkpoints, and the base as transformers has it."""
    root = tmp_path_factory.mktemp("language")
    models = {
        name: save_model(root / "build/checkpoints" / name, i) for i, name in enumerate(("base", *SKILLS))
    }
    save_tasks(root / "tasks", SKILLS)
    for name in SKILLS:
        file = root / "tasks" / f"{name}.yaml"
        rows = [json.dumps({"question": f"{a} {b} {a}", "answer": b}) for a, b in SKILLS[name] * 9]
        (root / "tasks" / f"{name}-train.jsonl").write_text("\n".join(rows) + "\n")
        task = json.loads(file.read_text())
        task["dataset_kwargs"]["data_files"]["train"] = str(root / "tasks" / f"{name}-train.jsonl")
        file.write_text(json.dumps({**task, "training_split": "train"}))
    params = {
        "name": "small", "seed": 0, "base": "base", "experts": [*SKILLS],
        "checkpoints": {"layout": "as_is", "files": {n: n for n in models}, "uris": {}},
        "language": {"tasks": str(root / "tasks"), "suites": {name: [name] for name in SKILLS}},
        "merges": {"average": {"method": "average"}},
    }  # fmt: skip
    (root / "params.yaml").write_text(json.dumps(params))
    return root, models["base"]


def opened(root: Path) -> tuple[Any, Params, Path]:
    params = load_params(root / "params.yaml")
    return modality_of(params), params, root / "build"


def test_features_are_the_last_hidden_states_of_the_tokens_that_count_and_logits_are_the_heads(family):
    root, base = family
    modality, params, build = opened(root)
    network = modality.network(params, build, build / "checkpoints/first")
    network.load(load_state(build / "checkpoints/base"))
    examples = examples_of(modality, params, build, first=5)
    [batch] = list(examples.of("first"))
    assert batch["input_ids"].shape == (5, 3) and batch["attention_mask"].all()
    batch["attention_mask"][0, 2] = 0  # as if one were shorter
    with torch.no_grad():
        features = network.features(batch)
        logits = network.logits(features, "first")
        whole = base(input_ids=batch["input_ids"][1:]).logits.flatten(0, 1)
        short = base(input_ids=batch["input_ids"][:1, :2]).logits.flatten(0, 1)
    assert features.shape == (14, 32) and logits.shape == (14, len(TOKENS))
    torch.testing.assert_close(logits, torch.cat([short, whole]), rtol=1e-4, atol=1e-5)


def test_every_matrix_of_a_block_is_seen(family):
    root, _ = family
    modality, params, build = opened(root)
    network = modality.network(params, build, build / "checkpoints/base")
    batch = next(examples_of(modality, params, build, first=2).of("second"))
    seen: set[str] = set()
    with torch.no_grad(), watched(network.tensors(), lambda use: seen.add(use.tensor)):
        network.features(batch)
    matrices = {name for name, tensor in network.tensors().items() if tensor.ndim == 2}
    assert seen == matrices and len(matrices) == 1 + 2 * 7


def test_prompts_are_of_the_training_part_64_unless_more_are_asked_for(family):
    root, _ = family
    modality, params, build = opened(root)
    for first, count in ((None, 64), (100, 100), (1000, 108)):
        examples = examples_of(modality, params, build, first=first)
        assert (examples.split, examples.labelled) == ("fit", False)
        assert {task: examples.count(task) for task in SKILLS} == dict.fromkeys(SKILLS, count)
        rows = torch.cat([batch["input_ids"] for batch in examples.of("first")])
        assert len(rows) == count and (rows[:, 0] == rows[:, 2]).all()
    again = examples_of(modality, params, build)
    assert torch.equal(rows[:64], torch.cat([batch["input_ids"] for batch in again.of("first")]))
    questions = [TOKENS.index(a) for a, _ in SKILLS["first"]]
    assert rows[:12, 0].tolist() != questions and set(rows[:, 0].tolist()) == set(questions)
    assert examples.digests == again.digests and len(set(again.digests.values())) == 2


@pytest.mark.parametrize("own", [{}, {"training_split": "test"}, {"fewshot_split": "validation"}])
def test_a_task_without_a_part_of_its_own_is_refused_with_the_mend(family, tmp_path, own):
    root, _ = family
    file = root / "tasks/first.yaml"
    before = file.read_text()
    task = {key: value for key, value in json.loads(before).items() if key != "training_split"}
    file.write_text(json.dumps(task | own))
    modality, params, build = opened(root)
    try:
        with refused("task 'first' has no examples to be fitted to", "add `training_split:`"):
            examples_of(modality, params, build)
    finally:
        file.write_text(before)
