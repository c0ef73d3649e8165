"""Averaging against ensembling (2411.09263): what of a merge's loss is the averaging's, and what the experts' own.

On the examples of each task, without labels, how often the class that is predicted is the one that the task's expert
predicts: by the merge, by the mean of all experts' logits, and by the mean of their features. An ensemble knows as
little as a merge for which task an example is; what it keeps and the merge does not, the merging of weights lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping

from mergeline.merging.diagnoses.advice import Advice
from mergeline.merging.diagnoses.sums import number
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.models import load_model
from mergeline.merging.learning.network import Examples, Network, batch_size

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any]

WAYS = ("merge", "logits", "features")
_DEVIATIONS = 3.0  # of a difference between two ways on the same rows, by McNemar's test


def ensembles(
    network: Network,
    examples: Examples,
    base: Path,
    merge: Path,
    experts: Mapping[str, Path],
    progress: Callable[[int, int], None] | None = None,
) -> Json:
    """How often each way agrees with the task's expert, by task and in the mean, and `advice`, as JSON values.

    One model is held at a time, and the experts' mean features and logits of all examples. Tasks whose logits are
    numbers have no classes, and are left out.

    Raises:
        UserError: models that have no logits; checkpoints that do not match, or that the network cannot take over.
    """
    tasks = [task for task in examples.owners if task not in network.numbers]
    if network.score is None or not tasks:
        raise UserError("these models predict no classes; leave ensembles out")
    done, total = 0, (len(experts) + 1) * sum(map(examples.count, tasks))

    if progress:
        progress(0, total)

    def passed(task: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and logits of the loaded model, batch by batch."""
        nonlocal done
        for batch in examples.of(task):
            features = network.features(batch)
            yield features, network.logits(features, task)
            done += batch_size(batch)
            if progress:
                progress(done, total)

    features: dict[str, Tensor] = {}
    logits: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    agreed: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad():
        for name, path in experts.items():
            load_model(network, base, path)
            for task in tasks:
                feature_RD, logit_RC = (torch.cat(parts) for parts in zip(*passed(task)))
                features[task] = features.get(task, 0) + feature_RD / len(experts)
                logits[task] = logits.get(task, 0) + logit_RC / len(experts)
                if examples.owners[task] == name:
                    right[task] = logit_RC.argmax(1)
        load_model(network, base, merge)
        for task in tasks:
            merged = torch.cat([logit_RC for _, logit_RC in passed(task)])
            found = {
                "merge": merged,
                "logits": logits[task],
                "features": network.logits(features[task], task),
            }
            agreed[task] = {way: logit_RC.argmax(1) == right[task] for way, logit_RC in found.items()}
    shares = {task: {way: float(own[way].double().mean()) for way in WAYS} for task, own in agreed.items()}
    return {
        "tasks": {
            task: {"expert": examples.owners[task], **{way: number(own[way]) for way in WAYS}}
            for task, own in shares.items()
        },
        "mean": {way: number(sum(own[way] for own in shares.values()) / len(tasks)) for way in WAYS},
        "advice": [advice.as_json() for advice in advice_on_ensembles(agreed)],
    }


def advice_on_ensembles(agreed: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Advice]:
    """A sentence where the better ensemble agrees surely more than the merge does.

    agreed: by task and way, for each row whether it agrees with the expert.
    """
    rows = {way: torch.cat([own[way] for own in agreed.values()]) for way in WAYS}
    better = max(WAYS[1:], key=lambda way: int(rows[way].sum()))
    gained = int((rows[better] & ~rows["merge"]).sum())
    lost = int((rows["merge"] & ~rows[better]).sum())
    share = {way: float(rows[way].double().mean()) for way in WAYS}
    if gained - lost > _DEVIATIONS * (gained + lost) ** 0.5:
        yield Advice(
            "ensembles",
            [],
            f"the mean of the experts' {better} agrees with the tasks' experts on {share[better]:.1%} of examples, the "
            f"merge on {share['merge']:.1%}: it is merging that loses them, not that experts contradict one another; "
            "search other methods and scales",
        )
