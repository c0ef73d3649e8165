"""How texts are scored: by hand, and by what the field uses."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from mergeline.evaluation.text2text.metrics import answers, number, outcomes

RIGHT = "the cat sat on the mat"


def score(metric, written, right=RIGHT, **more):
    found = outcomes(answers(metric, [written], [right], **more))
    assert found.shape == (1,) and found.dtype == np.float64
    return found[0]


def test_exact_match_is_of_texts_without_the_blanks_around_them():
    assert score("exact_match", " yes\n", "yes") == 1 and score("exact_match", "yes, yes", "yes") == 0
    assert score("exact_match", "Yes", "yes") == 0 and score("exact_match", "Yes", "YES", lower=True) == 1


def test_rouge_is_the_f_measure_of_what_is_shared():
    # of 4 words written 3 are among the 6 right ones; the pairs "the cat" and "cat sat"; the sequence "the cat sat"
    written = "the cat sat down"
    assert score("rouge1", written) == pytest.approx(2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6))
    assert score("rouge2", written) == pytest.approx(2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5))
    assert score("rougeL", "down sat the cat") == pytest.approx(2 * (2 / 4) * (2 / 6) / (2 / 4 + 2 / 6))
    assert score("rougeLsum", RIGHT) == 1 and score("rouge1", "") == 0
    # By sentences, order within them alone counts.
    right, turned = "one two\nthree four", "three four\none two"
    assert score("rougeLsum", turned, right) == 1 and score("rougeL", turned, right) == 0.5


def test_bleu_and_chrf_are_fractions_of_one():
    assert score("bleu", RIGHT) == pytest.approx(1) and score("chrf", RIGHT) == pytest.approx(1)
    # 1-, 2-, 3- and 4-grams shared: 5 of 5, 4 of 4, 3 of 3, 2 of 2, and one word too short.
    assert score("bleu", "the cat sat on the") == pytest.approx(np.exp(1 - 6 / 5))
    # Of two words there are no 3-grams to count.
    assert score("bleu", "a b", "a b") == pytest.approx(1)
    assert 0.3 < score("chrf", "the cats sat") < 0.8 and score("chrf", "") == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [("3.5", 3.5), (" -2 ", -2), ("+.5", 0.5), ("1e2", 100), ("4.", 4), ("3.5 or so", None), ("", None), ("nan", None),
     ("inf", None), ("1e999", None), ("1_000", None), ("٣", None), ("3,5", None)],
)  # fmt: skip
def test_numbers_are_those_that_are_written_plainly(text, value):
    found = number(text)
    assert found == value if value is not None else np.isnan(found)


def test_the_mean_of_outcomes_is_spearmans_correlation():
    rng = np.random.default_rng(0)
    right = rng.integers(0, 50, 200) / 10
    written = np.round(right + rng.normal(size=200), 1)
    kept = answers("spearman", [f" {x}" for x in written], [str(x) for x in right])
    assert kept.shape == (200, 2)
    assert outcomes(kept).mean() == pytest.approx(spearmanr(written, right)[0])


def test_what_is_no_number_counts_as_the_median_of_those_that_are():
    right = ["0", "1", "2", "3", "4"]
    kept = answers("spearman", ["1", "much", "2", "9", "3"], right)
    assert np.isnan(kept[1, 0])
    assert outcomes(kept).mean() == pytest.approx(spearmanr([1, 2.5, 2, 9, 3], range(5))[0])
    assert (outcomes(answers("spearman", ["x"] * 5, right)) == 0).all()
    assert (outcomes(answers("spearman", ["x", "1", "1", "1", "1"], right)) == 0).all()
