"""Language models on lm-eval's tasks: what is right, perplexities, checks, settings, and what bad input gets."""

from __future__ import annotations

import ast
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import refused
from places import REPOSITORY
from safetensors.torch import save_file
from small_language_model import WORDS, save_experts, save_model, save_tasks, save_tokenizer, skill
from soon import soon

from mergeline.evaluation.language import Language, LanguageEvaluator, LoadedModel, load_model
from mergeline.evaluation.metrics import bootstrap_ratio
from mergeline.merging.errors import UserError
from mergeline.tasks.language.modality import LanguageModels
from mergeline.tasks.params import load_params

SKILLS = {"one": skill(0), "two": skill(14)}

# Makes ready for lm-eval in the midst of another thread's first import of transformers.
IN_THE_MIDST = """
import sys, threading
import datasets, torch
from mergeline.evaluation.language.quiet import be_quiet
assert "transformers" not in sys.modules
threading.Thread(target=__import__, args=["transformers"]).start()
while "transformers" not in sys.modules:
    pass
be_quiet()
import lm_eval.models.huggingface
lm_eval.models.huggingface.transformers.AutoModelForCausalLM
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, one/, two/ and tasks/."""
    folder = tmp_path_factory.mktemp("language")
    save_experts(folder, save_model(folder / "base", 0), SKILLS)
    save_tasks(folder / "tasks", SKILLS)
    return folder


def language(family: Path, **changes: Any) -> Language:
    given = {"tasks": str(family / "tasks"), "suites": {"skills": ["one", "two"]}, "perplexity": ["prose"]}
    return Language(**{**given, **changes})


def right_by_hand(model: LoadedModel, pairs: list[tuple[str, str]]) -> list[bool]:
    """Whether the most likely word after each question is the answer."""
    asked = model.tokenizer([a for a, _ in pairs], return_tensors="pt")["input_ids"]
    found = model.model(asked).logits[:, -1].argmax(-1)
    return [model.tokenizer.decode(i) == answer for i, (_, answer) in zip(found, pairs)]


@pytest.mark.parametrize("name", ["base", "one", "two"])
def test_right_is_the_greedy_answer_example_by_example(family, name):
    model = load_model(family / name)
    found = LanguageEvaluator(language(family)).score(model, "test", ["one", "two"])
    for task, pairs in SKILLS.items():
        assert found.graded[task].tolist() == right_by_hand(model, pairs)
    if name != "base":
        assert found.graded[name].mean() > 0.9
    value, error = found.lm_eval["one"]["acc,none"]
    assert value == pytest.approx(found.graded["one"].mean())
    assert error == pytest.approx(np.std(found.graded["one"], ddof=1) / math.sqrt(12))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_is_neither_run_nor_asked_for(file, family, tmp_path, monkeypatch):
    shutil.copytree(family / "base", tmp_path / "base")
    path = tmp_path / "base" / file
    own = {
        "config.json": {
            "model_type": "evil",
            "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Evil",
            "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        },
    }[file]
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (tmp_path / "base" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("it asks whether to run code"))
    with refused(str(tmp_path / "base"), "code of its own, which is never run"):
        load_model(tmp_path / "base")
    assert not (tmp_path / "ran").exists()


def test_layers_without_weights_are_not_built(family, tmp_path):
    shutil.copytree(family / "base", tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 10**9}))
    with soon(), refused("num_hidden_layers is 1000000000", "the weights have"):
        load_model(tmp_path / "base")


