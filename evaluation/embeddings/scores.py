"""What a model answers on tasks of similarity and retrieval, and how good that is.

An answer of similarity is a pair's cosine beside its score, so that a task's answers are (N, 2); one of retrieval the
nDCG@10 of a query, (N).
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Mapping, Sequence

import numpy as np

from mergeline.evaluation.embeddings import data
from mergeline.evaluation.embeddings.measures import ndcg, nearest
from mergeline.evaluation.embeddings.models import Embedder
from mergeline.evaluation.embeddings.settings import Retrieval, Similarity
from mergeline.evaluation.metrics import spearman_outcomes
from mergeline.evaluation.tables import Table, load_table

Prompts = Mapping[str, str]  # role -> what stands before a text


def answers(
    embedder: Embedder,
    folder: Path,
    task: Similarity | Retrieval,
    splits: Sequence[str],
    prompts: Prompts,
    batch_size: int,
    more: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """A model's answers on splits of a prepared table, by split, float64: (N, 2) of pairs, (N) of queries.

    more: is told of texts that are done. Raises UserError for a table that is not what the task needs.
    """
    table = load_table(folder)

    def embed(texts: Sequence[str], role: str) -> np.ndarray:
        return embedder.embed(texts, role, prompts.get(role), batch_size, more)

    found = {}
    if isinstance(task, Similarity):
        for split in splits:
            pairs = data.pairs(table, task, split)
            first_Nd, second_Nd = embed(pairs.first, "first"), embed(pairs.second, "second")
            cosine_N = (first_Nd.astype(np.float64) * second_Nd).sum(1)
            found[split] = np.stack([cosine_N, pairs.score_N], axis=1)
        return found
    corpus = data.corpus(table)
    document_Dd = embed(corpus.texts, "document")
    for split in splits:
        queries = data.queries(table, task, split, corpus)
        ranking_NC = nearest(embed(queries.texts, "query"), document_Dd)
        found[split] = np.array([ndcg(r, g) for r, g in zip(ranking_NC, queries.relevant)])
    return found


def texts(folder: Path, task: Similarity | Retrieval, splits: Sequence[str]) -> int:
    """How many texts `answers` tells to be done."""
    table = load_table(folder)
    own = sum(len(table.rows(split)) for split in splits)
    return 2 * own if isinstance(task, Similarity) else own + len(table.rows(data.CORPUS))


def outcomes(answer: np.ndarray) -> np.ndarray:
    """How good each answer is, (N): of queries nDCG, of pairs what each adds to Spearman's correlation."""
    return answer if answer.ndim == 1 else spearman_outcomes(answer[:, 0], answer[:, 1])


def texts_of(table: Table, task: Similarity | Retrieval, split: str, prompts: Prompts) -> list[str]:
    """The texts of a split after their prompts: both of every pair, or every query and a document that answers it."""
    if isinstance(task, Similarity):
        pairs = data.pairs(table, task, split)
        both = zip(pairs.first, pairs.second)
    else:
        corpus = data.corpus(table)
        queries = data.queries(table, task, split, corpus)
        best = [max(grades, key=grades.__getitem__) for grades in queries.relevant]
        both = zip(queries.texts, [corpus.texts[place] for place in best])
    one, other = (prompts.get(role, "") for role in task.roles)
    return [text for a, b in both for text in (one + a, other + b)]
