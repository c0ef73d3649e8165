"""Find experts that are locked against merging (MergeLock, arXiv 2509.01548; there is no public code).

A lock multiplies the query and key weights of an attention head by R and R^-T, its value and output weights by S and
S^-1. The model computes the same, and every merge of it collapses. What a lock cannot change are the products
W_q^T W_k and W_o W_v, summed over heads: an expert is locked where its weights are far from the reference's while
their products are not. Permuted heads look the same, and are as bad to merge.

No layout of heads has to be known: a product of whole matrices is the sum over heads, and where several query heads
share a key head (grouped-query attention) every width of heads that divides the matrix is tried. Rotary embeddings
and norms of queries and keys leave a lock little but S, so both products are looked at.

What it costs: 64 rows of the query and of the value weights of each module are read of every checkpoint, at places
that move on from module to module: 1 to 2 % of a transformer's bytes, and less than 1 % of the time of the cheapest
merge. Only where these rows are far from the reference's is a module read whole, and its products compared on random
vectors. So whatever merges files looks before it begins; `plan`, which reads headers alone, does not, nor do merges
of state dicts in memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Iterator, Mapping, NamedTuple, Sequence

from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mergeline.merging.engine.plan import Plan

# Relative distance of weights from which they may be locked; fine-tuning moves them by 0.01 to 0.1.
_THRESHOLD = 0.5
# Distance of a product up to which they are, relative to that of its factors (1 at most). Without a lock it is 1 or
# more: changes of both factors add up. A fixed 0.1 would miss experts whose fine-tuning moved products by more.
_TOLERANCE = 0.5
_ROWS = 64
_MODULES = 3  # suspicious modules that a merge reads whole before it believes in the expert
_PROBES = 32  # random vectors, on which norms of products are known within a few percent

# Names of query, key, value and output weights, after what a module's tensors have in common.
_SEPARATE = (
    ("q_proj.weight", "k_proj.weight", "v_proj.weight", ("o_proj.weight", "out_proj.weight", "dense.weight")),
    ("q_lin.weight", "k_lin.weight", "v_lin.weight", ("out_lin.weight",)),
    ("query.weight", "key.weight", "value.weight", ("output.dense.weight",)),
    ("q.weight", "k.weight", "v.weight", ("o.weight",)),
)
_PACKED = (("in_proj_weight", "out_proj.weight"), ("qkv.weight", "proj.weight"))  # one below the other


class Part(NamedTuple):
    """Rows of a tensor: (rows, columns) from `first` on."""

    tensor: str
    first: int
    rows: int
    columns: int


class Attention(NamedTuple):
    """The weights of an attention module: (H, N), (G, N), (G, N), (M, H), where H is G or a multiple of it."""

    name: str
    query: Part
    key: Part
    value: Part
    output: Part


@dataclass(frozen=True)
class Lock:
    """A module whose weights are far from the reference's (relative distance) while the product of two is not."""

    expert: str
    reference: str
    module: str
    factors: float
    product: float

    def __str__(self) -> str:
        other = "the base" if self.reference == "base" else f"'{self.reference}'"
        who = f"expert '{self.expert}'" if self.reference == "base" else f"'{self.expert}' or {other}"
        return (
            f"{who} is locked against merging (MergeLock, or permuted heads): the weights of '{self.module}' differ "
            f"from those of {other} by {self.factors:.0%}, their product by {self.product:.0%}"
        )


def refuse_locked(plan: Plan) -> None:
    """Look at a few rows of every attention module, and at the products of suspicious ones, before a merge.

    Experts are held against the base or, without one, the first expert, in a stack those of each part. A recipe with
    `allow_locked` is not looked at.

    Raises:
        UserError: an expert is locked.
    """
    if plan.recipe.allow_locked:
        return
    merged = {entry.name: entry for entry in plan.entries if entry.bound and entry.spec.shape}
    groups: dict[tuple[str, ...], list[Attention]] = {}
    for module in attention_modules({name: entry.spec.shape for name, entry in merged.items()}):
        groups.setdefault(tuple(merged[module.query.tensor].origins), []).append(module)
    if not groups:
        return
    with FileInputs(plan) as source:
        for (reference, *others), modules in groups.items():
            for expert in others:
                suspicious = islice(suspicions(source, modules, reference, expert), _MODULES)
                for lock in filter(None, suspicious):
                    raise UserError(
                        f"{lock}; ask its owner for other weights, or say --allow-locked to merge these"
                    )