def test_every_automatic_class_of_transformers_is_told_not_to_run_code():
    """Left to its default, it asks on a terminal, and the answer runs it."""
    found = 0
    for folder in ("merging", "evaluation", "tasks", "flows", "samples"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                opens = r"(Auto\w+|_class\(.*\))\.from_\w+"
                if isinstance(call, ast.Call) and re.fullmatch(opens, ast.unparse(call.func)):
                    settings = {word.arg: ast.unparse(word.value) for word in call.keywords}
                    assert settings.get("trust_remote_code") == "False", f"{path}:{call.lineno}"
                    found += 1
    assert found >= 2


def test_perplexity_is_of_the_texts_own_words(family):
    model = load_model(family / "base")
    found = LanguageEvaluator(language(family)).score(model, "test", [], ["prose"]).perplexity["prose"]
    loss = words = length = 0.0
    for start in range(0, 32, 4):
        text = " ".join(WORDS[start : start + 8])
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        whole = torch.cat([torch.tensor([[model.tokenizer.bos_token_id]]), ids], dim=1)
        with torch.inference_mode():
            likelihood = model.model(whole).logits[0, :-1].double().log_softmax(-1)
        loss -= float(likelihood.gather(-1, ids[0][:, None]).sum())
        words += 8
        length += len(text.encode())
    assert found["value"] == pytest.approx(math.exp(loss / words), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(loss / length / math.log(2), rel=1e-4)
    assert found["lower"] <= found["value"] <= found["upper"]


def test_every_request_is_counted_once(family):
    seen: list[tuple[int, int]] = []
    evaluator, model = LanguageEvaluator(language(family)), load_model(family / "base")
    evaluator.score(model, "test", ["one", "two"], ["prose"], lambda *counts: seen.append(counts))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1)) and len(seen) > 24
    assert all(done <= total for done, total in seen) and seen[-1][0] == seen[-1][1]


def test_limit_takes_the_first_examples(family):
    model = load_model(family / "one")
    whole = LanguageEvaluator(language(family)).score(model, "test", ["two"]).graded["two"]
    few = LanguageEvaluator(language(family, limit=5)).score(model, "test", ["two"]).graded["two"]
    assert few.tolist() == whole[:5].tolist()


def test_a_task_with_one_split_holds_every_fourth_example_back(family, tmp_path):
    save_tasks(tmp_path / "tasks", SKILLS)
    file = tmp_path / "tasks" / "one.yaml"
    file.write_text(file.read_text().replace('"validation_split": "validation", ', ""))
    evaluator = LanguageEvaluator(language(tmp_path))
    model = load_model(family / "base")
    validation, test = (evaluator.score(model, split, ["one"]).graded["one"] for split in ("val", "test"))
    by_hand = right_by_hand(model, SKILLS["one"])
    assert validation.tolist() == by_hand[::4]
    assert test.tolist() == [r for i, r in enumerate(by_hand) if i % 4]


def test_the_validation_split_is_read_where_there_is_one(family, tmp_path):
    save_tasks(tmp_path / "tasks", SKILLS)
    lines = (tmp_path / "tasks" / "two-test.jsonl").read_text()
    (tmp_path / "tasks" / "one-validation.jsonl").write_text(lines)
    found = LanguageEvaluator(language(tmp_path)).score(load_model(family / "two"), "val", ["one"])
    assert found.graded["one"].mean() > 0.9


def test_few_shots_and_chat_templates_reach_the_prompt(family):
    """Other prompts, other answers: the expert knows its words alone, not in a context."""
    model = load_model(family / "one")

    def right(**changes: Any) -> list[bool]:
        evaluator = LanguageEvaluator(language(family, **changes))
        return evaluator.score(model, "test", ["one"]).graded["one"].tolist()

    assert right(num_fewshot=2) != right()
    assert right(num_fewshot=2) == right(num_fewshot=2)
    right(apply_chat_template=True)


def test_batches_change_nothing(family):
    model = load_model(family / "one")
    by_size = [
        LanguageEvaluator(language(family, batch_size=size)).score(model, "test", ["one", "two"], ["prose"])
        for size in (1, 5)
    ]
    for task in SKILLS:
        assert by_size[0].graded[task].tolist() == by_size[1].graded[task].tolist()
    values = [scores.perplexity["prose"]["value"] for scores in by_size]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_model_that_works_passes_its_checks(family):
    assert load_model(family / "base").check() == {"finite": True, "round_trip": True, "generates": True}


