"""How alike the units of two models are on examples: what activation matching puts them beside one another by.

Git Re-Basin (Ainsworth et al. 2022, arXiv 2209.04836) correlates each pair of units over the examples. Units are seen
wherever a map gives or reads them, of a convolution at the middle of its window: before an activation and behind it, so
that those that are off on all examples are told apart, too. All batches count, where the code of PLeaS counts the last.

Shape suffixes: R rows, L the things that a group counts (units or parts of them), W numbers of each.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Sequence

from mergeline.merging.align import REFERENCE, Family, family_of
from mergeline.merging.architecture import Role, TensorRole
from mergeline.merging.canonical import canonical_json
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.writer import CheckpointWriter, TensorSpec
from mergeline.merging.engine.inputs import files_of, refuse_changed, stamps
from mergeline.merging.engine.machine import one_thread
from mergeline.merging.engine.places import refuse_file
from mergeline.merging.errors import UserError
from mergeline.merging.files import publish, staged
from mergeline.merging.lazy import torch
from mergeline.merging.learning.network import Batch, Examples, Network, batch_size, mask_of
from mergeline.merging.learning.watching import Applied, watched
from mergeline.merging.permutations.groups import Place, activation_keys

if TYPE_CHECKING:
    from torch import Tensor

_MARK = "mergeline.activations"
_FLAT = 1e-12  # a variance below it, of the mean of all, is of a unit that does nothing: it is like no other


class _Seen(NamedTuple):
    """Where the things of a group are seen.

    key: of what is written. things: how many there are. place: the stretch of a dimension.
    """

    key: str
    things: int
    place: Place
    is_input: bool


@dataclass
class _Moments:
    """Sums over rows: of values, their squares, and the products of two models' values of the same number W."""

    rows: int = 0
    sums: Any = 0.0
    squares: Any = 0.0
    products: Any = 0.0

    def add(self, both: Sequence[Tensor]) -> None:
        """More rows: (R, L, W) of the reference and of the model."""
        a, b = (values.double() for values in both)
        self.rows += len(a)
        self.sums = self.sums + torch.stack([a.sum(0), b.sum(0)])
        self.squares = self.squares + torch.stack([a.square().sum(0), b.square().sum(0)])
        self.products = self.products + torch.einsum("rlw,rmw->lmw", a, b)

    def correlations(self) -> Tensor:
        """(L, L): of things of the reference and of the model, means over their numbers W."""
        means = self.sums / self.rows
        variances = (self.squares / self.rows - means.square()).clamp(min=0)
        floor = _FLAT * variances.mean()
        scales = torch.where(variances > floor, variances, torch.ones_like(variances)).rsqrt()
        scales = scales * (variances > floor)
        covariances = self.products / self.rows - means[0][:, None] * means[1][None]
        return (covariances * scales[0][:, None] * scales[1][None]).mean(-1)


def collect_activations(
    reference: str | os.PathLike,
    model: str | os.PathLike,
    network: Network,
    examples: Examples,
    out: str | os.PathLike,
    *,
    heads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
) -> Path:
    """Write how alike the units of a model are to those of the reference, for `align(statistics=...)`; returns `out`.

    Of each group its name and `/units` (U, U), and `/0`, `/1` ... (U * R, U * R) for parts of units, float32: the
    correlations over all rows of all examples. network: of the models' architecture. heads: as for `align`.

    Raises:
        UserError: as `merging.align.family_of`; no examples, or none that reaches the groups; NaN or Inf.
    """
    out = Path(out)
    family = family_of(reference, {"model": model}, heads)
    read = [file for checkpoint in family.checkpoints.values() for file in files_of(checkpoint)]
    before = stamps(read)
    refuse_file(
        out, [*(c.path for c in family.checkpoints.values()), *read], _is_own, "file of activations", force
    )
    if not sum(map(examples.count, examples.counts)):
        raise UserError("there are no examples to see activations on; bring some")
    with one_thread(), torch.no_grad():
        found = _collected(family, network, examples, progress)
    missing = [
        group.name for group in family.groups if not any(key.startswith(f"{group.name}/") for key in found)
    ]
    if missing:
        raise UserError(f"'{missing[0]}': nothing of it is seen on the examples; match by weights")
    for group in family.groups:  # where all is in parts, or in none
        for key, count in zip(activation_keys(group), group.counts):
            found.setdefault(key, torch.zeros(count, count))
    specs = [TensorSpec(key, "F32", tuple(t.shape), 4 * t.numel()) for key, t in sorted(found.items())]
    told = {"split": examples.split, "data": dict(examples.digests)}
    with staged(out) as folder:
        writer = CheckpointWriter(
            folder, specs, {"format": "pt", _MARK: canonical_json(told)}, None, file=out.name
        )
        for spec in specs:
            writer.write(spec.name, found[spec.name].float())
        writer.finish()
        refuse_changed(before)
        publish(folder / out.name, out)
    return out


