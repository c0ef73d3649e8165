"""How good a text is that a model wrote, beside the right one: a score of each example, larger ones better.

exact_match   1 where the two are the same without blanks around them, else 0
rouge1, rouge2, rougeL, rougeLsum
              F-measure of shared words, pairs of words, or the longest common sequence (Lin, 2004), by the package
              rouge_score, without its stemmer; words are of Latin letters and digits, lines of rougeLsum are sentences
bleu          sentence BLEU with up to 4-grams, those alone that the texts are long enough for, exponentially smoothed
              (Chen and Cherry, 2014), by sacrebleu; divided by 100, as the next
chrf          F-score of character 6-grams (Popovic, 2015), by sacrebleu
spearman      of numbers that are written as text: Spearman's rank correlation with the right ones

All but the correlation lie in 0 to 1. A correlation is of all examples together: an example keeps both numbers, and
`outcomes` makes of all what each adds (`metrics.spearman_outcomes`).
"""

from __future__ import annotations

import re
from typing import Any, Callable, Literal, Sequence

import numpy as np

from mergeline.evaluation.metrics import spearman_outcomes

MetricName = Literal["exact_match", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "spearman"]
SPEARMAN: MetricName = "spearman"

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def answers(
    metric: MetricName, written: Sequence[str], targets: Sequence[str], lower: bool = False
) -> np.ndarray:
    """What is kept of N written texts, float64: scores (N), or (N, 2) the number that was written and the right one.

    What is no number is kept as NaN. lower: letters are compared in lower case.
    """
    pairs = [(w.lower(), t.lower()) if lower else (w, t) for w, t in zip(written, targets)]
    if metric == SPEARMAN:
        return np.array([(number(w), number(t)) for w, t in pairs], np.float64).reshape(-1, 2)
    score = scorer(metric)
    return np.array([score(w.strip(), t.strip()) for w, t in pairs], np.float64)


def outcomes(answers: np.ndarray) -> np.ndarray:
    """How good each answer is, (N), of what `answers` kept; their mean is the correlation where two numbers were.

    A text that is no number counts as the median of the numbers that the model wrote: it says nothing of where its
    example belongs, and the median moves no other. Where all are the same number, or none is one, all outcomes are 0.
    """
    if answers.ndim == 1:
        return answers.astype(np.float64)
    written_N, right_N = answers.T
    is_number_N = np.isfinite(written_N)
    middle = np.median(written_N[is_number_N]) if is_number_N.any() else 0.0
    return spearman_outcomes(np.where(is_number_N, written_N, middle), right_N)


def number(text: str) -> float:
    """The number that a text is, blanks around it aside; NaN where it is none, or too large for one."""
    text = text.strip()
    found = float(text) if _NUMBER.fullmatch(text) else np.nan
    return found if np.isfinite(found) else np.nan


def scorer(metric: MetricName) -> Callable[[str, str], float]:
    """The score of a written text and the right one, of metrics that are no correlation."""
    if metric == "exact_match":
        return lambda written, right: float(written == right)
    if metric.startswith("rouge"):
        from rouge_score.rouge_scorer import RougeScorer

        rouge: Any = RougeScorer([metric])
        return lambda written, right: float(rouge.score(right, written)[metric].fmeasure)
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    made: Any = BLEU(effective_order=True) if metric == "bleu" else CHRF()
    return lambda written, right: float(made.sentence_score(written, [right]).score) / 100
