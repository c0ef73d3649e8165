"""Embedding models as learners see them, and the texts that they learn from.

Shape suffixes: B texts of a batch, L tokens of the longest, d width of an embedding.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Sequence, cast

from mergeline.evaluation.splits import FIT
from mergeline.merging.canonical import text_digest
from mergeline.merging.learning.network import Batch, Examples, Network
from mergeline.tasks.data_step import dataset

if TYPE_CHECKING:
    from torch import Tensor

    from mergeline.evaluation.embeddings.models import Embedder
    from mergeline.tasks.embeddings.params import EmbeddingParams
    from mergeline.tasks.schema import Params

_BATCH = 16


def network(params: Params, build: Path, like: Path) -> Network:
    """The transformer of `like`: its features (B, d) are the embeddings of texts, as its other modules make them.

    There are no logits: merges are fitted by objectives of features, such as `cosine` and `l2`.
    """
    from mergeline.evaluation.embeddings.models import load_model

    return network_of(load_model(like, params.device))


def network_of(embedder: Embedder) -> Network:
    """A model in memory as learners see it."""
    others: list[Any] = [*embedder.model][1:]

    def run(module: Any, batch: Batch) -> Tensor:
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        features = {**given, "token_embeddings": module(**given)[0]}
        for other in others:
            features = other(features)
        return features["sentence_embedding"]

    return Network(embedder.transformer, run, prefix=embedder.prefix, apart=embedder.beside)


def examples(params: Params, build: Path, split: str = FIT) -> Examples:
    """The texts of a split of every task, without scores: pairs one after the other; queries and what answers them.

    Where a table has no `fit`, every other row of `val` stands for it. Batches: "task", and "input_ids" and
    "attention_mask", int64 (B, L).
    """
    from mergeline.evaluation.embeddings.models import load_model
    from mergeline.evaluation.embeddings.scores import texts_of
    from mergeline.evaluation.tables import load_table

    settings = cast("EmbeddingParams", params).embeddings
    tokenizer = load_model(build / "checkpoints" / params.base).model.tokenizer
    batches, counts, digests, fits_val = {}, {}, {}, False
    for task, kind in settings.tasks.items():
        table = load_table(dataset(build, task))
        texts = texts_of(table, kind, split, settings.prompts.get(task, {}))
        fits_val = fits_val or (split == FIT and table.fits_val)
        batches[task] = partial(_batches, tokenizer, task, texts, params.device)
        counts[task], digests[task] = len(texts), text_digest(texts)
    return Examples(batches, counts, params.owners, digests, "half of val" if fits_val else split)


def _batches(tokenizer: Any, task: str, texts: Sequence[str], device: str) -> Iterator[Batch]:
    for start in range(0, len(texts), _BATCH):
        rows = tokenizer(texts[start : start + _BATCH], padding=True, truncation=True, return_tensors="pt")
        yield {"task": task, **{key: rows[key].to(device) for key in ("input_ids", "attention_mask")}}
