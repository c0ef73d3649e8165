"""What scores are called and which are better, and what a mean of different ones is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_up_results import made_up

from mergeline.evaluation.measures import Measure, Measures, measures_of
from mergeline.evaluation.metrics import Paired, in_scores
from mergeline.evaluation.pages.figures import curve, draw_all, ranked
from mergeline.evaluation.pages.report import render

ERROR, NDCG, PSNR = Measure("error", "mm", "lower"), Measure("nDCG@10"), Measure("PSNR", "dB")


def test_scores_are_outcomes_and_where_smaller_ones_are_better_negated_outcomes():
    assert (NDCG.turned(0.25), ERROR.turned(-0.25), str(ERROR.turned(0.0))) == (0.25, 0.25, "0.0")
    assert NDCG.turned_interval(1, 2) == (1, 2) and ERROR.turned_interval(-2, -1) == (1, 2)
    assert in_scores(Paired(-1.0, -2.0, 0.5, 0.3), ERROR) == (1.0, -0.5, 2.0, 0.3)
    assert in_scores(Paired(-1.0, -2.0, 0.5, 0.3), NDCG) == (-1.0, -2.0, 0.5, 0.3)


def test_scores_are_said_with_name_unit_and_direction():
    assert (ERROR.label, ERROR.title) == ("error (mm)", "error (mm), lower is better")
    assert (NDCG.label, NDCG.title) == ("nDCG@10", "nDCG@10")
    assert (ERROR.said(1.23456), NDCG.said(0.5, ".2f")) == ("1.2346 mm", "0.50")


@pytest.mark.parametrize(
    ("tasks", "mean", "words"),
    [
        ({"a": ERROR, "b": ERROR}, ERROR, ""),
        ({"a": NDCG, "b": PSNR}, Measure("score"), "nDCG@10 on a and PSNR (dB) on b"),
        (
            {"a": NDCG, "b": PSNR, "c": NDCG, "d": ERROR},
            Measure("score"),
            "nDCG@10 on a, c, PSNR (dB) on b and negated error (mm) on d",
        ),
        (
            {"a": ERROR, "b": Measure("loss", better="lower")},
            Measure("score", better="lower"),
            "error (mm) on a and loss on b",
        ),
    ],
)
def test_a_mean_of_different_measures_says_what_it_is_of(tasks, mean, words):
    found = Measures(tasks)
    assert (found.mean, found.mean_of) == (mean, words)
    assert measures_of(found.as_json()) == Measures(tasks, Measure(mean.name))


def test_a_leaderboard_of_an_earlier_version_has_one_measure():
    assert measures_of({"measure": "profit"}).mean == Measure("profit")


@pytest.fixture
def of_errors() -> dict:
    """Made-up results as if their accuracies were errors."""
    found = made_up()
    found["leaderboard"]["measures"] = dict.fromkeys(found["leaderboard"]["tasks"], ERROR._asdict())
    found["leaderboard"]["measure"] = "error"
    for search in found["searches"].values():
        for point in search["points"]:
            point["mean"] = 1 - point["mean"]
    return found


def test_the_best_error_is_the_smallest_in_order_curves_and_pictures(of_errors, tmp_path):
    board = of_errors["leaderboard"]
    assert [row["name"] for row in ranked(board)] == ["base", "average", "ties", "cart", "experts"]
    found = curve(of_errors["searches"]["cart"], "rank", ERROR)
    assert found and min(y for _, y in found.best) == pytest.approx(0.3) == pytest.approx(found.chosen[1])
    drawn = {path.stem: path.read_bytes() for path in draw_all(tmp_path / "errors", **of_errors)}
    board["measures"] = dict.fromkeys(board["tasks"], ERROR._replace(better="higher")._asdict())
    turned = {path.stem: path.read_bytes() for path in draw_all(tmp_path / "turned", **of_errors)}
    assert {name for name in drawn if drawn[name] != turned[name]} == set(drawn) - {"similarity"}


def test_the_report_calls_the_smaller_error_better(of_errors, tmp_path):
    page = rendered(of_errors, tmp_path)
    assert "Mean test error (mm), lower is better, 95 % interval" in page
    assert "On test alone average is lower, with 0.410" in page and "0.543 mm" in page
    assert "cart is better than 0 of" in page and "</span> is better</td>" in page
    table = page.partition('id="tasks"')[2].partition("</table>")[0]
    heats = dict(re.findall(r'<span class="name">(\w+)</span></th>\s*<td style="--heat:(\d+)%', table))
    assert int(heats["base"]) > int(heats["average"]) > int(heats["cart"]) > int(heats["experts"])
    assert re.findall(r"<strong>(0\.\d+)</strong>", table) == ["0.400", "0.410", "0.420"]
    assert 'data-first="ascending"' in page or "data-first=ascending" in page


def test_different_measures_are_coloured_by_columns(of_errors, tmp_path):
    board = of_errors["leaderboard"]
    board["measure"] = "score"
    board["measures"] = {
        task: measure._asdict() for task, measure in zip(board["tasks"], (ERROR, NDCG, PSNR))
    }
    for row in board["rows"]:
        for end in ("accuracy", "lower", "upper"):
            row["tasks"]["latin"][end] *= 40
        row["worst_task"] = None
    page = rendered(of_errors, tmp_path)
    assert (
        "A score is the mean of negated error (mm) on digits, nDCG@10 on shapes and PSNR (dB) on latin."
        in page
    )
    table = page.partition('id="tasks"')[2].partition("</table>")[0].replace("<wbr>", "")
    assert "digits:error (mm), lower is better" in table.replace(": ", ":") and "latin:" in table.replace(
        ": ", ":"
    )
    rows = {
        name: [int(heat) for heat in re.findall(r"--heat:(\d+)%", cells)]
        for name, cells in re.findall(r'<span class="name">(\w+)</span></th>(.*?)</tr>', table, re.DOTALL)
    }
    assert rows["base"] == [0, 100, 0, 0] and rows["experts"] == [100, 0, 100, 100]
    draw_all(tmp_path / "figures", **of_errors)


def rendered(results: dict, folder: Path) -> str:
    render(folder / "report.html", **results, costs=[], verdict=None)
    return " ".join((folder / "report.html").read_text().split())
