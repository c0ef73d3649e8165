"""What the task vectors of a family of experts look like: norms, conflicts of signs, spectra, overlaps of subspaces.

One tensor's task vectors are held at a time. Spectra are of the matrices that CART decomposes (`block_linear`), around
the base and around the mean of the experts, from float64 Gram matrices of the smaller side.

Shape suffixes: T experts, P pairs of them (i < j, in the order of `itertools.combinations`), K ranks of a list.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Sequence

from mergeline.merging.algebra import decompositions, directions, linear
from mergeline.merging.algebra.slots import Slot, View
from mergeline.merging.algebra.sums import added
from mergeline.merging.align import config_of
from mergeline.merging.architecture import describe
from mergeline.merging.diagnoses import heads as attention_heads
from mergeline.merging.diagnoses.family import diagnose
from mergeline.merging.diagnoses.scopes import scope_row
from mergeline.merging.diagnoses.sums import (
    Layer,
    Sums,
    TensorSums,
    layers_of,
    number,
    rows,
    sums_of,
    total,
)
from mergeline.merging.engine.machine import keep_freed_memory, one_thread, worker_count
from mergeline.merging.engine.mergelock import Attention, Lock, Part, attention_modules, read_part, suspicions
from mergeline.merging.engine.plan import Entry, Plan, with_kept
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

RANKS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
_TYPICAL = (
    0.08  # the rank that CART's paper finds best; overlaps and layers are told at the rank nearest to it
)
_TINY = 1e-300
_BUFFERS = 12  # float64 intermediates of the size of a matrix, whatever the number of experts

Json = dict[str, Any]


# ---------------------------------------------------------------------------------------------- spectra


class Spectra(NamedTuple):
    """The task vectors of one matrix around one origin, in float64; NaN where a task vector is 0.

    energy_T: squared norms; held_TK: what of them lies in the leading directions of each rank. stable_T:
    |tau|_F^2 / |tau|_2^2; effective_T: exp of the entropy of the singular values' shares of their sum (Roy & Vetterli
    2007). interference_PK: |diag(s_i) V_i^T V_j diag(s_j)|_F over |tau_i| |tau_j|, of the leading triplets of each
    rank: the terms of I(k) of CART (2412.12153). inputs_P, outputs_P: the mean squared cosine between the leading
    right, or left, singular subspaces at one rank; `chance`: what it is between random subspaces, (2,).
    """

    energy_T: Tensor
    held_TK: Tensor
    stable_T: Tensor
    effective_T: Tensor
    interference_PK: Tensor
    inputs_P: Tensor
    outputs_P: Tensor
    chance: Tensor


def spectra_of(x: Slot, ranks: Sequence[float]) -> Spectra:
    """Decompose the task vectors of a matrix, from its reference; holds singular vectors, in float32, till the end."""
    (rows, columns), experts = x.shape, range(len(x.experts))
    counts_K = [linear.rank_of(rank, x.shape) for rank in ranks]
    few = counts_K[typical(ranks)]
    energies, held, stable, effective, weighted, left, right = ([] for _ in range(7))
    for t in experts:
        u_ML, s_L, v_NL = decompositions.singular_triplets(directions.task_vector(x, t))
        energy_L, share_L = s_L.square(), s_L / s_L.sum()
        energies.append(energy_L.sum())
        held.append(_at(energy_L.cumsum(0), counts_K))
        stable.append(energy_L.sum() / energy_L.max() if len(s_L) else energy_L.sum() * torch.nan)
        effective.append(torch.exp(-torch.special.xlogy(share_L, share_L).sum()) if len(s_L) else stable[-1])
        weighted.append((v_NL * (s_L / energies[-1].sqrt())).float())
        left.append(u_ML[:, :few].float())
        right.append(v_NL[:, :few].float())
    pairs = list(combinations(experts, 2))
    return Spectra(
        torch.stack(energies),
        torch.stack(held),
        torch.stack(stable),
        torch.stack(effective),
        _stacked([_interference(weighted[i], weighted[j], counts_K) for i, j in pairs], (0, len(ranks))),
        _stacked([_overlap(right[i], right[j]) for i, j in pairs], (0,)),
        _stacked([_overlap(left[i], left[j]) for i, j in pairs], (0,)),
        torch.tensor([few / columns, few / rows], dtype=torch.float64),
    )


def typical(ranks: Sequence[float]) -> int:
    """The index of the rank at which overlaps and layers are told."""
    return min(range(len(ranks)), key=lambda k: abs(ranks[k] - _TYPICAL))


def _at(sums_L: Tensor, counts_K: Sequence[int]) -> Tensor:
    """Cumulative sums at these counts, the last where there are fewer; 0 where there are none."""
    if not len(sums_L):
        return sums_L.new_zeros(len(counts_K))
    return sums_L[[min(count, len(sums_L)) - 1 for count in counts_K]]


def _interference(a_NL: Tensor, b_NL: Tensor, counts_K: Sequence[int]) -> Tensor:
    if not a_NL.shape[1] or not b_NL.shape[1]:
        return torch.full((len(counts_K),), torch.nan, dtype=torch.float64)
    sums_LL = (a_NL.T @ b_NL).double().square().cumsum(0).cumsum(1)
    rows, columns = ([min(count, size) - 1 for count in counts_K] for size in sums_LL.shape)
    return sums_LL[rows, columns].sqrt()


def _overlap(a_NK: Tensor, b_NK: Tensor) -> Tensor:
    shared = min(a_NK.shape[1], b_NK.shape[1])
    return (a_NK.T @ b_NK).double().square().sum() / shared if shared else torch.tensor(torch.nan).double()


def _stacked(values: list[Tensor], empty: tuple[int, ...]) -> Tensor:
    return torch.stack(values) if values else torch.zeros(empty, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- a family


@dataclass(frozen=True)
class _Measured(TensorSums):
    """What was found in one tensor; `spectra` by origin, of a matrix."""

    spectra: Mapping[str, Spectra] = field(default_factory=dict)


def family_plan(base: Path, experts: Mapping[str, Path], heads: Sequence[str] = ()) -> Plan:
    """The plan whose tensors `describe_family` describes; it may be of headers alone.

    Raises:
        UserError: checkpoints that do not match.
    """
    plan = make_plan({"method": "average", "base": base, "experts": dict(experts), "heads": list(heads)})
    plan.check()
    return plan


def describe_family(
    base: Path,
    experts: Mapping[str, Path],
    *,
    ranks: Sequence[float] = RANKS,
    heads: Sequence[str] = (),
    composition: bool = False,
    workers: int | None = None,
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Json:
    """Everything that `mergeline inspect` tells of a family, as JSON values; None where there is nothing to tell.

    ranks: fractions of full rank, as CART rounds them. heads: names of tensors that are each expert's own and not
    described. composition: whether to measure what attention heads pass on to one another, in every model and the
    average of the experts; it holds the output matrices of a model, and takes time by the square of its depth.
    `origins`: for `base` and (of several experts) `mean`, the
    `error` R(k) = sum over experts and matrices of |tau - P_k tau|_F^2, also as a share of its value at k = 0, and the
    `interference` I(k) of CART as a mean over ordered pairs and matrices, each term relative to |tau_i| |tau_j|: 0 for
    experts that read from orthogonal inputs, 1 for equal ones of rank one. `locks`: experts that are locked against
    merging (see `merging.engine.mergelock`), here looked for in every module. `notes`: sentences on what looks wrong.

    Raises:
        UserError: checkpoints that do not match, NaN or Inf in one, a rank outside (0, 1], too little memory;
            `composition` of a model the number of whose attention heads is not known.
    """
    wrong = next((rank for rank in ranks if not 0 < rank <= 1), None)
    if wrong is not None or not ranks:
        raise UserError(f"rank {wrong} is no fraction of full rank; list numbers from 0.01 to 1")
    ranks = sorted(set(ranks))
    plan = family_plan(base, experts, heads)
    entries = [entry for entry in plan.entries if entry.action == "merge"]
    modules = attention_modules({entry.name: entry.spec.shape for entry in entries})
    attention = _attention(plan, modules) if composition else {}
    need = max((_peak_bytes(entry, len(experts)) for entry in entries), default=0)
    workers = worker_count(need, workers, memory)
    keep_freed_memory()
    measured: list[_Measured] = []
    with (
        one_thread(lapack=True),
        FileInputs(plan) as source,
        ThreadPoolExecutor(workers) as pool,
    ):
        for found in pool.map(lambda entry: _measure(source.view(entry), ranks), entries):
            measured.append(found)
            if progress:
                progress(len(measured), len(entries))
        towers = [_composed(source, tower, found, list(experts)) for tower, found in attention.items()]
        locks = {name: list(filter(None, suspicions(source, modules, "base", name))) for name in experts}
    layers = layers_of(measured, len(experts))
    sums = total((m.sums for m in measured), len(experts))
    locked = {name: _lock(found, len(modules)) for name, found in locks.items() if found}
    return {
        "base": str(base),
        "ranks": ranks,
        "typical_rank": ranks[typical(ranks)],
        "tensors": len(entries),
        "matrices": sum(bool(m.spectra) for m in measured),
        "experts": _experts(list(experts), sums, measured),
        **_pairwise(sums, measured),
        "origins": _origins(measured, ranks),
        "layers": _layers(layers, ranks),
        "by_tensor": [_tensor(m) for m in measured],
        "diagnoses": diagnose(layers, sums, list(experts), locked, towers),
        "locks": locked,
        "notes": plan.warnings,
    }


def _attention(plan: Plan, modules: Sequence[Attention]) -> dict[str, list[attention_heads.Layer]]:
    assert plan.base is not None
    shapes = {name: info.shape for name, info in plan.base.tensors.items()}
    merged = {entry.name for entry in plan.entries if entry.action == "merge"}
    model = describe(shapes, config_of(plan.base.path))
    found = attention_heads.attention_layers(model, modules, merged)
    if not found:
        raise UserError(
            f"{plan.base.path}: neither names nor config.json say which heads its attention has in two or more layers; "
            "leave composition out"
        )
    return found


def _composed(
    source: FileInputs, tower: str, layers: Sequence[attention_heads.Layer], experts: Sequence[str]
) -> attention_heads.Tower:
    """What the heads of a tower pass on in the base, in each expert, and in the experts' average."""

    def of(origins: Sequence[str]) -> tuple[list[attention_heads.Pair], Tensor]:
        def read(part: Part) -> Tensor:
            return added(read_part(source, origin, part) for origin in origins) / len(origins)

        return attention_heads.composition(read, layers)

    models = {"base": ["base"], "mean": list(experts)}
    scores = {name: of(origins) for name, origins in models.items()}
    own = {name: of([name])[1] for name in experts}
    pairs = scores["base"][0]
    width = layers[0].module.query.columns
    return attention_heads.Tower(tower, width, pairs, scores["base"][1], scores["mean"][1], own)