def _is_own(path: Path) -> bool:
    try:
        return _MARK in open_checkpoint(path).metadata
    except UserError:
        return False


def _collected(
    family: Family, network: Network, examples: Examples, progress: Callable[[int, int], None] | None
) -> dict[str, Tensor]:
    """The correlations by what they are called."""
    own = network.tensors()
    wanted: dict[str, list[_Seen]] = defaultdict(list)
    for group in family.groups:
        keys = activation_keys(group)
        for place, count, which in group.counted:
            role = family.model.tensors[place.name]
            if place.name in own and len(role.shape) > 1:
                seen = _Seen(keys[which], count, place, place.axis == _inputs(role))
                wanted[place.name].append(seen)
    watch = {name: own[name] for name in wanted}
    states = [
        {n: t.to(own[n]) for n, t in family.state(name).items() if n in own} for name in (REFERENCE, "model")
    ]
    moments: dict[tuple[_Seen, int], _Moments] = defaultdict(_Moments)
    done, total = 0, sum(map(examples.count, examples.counts))
    if progress:
        progress(0, total)
    for task in examples.counts:
        for batch in examples.of(task):
            both = [_values(network, state, watch, wanted, batch) for state in states]
            for at in both[0]:
                moments[at].add([values[at] for values in both])
            done += batch_size(batch)
            if progress:
                progress(done, total)
    by_key: dict[str, list[Tensor]] = defaultdict(list)
    for (seen, _), sums in moments.items():
        by_key[seen.key].append(sums.correlations())
    found = {key: torch.stack(places).mean(0) for key, places in by_key.items()}
    for key, correlations_LL in found.items():
        if not bool(torch.isfinite(correlations_LL).all()):
            raise UserError(f"'{key}': activations are not finite; look for NaN and Inf in the examples")
    return found


def _inputs(role: TensorRole) -> int:
    """The axis of a weight that counts what it is given."""
    if role.multiplied_from_left:
        return 0
    if role.role in (Role.EMBEDDING, Role.POSITION, Role.TOKEN):
        return -1
    return role.inputs if len(role.shape) == 2 else 1


def _values(
    network: Network,
    state: Mapping[str, Tensor],
    watch: Mapping[str, Tensor],
    wanted: Mapping[str, list[_Seen]],
    batch: Batch,
) -> dict[tuple[_Seen, int], Tensor]:
    """What is seen of one model on a batch, (R, L, W), by place and number of the use."""
    found: dict[tuple[_Seen, int], Tensor] = {}
    uses: dict[str, int] = defaultdict(int)
    mask = mask_of(batch)

    def see(applied: Applied) -> None:
        if applied.kind == "embedding" or applied.part is not None:
            return
        uses[applied.tensor] += 1
        for seen in wanted[applied.tensor]:
            rows = applied.inputs if seen.is_input else applied.outputs
            if mask is not None and rows.shape[:2] == mask.shape:
                rows = rows[mask.bool()]
            rows = rows.reshape(-1, rows.shape[-1])
            if seen.is_input and applied.kind == "convolution":
                window = watch[applied.tensor].shape[2:].numel()
                rows = rows[:, window // 2 :: window]
            rows = rows[:, seen.place.start : seen.place.start + seen.place.length]
            found[seen, uses[applied.tensor]] = rows.reshape(len(rows), seen.things, -1).clone()

    with network.lent(state), watched(watch, see):
        network.features(batch)
    return found
