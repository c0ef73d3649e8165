"""Checkpoints whose vocabularies differ: the rows of their embeddings, brought into one order, token by token."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Mapping, Sequence

from mergeline.merging.architecture import describe
from mergeline.merging.checkpoints.checkpoint import DTYPES, Checkpoint, TensorInfo, common_dtype
from mergeline.merging.checkpoints.companions import TOKENIZER
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 22  # elements that are read at once for a mean


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a checkpoint and their ids; rows beyond the largest id are padding.

    beyond: tokens of its tokenizer whose ids are larger than there are rows.
    """

    ids: Mapping[str, int]
    rows: int
    beyond: tuple[str, ...] = ()

    @cached_property
    def tokens(self) -> list[str | None]:
        """The token of each row; None for padding."""
        tokens: list[str | None] = [None] * self.rows
        for token, id in self.ids.items():
            tokens[id] = token
        return tokens


@dataclass(frozen=True)
class RowOf:
    """Whose row a token gets: that of a token, or of an id, of a checkpoint; zeros without one.

    force: in all checkpoints; else in those that lack the token.
    """

    origin: str | None = None
    token: str | None = None
    id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Rows:
    """What rows the embeddings of all checkpoints are to have.

    union: of the tokens of all, not the donor's alone. tokens: where the rows of some come from; those that nobody has
    are added. multiple: as many rows as tokens, rounded up to a multiple of it; None: as many as there were. missing:
    what a checkpoint gets for a token that it lacks: the row of the `first` that has it, the `mean` of those that have
    it, or the row of the checkpoint of this name, or the mean where that lacks it, too.
    """

    union: bool = False
    tokens: Mapping[str, RowOf] = field(default_factory=dict)
    multiple: int | None = None
    missing: str = "first"


_MEAN = -1  # of all tokens' rows
_Mix = tuple[tuple[int, int], ...]  # sources and their rows, whose mean a row is; zeros of none


