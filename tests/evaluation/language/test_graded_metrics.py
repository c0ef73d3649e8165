"""Metrics that are numbers, not right or wrong, are the outcomes of their examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from checkpoints import refused
from small_language_model import _write_task, save_experts, save_model, save_tasks, skill

from mergeline.evaluation.language import Language, LanguageEvaluator, load_model

SKILLS = {"one": skill(0)}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graded")
    save_experts(folder, save_model(folder / "base", 0), SKILLS)
    save_tasks(folder / "tasks", SKILLS)
    metrics = [
        {"metric": "chrf", "aggregation": "chrf", "higher_is_better": True},
        {"metric": "ter", "aggregation": "ter", "higher_is_better": False},
    ]
    for split in ("validation", "test"):
        text = (folder / f"tasks/one-{split}.jsonl").read_text()
        (folder / f"tasks/written-{split}.jsonl").write_text(text)
    _write_task(
        folder / "tasks",
        "written",
        {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 2, "do_sample": False},
            "metric_list": metrics,
        },
    )
    return folder


def score(family: Path, name: str, **changes: Any) -> Any:
    language = Language(
        **{
            "tasks": str(family / "tasks"),
            "suites": {"s": ["written"]},
            "metrics": {"written": "chrf"},
            **changes,
        }
    )
    return LanguageEvaluator(language).score(load_model(family / name), "test", ["written"])


def test_each_text_has_a_score_of_its_own_as_sacrebleu_gives_it(family):
    found = score(family, "one").graded["written"]
    model = load_model(family / "one")
    texts = []
    for asked, _ in SKILLS["one"]:
        ids = model.tokenizer(asked, return_tensors="pt")["input_ids"]
        written = model.model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)[
            0, ids.shape[1] :
        ]
        texts.append(model.tokenizer.decode(written, skip_special_tokens=True))
    by_hand = [sacrebleu.corpus_chrf([t], [[answer]]).score for t, (_, answer) in zip(texts, SKILLS["one"])]
    assert found == pytest.approx(by_hand, abs=1e-6)
    assert len(set(by_hand)) > 2 or np.mean(by_hand) > 30


def test_smaller_ones_are_negated_where_params_say_so_and_lm_eval_agrees(family):
    higher = score(family, "one", metrics={"written": "ter"}, lower=["written"]).graded["written"]
    assert (higher <= 0).all() and higher.any()
    with refused("smaller ter is better", "list it under language.lower"):
        score(family, "one", metrics={"written": "ter"})
    with refused("larger chrf is better", "take it out of language.lower"):
        score(family, "one", lower=["written"])


def test_a_metric_that_is_not_there_is_refused_with_those_that_are(family):
    with refused("'written'", "language.metrics", "chrf", "ter"):
        score(family, "one", metrics={"written": "bleu"})
