"""Checkpoints whose vocabularies differ: the rows of their embeddings, brought into one order, token by token."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence

from mergeline.merging.architecture import describe
from mergeline.merging.checkpoints.checkpoint import DTYPES, Checkpoint, TensorInfo
from mergeline.merging.checkpoints.companions import TOKENIZER
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a checkpoint and their ids; rows beyond the largest id are padding."""

    ids: Mapping[str, int]
    rows: int

    @cached_property
    def tokens(self) -> list[str | None]:
        """The token of each row; None for padding."""
        tokens: list[str | None] = [None] * self.rows
        for token, id in self.ids.items():
            tokens[id] = token
        return tokens


@dataclass(frozen=True)
class GatheredTensor(TensorInfo):
    """Row r is row `rows[r]` of `sources[whose[r]]`."""

    sources: tuple[TensorInfo, ...]
    whose: Sequence[int] = field(repr=False)
    rows: Sequence[int] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """About what is read for it."""
        return prod(self.shape) * DTYPES[self.dtype][1]

    @property
    def read_as(self) -> str:
        return _common({source.read_as for source in self.sources})

    @property
    def runs(self) -> int:
        """How many stretches of rows it is read in."""
        steps = zip(self.whose, self.whose[1:], self.rows, self.rows[1:])
        return 1 + sum(whose != after or row + 1 != next_row for whose, after, row, next_row in steps)

    def bytes_in(self, counts: Callable[[Path], bool]) -> int:
        rows = Counter(self.whose)
        return sum(
            rows[i] * source.bytes_in(counts) // max(source.shape[0], 1)
            for i, source in enumerate(self.sources)
        )

    def read(self, elements: Callable[[TensorInfo, int, int], Tensor], start: int, stop: int) -> Tensor:
        width = prod(self.shape[1:])
        first, last = start // max(width, 1), -(-stop // max(width, 1))
        dtype = getattr(torch, DTYPES[self.read_as][0])
        parts, row = [], first
        while row < last:
            end = row + 1
            while (
                end < last and self.whose[end] == self.whose[row] and self.rows[end] == self.rows[end - 1] + 1
            ):
                end += 1
            source, at = self.sources[self.whose[row]], self.rows[row]
            parts.append(source.read(elements, at * width, (at + end - row) * width).to(dtype))
            row = end
        if not parts:
            return elements(self.sources[0], 0, 0).to(dtype)
        return torch.cat(parts)[start - first * width : stop - first * width]


def _common(dtypes: set[str]) -> str:
    """The dtype that rows of these have in one tensor."""
    return next(iter(dtypes)) if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """The vocabulary of a folder with a `tokenizer.json` and embeddings; None of any other checkpoint.

    Raises:
        UserError: a tokenizer that is no JSON object, gives an id twice, or has more tokens than there are rows.
    """
    rows = {info.shape[0] for info in by_token(checkpoint).values()}
    if len(rows) != 1 or not checkpoint.path.is_dir():
        return None
    path = checkpoint.path / TOKENIZER
    parts = read_object(path)
    if not parts:
        return None
    try:
        known = parts["model"]["vocab"]
        listed = known if isinstance(known, dict) else {piece[0]: i for i, piece in enumerate(known)}
        ids = {**listed, **{added["content"]: added["id"] for added in parts.get("added_tokens") or ()}}
        largest = max(ids.values(), default=-1)
        if not all(type(id) is int and id >= 0 for id in ids.values()):
            raise ValueError("ids must be whole numbers")
        if not all(isinstance(token, str) for token in ids):
            raise ValueError("tokens must be text")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: is no tokenizer ({type(error).__name__}: {error}); download it again"
        ) from None
    if len(set(ids.values())) != len(ids):
        raise UserError(f"{path}: gives one id to two tokens; download it again")
    if largest >= max(rows):
        raise UserError(
            f"{path}: has a token with the id {largest}, the embeddings have {max(rows)} rows; "
            "resize them to the tokenizer, or give the tokenizer that belongs to them"
        )
    return Vocabulary(ids, max(rows))