@dataclass(frozen=True)
class GatheredTensor(TensorInfo):
    """Row r is row `rows[r]` of `sources[whose[r]]`.

    Behind the sources `whose` counts `mixes`; it is -1 where a row is the mean of the first `tokens` rows.
    """

    sources: tuple[TensorInfo, ...]
    whose: Sequence[int] = field(repr=False)
    rows: Sequence[int] = field(repr=False)
    mixes: tuple[_Mix, ...] = ()
    tokens: int = 0
    _means: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """About what is read for it."""
        return prod(self.shape) * DTYPES[self.dtype][1]

    @property
    def read_as(self) -> str:
        return common_dtype(source.read_as for source in self.sources)

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
            if 0 <= self.whose[row] < len(self.sources):
                source, at = self.sources[self.whose[row]], self.rows[row]
                parts.append(source.read(elements, at * width, (at + end - row) * width).to(dtype))
            else:
                parts += [self._mean(elements, self.whose[row], width).to(dtype)] * (end - row)
            row = end
        if not parts:
            return elements(self.sources[0], 0, 0).to(dtype)
        return torch.cat(parts)[start - first * width : stop - first * width]

    def _mean(self, elements: Callable[[TensorInfo, int, int], Tensor], mix: int, width: int) -> Tensor:
        """The mean row of a mix, or of all tokens, float64: (width)."""
        if mix not in self._means:
            sum_W, count = torch.zeros(width, dtype=torch.float64), 0
            if mix == _MEAN:
                step = max(1, _BLOCK // max(width, 1))
                for row in range(0, self.tokens, step):
                    last = min(row + step, self.tokens)
                    sum_W += (
                        self.read(elements, row * width, last * width)
                        .reshape(-1, width)
                        .double()
                        .sum(0)
                        .cpu()
                    )
                count = self.tokens
            else:
                for source, row in self.mixes[mix - len(self.sources)]:
                    sum_W += (
                        self.sources[source].read(elements, row * width, (row + 1) * width).double().cpu()
                    )
                    count += 1
            self._means[mix] = sum_W / max(count, 1)
        return self._means[mix]


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """The vocabulary of a folder with a `tokenizer.json` and embeddings; None of any other checkpoint.

    Raises:
        UserError: a tokenizer that is no JSON object, or gives an id twice.
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
    beyond = tuple(sorted(token for token, id in ids.items() if id >= max(rows)))
    return Vocabulary({token: id for token, id in ids.items() if id < max(rows)}, max(rows), beyond)


def by_token(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors that have a row for every token."""
    roles = describe({name: info.shape for name, info in checkpoint.tensors.items()}).tensors
    return {name: info for name, info in checkpoint.tensors.items() if roles[name].by_token}


@dataclass(frozen=True)
class Alignment:
    """All checkpoints with the rows of one vocabulary.

    added: what is appended to the donor's tokenizer; removed: tokens that are left out of it, for they have no row.
    """

    checkpoints: dict[str, Checkpoint]
    rows: int
    added: list[dict[str, Any]]
    removed: tuple[str, ...]
    notes: list[str]


def align(checkpoints: Mapping[str, Checkpoint], donor: str, wanted: Rows) -> Alignment | None:
    """Give all checkpoints the donor's vocabulary, or another one; None if they have that as it is.

    Padding rows stay, unless a `multiple` is asked for. New tokens take the donor's padding rows, then new ones.

    Raises:
        UserError: embeddings of different lengths without tokenizers that explain them; rows for tokens from where
            there are none.
    """
    sizes = {o: {info.shape[0] for info in by_token(c).values()} for o, c in checkpoints.items()}
    if not any(sizes.values()):
        return None
    found = {origin: read_vocabulary(c) for origin, c in checkpoints.items()}
    vocabularies = {origin: v for origin, v in found.items() if v}
    alike = len({frozenset(s) for s in sizes.values() if s}) == 1
    asked = wanted.tokens or wanted.multiple
    if asked and donor not in vocabularies:
        raise UserError(
            f"'{donor}' has no {TOKENIZER}, so that tokens cannot be told; put it beside the weights"
        )
    if alike and len({frozenset(v.ids.items()) for v in vocabularies.values()}) <= 1:
        if not wanted.tokens and (not wanted.multiple or _unpadded(vocabularies[donor], wanted.multiple)):
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
    target = list(vocabularies[donor].tokens)
    if wanted.multiple:
        del target[max(vocabularies[donor].ids.values(), default=-1) + 1 :]
    added = _append_new(checkpoints, vocabularies, donor, target) if wanted.union else []
    added += _append_asked(wanted.tokens, target)
    tokens = len(target)
    if wanted.multiple:
        target += [None] * (-len(target) % wanted.multiple)
    gathered = _Gathering(checkpoints, vocabularies, wanted, target, tokens)
    aligned = {origin: gathered.of(origin) for origin in checkpoints}
    notes = [*_notes(vocabularies, donor, added, target), *_notes_of_rows(wanted, len(target) - tokens)]
    removed = vocabularies[donor].beyond
    kept = {entry["content"] for entry in added}
    return Alignment(aligned, len(target), added, tuple(t for t in removed if t not in kept), notes)


def _unpadded(vocabulary: Vocabulary, multiple: int) -> bool:
    """Whether there are as many rows as tokens, rounded up."""
    tokens = max(vocabulary.ids.values(), default=-1) + 1
    return vocabulary.rows == tokens and not tokens % multiple and not vocabulary.beyond


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
    listed = {
        origin: {
            e["content"]: e
            for e in read_object(checkpoints[origin].path / TOKENIZER).get("added_tokens") or ()
        }
        for origin in vocabularies
    }
    marked = {token for own in listed.values() for token in own}
    for special in (False, True):  # what is special to nobody first, as mergekit does
        for vocabulary in vocabularies.values():
            for token in sorted(vocabulary.ids, key=vocabulary.ids.__getitem__):
                if token in known or (token in marked) != special:
                    continue
                first = next((own[token] for own in listed.values() if token in own), _plain_token(token))
                entries.append({**first, "id": _next_place(target)})
                target[entries[-1]["id"]] = token
                known.add(token)
    return entries


def _append_asked(tokens: Iterable[str], target: list[str | None]) -> list[dict[str, Any]]:
    """Put tokens that are asked for, and that nobody has, into `target`; their entries for the donor's tokenizer."""
    entries = []
    for token in tokens:
        if token not in target:
            entries.append({**_plain_token(token), "id": _next_place(target)})
            target[entries[-1]["id"]] = token
    return entries


def _next_place(target: list[str | None]) -> int:
    """The first row behind all tokens, which is appended if there is none."""
    id = next((i + 1 for i in reversed(range(len(target))) if target[i] is not None), 0)
    if id == len(target):
        target.append(None)
    return id


def _plain_token(token: str) -> dict[str, Any]:
    """An entry of a tokenizer's `added_tokens` for a token that is not special."""
    sides = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"content": token, **sides, "normalized": True, "special": False}


