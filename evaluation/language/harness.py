"""Causal language models on tasks of lm-eval: how good each answer of a checkpoint is, and its perplexities.

The tasks are lm-eval's own YAML files, those of a folder and, if asked for, the ones it comes with.
https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, Sequence

import numpy as np

from mergeline.evaluation.language.models import LoadedModel
from mergeline.evaluation.language.quiet import be_quiet
from mergeline.evaluation.language.server import ServedModel
from mergeline.evaluation.language.settings import Language
from mergeline.evaluation.metrics import bootstrap_ratio
from mergeline.merging.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# Metrics that say of one example whether it is right, the strictest first.
_RIGHT_OR_WRONG = ("exact_match", "acc", "pass@1", "pass_at_1", "prompt_level_strict_acc")
_NUMBER = int | float | bool | np.number
_WORST = 700.0  # nats a word: the exponential of more would overflow
_HELD_BACK = 4  # of a task that has one split alone, every fourth example is for validation


@dataclass
class Scores:
    """Of one model and split. graded: task -> how good each answer is, float64 (N), in the task's order: 1 or 0 where
    the metric says right or wrong, else the metric of the example, negated where smaller ones are better.

    perplexity: task -> word perplexity, its interval over documents, and bits per byte. lm_eval: task -> metric ->
    (value, standard error or None), as lm-eval reports them.
    """

    graded: dict[str, np.ndarray] = field(default_factory=dict)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    lm_eval: dict[str, dict[str, tuple[float, float | None]]] = field(default_factory=dict)


class LanguageEvaluator:
    """Scores any number of checkpoints; the tasks and their data are loaded once.

    Paths in task files are relative to the current folder, as lm-eval has it.

    Raises:
        UserError: a task that is not known, or one that cannot be loaded.
    """

    def __init__(self, language: Language, seed: int = 0):
        self.language = language
        be_quiet()
        self._tasks: dict[str, dict[str, Task]] = {
            split: load_tasks(language, split, seed) for split in ("val", "test")
        }

    def score(
        self,
        model: LoadedModel | ServedModel,
        split: str,
        tasks: Sequence[str],
        perplexity: Sequence[str] = (),
        count: Callable[[int, int], None] = lambda done, total: None,
    ) -> Scores:
        """A model on some of the tasks; `count` is told how many requests were answered, of those known by then.

        Raises:
            UserError: a task has no metric of the name, or one that says nothing of a single example.
        """
        from lm_eval.evaluator import evaluate

        names = [*tasks, *perplexity]
        if not names:
            return Scores()
        chosen = {name: self._tasks[split][name] for name in names}
        lm = model.lm(self.language.batch_size)
        _count_requests(lm, count)
        found = evaluate(
            lm,
            {"tasks": chosen, "groups": {}, "group_map": {}},
            samples={name: self._examples(name, split) for name in names},
            apply_chat_template=self.language.apply_chat_template,
            bootstrap_iters=100,
            log_samples=True,
        )
        return Scores(
            graded={name: self._graded(name, found["samples"][name]) for name in tasks},
            perplexity={name: _perplexity(found["samples"][name]) for name in perplexity},
            lm_eval={name: _reported(found["results"][name]) for name in names},
        )

    def document(self, split: str, task: str, index: int) -> tuple[str, str]:
        """What is asked, without examples before it, and the answer that is wanted, of an example of `score`."""
        asked = self._tasks[split][task]
        doc = asked.eval_docs[self._examples(task, split)[index]]
        target = asked.doc_to_target(doc)
        if isinstance(target, int) and asked.config.doc_to_choice is not None:
            target = asked.doc_to_choice(doc)[target]
        return str(asked.doc_to_text(doc)), str(target)

    def _examples(self, name: str, split: str) -> list[int]:
        """Which of the task's examples belong to the split."""
        task = self._tasks[split][name]
        indexes: Sequence[int] = range(len(task.eval_docs))
        if not _has_both_splits(self._tasks["test"][name]):
            indexes = [i for i in indexes if (i % _HELD_BACK == 0) == (split == "val")]
        return list(indexes[: self.language.limit])

    def _graded(self, name: str, samples: list[dict[str, Any]]) -> np.ndarray:
        metric, _, filtered = self.language.metrics.get(name, "").partition(",")
        filtered = filtered or samples[0]["filter"]
        counted = [sample for sample in samples if sample["filter"] == filtered]
        metric = metric or next((m for m in _RIGHT_OR_WRONG if m in samples[0]["metrics"]), "")
        if not counted or metric not in samples[0]["metrics"]:
            known = ", ".join(samples[0]["metrics"])
            raise UserError(
                f"task '{name}': name the metric that counts under language.metrics; it has: {known}"
            )
        task = self._tasks["test"][name]
        together = task.aggregation()[metric]
        try:
            # Of BLEU and the like, an example has a text and its references, of which the aggregate makes a number.
            alone = [s[metric] if isinstance(s[metric], _NUMBER) else together([s[metric]]) for s in counted]
            values = np.array(alone, np.float64)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(
                f"task '{name}': '{metric}' says nothing of a single example ({error}); name another under "
                "language.metrics"
            ) from None
        higher = bool(task.higher_is_better().get(metric, True))
        if higher == (name in self.language.lower):
            told = "larger" if higher else "smaller"
            mend = "take it out of" if higher else "list it under"
            raise UserError(
                f"task '{name}': lm-eval says that {told} {metric} is better: {mend} language.lower"
            )
        return values if higher else -values


