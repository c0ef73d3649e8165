"""What classifiers are measured on in build/data: examples of a split in batches, and their labels."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Protocol

import numpy as np

from mergeline.evaluation.splits import FIT
from mergeline.merging.errors import UserError
from mergeline.tasks.data_step import dataset

if TYPE_CHECKING:
    from torch import nn

    from mergeline.tasks.classifiers.family import Family
    from mergeline.tasks.classifiers.params import ImageClassifierParams, TextClassifierParams

Part = tuple[np.ndarray, dict[str, Any]]  # which examples of a split, and the batch of them


class Data(Protocol):
    """The examples of a pipeline as its models take them."""

    kind: str  # the class of transformers that opens such models

    def count(self, task: str, split: str) -> int:
        """How many examples a split has."""

    def batches(self, task: str, split: str, part: np.ndarray | None = None) -> Iterator[Part]:
        """A split, or those of its examples whose numbers `part` has, (n) ascending; each once."""

    def labels(self, task: str, split: str) -> np.ndarray | None:
        """The labels (N), int64 or float64; None where there are none."""

    def names(self, task: str) -> list[str] | None:
        """What the labels are called."""

    def fits_val(self, task: str) -> bool:
        """Whether examples of val stand for a split `fit`."""

    def digest(self, task: str, split: str) -> str:
        """Of the content of the examples, without their labels."""

    def prepare(self, module: nn.Module) -> None:
        """Tell a model what it must know of its inputs."""


class Images:
    """Images; batches have "images", float32 (B, 3, H, W).

    Raises:
        UserError: it is not said how the models take them, or they take another size.
    """

    kind = "AutoModelForImageClassification"

    def __init__(self, params: ImageClassifierParams, build: Path, family: Family):
        from mergeline.evaluation.datasets import load
        from mergeline.evaluation.pixels import Pixels, normalisation

        self._settings = params.image_classification
        self._sets = {task: load(dataset(build, task)) for task in params.tasks}
        settings = self._settings
        told = normalisation(
            family.folders, settings.model, settings.mean, settings.std, "image_classification"
        )
        self.pixels = Pixels(*told, params.device)

    @property
    def image_size(self) -> int:
        return self._settings.image_size

    def count(self, task: str, split: str) -> int:
        return len(self._sets[task].split(split)[0])

    def batches(self, task: str, split: str, part: np.ndarray | None = None) -> Iterator[Part]:
        x, _ = self._sets[task].split(split)
        part, size = np.arange(len(x)) if part is None else part, self._settings.batch_size
        for start in range(0, len(part), size):
            which = part[start : start + size]
            yield which, {"images": self.pixels(x[which])}

    def labels(self, task: str, split: str) -> np.ndarray | None:
        y = self._sets[task].split(split)[1]
        return y if bool((y >= 0).all()) else None

    def names(self, task: str) -> list[str] | None:
        return self._sets[task].classnames

    def fits_val(self, task: str) -> bool:
        return self._sets[task].fits_val

    def digest(self, task: str, split: str) -> str:
        return "sha256:" + sha256(self._sets[task].split(split)[0].tobytes()).hexdigest()

    def prepare(self, module: nn.Module) -> None:
        size = getattr(getattr(module, "config", None), "image_size", None)
        takes = [size, size] if isinstance(size, int) else list(size or [])
        if takes and takes != [self.image_size] * 2 and hasattr(module.config, "patch_size"):
            raise UserError(
                f"the models take images of {takes[0]} x {takes[1]} pixels; set image_size: {takes[0]}"
            )


class Texts:
    """Texts, or pairs of them; batches have what the tokenizer gives, int64 (B, L).

    Raises:
        UserError: there is no tokenizer; a table has no such column.
    """

    kind = "AutoModelForSequenceClassification"

    def __init__(self, params: TextClassifierParams, build: Path, family: Family):
        from mergeline.evaluation.classifiers.texts import Tokens
        from mergeline.evaluation.pretrained import load_tokenizer
        from mergeline.evaluation.tables import load_table

        self._settings, self._build = params.text_classification, build
        self._tables = {task: load_table(dataset(build, task)) for task in params.tasks}
        with_one = [
            f
            for f in family.folders
            if (f / "tokenizer_config.json").exists() or (f / "tokenizer.json").exists()
        ]
        if not with_one:
            raise UserError(f"{family.base}: has no tokenizer, nor has any expert; copy tokenizer.json there")
        self._known: dict[tuple[str, str], tuple[list[str], list[str] | None]] = {}
        self._tokens = Tokens(load_tokenizer(with_one[0]), self._settings.max_length, params.device)

    def count(self, task: str, split: str) -> int:
        return len(self._texts(task, split)[0])

    def _texts(self, task: str, split: str) -> tuple[list[str], list[str] | None]:
        """The texts of a split, and the others of their pairs."""
        if (task, split) not in self._known:
            columns, table = self._settings.columns[task], self._tables[task]
            texts = [str(text) for text in table.column(split, columns.text)]
            pairs = [str(text) for text in table.column(split, columns.pair)] if columns.pair else None
            self._known[task, split] = texts, pairs
        return self._known[task, split]

    def batches(self, task: str, split: str, part: np.ndarray | None = None) -> Iterator[Part]:
        from mergeline.evaluation.classifiers.texts import in_batches

        texts, pairs = self._texts(task, split)
        for which in in_batches(texts, pairs, self._settings.batch_size, part):
            yield which, self._tokens([texts[i] for i in which], [pairs[i] for i in which] if pairs else None)

    def labels(self, task: str, split: str) -> np.ndarray | None:
        from mergeline.evaluation.classifiers.texts import load_labels

        return None if split == FIT else load_labels(dataset(self._build, task), split)

    def names(self, task: str) -> list[str] | None:
        from mergeline.evaluation.classifiers.texts import label_names

        return label_names(dataset(self._build, task))

    def fits_val(self, task: str) -> bool:
        return self._tables[task].fits_val

    def digest(self, task: str, split: str) -> str:
        from mergeline.merging.canonical import text_digest

        return text_digest(self._texts(task, split))

    def prepare(self, module: nn.Module) -> None:
        config: Any = getattr(module, "config", None)
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self._tokens.pad_id