class _Gathering:
    """Finds the rows of `target` in checkpoints; those from `tokens` on are padding."""

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        vocabularies: Mapping[str, Vocabulary],
        wanted: Rows,
        target: Sequence[str | None],
        tokens: int,
    ):
        self.checkpoints, self.vocabularies, self.wanted = checkpoints, vocabularies, wanted
        self.target, self.tokens = target, tokens

    def of(self, origin: str) -> Checkpoint:
        """One checkpoint with the rows of `target`."""
        own = by_token(self.checkpoints[origin])
        tensors = dict(self.checkpoints[origin].tensors)
        for name, info in own.items():
            tensors[name] = self._tensor(origin, name, info)
        if all(tensors[name] is info for name, info in own.items()):
            return self.checkpoints[origin]
        return self.checkpoints[origin].view(tensors)

    def _tensor(self, origin: str, name: str, info: TensorInfo) -> TensorInfo:
        others = (o for o in self.checkpoints if o != origin and name in self.checkpoints[o].tensors)
        origins = [origin, *others]  # itself first, then the others in their order
        whose, rows = [], []
        mixes: dict[_Mix, int] = {}
        for r, token in enumerate(self.target):
            found = self._padding(r, origins) if token is None else self._row(token, origins)
            if isinstance(found, tuple) and len(found) == 1:
                [(source, row)] = found
            elif isinstance(found, tuple):
                source, row = len(origins) + mixes.setdefault(found, len(mixes)), 0
            else:
                source, row = _MEAN, 0
            whose.append(source)
            rows.append(row)
        if rows == list(range(info.shape[0])) and not any(whose):
            return info
        sources = tuple(self.checkpoints[o].tensors[name] for o in origins)
        dtype = common_dtype(source.dtype for source in sources)
        shape = (len(self.target), *info.shape[1:])
        return GatheredTensor(
            name, dtype, shape, info.file, info.start, info.stop, sources, tuple(whose), tuple(rows),
            tuple(mixes), self.tokens,
        )  # fmt: skip

    def _row(self, token: str, origins: Sequence[str]) -> _Mix:
        """Of which rows, among those of `origins`, that of a token is the mean; the first is whose it is."""
        asked = self.wanted.tokens.get(token)
        having = [i for i, other in enumerate(origins) if token in self.vocabularies[other].ids]
        if asked and (asked.force or 0 not in having):
            return self._asked(token, asked, origins)
        if 0 in having or self.wanted.missing == "first":
            having = having[:1]
        elif self.wanted.missing in origins and origins.index(self.wanted.missing) in having:
            having = [origins.index(self.wanted.missing)]
        return tuple((i, self.vocabularies[origins[i]].ids[token]) for i in having)

    def _asked(self, token: str, asked: RowOf, origins: Sequence[str]) -> _Mix:
        if asked.origin is None:
            return ()
        vocabulary = self.vocabularies[asked.origin]
        row = asked.id if asked.id is not None else vocabulary.ids.get(asked.token or token)
        if asked.origin not in origins or row is None or row >= vocabulary.rows:
            what = f"row {row}" if row is not None else f"token {asked.token or token!r}"
            raise UserError(f"tokens: {token!r}: '{asked.origin}' has no {what}; name one that it has")
        return ((origins.index(asked.origin), row),)

    def _padding(self, r: int, origins: Sequence[str]) -> _Mix | None:
        """The row of no token; None: the mean of all tokens'."""
        if self.wanted.multiple:
            return None if r >= self.tokens else ()
        for i, other in enumerate(origins):
            vocabulary = self.vocabularies[other]
            if r < vocabulary.rows and vocabulary.tokens[r] is None:
                return ((i, r),)
        return ()


def _notes_of_rows(wanted: Rows, padding: int) -> Iterator[str]:
    """What happened to rows that the recipe asks for, a sentence each."""
    if wanted.tokens:
        forced = sum(row.force for row in wanted.tokens.values())
        lacking = len(wanted.tokens) - forced
        yield f"tokens: {forced} get the recipe's row in all checkpoints, {lacking} where one lacks them"
    if padding:
        yield f"{padding} row(s) of padding, up to a multiple of {wanted.multiple}, are the mean of all tokens'"


def _notes(
    vocabularies: Mapping[str, Vocabulary],
    donor: str,
    added: Sequence[Mapping[str, Any]],
    target: Sequence[str | None],
) -> Iterator[str]:
    """What happened to the tokens of each checkpoint, a sentence each."""
    kept = {token for token in target if token is not None}
    for origin, vocabulary in vocabularies.items():
        if vocabulary.beyond:
            yield (
                f"{len(vocabulary.beyond)} token(s) of '{origin}' have ids beyond its {vocabulary.rows} rows, "
                f"{vocabulary.beyond[0]!r} first: they are left out"
            )
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
        if words := [
            entry["content"]
            for entry in added
            if entry == {**_plain_token(entry["content"]), "id": entry["id"]}
        ]:
            yield (
                f"{len(words)} of them, {words[0]!r} first, are added as ordinary tokens: they are found in a text "
                "before all others"
            )