def _count_requests(lm: Any, count: Callable[[int, int], None]) -> None:
    """Have a model of lm-eval count what it is asked and what it answers."""
    done = total = 0

    class Answered:  # in place of lm-eval's cache of answers, which is told of each of them
        def add_partial(self, *_answer: Any) -> None:
            nonlocal done
            done += 1
            count(done, max(done, total))

    def counted(ask: Callable[..., Any]) -> Callable[..., Any]:
        def asked(requests: Sequence[Any], *args: Any, **more: Any) -> Any:
            nonlocal total
            total += len(requests)
            return ask(requests, *args, **more)

        return asked

    lm.set_cache_hook(Answered())
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, kind, counted(getattr(lm, kind)))


def load_tasks(language: Language, split: str, seed: int) -> dict[str, Task]:
    """The tasks of a `language`, as they are asked on a split (raises UserError)."""
    from lm_eval.tasks import TaskManager

    folder = Path(language.tasks)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; language.tasks names a folder of lm-eval's task files")
    manager = TaskManager(include_path=str(folder), include_defaults=language.built_in)
    names = [*language.scored, *language.perplexity]
    for name in names:
        if name not in manager.all_subtasks:
            raise UserError(f"lm-eval has no task '{name}'{did_you_mean(name, manager.all_subtasks)}")
    try:
        tasks = manager.load(names)["tasks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: a task cannot be loaded ({type(error).__name__}: {reason})") from None
    for task in tasks.values():
        if split == "val" and _has_both_splits(task):
            task.config.test_split = None  # lm-eval takes the test examples where there are any
        if language.num_fewshot is not None:
            task.set_config("num_fewshot", language.num_fewshot)
        task.set_fewshot_seed(seed)
    return tasks


def _has_both_splits(task: Task) -> bool:
    return bool(task.has_test_docs()) and bool(task.has_validation_docs())


def _perplexity(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Word perplexity with its interval over documents, and bits per byte; NaN counts as the largest there is."""
    likelihood_N, words_N = np.array([sample["word_perplexity"] for sample in samples]).T
    bytes_N = np.array([sample["bits_per_byte"][1] for sample in samples])
    loss_N = np.where(np.isfinite(likelihood_N), -likelihood_N, _WORST * words_N)
    value, lower, upper = (math.exp(min(loss, _WORST)) for loss in bootstrap_ratio(loss_N, words_N))
    bits = loss_N.sum() / bytes_N.sum() / math.log(2)
    return {"value": value, "lower": lower, "upper": upper, "bits_per_byte": float(bits)}


def _reported(results: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """`metric,filter` -> (value, standard error) of lm-eval's results."""
    reported = {}
    for key, value in results.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = results.get(f"{metric}_stderr,{filtered}")
        reported[key] = (float(value), float(error) if isinstance(error, (int, float)) else None)
    return reported
