"""The diagonal Fisher information of a model on examples: squared gradients, of each example by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Literal, Mapping

from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.gathering import Collected, Gathering, Subject, generator, refuse_nonfinite
from mergeline.merging.learning.network import Batch, Network, batch_size, taken

if TYPE_CHECKING:
    from torch import Tensor

_BYTES = 1 << 28  # of gradients of examples at a time
_CLASSES = 1000  # of which each takes a gradient


def fisher(subject: Subject, gathering: Gathering) -> Collected:
    """Mean over examples of sum of p(y) (d log p(y) / d theta)^2, p(y) the model's own, or of drawn or given labels.

    Of a model that gives numbers, means of normal distributions of variance 1, that is the sum of (d mean / d theta)^2.

    Raises:
        UserError: no logits, no labels, too many classes for all of them, drawn or given labels of numbers, logits or
            gradients that are not finite.
    """
    network, own = subject.network, subject.tensors
    names = {network.stored(name) for name, _ in network.module.named_parameters()}
    leaves = {name: tensor for name, tensor in own.items() if name in names}
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in leaves.items()}
    gradients = _Gradients(network, leaves, sums)
    count = 0
    for task, batches in subject.batches.items():
        if task in network.numbers and gathering.labels != "true":
            raise UserError(f"the models give numbers for '{task}', no classes; choose `labels: true`")
        for batch, numbers in batches():
            with torch.no_grad():
                logits_RC = network.logits(network.features(batch), task)
            refuse_nonfinite(subject, task, logits_RC, "logits")
            if len(logits_RC) == len(numbers):
                draws = _draws(subject, gathering, task, numbers, logits_RC, batch)
                gradients.add(batch, task, draws)
            else:  # several rows an example, as of language models: its tokens
                for i, number in enumerate(numbers):
                    one = taken(batch, slice(i, i + 1))
                    with torch.no_grad():
                        logits_RC = network.logits(network.features(one), task)
                    gradients.add_rows(
                        one, task, _row_draws(subject, gathering, task, number, logits_RC, one)
                    )
            count += len(numbers)
            subject.step(len(numbers))
    found = {name: total.div_(count) for name, total in sums.items()}
    found |= _zeros(subject, found)
    for name, total in found.items():
        refuse_nonfinite(subject, ", ".join(subject.batches), total, f"gradients of '{name}'")
    _normalise(found, gathering.normalise, subject.expert)
    shapes = {name: tuple(total.shape) for name, total in found.items()}
    not_run = sorted(found.keys() - leaves.keys())
    return Collected(shapes, iter(found.items()), {"gradients": gradients.how, "not_run": not_run})


def _zeros(subject: Subject, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of float tensors of the expert that no gradient is of: buffers, and what the network does not run."""
    entries = [e for e in subject.plan.entries if e.sources and e.action == "merge" and e.name not in found]
    return {entry.name: torch.zeros(entry.spec.shape, dtype=torch.float64) for entry in entries}


def _normalise(found: Mapping[str, Tensor], how: Literal["none", "global", "trace"], expert: str) -> None:
    if how == "none":
        return
    total = sum(float((t.square() if how == "global" else t).sum()) for t in found.values())
    if not total:
        raise UserError(f"'{expert}': all gradients are 0, so that its Fisher information has no norm")
    for tensor in found.values():
        tensor /= total**0.5 if how == "global" else total


# ---------------------------------------------------------------------------------------------- labels

# A label for each example (B,), and how much the square of its gradient counts (B,).
Draw = tuple["Tensor", "Tensor"]


def _weights(subject: Subject, task: str, logits_RC: Tensor) -> Tensor:
    """How much the square of each gradient counts: by the probability of its class; numbers count alike."""
    logits_RC = logits_RC.double()
    return torch.ones_like(logits_RC) if task in subject.network.numbers else logits_RC.softmax(1)


def _refuse_many(gathering: Gathering, gradients: int) -> None:
    if gathering.labels == "true" and gradients > _CLASSES:
        raise UserError(
            f"the true Fisher information takes a gradient for each of {gradients} classes of an example; "
            "choose `labels: sampled`"
        )


def _draws(
    subject: Subject, gathering: Gathering, task: str, numbers: list[int], logits_BC: Tensor, batch: Batch
) -> Iterator[Draw]:
    """Labels of examples with one row of logits each."""
    probabilities_BC = _weights(subject, task, logits_BC)
    ones_B = torch.ones(len(numbers), dtype=torch.float64, device=logits_BC.device)
    if gathering.labels == "empirical":
        yield _labels(batch, task, len(numbers)).to(logits_BC.device), ones_B
    elif gathering.labels == "true":
        _refuse_many(gathering, logits_BC.shape[1])
        for label in range(logits_BC.shape[1]):
            yield torch.full((len(numbers),), label, device=logits_BC.device), probabilities_BC[:, label]
    else:
        for draw in range(gathering.draws):
            rows = [_drawn(subject, task, n, draw, p[None]) for n, p in zip(numbers, probabilities_BC)]
            yield torch.cat(rows), ones_B / gathering.draws


