"""The HTML report: well-formed, self-contained, escaped, and whole whatever is missing."""

import base64
import hashlib
import os
import re

import pytest
from html_pages import HOSTILE, LOADS, Page
from made_up_results import made_up, search

from mergeline.evaluation.language.section import section
from mergeline.evaluation.pages.page import is_page
from mergeline.evaluation.pages.report import render
from mergeline.merging.errors import UserError

COSTS = [
    {"stage": "merge@cart", "seconds": 1.5, "cpu_seconds": 1.25, "peak_rss_bytes": 3 * 2**29},
    {"stage": "merge@ties", "seconds": 75.0, "cpu_seconds": 70.0, "peak_rss_bytes": 2**29},
    {"stage": "compare", "seconds": 0.5, "cpu_seconds": 0.5, "peak_rss_bytes": 2**28},
]


def verdict(passed=True, **changes):
    findings = [{"gate": "finite", "passed": passed, "sentence": "The weights are all finite."}]
    return {
        "candidate": "cart",
        "version": "2",
        "champion_before": "1",
        "champion_after": "2" if passed else "1",
        "passed": passed,
        "findings": findings,
    } | changes


PASSED = verdict()


@pytest.fixture
def page(tmp_path):
    def rendered(results=None, costs=COSTS, verdict=PASSED, changes=None):
        path = tmp_path / "build" / "report.html"
        render(path, **(results or made_up()), costs=costs, verdict=verdict, changes=changes)
        assert os.listdir(path.parent) == ["report.html"]
        return Page(path.read_text())

    return rendered


def test_it_loads_nothing(page):
    found = page()
    assert [attrs for tag, attrs in found.tags if tag in ("script", "link")] == [{}]
    loads = [value for _, attrs in found.tags for key, value in attrs.items() if key in LOADS]
    assert loads and all(value.startswith("#") for value in loads)
    assert not re.search(r"https?://|url\(|@import", found.html)
    ids = {attrs["id"] for _, attrs in found.tags if "id" in attrs}
    assert {value[1:] for value in loads} <= ids


def test_its_policy_lets_the_one_script_run_and_nothing_else(page):
    found = page()
    (policy,) = [attrs["content"] for _, attrs in found.tags if "http-equiv" in attrs]
    (script,) = re.findall("<script>(.*?)</script>", found.html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}';" in policy


def test_names_break_after_their_separators_alone(page):
    html = page(made_up(merges=("average", "task_arithmetic"))).html
    assert '<span class="name">task_<wbr>arithmetic</span>' in html
    assert '<span class="name">samples/<wbr>base</span>' in html


def test_it_is_known_as_mergelines(page, tmp_path):
    page()
    assert is_page(tmp_path / "build" / "report.html")
    (tmp_path / "other.html").write_text("<html><head><title>mergeline</title></head></html>")
    assert not is_page(tmp_path / "other.html")


def test_the_same_results_give_the_same_bytes(page):
    assert page().html == page().html


def test_sections_come_in_order(page):
    sections = " ".join(attrs["id"] for tag, attrs in page().tags if tag == "section")
    assert sections == "leaderboard comparisons tasks searches vectors inputs costs gates"


def test_the_summary_says_which_merge_and_how_good(page):
    text = page().text
    assert "cart (rank 0.16, scale 2) is the best of 3 merges by validation accuracy." in text
    assert "mean accuracy over 3 tasks is 0.543 (95 % interval 0.533 to 0.553):" in text
    assert ": 0.367 below the experts and 0.243 above the base." in text


def test_experts_are_compared_with_on_their_own_tasks_only(page):
    text = page(made_up(tasks=("digits", "held_out"), experts=("digits",))).text
    assert "0.367 below the experts on the 1 task with an expert and" in text


def test_a_better_test_score_of_another_merge_is_not_hidden(page):
    results = made_up()
    results["leaderboard"]["candidate"] = "ties"
    text = page(results).text
    assert "On test alone cart is higher, with 0.543; the choice was made on the validation split." in text