def _peak_bytes(entry: Entry, experts: int) -> int:
    """Memory that a tensor takes, without the imports: of a matrix, factors of all experts among it."""
    piece = _matrix(entry.header)
    if piece is None:
        return entry.peak_bytes
    elements, side = piece.elements, min(piece.shape)
    used = 16 * experts * elements + 8 * _BUFFERS * (elements + side**2)
    return max(entry.peak_bytes, with_kept(used))


def _measure(view: View, ranks: Sequence[float]) -> _Measured:
    sums, piece = sums_of(view), _matrix(view)
    if piece is None or not view.elements:
        return _Measured(view.name, view.shape, sums, _layer(view))
    x = next(piece.blocks("tensor"))
    spectra = {"base": spectra_of(x.from_base(), ranks)}
    if len(x.experts) > 1:
        spectra["mean"] = spectra_of(x.from_mean(), ranks)
    return _Measured(view.name, view.shape, sums, _layer(view), spectra)


def _matrix(view: View) -> View | None:
    """The matrix of a linear layer in a numbered block that a tensor is; None if it is none, or several."""
    matrices = view.matrices("block_linear", False)
    return view.pieces(matrices)[0] if len(matrices) == 1 else None


def _layer(view: View) -> tuple[str, int] | None:
    """The tower and the number of the layer that a tensor belongs to."""
    role = view.role
    return None if role.tower is None or role.layer is None else (role.tower, role.layer)


