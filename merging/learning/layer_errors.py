"""How far a merge's activations are from those of each expert on its own task, stage by stage, without labels.

The error of a stage is the relative L2 distance of its outputs, |h - h_expert| / |h_expert|, over the examples of a
task. Three of them tell where a merge goes wrong: that of the merge, which has what earlier stages did wrong in it; its
`own`, where the stage is given what the expert's stage is given; and the `base`'s, which a merge has to be better than.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence

from mergeline.merging.algebra.sums import added
from mergeline.merging.architecture import layer_of
from mergeline.merging.diagnoses.advice import Advice, Span, spans
from mergeline.merging.diagnoses.sums import number
from mergeline.merging.lazy import torch
from mergeline.merging.learning.models import load_base, load_model
from mergeline.merging.learning.network import Batch, Examples, Network, batch_size, mask_of
from mergeline.merging.learning.stages import Stage, Stream, stages_of

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-300

Json = dict[str, Any]
State = Mapping[str, "Tensor"]


def layer_errors(
    network: Network,
    examples: Examples,
    base: Path,
    merge: Path,
    experts: Mapping[str, Path],
    progress: Callable[[int, int], None] | None = None,
) -> Json:
    """The errors of a merge by task and stage, and `advice`, as JSON values.

    tasks: of each, its `expert`, the names of the `stages`, and by stage the errors `merge`, `own` and `base`. Three
    models are held at a time.

    Raises:
        UserError: checkpoints that do not match, or that the network cannot take over.
    """
    with torch.no_grad():
        load_base(network, base)
        foundation = _weights(network)
        load_model(network, base, merge)
        merged = _weights(network)
        total, done, tasks = sum(map(examples.count, examples.owners)), 0, {}
        if progress:
            progress(0, total)
        for task, owner in examples.owners.items():
            load_model(network, base, experts[owner])
            tuned = _weights(network)
            with network.lent(tuned):
                stages = stages_of(network, next(iter(examples.of(task))))
            parts: list[dict[str, Tensor]] = []
            for batch in examples.of(task):
                parts.append(_squares(network, stages, batch, tuned, merged, foundation))
                done += batch_size(batch)
                if progress:
                    progress(done, total)
            squares = {key: added(part[key] for part in parts) for key in parts[0]}
            length_S = squares.pop("length").clamp(min=_TINY)
            tasks[task] = {
                "expert": owner,
                "stages": [stage.name for stage in stages],
                **{key: [number(e) for e in (own_S / length_S).sqrt()] for key, own_S in squares.items()},
            }
    return {"tasks": tasks, "advice": [advice.as_json() for advice in advice_on_errors(tasks)]}


def _weights(network: Network) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.tensors().items()}


def _squares(
    network: Network, stages: Sequence[Stage], batch: Batch, tuned: State, merged: State, base: State
) -> dict[str, Tensor]:
    """Of each stage, the squared norm of the expert's outputs and of the distances from them: (S) each."""
    with network.lent(tuned):
        right = [Stream(batch), *_passed(stages, Stream(batch))]
    found = {"length": [_square(stream, None) for stream in right[1:]]}
    with network.lent(merged):
        passed = _passed(stages, Stream(batch))
        found["merge"] = [_square(stream, goal) for stream, goal in zip(passed, right[1:])]
        found["own"] = [
            _square(stage.run(entered), goal) for stage, entered, goal in zip(stages, right, right[1:])
        ]
    with network.lent(base):
        passed = _passed(stages, Stream(batch))
        found["base"] = [_square(stream, goal) for stream, goal in zip(passed, right[1:])]
    return {key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}


def _passed(stages: Sequence[Stage], stream: Stream) -> Iterator[Stream]:
    for stage in stages:
        stream = stage.run(stream)
        yield stream


def _square(stream: Stream, goal: Stream | None) -> float:
    """The squared norm of a stream, or of its distance from another; padding has no say."""
    assert stream.hidden is not None
    difference = stream.hidden.double()
    if goal is not None:
        assert goal.hidden is not None
        difference = difference - goal.hidden.double()
    mask = mask_of(stream.batch)
    if mask is not None and difference.shape[:2] == mask.shape:
        difference = difference[mask.bool()]
    return float(difference.square().sum())


def advice_on_errors(tasks: Mapping[str, Json]) -> Iterator[Advice]:
    """For each task, and each run of blocks after which the merge is further from the expert than the base is."""
    for task, own in tasks.items():
        places = {stage: place for stage in own["stages"] if (place := _place(stage)) is not None}
        towers = len({tower for tower, _ in places.values()})
        is_worse = {
            places[stage]: stage
            for stage, merge, base in zip(own["stages"], own["merge"], own["base"])
            if stage in places and merge > base
        }
        for span in spans(is_worse, towers):
            yield _on_errors(task, own, span, is_worse[span.tower, span.last])


def _on_errors(task: str, own: Json, span: Span, last: str) -> Advice:
    """last: the stage at the end of the span."""
    end = own["stages"].index(last)
    most = max(range(end + 1), key=lambda k: float(own["own"][k]))
    where = "in " + own["stages"][most] if _place(own["stages"][most]) else "before the first layer"
    return Advice(
        "layer errors",
        [own["expert"]],
        f"on '{task}' the merge is further from expert '{own['expert']}' than the base is, after {span} (at the end "
        f"{own['merge'][end]:.2f} of the activations' norm, the base {own['base'][end]:.2f}); most is added {where}: "
        f"lower the scale of the merge, or give '{own['expert']}' more weight than the others there",
        span.tower,
        (span.first, span.last),
    )


def _place(stage: str) -> tuple[str, int] | None:
    tower, layer = layer_of(f"{stage}.")
    return None if tower is None or layer is None else (tower, layer)