def by_token(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors that have a row for every token."""
    roles = describe({name: info.shape for name, info in checkpoint.tensors.items()}).tensors
    return {name: info for name, info in checkpoint.tensors.items() if roles[name].by_token}


@dataclass(frozen=True)
class Alignment:
    """All checkpoints with the rows of one vocabulary. added: what the union appends to the donor's tokenizer."""

    checkpoints: dict[str, Checkpoint]
    rows: int
    added: list[dict[str, Any]]
    notes: list[str]


def align(checkpoints: Mapping[str, Checkpoint], donor: str, union: bool) -> Alignment | None:
    """Give all checkpoints the donor's vocabulary, or the union of all; None if they have the same as it is.

    A token that a checkpoint lacks gets the row of the first checkpoint, in their order, that has it: the base's, whose
    task vector is zero there. Padding rows stay. New tokens of a union take the donor's padding rows, then new ones.

    Raises:
        UserError: embeddings of different lengths without tokenizers that explain them; a union with a token that
            cannot be added to a tokenizer.
    """
    sizes = {o: {info.shape[0] for info in by_token(c).values()} for o, c in checkpoints.items()}
    if not any(sizes.values()):
        return None
    found = {origin: read_vocabulary(c) for origin, c in checkpoints.items()}
    vocabularies = {origin: v for origin, v in found.items() if v}
    alike = len({frozenset(s) for s in sizes.values() if s}) == 1
    if alike and len({frozenset(v.ids.items()) for v in vocabularies.values()}) <= 1:
        return None
    for origin in checkpoints:
        if origin in vocabularies:
            continue
        if donor not in vocabularies or sizes[origin] != sizes[donor]:
            raise UserError(
                f"'{origin}': its vocabulary differs ({_sizes(sizes)} rows), and it has no {TOKENIZER} to tell its "
                "tokens; put it beside the weights"
            )
        vocabularies[origin] = vocabularies[donor]
    target, added = list(vocabularies[donor].tokens), []
    if union:
        added = _append_new(checkpoints, vocabularies, donor, target)
    aligned = {o: _gathered(o, checkpoints, vocabularies, target) for o in checkpoints}
    return Alignment(aligned, len(target), added, list(_notes(vocabularies, donor, added, target)))


def _sizes(sizes: Mapping[str, set[int]]) -> str:
    return ", ".join(f"'{origin}' {'/'.join(map(str, sorted(s)))}" for origin, s in sizes.items() if s)


def _append_new(
    checkpoints: Mapping[str, Checkpoint],
    vocabularies: Mapping[str, Vocabulary],
    donor: str,
    target: list[str | None],
) -> list[dict[str, Any]]:
    """Put the tokens that the donor lacks into `target`; their entries for the donor's tokenizer."""
    known, entries = set(vocabularies[donor].ids), []
    id = max(vocabularies[donor].ids.values(), default=-1) + 1
    for origin, vocabulary in vocabularies.items():
        new = [token for token in vocabulary.ids if token not in known]
        if not new:
            continue
        listed = read_object(checkpoints[origin].path / TOKENIZER).get("added_tokens") or ()
        own = {entry["content"]: entry for entry in listed}
        for token in sorted(new, key=vocabulary.ids.__getitem__):
            if token not in own:
                raise UserError(
                    f"'{origin}': its token {token!r} is none of its added tokens, so it cannot be added to the "
                    f"tokenizer of '{donor}'; take the donor's vocabulary alone"
                )
            entries.append({**own[token], "id": id})
            if id == len(target):
                target.append(None)
            target[id] = token
            known.add(token)
            id += 1
    return entries


def _gathered(
    origin: str,
    checkpoints: Mapping[str, Checkpoint],
    vocabularies: Mapping[str, Vocabulary],
    target: Sequence[str | None],
) -> Checkpoint:
    """One checkpoint with the rows of `target`."""
    own = by_token(checkpoints[origin])
    tensors = dict(checkpoints[origin].tensors)
    for name, info in own.items():
        # Itself first, then the others in their order.
        origins = [origin, *(o for o in checkpoints if o != origin and name in checkpoints[o].tensors)]
        whose, rows = [], []
        for r, token in enumerate(target):
            for i, other in enumerate(origins):
                vocabulary = vocabularies[other]
                row = vocabulary.ids.get(token) if token is not None else r
                if (
                    row is not None
                    and row < vocabulary.rows
                    and (token is not None or vocabulary.tokens[row] is None)
                ):
                    whose.append(i)
                    rows.append(row)
                    break
        if rows == list(range(info.shape[0])) and not any(whose):
            continue
        sources = tuple(checkpoints[o].tensors[name] for o in origins)
        dtype = _common({source.dtype for source in sources})
        shape = (len(target), *info.shape[1:])
        tensors[name] = GatheredTensor(
            name, dtype, shape, info.file, info.start, info.stop, sources, tuple(whose), tuple(rows)
        )
    if all(tensors[name] is info for name, info in own.items()):
        return checkpoints[origin]
    return checkpoints[origin].view(tensors)


def _notes(
    vocabularies: Mapping[str, Vocabulary],
    donor: str,
    added: Sequence[Mapping[str, Any]],
    target: Sequence[str | None],
) -> Iterator[str]:
    """What happened to the tokens of each checkpoint, a sentence each."""
    kept = {token for token in target if token is not None}
    for origin, vocabulary in vocabularies.items():
        lacking = [token for token in kept if token not in vocabulary.ids]
        dropped = [token for token in vocabulary.ids if token not in kept]
        moved = [t for i, t in enumerate(target) if t is not None and vocabulary.ids.get(t, i) != i]
        if lacking:
            yield f"'{origin}' lacks {len(lacking)} token(s), {min(lacking)!r} first: others' rows stand in for them"
        if dropped:
            yield (
                f"{len(dropped)} token(s) that '{origin}' has and '{donor}' has not are left out, {min(dropped)!r} "
                "first; `vocabulary: union` keeps them"
            )
        if moved:
            yield f"{len(moved)} token(s) of '{origin}' have other ids, {min(moved)!r} first: matched by token"
    if added:
        yield f"{len(added)} token(s) are added to the tokenizer of '{donor}', {added[0]['content']!r} first"