def _experts(names: Sequence[str], sums: Sums, measured: Sequence[_Measured]) -> Json:
    spectra = [m.spectra["base"] for m in measured if m.spectra]
    sides = torch.tensor([float(min(m.shape)) for m in measured if m.spectra], dtype=torch.float64)
    stable_T = _mean([s.stable_T for s in spectra])
    effective_T = _mean([s.effective_T for s in spectra])
    share_T = _mean([s.effective_T / side for s, side in zip(spectra, sides)])
    alignment_T = sums.alignment_T
    return {
        name: {
            "norm": number(sums.norm_T[t]),
            "relative_norm": number(sums.relative_norm_T[t]),
            "alignment_with_base": None if alignment_T is None else number(alignment_T[t]),
            "stable_rank": None if stable_T is None else number(stable_T[t]),
            "effective_rank": None if effective_T is None else number(effective_T[t]),
            "effective_rank_share": None if share_T is None else number(share_T[t]),
        }
        for t, name in enumerate(names)
    }


def _pairwise(sums: Sums, measured: Sequence[_Measured]) -> Json:
    return {
        "cosine": rows(sums.cosine_TT),
        "sign_conflict": rows(sums.conflict_TT),
        "sign_conflict_by_magnitude": rows(sums.weighted_conflict_TT),
        "cancelled": number(sums.cancelled_share),
        "overlap": _overlap_of([m.spectra["base"] for m in measured if m.spectra], len(sums.norm_T)),
    }


def _overlap_of(spectra: Sequence[Spectra], experts: int) -> Json | None:
    """Of every two experts' subspaces, a mean over matrices; and what it is by chance."""
    chance = _mean([s.chance for s in spectra])
    if chance is None or experts < 2:
        return None
    return {
        "inputs": _square(_mean([s.inputs_P for s in spectra]), experts),
        "outputs": _square(_mean([s.outputs_P for s in spectra]), experts),
        "inputs_by_chance": number(chance[0]),
        "outputs_by_chance": number(chance[1]),
    }