def suspicions(
    source: FileInputs, modules: Sequence[Attention], reference: str, expert: str
) -> Iterator[Lock | None]:
    """For each module of which some rows are far from the reference's: the lock, or None where there is none."""
    for i, module in enumerate(modules):
        for part in (module.query, module.value):
            rows = min(_ROWS, part.rows)
            some = part._replace(first=part.first + i * rows % (part.rows - rows + 1), rows=rows)
            if (
                _distance([read_part(source, expert, some)], [read_part(source, reference, some)])
                >= _THRESHOLD
            ):
                yield _lock(source, module, reference, expert)
                break


def attention_modules(shapes: Mapping[str, Sequence[int]]) -> list[Attention]:
    """The attention modules among these tensors, as open_clip, timm and transformers name them.

    GPT-2's transposed `c_attn` and matrices that hold query, key and value of different heights are not known.
    """
    found: list[Attention] = []
    for name, shape in shapes.items():
        for packed, output in _PACKED:
            prefix = _before(name, packed)
            if prefix is not None and len(shape) == 2 and shape[0] % 3 == 0:
                rows = shape[0] // 3
                parts = [Part(name, i * rows, rows, shape[1]) for i in range(3)]
                found += _module(prefix, parts, [prefix + output], shapes)
        for query, key, value, outputs in _SEPARATE:
            prefix = _before(name, query)
            if prefix is not None:
                parts = [Part(n, 0, *shapes.get(n, ())) for n in (name, prefix + key, prefix + value)
                         if len(shapes.get(n, ())) == 2]  # fmt: skip
                above = re.sub(r"[^.]+\.$", "", prefix)
                places = [place + output for place in (prefix, above) for output in outputs]
                found += _module(prefix, parts, places, shapes)
    return found


def _before(name: str, end: str) -> str | None:
    """What stands before `end`, if that is a whole part of the name."""
    prefix = name.removesuffix(end)
    return prefix if prefix != name and (not prefix or prefix.endswith(".")) else None


def _module(
    prefix: str, parts: Sequence[Part], outputs: Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> Iterator[Attention]:
    output = next((n for n in outputs if len(shapes.get(n, ())) == 2), None)
    if output is None or len(parts) != 3:
        return
    query, key, value = parts
    (rows, columns), heights = shapes[output], [part.rows for part in parts]
    if min(heights) and heights[1] == heights[2] and heights[0] == columns and columns % heights[1] == 0:
        yield Attention(prefix.rstrip("."), query, key, value, Part(output, 0, rows, columns))


def read_part(source: FileInputs, origin: str, part: Part) -> Tensor:
    """The rows of a part in float64: (rows, columns)."""
    start = part.first * part.columns
    found = source.stored(origin, part.tensor, start, start + part.rows * part.columns)
    return found.double().reshape(part.rows, part.columns)


def _distance(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Norm of the differences over that of the references."""
    apart = sum(float((a - b).square().sum()) for a, b in zip(found, reference))
    size = sum(float(b.square().sum()) for b in reference)
    return (apart / size) ** 0.5 if size else 0.0


def _lock(source: FileInputs, module: Attention, reference: str, expert: str) -> Lock | None:
    """Compare the products of a whole module."""
    for first, second in ((module.query, module.key), (module.output, module.value)):
        found, known = ([read_part(source, o, part) for part in (first, second)] for o in (expert, reference))
        if first is module.query:
            found[0], known[0] = found[0].T, known[0].T
        factors = _distance(found, known)
        if factors < _THRESHOLD:
            continue
        probes = torch.Generator().manual_seed(0)
        probe_NP = torch.randn(second.columns, _PROBES, generator=probes, dtype=torch.float64)
        products = zip(_products(found[0], found[1], probe_NP), _products(known[0], known[1], probe_NP))
        product = min(_distance([a], [b]) for a, b in products)
        if product <= _TOLERANCE * min(factors, 1.0):
            return Lock(expert, reference, module.name, factors, product)
    return None


def _products(left_MH: Tensor, right_GN: Tensor, probe_NP: Tensor) -> Iterator[Tensor]:
    """Left times right on random vectors, (M, P), for each width of heads where H / G of them share one of G."""
    right_GP = right_GN @ probe_NP
    height, shared = right_GN.shape[0], left_MH.shape[1] // right_GN.shape[0]
    for width in range(1, height + 1) if shared > 1 else [height]:
        if height % width == 0:
            heads = right_GP.reshape(height // width, width, -1)
            yield left_MH @ heads.repeat_interleave(shared, dim=0).reshape(height * shared, -1)
