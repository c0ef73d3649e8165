"""How good a text is that a model wrote to an image and a question, beside the right answers: from 0 to 1.

exact_match, rougeL, bleu, chrf
              as of text to text (evaluation/text2text/metrics.py)
contains      1 where a right answer stands anywhere in the text (OCRBench)
choice        1 where the first word is that of a right answer, such as the letter of a choice, or yes or no; marks
              around it and its case do not count (MMMU, MME)
relaxed_accuracy
              1 where a number is at most 5 % from the right one, 12% being 0.12; other texts must be the same but for
              their case (ChartQA; Masry et al., 2022)
vqa           min(n / 3, 1) of the n people who gave the answer, the mean over leaving each of them out, of texts as
              `plain` makes them (VQAv2, TextVQA, VizWiz; Antol et al., 2015)
anls          1 - the edit distance over the length of the longer text, or 0 where that is below a half; case and
              numbers of blanks do not count (DocVQA; Biten et al., 2019)
iou           intersection over union of the first box in the text and the right one
grounding     1 where that is a half or more (RefCOCO)

Of several right answers the one counts that gives the most; for `vqa` all do.
"""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Callable, Literal, Sequence, cast

import numpy as np

from mergeline.evaluation.text2text.metrics import number, scorer
from mergeline.evaluation.vision_language.boxes import Box, Size, iou, read_box

MetricName = Literal[
    "exact_match", "contains", "choice", "relaxed_accuracy", "vqa", "anls", "iou", "grounding",
    "rougeL", "bleu", "chrf",
]  # fmt: skip
VQA: MetricName = "vqa"
BOX_METRICS: tuple[MetricName, ...] = ("iou", "grounding")
LEAST_PEOPLE = 4  # whose answers vqa compares with: three besides each of them

_Score = Callable[[str, Sequence[str], Size], float]

_RELAXED = 0.05
_LEAST_SIMILAR = 0.5
_LEAST_OVERLAP = 0.5

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMERALS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(_NUMERALS)}}


def answers(
    metric: MetricName,
    written: Sequence[str],
    targets: Sequence[Sequence[str]],
    sizes: Sequence[Size],
    lower: bool = False,
    target_box: Box | None = None,
    written_box: Box | None = None,
) -> np.ndarray:
    """The scores of N written texts, float64 (N), beside the right answers of each; sizes: of the images.

    lower: texts are compared in lower case. target_box, written_box: how boxes are told, for metrics that compare them.
    """
    if metric in BOX_METRICS:
        assert target_box and written_box
        score: _Score = partial(_overlap, metric, target_box, written_box)
    elif metric == VQA:
        score = _vqa
    else:
        one = _PAIRS[metric] if metric in _PAIRS else scorer(cast("Literal['exact_match']", metric))
        score = partial(_best, one, lower)
    return np.array([score(w.strip(), t, size) for w, t, size in zip(written, targets, sizes)], np.float64)


def _best(
    one: Callable[[str, str], float], lower: bool, written: str, right: Sequence[str], size: Size
) -> float:
    if lower:
        written, right = written.lower(), [text.lower() for text in right]
    return max(one(written, text.strip()) for text in right)


def _vqa(written: str, right: Sequence[str], size: Size) -> float:
    return vqa(written, right)


def _overlap(
    metric: MetricName, target_box: Box, written_box: Box, written: str, right: Sequence[str], size: Size
) -> float:
    own = read_box(written, written_box, size)
    wanted = [read_box(text, target_box, size) for text in right]
    best = max((iou(own, box) for box in wanted if own is not None and box is not None), default=0.0)
    return float(best >= _LEAST_OVERLAP) if metric == "grounding" else best


def contains(written: str, right: str) -> float:
    return float(right in written)


def choice(written: str, right: str) -> float:
    return float(_first_word(written) == _first_word(right))


def _first_word(text: str) -> str:
    """The first run of letters and digits, in lower case; the text itself where there is none."""
    found = re.search(r"\w+", text)
    return (found.group() if found else text).lower()


def relaxed_accuracy(written: str, right: str) -> float:
    value, wanted = _value(written), _value(right)
    if np.isfinite(value) and np.isfinite(wanted) and wanted:
        return float(abs(value - wanted) / abs(wanted) <= _RELAXED)
    return float(written.lower() == right.lower())


def _value(text: str) -> float:
    return number(text[:-1]) / 100 if text.endswith("%") else number(text)


def anls(written: str, right: str) -> float:
    a, b = (" ".join(text.lower().split()) for text in (written, right))
    similar = 1 - _edits(a, b) / (max(len(a), len(b)) or 1)
    return similar if similar >= _LEAST_SIMILAR else 0.0


def _edits(a: str, b: str) -> int:
    """How many letters must be put in, left out or changed (Levenshtein, 1966)."""
    row = [*range(len(b) + 1)]
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]


def vqa(written: str, right: Sequence[str]) -> float:
    """The mean, over each of the people being left out, of min(n / 3, 1) of the n others who gave this answer."""
    own, people = plain(written), [plain(text) for text in right]
    agree = sum(text == own for text in people)
    left_out = [min(1.0, (agree - (text == own)) / 3) for text in people]
    return sum(left_out) / len(left_out)


@cache
def plain(text: str) -> str:
    """A text as VQAv2's evaluation compares them: in lower case, without marks and articles, small numbers as digits.

    Apostrophes are left out, where that evaluation puts them into contractions that lack them.
    """
    text = " ".join(text.lower().split())
    digits = re.search(r"\d,\d", text) is not None
    out = text.replace("'", "")
    for mark in _MARKS:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_blank or digits else " ")
    words = [_DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", out).split()]
    return " ".join(word for word in words if word not in _ARTICLES)


_PAIRS: dict[str, Callable[[str, str], float]] = {
    "contains": contains,
    "choice": choice,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
}