def _origins(measured: Sequence[_Measured], ranks: Sequence[float]) -> Json:
    found = {}
    for origin in ("base", "mean"):
        spectra = [m.spectra[origin] for m in measured if origin in m.spectra]
        if spectra:
            energy_T = added(s.energy_T for s in spectra)
            held_TK = added(s.held_TK for s in spectra)
            error_K, share_K = _errors(spectra)
            found[origin] = {
                "energy": rows(held_TK / energy_T.clamp(min=_TINY)[:, None]),  # by expert
                "error": [number(e) for e in error_K],
                "error_share": [number(e) for e in share_K],
                "interference": _interferences(spectra, len(ranks)),
            }
    return found


def _errors(spectra: Sequence[Spectra]) -> tuple[Tensor, Tensor]:
    """R(k), and as a share of R(0): (K,), (K,)."""
    energy = added(s.energy_T.sum() for s in spectra)
    held_K = added(s.held_TK.sum(0) for s in spectra)
    error_K = energy - held_K
    error_K[error_K < 1e-12 * energy] = 0.0  # mere rounding
    return error_K, error_K / energy.clamp(min=_TINY)


def _interferences(spectra: Sequence[Spectra], ranks: int) -> list[float | None]:
    mean_K = _mean([s.interference_PK.reshape(-1, ranks) for s in spectra], over_rows=True)
    return [None] * ranks if mean_K is None else [number(value) for value in mean_K]


def _layers(layers: Sequence[Layer[_Measured]], ranks: Sequence[float]) -> list[Json]:
    found, at = [], typical(ranks)
    for layer in layers:
        sums, inside = layer.sums, layer.tensors
        around = {o: [m.spectra[o] for m in inside if o in m.spectra] for o in ("base", "mean")}
        row: Json = {
            "layer": layer.name,
            "tower": layer.place and layer.place[0].rstrip("."),
            "block": layer.place and layer.place[1],
            "tensors": len(inside),
            "norm": [number(n) for n in sums.norm_T],
            "relative_norm": [number(n) for n in sums.relative_norm_T],
            "cosine": _mean_of_pairs(sums.cosine_TT),
            "sign_conflict": _mean_of_pairs(sums.conflict_TT),
            "sign_conflict_by_magnitude": _mean_of_pairs(sums.weighted_conflict_TT),
            "cancelled": number(sums.cancelled_share),
        }
        effective_T = _mean([m.spectra["base"].effective_T / min(m.shape) for m in inside if m.spectra])
        row["overlap"] = _overlap_of([m.spectra["base"] for m in inside if m.spectra], len(sums.norm_T))
        row["effective_rank_share"] = None if effective_T is None else number(effective_T.nanmean())
        for origin, spectra in around.items():
            row[f"error_share_{origin}"] = number(_errors(spectra)[1][at]) if spectra else None
            row[f"interference_{origin}"] = _interferences(spectra, len(ranks))[at] if spectra else None
        found.append(row)
    return found


def _tensor(found: _Measured) -> Json:
    row: Json = {
        "tensor": found.name,
        "shape": list(found.shape),
        "norm": [number(n) for n in found.sums.norm_T],
        "scope": scope_row(found),
    }
    for origin, spectra in found.spectra.items():
        row[origin] = {
            "stable_rank": [number(r) for r in spectra.stable_T],
            "effective_rank": [number(r) for r in spectra.effective_T],
            "error_share": [number(e) for e in _errors([spectra])[1]],
            "interference": _interferences([spectra], spectra.held_TK.shape[1]),
        }
    return row


def _lock(locks: Sequence[Lock], modules: int) -> Json:
    first = locks[0]
    return {
        "modules": len(locks),
        "of": modules,
        "first": first.module,
        "factors": number(first.factors),
        "product": number(first.product),
        "sentence": str(first),
    }


def _mean(values: Sequence[Tensor], over_rows: bool = False) -> Tensor | None:
    """The mean of what is not NaN; None of nothing."""
    if not values:
        return None
    return (torch.cat(list(values)) if over_rows else torch.stack(list(values))).nanmean(0)


def _mean_of_pairs(values_TT: Tensor) -> float | None:
    pairs = list(combinations(range(len(values_TT)), 2))
    return number(sum(float(values_TT[i, j]) for i, j in pairs) / len(pairs)) if pairs else None


def _square(values_P: Tensor | None, count: int) -> list[list[float | None]] | None:
    """A symmetric matrix of pairs, 1 on its diagonal."""
    if values_P is None:
        return None
    square_TT = torch.eye(count, dtype=torch.float64)
    for (i, j), value in zip(combinations(range(count), 2), values_P):
        square_TT[i, j] = square_TT[j, i] = value
    return rows(square_TT)