def test_accuracies_come_with_their_intervals(page):
    found = page()
    assert "widest interval ±0.010 ±0.030 ±0.030 ±0.030" in found.text
    titles = [attrs["title"] for tag, attrs in found.tags if tag == "td" and "title" in attrs]
    assert "95 % interval 0.503 to 0.563, n = 400, 59% of its expert" in titles


def test_pairs_are_told_from_the_candidates_side(page):
    text = page().text  # the pairs say that ties and average are 0.05 below cart
    assert "cart minus ties +0.050 +0.040 to +0.060 < 0.001 cart is better" in text
    assert "average minus ties −0.050 −0.060 to −0.040 < 0.001 ties is better" in text
    assert "cart is better than 2 of 2 other merges" in text


def changed(**changes):
    settings = {"method": "cart", "params": {"rank": 0.16, "scale": 1}, "experts": None, "searched": 6}
    pair = {"difference": 0.043, "lower": 0.03, "upper": 0.056, "p": 0.0001}
    merge = {
        "name": "cart",
        "settings": [settings, {**settings, "params": {"rank": 0.16, "scale": 2}}],
        "means": [0.5, 0.543],
        "pair": pair,
    }
    found = {"candidates": ["ties", "cart"], "added": ["average"], "removed": ["slerp"], "inputs": ["digits"]}
    return {**found, "merges": [merge], "same": ["ties"], **changes}


def test_the_run_before_is_compared_with(page):
    text = page(changes=changed()).text
    assert (
        "cart is the best merge in place of ties. Other checkpoints: digits. New: average. Gone: slerp."
        in text
    )
    assert "As they were: ties." in text
    settings = "cart: rank 0.16, scale 1; 6 settings tried → cart: rank 0.16, scale 2; 6 settings tried"
    assert f"{settings} 0.500 0.543 +0.043 +0.030 to +0.056 < 0.001 better than before" in text


def test_what_cannot_be_compared_with_the_run_before_says_so(page):
    (merge,) = changed()["merges"]
    same_settings = {**merge, "settings": merge["settings"][:1] * 2, "pair": None}
    text = page(changes=changed(candidates=["cart", "cart"], merges=[same_settings])).text
    assert "cart is the best merge again." in text
    assert (
        "cart cart: rank 0.16, scale 1; 6 settings tried 0.500 0.543 – – – measured on other examples" in text
    )


def test_without_a_run_before_nothing_is_said_of_it(page):
    assert "run before" not in page().text


def test_searches_say_what_was_chosen_and_where_the_grid_ended(page):
    found = page()
    assert "Of 6 settings, rank 0.16, scale 2 is best on validation, with 0.700." in found.text
    assert found.text.count("that was tried") == 1 and "The chosen scale 2 is the largest that" in found.text
    assert [attrs["aria-label"].split(";")[0] for tag, attrs in found.tags if tag == "svg"] == [
        "Mean validation accuracy of ties by scale",
        "Mean validation accuracy of cart by rank",
        "Mean validation accuracy of cart by scale",
    ]


def test_a_curve_far_below_the_best_does_not_flatten_the_picture(page):
    results = made_up()
    worst = results["searches"]["cart"]["points"][0]
    assert worst["params"] == {"rank": 0.04, "scale": 1.0}
    worst["mean"] = 0.01  # rank 0.04 has a better point, at scale 2
    ticks = re.findall(r'"end">(0\.\d\d)</text>', page(results).html)
    assert ticks and min(map(float, ticks)) > 0.4


def test_a_search_over_two_parameters_is_shown_as_a_grid(page):
    found = page()
    grid = "rank 1 2 0.04 0.588 0.688 0.16 0.600 0.700 0.64 0.552 0.652 Rows: rank. Columns: scale."
    assert grid in found.text and "All points of cart" not in found.text
    assert "<strong>0.700</strong></td></tr>" in found.html  # the chosen point
    assert "All points of ties" in found.text