def _row_draws(
    subject: Subject, gathering: Gathering, task: str, number: int, logits_RC: Tensor, batch: Batch
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Rows (K,) and their labels (K,) of one example, whose log-probabilities are added up, and their weight.

    Rows are independent of one another given the inputs, so that the squares of all rows and classes add up.
    """
    count, classes = logits_RC.shape
    rows_R = torch.arange(count, device=logits_RC.device)
    probabilities_RC = _weights(subject, task, logits_RC)
    if gathering.labels == "empirical":
        yield rows_R, _labels(batch, task, count).to(logits_RC.device), 1.0
    elif gathering.labels == "true":
        _refuse_many(gathering, count * classes)
        for row in range(count):
            for label in range(classes):
                weight = float(probabilities_RC[row, label])
                yield rows_R[row : row + 1], torch.tensor([label], device=logits_RC.device), weight
    else:
        for draw in range(gathering.draws):
            yield rows_R, _drawn(subject, task, number, draw, probabilities_RC), 1 / gathering.draws


def _labels(batch: Batch, task: str, rows: int) -> Tensor:
    labels = batch.get("labels")
    if labels is None:
        raise UserError(
            f"the examples of '{task}' have no labels; choose `labels: true` or `sampled`, which need none"
        )
    if labels.numel() != rows:
        raise UserError(
            f"'{task}': {labels.numel()} labels for {rows} rows of logits; choose `labels: sampled`"
        )
    return labels.flatten()


def _drawn(subject: Subject, task: str, number: int, draw: int, probabilities_RC: Tensor) -> Tensor:
    """A label for each row, by the seed, the task, and the number of the example and of the draw: (R,)."""
    random = generator(subject.seed, "label", task, number, draw)
    place_R1 = torch.rand(len(probabilities_RC), 1, dtype=torch.float64, generator=random)
    ends_RC = probabilities_RC.cumsum(1)
    return torch.searchsorted(ends_RC, place_R1.to(ends_RC) * ends_RC[:, -1:], right=True).squeeze(1)


# ---------------------------------------------------------------------------------------------- gradients


class _Gradients:
    """Adds up squared gradients, of each example by itself: many at once where the model lets them, else one by one."""

    def __init__(self, network: Network, leaves: Mapping[str, Tensor], sums: Mapping[str, Tensor]):
        from torch import nn

        class Scored(nn.Module):
            """log p of a batch, or the numbers, as one module whose weights torch can exchange."""

            def __init__(self) -> None:
                super().__init__()
                self.inner = network.module

            def forward(self, batch: Batch, task: str) -> Tensor:
                logits = network.logits(network.run(self.inner, batch), task)
                return logits if task in network.numbers else logits.log_softmax(1)

        self._module, self._sums, self.how = Scored(), sums, "vmap"
        self._names = {name: "inner." + network.inside(name) for name in leaves}
        self._leaves = {inner: leaves[name].detach() for name, inner in self._names.items()}
        size = 4 * sum(leaf.numel() for leaf in leaves.values())
        self._at_once = max(1, _BYTES // max(size, 1))

    def add(self, batch: Batch, task: str, draws: Iterator[Draw]) -> None:
        """The squares of the gradients of log p of a label of each example."""
        count = batch_size(batch)
        for labels_B, weights_B in draws:
            for start in range(0, count, self._at_once):
                part = slice(start, start + self._at_once)
                self._add(taken(batch, part), task, labels_B[part], weights_B[part])

    def _add(self, batch: Batch, task: str, labels_B: Tensor, weights_B: Tensor) -> None:
        if self.how == "vmap":
            try:
                self._add_at_once(batch, task, labels_B, weights_B)
                return
            except (
                RuntimeError
            ):  # what a model does by the values of its inputs cannot be done for many at once
                self.how = "one by one"
        for i in range(len(labels_B)):
            one, first = taken(batch, slice(i, i + 1)), torch.zeros(1, dtype=torch.int64)
            row = first.to(labels_B.device)
            self.add_rows(one, task, iter([(row, labels_B[i : i + 1], float(weights_B[i]))]))

    def _add_at_once(self, batch: Batch, task: str, labels_B: Tensor, weights_B: Tensor) -> None:
        from torch.func import functional_call, grad, vmap
        from torch.nn.attention import SDPBackend, sdpa_kernel

        tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        others = {key: value for key, value in batch.items() if key not in tensors}

        def log_probability(leaves: dict[str, Tensor], one: Mapping[str, Tensor], label: Tensor) -> Tensor:
            alone = {**others, **{key: value[None] for key, value in one.items()}}
            return functional_call(self._module, leaves, (alone, task)).gather(1, label.view(1, 1)).squeeze()

        with sdpa_kernel(SDPBackend.MATH):  # the one that torch can do for many examples at once
            found = vmap(grad(log_probability), in_dims=(None, 0, 0))(self._leaves, tensors, labels_B)
        for name, inner in self._names.items():
            gradient_BX = found[inner].double()
            self._sums[name].add_(torch.einsum("b...,b->...", gradient_BX.square_(), weights_B))

    def add_rows(self, one: Batch, task: str, draws: Iterator[tuple[Tensor, Tensor, float]]) -> None:
        """The squares of the gradients of what is added up of log p of one example."""
        from torch.func import functional_call

        leaves = {inner: leaf.clone().requires_grad_() for inner, leaf in self._leaves.items()}
        with torch.enable_grad():
            log_RC = functional_call(self._module, leaves, (one, task))
            for rows, labels, weight in draws:
                loss = log_RC[rows, labels].sum()
                gradients: Any = torch.autograd.grad(
                    loss, list(leaves.values()), retain_graph=True, allow_unused=True
                )
                for name, gradient in zip(self._names, gradients):
                    if gradient is not None:
                        self._sums[name].add_(gradient.double().square_(), alpha=weight)
