"""The evaluator of Decision Transformers: a trunk under the head of each task's own expert, episode by episode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Sequence, cast

import numpy as np

from mergeline.evaluation.policies.rollouts import rollouts
from mergeline.tasks.modality import Evaluation, Json, Model
from mergeline.tasks.progress import adding

if TYPE_CHECKING:
    from mergeline.tasks.policies.family import Family


class PolicyEvaluator:
    """Answers are, of each episode, its normalised return, its return and its length, float64 (N, 3).

    Models are folders. scores: "returns", of the test split where it is measured: of each task the "mean" return and
    the mean "length".

    Raises:
        UserError: a head does not fit its environment.
    """

    def __init__(self, family: Family):
        self._family, self._policies = family, family.policies

    def evaluate(self, model: Model, splits: Sequence[str], tasks: Sequence[str]) -> Evaluation:
        section = self._family.params.policies
        trunk = self._family.model(cast(Path, model))
        answers: dict[str, np.ndarray] = {}
        scores: Json = {}
        asked = [(split, task, section.episodes.seeds(split)) for split in splits for task in tasks]
        with adding("episodes", sum(len(seeds) for *_, seeds in asked)) as more:
            for split, task, seeds in asked:
                policy = self._policies[task]
                policy.put_on(trunk)
                found_N2 = rollouts(policy, seeds, section.batch_size, more)
                normalised_N = policy.task.normalised(found_N2[:, 0])
                answers[f"{split}/{task}"] = np.column_stack([normalised_N, found_N2])
                if split == "test":
                    mean, length = found_N2.mean(0).tolist()
                    scores.setdefault("returns", {})[task] = {"mean": mean, "length": length}
        return Evaluation(answers, scores)
