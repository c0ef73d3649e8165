"""Texts as classifiers take them, and their labels.

A prepared folder is that of a table (evaluation/tables.py), with val_y.npy and test_y.npy beside it: int64 labels, or
float64 targets. meta.json then names the `labels`, where the source has names for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Sequence

import numpy as np

from mergeline.evaluation.splits import SPLITS
from mergeline.evaluation.tables import Table, load_table, prepare_table
from mergeline.merging.errors import UserError
from mergeline.merging.files import publish, read_object, staged, write_bytes, write_json

if TYPE_CHECKING:
    from torch import Tensor

_META = "meta.json"


def prepare_texts(source: str, out: Path, label: str, numbers: bool) -> None:
    """Read a table of labelled texts into the folder `out`; `numbers`: whether labels are targets, and no classes.

    Labels are whole numbers, or names, which are numbered as the source does, or else by the alphabet.

    Raises:
        UserError: as `prepare_table`; a row of val or test without a label, or with one that is no number.
    """
    with staged(out) as place:
        prepare_table(source, place / "table")
        table = load_table(place / "table")
        values = {split: table.column(split, label) for split in SPLITS}
        names = None if numbers else _names(table, label, values)
        for split, own in values.items():
            write_bytes(place / "table" / f"{split}_y.npy", _npy(_labels(source, split, own, names, numbers)))
        meta = read_object(place / "table" / _META)
        write_json(place / "table" / _META, {**meta, "labels": names})
        publish(place / "table", out)


def _names(table: Table, label: str, values: Mapping[str, Sequence[Any]]) -> list[str] | None:
    """What the classes are called, in their order; None where labels are numbers without names."""
    if label in table.classnames:
        return list(table.classnames[label])
    found = {str(value) for own in values.values() for value in own}
    return None if all(_is_whole(value) for value in found) else sorted(found)


def _is_whole(text: str) -> bool:
    return text.lstrip("-").isdecimal()


def _labels(
    source: str, split: str, values: Sequence[Any], names: list[str] | None, numbers: bool
) -> np.ndarray:
    found: list[float] = []
    for i, value in enumerate(values):
        if names and str(value) in names and not isinstance(value, int):
            found.append(names.index(str(value)))
            continue
        try:
            found.append(float(value) if numbers else int(value))
        except (TypeError, ValueError):
            raise UserError(
                f"{source}: row {i} of {split} has the label {value!r}, which is no number"
            ) from None
        if not numbers and found[-1] < 0:
            raise UserError(
                f"{source}: row {i} of {split} has the label {value}: it has none; choose another split"
            )
    return np.array(found, np.float64 if numbers else np.int64)


def _npy(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def load_labels(folder: Path, split: str) -> np.ndarray:
    """The labels (N), int64 or float64, of a prepared folder (raises UserError)."""
    try:
        return np.load(folder / f"{split}_y.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"{folder}: not a prepared dataset; prepare it again") from None


def label_names(folder: Path) -> list[str] | None:
    """What the labels of a prepared folder are called, if they have names."""
    return read_object(folder / _META).get("labels")


class Tokens:
    """Texts, or pairs of them, as a model takes them: batches by a tokenizer, cut at so many tokens."""

    def __init__(self, tokenizer: Any, max_length: int, device: str):
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        self._tokenizer, self._max_length, self._device = tokenizer, max_length, device

    @property
    def pad_id(self) -> int | None:
        """What shorter texts are filled up with."""
        return self._tokenizer.pad_token_id

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None) -> dict[str, Tensor]:
        """ "input_ids", "attention_mask" and whatever else the tokenizer gives, each (B, L)."""
        found = self._tokenizer(
            list(texts),
            list(pairs) if pairs else None,
            truncation=True,
            max_length=self._max_length,
            padding=True,
            return_tensors="pt",
        )
        return {key: tensor.to(self._device) for key, tensor in found.items()}


def in_batches(
    texts: Sequence[str], pairs: Sequence[str] | None, size: int, part: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Which texts go together: longer ones first, so that little is filled up, and memory suffices at once or never.

    part: the numbers of those that are wanted (n); None for all.
    """
    lengths = np.array([len(text) + len(pairs[i] if pairs else "") for i, text in enumerate(texts)])
    part = np.arange(len(texts)) if part is None else part
    order = part[np.argsort(-lengths[part], kind="stable")]
    for start in range(0, len(order), size):
        yield order[start : start + size]
