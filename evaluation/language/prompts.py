"""The prompts of lm-eval tasks that neither choose nor report: those of a task's training or few-shot part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

import numpy as np

from mergeline.evaluation.language.harness import load_tasks
from mergeline.evaluation.language.quiet import be_quiet
from mergeline.evaluation.language.settings import Language
from mergeline.merging.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ORDER_SEED = 0  # examples may be sorted by what they ask for


def prompts(
    language: Language, names: Sequence[str], tokenizer: PreTrainedTokenizerBase, split: str
) -> dict[str, list[str]]:
    """Task -> its prompts without their answers, in an order that is drawn once and for all.

    split: `fit` for the examples of `training_split`, or else of a `fewshot_split` of its own; `test` for the test
    examples.

    Raises:
        UserError: a task that is not known, has no such part, or asks nothing.
    """
    be_quiet()
    tasks = load_tasks(language, "test", seed=0)
    found = {}
    for name in names:
        task = tasks[name]
        documents = list(task.test_docs() if split == "test" else _own(name, task))
        order = np.random.default_rng(_ORDER_SEED).permutation(len(documents))
        texts = [str(task.doc_to_text(documents[i])) for i in order]
        if not all(text.strip() for text in texts) or not texts:
            raise UserError(
                f"task '{name}': an example asks nothing (doc_to_text), so nothing can be fitted to it"
            )
        if language.apply_chat_template:
            texts = [as_chat(text, tokenizer) for text in texts]
        found[name] = texts
    return found


def _own(name: str, task: Any) -> Any:
    """The examples of a task that are in neither of the splits which choose and report."""
    measured = {task.config.validation_split, task.config.test_split}
    training, shots = task.config.training_split, task.config.fewshot_split
    if training and training not in measured:
        return task.training_docs()
    if shots and shots not in measured:
        return task.fewshot_docs()
    raise UserError(
        f"task '{name}' has no examples to be fitted to; add `training_split:` to its file, with examples that are in "
        "neither validation nor test"
    )


def as_chat(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text as what a user says, in the chat template, up to where the model answers."""
    asked = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
