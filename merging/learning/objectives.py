"""What a fit minimises: of the merged model on a batch, beside what the task's own expert makes of it.

Shape suffixes: R rows of features (an example, or a token that counts), d features, C classes.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Mapping

from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.lazy import torch
from mergeline.merging.learning.network import Batch, Network, mask_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """What a model makes of a batch: features (R, d), and hidden states of its blocks where they are asked for.

    heads: the tensors of the model's own head, where these differ from model to model.
    """

    features: Tensor
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    heads: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A batch of a task, what the merged model makes of it, and its own expert (None where nobody asks)."""

    network: Network
    batch: Batch
    task: str
    merged: Outputs
    expert: Outputs | None = None

    @property
    def logits(self) -> Tensor:
        """Of the merged model: (R, C) (raises UserError where the models give numbers, no classes)."""
        if self.task in self.network.numbers:
            raise UserError(
                f"the models give numbers for '{self.task}', no classes; choose an objective of features"
            )
        return self.network.logits(self.merged.features, self.task)

    @property
    def teacher(self) -> Outputs:
        assert self.expert is not None, "the objective did not say that it looks at experts"
        return self.expert

    @property
    def teacher_logits(self) -> Tensor:
        """Of the expert, by its own head: (R, C)."""
        with torch.no_grad(), self.network.lent(self.teacher.heads):
            return self.network.logits(self.teacher.features, self.task)

    @property
    def labels(self) -> Tensor:
        """(R) int64 (raises UserError where the examples have none)."""
        if "labels" not in self.batch:
            raise UserError(
                f"the examples of '{self.task}' have no labels, or the objective does not say that it looks at them "
                "(`labels = True`); choose an objective without"
            )
        return self.batch["labels"]


Loss = Callable[[Seen], "Tensor"]


@dataclass(frozen=True)
class Objective:
    """A loss, what it looks at beside the merged model's features, and whether hidden states are among it.

    sharpens: whether predictions are its targets, so that examples of one class teach that class alone.
    """

    loss: Loss
    expert: bool = True
    hidden: bool = False
    labels: bool = False
    sharpens: bool = False


def entropy(seen: Seen) -> Tensor:
    """Mean entropy of the predicted distribution, natural logarithm."""
    logits = seen.logits
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def cross_entropy(seen: Seen) -> Tensor:
    """To the labels."""
    return torch.nn.functional.cross_entropy(seen.logits, seen.labels)


def cosine(seen: Seen) -> Tensor:
    """1 - the cosine of features with the expert's, mean over rows."""
    return (1 - torch.cosine_similarity(seen.merged.features, seen.teacher.features, dim=-1)).mean()


def l1(seen: Seen) -> Tensor:
    """Mean absolute difference of features to the expert's."""
    return (seen.merged.features - seen.teacher.features).abs().mean()


def l2(seen: Seen) -> Tensor:
    """Mean squared difference of features to the expert's."""
    return (seen.merged.features - seen.teacher.features).square().mean()


def kl(temperature: float = 1.0) -> Loss:
    """T^2 * KL(expert || merged) of the distributions at temperature T, mean over rows."""

    def loss(seen: Seen) -> Tensor:
        return soft_cross_entropy(seen.logits, seen.teacher_logits, temperature) - (
            soft_cross_entropy(seen.teacher_logits, seen.teacher_logits, temperature)
        )

    return loss


def soft_cross_entropy(logits_RC: Tensor, teacher_RC: Tensor, temperature: float) -> Tensor:
    """T^2 * cross-entropy to the teacher's distribution at temperature T, mean over rows."""
    target_RC = (teacher_RC / temperature).softmax(-1)
    log_RC = (logits_RC / temperature).log_softmax(-1)
    return -(target_RC * log_RC).sum(-1).mean() * temperature**2


def hidden(seen: Seen) -> Tensor:
    """Mean squared difference of every block's output to the expert's, mean over blocks; padding has no say."""
    pairs = [(seen.merged.hidden[name], seen.teacher.hidden[name]) for name in seen.teacher.hidden]
    mask = mask_of(seen.batch)
    return torch.stack([hidden_difference(a, b, mask) for a, b in pairs]).mean()


def hidden_difference(merged: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """mask: of the tokens (B, L) that count, where the outputs are (B, L, d)."""
    if mask is not None and merged.shape[:2] == mask.shape:
        merged, teacher = merged[mask.bool()], teacher[mask.bool()]
    return (merged.float() if merged.dtype.itemsize < 4 else merged).sub(teacher).square().mean()


def pseudo_labels(seen: Seen) -> Tensor:
    """Cross-entropy to the expert's predictions, where it agrees with the merged model or is as sure (SyMerge).

    Rows where the merged model is surer, and of another opinion, are left out; 0 if all are.
    """
    logits_RC, teacher_RC = seen.logits, seen.teacher_logits
    sure_R, label_R = teacher_RC.softmax(1).max(1)
    own_R, guess_R = logits_RC.detach().softmax(1).max(1)
    kept_R = (label_R == guess_R) | (sure_R >= own_R)
    if not kept_R.any():
        return logits_RC.sum() * 0
    return torch.nn.functional.cross_entropy(logits_RC[kept_R], label_R[kept_R])


def combined(first: Loss, second: Loss, weight: float) -> Loss:
    """first + weight * second."""
    return lambda seen: first(seen) + weight * second(seen)


NAMED: dict[str, Objective] = {
    "entropy": Objective(entropy, expert=False, sharpens=True),
    "cross_entropy": Objective(cross_entropy, expert=False, labels=True),
    "cosine": Objective(cosine),
    "l1": Objective(l1),
    "l2": Objective(l2),
    "kl": Objective(kl()),
    "hidden": Objective(hidden, hidden=True),
    "pseudo_labels": Objective(pseudo_labels, sharpens=True),
}


def objective_of(name: str, temperature: float = 1.0) -> Objective:
    """An objective by its name, or a function `module:function` of `Seen` that Python can import.

    temperature: of `kl`, the only one that has any. A function may have attributes: `hidden = True` for hidden states,
    `labels = True` for labels, which it is not shown otherwise.

    Raises:
        UserError: there is no such objective, or function; it has no temperature.
    """
    if temperature != 1:
        if name != "kl":
            raise UserError(f"the objective '{name}' has no temperature; leave it out, or choose kl")
        return Objective(kl(temperature))
    if name in NAMED:
        return NAMED[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise UserError(
            f"no objective is called '{name}'{did_you_mean(name, NAMED)}; a function of your own is module:function"
        )
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"objective '{name}': {error}") from None
    if not callable(found):
        raise UserError(f"objective '{name}' is no function")
    said = {what: bool(getattr(found, what, False)) for what in ("hidden", "labels")}
    return Objective(found, **said)