def test_costs_are_summed_by_step(page):
    assert "merge 2 1 min 16 s 1 min 11 s 1.50 GiB compare 1 0.5 s 0.5 s 256.0 MiB total 3" in page().text


@pytest.mark.parametrize(
    "given, words",
    [
        (verdict(), "cart passed every gate: version 2 became champion, in place of version 1."),
        (verdict(champion_before=None), "cart passed every gate: version 2 became the first champion."),
        (verdict(champion_before="2"), "cart is version 2, which was champion already."),
        (verdict(False), "cart, registered as version 2, did not pass: 1 of 1 gates failed."),
        (verdict(False), "Version 1 stayed champion."),
        (verdict(False, version=None), "cart was not registered and did not pass"),
        (verdict(False, champion_after=None), "There was no champion."),
        (verdict(candidate="old"), "This verdict is older than the leaderboard, whose candidate is cart."),
        (None, "the register step has not run"),
    ],
)
def test_the_verdict_in_words(page, given, words):
    assert words in page(verdict=given).text


def test_everything_from_outside_is_escaped(page):
    results = made_up(tasks=("digits", HOSTILE), merges=("cart", HOSTILE))
    board = results["leaderboard"]
    board["pipeline"] = board["lineage"]["base"]["name"] = board["lineage"]["base"]["source"] = HOSTILE
    board["rows"][-1] |= {"method": HOSTILE, "digest": HOSTILE, "params": {HOSTILE: HOSTILE}}
    point = {"params": {HOSTILE: HOSTILE, "scale": 1.0}, "mean": 0.5, "tasks": {}}
    results["searches"][HOSTILE] = {
        "method": HOSTILE,
        "points": [point, {**point, "params": {HOSTILE: "b", "scale": 2.0}}],
        "chosen": point["params"],
    }
    gate = {"gate": HOSTILE, "passed": False, "sentence": HOSTILE}
    given = verdict(False, candidate=HOSTILE, version=HOSTILE, champion_after=HOSTILE, findings=[gate])
    found = page(results, [{**COSTS[0], "stage": f"{HOSTILE}@{HOSTILE}"}], given)
    tags = [tag for tag, _ in found.tags]
    assert "img" not in tags and tags.count("script") == 1  # our own
    assert not any(key.startswith("on") for _, attrs in found.tags for key in attrs)
    assert "{{ 7*1111 }}" in found.text and "7777" not in found.text


def of_language_models(results):
    """The same with what rows of language models say besides; `ties` is made of two experts of its own."""
    board = results["leaderboard"]
    perplexity = {"prose": {"value": 12.5, "lower": 11.25, "upper": 14.0, "bits_per_byte": 1.5}}
    for row in board["rows"]:
        if row["kind"] != "experts":
            row |= {
                "perplexity": perplexity,
                "lm_eval": {"digits": {"acc,none": [0.5, 0.125]}},
                "held_in": 0.625,
            }
        if row["name"] == "ties":
            row |= {"experts": ["shapes", "digits"], "gain_kept": 0.375}
    return {**results, "section": section(board)}


def test_language_models_have_a_section_of_their_own(page):
    text = page(of_language_models(made_up())).text
    assert "Perplexity: prose" in text and "ties 0.375 0.625 – 12.5 11.25 to 14 1.500" in text
    assert "experts – – – – –" in text
    assert "digits acc,none 0.5 ± 0.12" in text
    assert 'id="language"' not in page().html


def test_a_merge_of_experts_of_its_own_names_them(page):
    text = page(of_language_models(made_up())).text
    assert "ties scale 1; of shapes, digits" in text and text.count("; of ") == 1


def test_a_merge_that_is_not_finite_has_no_norm_ratio(page):
    results = made_up()
    results["leaderboard"]["rows"][-1] |= {"finite": False, "norm_ratio": None}
    assert "cart cart 10.0 MiB – not all finite" in page(results).text