def test_a_model_that_computes_nan_fails_its_checks_and_has_the_worst_perplexity(family):
    model = load_model(family / "base")
    with torch.no_grad():
        model.model.model.norm.weight.fill_(float("nan"))
    assert model.check()["finite"] is False
    found = LanguageEvaluator(language(family)).score(model, "test", ["one"], ["prose"])
    assert not found.graded["one"].any()
    assert found.perplexity["prose"]["value"] > 1e300


def test_a_tokenizer_of_another_model_fails_its_check(family, tmp_path):
    save_tokenizer(tmp_path, ["<pad>", "<s>", "</s>", "<unk>", *WORDS])  # knows no word of the text
    other = load_model(family / "base")
    from transformers import AutoTokenizer

    assert not LoadedModel(other.model, AutoTokenizer.from_pretrained(tmp_path)).check()["round_trip"]


def test_what_is_no_model_is_refused(family, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with refused(str(tmp_path), "needs model.safetensors"):
        load_model(tmp_path)
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with refused(str(tmp_path), "does not open"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "kind", "section"),
    [
        ('{"model_type": "t5", "is_encoder_decoder": true}', "t5", "text2text"),
        ('{"model_type": "llava"}', "llava", "vision_language"),
    ],
)
def test_other_kinds_of_writers_are_refused_in_few_words(tmp_path, config, kind, section):
    (tmp_path / "config.json").write_text(config)
    said = (
        f"{tmp_path}: is of type {kind}, no causal language model; write `{section}:` in place of `language:`"
    )
    for refuse in (load_model, LanguageModels().check):
        with refused(said):
            refuse(tmp_path)


def test_unknown_tasks_are_refused_with_the_nearest_name(family):
    with refused("lm-eval has no task 'ones'", "one"):
        LanguageEvaluator(language(family, suites={"skills": ["ones"]}))
    with refused("no such folder", "language.tasks"):
        LanguageEvaluator(language(family, tasks=str(family / "nowhere")))


def test_a_task_file_that_is_broken_is_refused(family, tmp_path):
    save_tasks(tmp_path / "tasks", SKILLS)
    (tmp_path / "tasks" / "one-test.jsonl").unlink()
    with refused("a task cannot be loaded"):
        LanguageEvaluator(language(tmp_path))


@pytest.mark.slow
def test_the_tasks_of_the_examples_are_lm_evals():
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_subtasks
    for name in ("language", "mergebench-gemma-2-2b", "3h-mistral-7b"):
        asked = load_params(REPOSITORY / f"examples/{name}.yaml").language  # type: ignore[attr-defined]
        assert {*asked.scored, *asked.perplexity} <= {*known}
        assert {*asked.metrics} <= {*asked.scored}


def test_a_metric_that_is_neither_right_nor_wrong_is_refused(family):
    evaluator = LanguageEvaluator(language(family, metrics={"one": "perplexity"}))
    with refused("task 'one'", "language.metrics", "acc"):
        evaluator.score(load_model(family / "base"), "test", ["one"])


def test_the_interval_of_a_ratio_holds_the_ratio_and_narrows_with_documents():
    rng = np.random.default_rng(0)
    words_N = rng.integers(5, 50, 400).astype(float)
    loss_N = words_N * 3 + rng.normal(0, 4, 400)
    wide, narrow = (bootstrap_ratio(loss_N[:n], words_N[:n]) for n in (20, 400))
    for found in (wide, narrow):
        assert found.lower < found.mean < found.upper and found.lower < 3 < found.upper
    assert narrow.upper - narrow.lower < (wide.upper - wide.lower) / 2
    assert bootstrap_ratio(3 * words_N, words_N) == pytest.approx((3, 3, 3))


def test_a_model_with_adapters_of_tasks_or_a_router_is_not_measured_as_if_it_had_none(tmp_path):
    (tmp_path / "one" / "adapters").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "router.safetensors").touch()
    for name in ("one", "two"):
        with pytest.raises(UserError, match="with which only image models are measured"):
            load_model(tmp_path / name)


def test_lm_eval_has_the_whole_of_transformers_whoever_imports_it_first():
    subprocess.run([sys.executable, "-c", IN_THE_MIDST], cwd=REPOSITORY, check=True)
