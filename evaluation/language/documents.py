"""The examples of lm-eval's tasks as people read them."""

from __future__ import annotations

import json
from functools import lru_cache

from mergeline.evaluation.language.harness import LanguageEvaluator
from mergeline.evaluation.language.settings import Language


def document(language: Language, seed: int, split: str, task: str, index: int) -> str:
    """What is asked and the answer that is wanted, of an example of a split by its place among the answers.

    Raises:
        UserError: the tasks cannot be loaded.
    """
    asked, wanted = _opened(json.dumps(language.model_dump(mode="json")), seed).document(split, task, index)
    return f"{asked} → {wanted.strip()}"


@lru_cache(maxsize=1)
def _opened(language: str, seed: int) -> LanguageEvaluator:
    """The tasks with their data, which take long to load."""
    return LanguageEvaluator(Language.model_validate_json(language), seed)
