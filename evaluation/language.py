"""Causal language models on tasks of lm-eval: which examples a checkpoint gets right, and its perplexities.

The tasks are lm-eval's own YAML files, those of a folder and, if asked for, the ones it comes with.
https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from evaluation.metrics import bootstrap_ratio
from merging.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Split = Literal["val", "test"]
# Metrics that say of one example whether it is right, the strictest first.
_RIGHT_OR_WRONG = ("exact_match", "acc", "pass@1", "pass_at_1", "prompt_level_strict_acc")
_WORST = 700.0  # nats a word: the exponential of more would overflow
_HELD_BACK = 4  # of a task that has one split alone, every fourth example is for validation
_PROBE = "The capital of France is Paris, and 2 + 2 = 4."
_NEW_TOKENS = 8
_LOADING = threading.Lock()  # transformers changes global state while it builds a model


class Language(BaseModel):
    """`language` of params.yaml: what a language model is measured on.

    tasks: a folder of lm-eval's task files. built_in: the tasks that lm-eval comes with, too.
    suites: domain -> tasks whose examples are right or wrong. An expert is scored on the suite of its own name.
    perplexity: tasks of `loglikelihood_rolling`. metrics: task -> the metric that counts, `name` or `name,filter`.
    limit: examples of a task and split, the first ones. num_fewshot: None leaves it to the task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: str
    built_in: bool = False
    suites: Annotated[dict[str, Annotated[list[str], Field(min_length=1)]], Field(min_length=1)]
    perplexity: list[str] = []
    metrics: dict[str, str] = {}
    limit: Annotated[int, Field(gt=0)] | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    apply_chat_template: bool = False
    batch_size: Annotated[int, Field(gt=0)] = 16
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"

    @property
    def scored(self) -> list[str]:
        """The tasks of all suites, in order, once each."""
        return list(dict.fromkeys(task for tasks in self.suites.values() for task in tasks))


@dataclass
class Scores:
    """Of one model and split. right: task -> which examples are right, bool (N), in the task's order.

    perplexity: task -> word perplexity, its interval over documents, and bits per byte. lm_eval: task -> metric ->
    (value, standard error or None), as lm-eval reports them.
    """

    right: dict[str, np.ndarray] = field(default_factory=dict)
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
        _be_quiet()
        self._tasks: dict[Split, dict[str, Task]] = {
            split: _load_tasks(language, split, seed) for split in ("val", "test")
        }

    def score(
        self, model: LoadedModel, split: Split, tasks: Sequence[str], perplexity: Sequence[str] = ()
    ) -> Scores:
        """A model on some of the tasks (raises UserError if a task's metric is neither right nor wrong)."""
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        names = [*tasks, *perplexity]
        if not names:
            return Scores()
        chosen = {name: self._tasks[split][name] for name in names}
        lm = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=self.language.batch_size)
        found = evaluate(
            lm,
            {"tasks": chosen, "groups": {}, "group_map": {}},
            samples={name: self._examples(name, split) for name in names},
            apply_chat_template=self.language.apply_chat_template,
            bootstrap_iters=100,
            log_samples=True,
        )
        return Scores(
            right={name: self._right(name, found["samples"][name]) for name in tasks},
            perplexity={name: _perplexity(found["samples"][name]) for name in perplexity},
            lm_eval={name: _reported(found["results"][name]) for name in names},
        )

    def _examples(self, name: str, split: Split) -> list[int]:
        """Which of the task's examples belong to the split."""
        task = self._tasks[split][name]
        indexes = range(len(task.eval_docs))
        if not _has_both_splits(self._tasks["test"][name]):
            indexes = [i for i in indexes if (i % _HELD_BACK == 0) == (split == "val")]
        return list(indexes[: self.language.limit])

    def _right(self, name: str, samples: list[dict[str, Any]]) -> np.ndarray:
        metric, _, filtered = self.language.metrics.get(name, "").partition(",")
        filtered = filtered or samples[0]["filter"]
        kept = [sample for sample in samples if sample["filter"] == filtered]
        metric = metric or next((m for m in _RIGHT_OR_WRONG if m in samples[0]["metrics"]), "")
        if not kept or metric not in samples[0]["metrics"]:
            known = ", ".join(samples[0]["metrics"])
            raise UserError(f"task '{name}': name the metric that counts under language.metrics; it has: {known}")
        values = np.array([float(sample[metric]) for sample in kept])
        if not np.isin(values, (0, 1)).all():
            raise UserError(f"task '{name}': '{metric}' is not right or wrong; name another under language.metrics")
        return values == 1


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def check(self) -> dict[str, bool]:
        """What a model must do before it is used: finite logits, a tokenizer that gives a text back, some output."""
        import torch

        ids = self.tokenizer(_PROBE, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            logits = self.model(**ids).logits
            out = self.model.generate(
                **ids,
                max_new_tokens=_NEW_TOKENS,
                min_new_tokens=1,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
        text = self.tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True)
        return {
            "finite": bool(torch.isfinite(logits).all()),
            "round_trip": text.strip() == _PROBE,
            "generates": out.shape[1] > ids["input_ids"].shape[1],
        }


def load_model(folder: Path, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """A folder that transformers' AutoModelForCausalLM and AutoTokenizer open, without code of its own.

    Raises:
        UserError: it does not open.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _be_quiet()
    try:
        with _LOADING:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: does not open as a language model ({reason})") from None
    return LoadedModel(model.eval().to(device), tokenizer)


def _load_tasks(language: Language, split: Split, seed: int) -> dict[str, Task]:
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


@cache
def _be_quiet() -> None:
    """Progress bars and notices of lm-eval and what it uses stay away from now on; errors come through."""
    import logging

    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    import transformers
    from tqdm import tqdm

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
        module.tqdm = lambda *args, **more: tqdm(*args, **{**more, "disable": True})
    for name in ("lm_eval", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