def without_spectra(results):
    for expert in results["description"]["experts"].values():
        expert["energy_in_leading_directions"] = {}
        expert["alignment_with_base"] = None
    return results


def with_one_point(results):
    results["searches"]["ties"]["points"] = search("ties")["points"][1:2]
    return results


LONG_NAMES = tuple(f"{'long' * 30}-{i}" for i in range(15))


@pytest.mark.parametrize(
    "results, absent",
    [
        (made_up(merges=("average",)), "id=searches"),
        (made_up(tasks=("digits",)), "Cosine between task vectors"),
        (made_up(tasks=("digits", "shapes"), experts=()), "below the experts"),
        (without_spectra(made_up()), "Energy in leading directions"),
        (with_one_point(made_up()), "accuracy of ties by scale"),
        (made_up(tuple(f"task-{i}" for i in range(20)), LONG_NAMES), "id=searches"),
    ],
    ids=["one merge", "one task", "no experts", "no spectra", "one point", "many and long"],
)
def test_what_is_missing_is_left_out(page, results, absent):
    found = page(results, costs=[], verdict=None)
    assert absent not in found.html.replace('"', "")
    assert "Time and memory" not in found.text and "None" not in found.text and "nan" not in found.text


def test_a_place_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "build").write_text("")
    with pytest.raises(UserError, match="report.html: cannot be written"):
        render(tmp_path / "build" / "report.html", **made_up(), costs=[], verdict=None)


def test_models_that_are_told_the_task_or_find_it_come_last_and_say_how(page):
    results = made_up()
    *_, ties, cart = results["leaderboard"]["rows"]
    cart["at_use"] = {"task": "known", "how": "linear", "passes": 1, "bytes": 528384}
    route = {"val": {"digits": 0.9}, "test": {"digits": 0.9, "shapes": 0.5, "latin": 1.0}}
    ties["at_use"] = {"task": "found", "how": "residual", "passes": 2, "bytes": 2**20, "route": route}
    results["leaderboard"] |= {"candidate": "average", "pairs": []}
    text = page(results).text
    assert "average" in text and "is the only merge." in text
    assert text.index("cart task known at use") > text.index("base")
    assert "cart known linear – – 1 0.5 MiB" in text
    assert "ties found residual 0.800 0.500 shapes 2 1.0 MiB" in text
    assert "Task known or found at use" not in page().text


@pytest.mark.parametrize("tasks", [("digits",), ("digits", "shapes"), ("digits", "shapes", "latin")])
def test_a_front_over_tasks_is_drawn(page, tasks):
    results = made_up(tasks=tasks)
    points = [
        {
            "params": {"scale": i},
            "mean": 0.5,
            "tasks": {task: (i + j) % 3 / 4 for j, task in enumerate(tasks)},
        }
        for i in range(3)
    ]
    results["searches"]["ties"] = {
        "method": "ties", "points": points, "chosen": points[1]["params"], "front": [0, 1],
        "search": {
            "sampler": "map", "seed": 0, "budget": "3 points", "dropped": 0, "examples": 30,
            "examples_of_a_point": 10, "points_of_space": None, "reproducible": True,
        },
        "surrogate": {
            "sampled": 2,
            "tasks": {
                task: {"activation": "sigmoid", "bootstrap_error": 0.1, "front_error": 0.02 + i / 100}
                for i, task in enumerate(tasks)
            },
        },
    }  # fmt: skip
    found = page(results)
    assert "fitted to the first 2 points proposed the others, and are off there by 0.02 to" in found.text
    drawn = found.html.partition('<figure class="front">')[2].partition("</figure>")[0]
    if len(tasks) == 1:
        assert not drawn
    elif len(tasks) == 2:
        assert drawn.count("<circle") == 2 + 1 + 1 and "digits: accuracy" in drawn
    else:
        assert drawn.count("<polyline") == 2 and drawn.count('class="line picked"') == 1
        assert all(task in drawn for task in tasks)
