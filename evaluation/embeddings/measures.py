"""How well vectors find documents: the nearest ones of each query, exactly, and nDCG of these."""

from __future__ import annotations

from typing import Mapping, Sequence

import numpy as np

CUT = 10
_ELEMENTS = 1 << 22  # of products in memory at a time
_WIDTH = 1 << 14  # documents in a block


def nearest(
    query_Qd: np.ndarray, document_Dd: np.ndarray, count: int = CUT, elements: int = _ELEMENTS
) -> np.ndarray:
    """The places of the `count` documents of the largest inner products with each query, best first: int64 (Q, count).

    Exact; of documents with equal products the one that comes first in the corpus goes before. At most `elements`
    products are held at a time, whatever the sizes.
    """
    count = min(count, len(document_Dd))
    width = max(count, min(len(document_Dd), _WIDTH, elements))
    height = max(1, elements // width)
    found = np.empty((len(query_Qd), count), np.int64)
    for top in range(0, len(query_Qd), height):
        rows = query_Qd[top : top + height]
        best = np.empty((len(rows), 0), np.float32)
        place = np.empty((len(rows), 0), np.int64)
        for left in range(0, len(document_Dd), width):
            products = rows @ document_Dd[left : left + width].T
            places = np.broadcast_to(np.arange(left, left + products.shape[1]), products.shape)
            best, place = _largest(np.hstack([best, products]), np.hstack([place, places]), count)
        found[top : top + height] = place
    return found


def _largest(value_QD: np.ndarray, place_QD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest of each row, in order, equal ones as they come, and their places."""
    if value_QD.shape[1] > count:
        kept = []
        threshold_Q = np.partition(value_QD, -count, axis=1)[:, -count]
        for row_D, threshold in zip(value_QD, threshold_Q):
            above = np.flatnonzero(row_D >= threshold)
            kept.append(above[np.argsort(-row_D[above], kind="stable")[:count]])
        order = np.stack(kept)
    else:
        order = np.argsort(-value_QD, axis=1, kind="stable")
    return np.take_along_axis(value_QD, order, 1), np.take_along_axis(place_QD, order, 1)


def ndcg(ranking: Sequence[int], relevant: Mapping[int, float], cut: int = CUT) -> float:
    """nDCG at `cut` of documents in the order of a ranking; relevant: document -> grade, above 0.

    The gain is the grade itself, not 2^grade - 1, discounted by log2(rank + 1) (Järvelin and Kekäläinen, 2002), as
    trec_eval and MTEB have it; the ideal order holds all relevant documents.
    """
    ideal = sorted(relevant.values(), reverse=True)[:cut]
    return _dcg([relevant.get(int(document), 0.0) for document in ranking[:cut]]) / _dcg(ideal)


def _dcg(gains: Sequence[float]) -> float:
    return float(np.sum(np.asarray(gains) / np.log2(np.arange(2, len(gains) + 2))))
