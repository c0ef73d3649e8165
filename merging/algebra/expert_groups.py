"""Which experts of a mixture become one, and what they become: the arithmetic of M-SMoE (arXiv 2310.01334) and Sub-MoE
(arXiv 2506.23266).

Shape suffixes: E experts, L layers, I hidden units of an expert, M outputs and N inputs of a matrix. All is float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable, Sequence

import numpy as np

from mergeline.merging.algebra.decompositions import leading

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_DRAWS = 10  # beginnings of K-means, as of scikit-learn's n_init
_ROUNDS = 300

Groups = list[list[int]]  # of experts, each group sorted, in the order of their first members


def cosines(gram_EE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of a Gram matrix, the cosines between what it is of; 0 where one of them is zero."""
    norms_E = np.sqrt(np.diag(gram_EE))
    scale_EE = np.outer(norms_E, norms_E)
    return np.divide(gram_EE, scale_EE, out=np.zeros_like(gram_EE), where=scale_EE > 0)


def dominants(usage_LE: Sequence[NDArray[np.float64]], average: int) -> list[list[int]]:
    """The most used experts over all layers, `average` a layer, but one at least in each; the most used one first.

    usage_LE: of each layer the shares of its experts. Among equal ones the earlier layer, then the earlier expert
    counts; the official code drops those at the threshold.
    """
    ranked = []
    for layer, usage_E in enumerate(usage_LE):
        first = int(np.argmax(usage_E))
        ranked += [(-(1.0 if e == first else float(u)), layer, e) for e, u in enumerate(usage_E)]
    wanted = max(average, 1) * len(usage_LE)
    found: list[list[int]] = [[] for _ in usage_LE]
    for _, layer, expert in sorted(ranked)[:wanted]:
        found[layer].append(expert)
    return found


def most_used(usage_E: NDArray[np.float64], count: int) -> list[int]:
    """So many experts of one layer, the most used one first; the earlier one of equals."""
    return sorted(range(len(usage_E)), key=lambda e: (-usage_E[e], e))[:count]


def joined(similarity_EE: NDArray[np.float64], leaders: Sequence[int]) -> Groups:
    """Every expert in the group of the leader that it is most similar to; the first of `leaders` among equals."""
    groups: dict[int, list[int]] = {leader: [leader] for leader in leaders}
    for expert in range(len(similarity_EE)):
        if expert not in groups:
            groups[leaders[int(np.argmax(similarity_EE[expert, list(leaders)]))]].append(expert)
    return in_order(groups.values())


def in_order(groups: Iterable[Sequence[int]]) -> Groups:
    """Groups, and the experts in them, in the order of experts."""
    return sorted(sorted(group) for group in groups)


def clustered(rows_EN: NDArray[np.float64], count: int, seed: int) -> Groups:
    """K-means of the rows into `count` groups: the best of some beginnings that k-means++ draws by the seed.

    None is empty: a centre that loses its rows takes the row that is farthest from its own.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    best: tuple[float, Groups] | None = None
    for _ in range(_DRAWS):
        labels_E = _k_means(rows_EN, _beginning(rows_EN, count, generator))
        groups = in_order([int(e) for e in np.flatnonzero(labels_E == k)] for k in range(count))
        spread = sum(float(((rows_EN[g] - rows_EN[g].mean(0)) ** 2).sum()) for g in groups)
        if best is None or (round(spread, 12), groups) < (round(best[0], 12), best[1]):
            best = spread, groups
    assert best is not None
    return best[1]


def _beginning(
    rows_EN: NDArray[np.float64], count: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    chosen = [int(generator.integers(len(rows_EN)))]
    while len(chosen) < count:
        apart_E = np.min([((rows_EN - rows_EN[c]) ** 2).sum(1) for c in chosen], axis=0)
        apart_E[chosen] = 0
        if apart_E.sum() == 0:  # all the others equal a chosen one
            chosen.append(next(e for e in range(len(rows_EN)) if e not in chosen))
        else:
            chosen.append(int(generator.choice(len(rows_EN), p=apart_E / apart_E.sum())))
    return rows_EN[chosen]


def _k_means(rows_EN: NDArray[np.float64], centres_KN: NDArray[np.float64]) -> NDArray[np.int64]:
    count, before = len(centres_KN), None
    for _ in range(_ROUNDS):
        apart_EK = ((rows_EN[:, None] - centres_KN) ** 2).sum(2)
        labels_E = apart_EK.argmin(1)
        for k in range(count):
            if not (labels_E == k).any():
                sizes_K = np.bincount(labels_E, minlength=count)
                own_E = np.where(sizes_K[labels_E] > 1, apart_EK[np.arange(len(labels_E)), labels_E], -1.0)
                labels_E[int(own_E.argmax())] = k
        if before is not None and (labels_E == before).all():
            break
        before = labels_E
        centres_KN = np.stack([rows_EN[labels_E == k].mean(0) for k in range(count)])
    return labels_E


def shares(usage_E: Sequence[float]) -> list[float]:
    """The usage of the members of a group as weights that add up to 1: equal ones where none was used."""
    total = float(sum(usage_E))
    return [u / total if total > 0 else 1 / len(usage_E) for u in usage_E]


def projected(average_MN: Tensor, gram_MM: Tensor, rank: int) -> Tensor:
    """Sub-MoE's joint decomposition of matrices side by side, cut to a rank: their average in its leading directions.

    gram_MM: the sum of W W^T over the matrices. With [W1 .. Wn] = U S [V1 .. Vn], U_k S_k (sum of f_i V_i) is
    U_k U_k^T (sum of f_i W_i), which is the average itself where nothing is cut.
    """
    if rank >= len(gram_MM):
        return average_MN
    _, u_MK = leading(gram_MM, rank)
    return u_MK @ (u_MK.T @ average_MN)
