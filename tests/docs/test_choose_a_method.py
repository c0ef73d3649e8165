"""The page that says which method to try has the figures of the pages that measured them, and counts them rightly."""

from __future__ import annotations

import re

import pytest
from places import REPOSITORY

PAGE = REPOSITORY / "docs/choose-a-method.md"
METHODS = ("average", "task_arithmetic", "ties", "cart", "tsv_merge", "iso_c", "wudi")


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, the head first, without the line below it."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    rows = [[row.strip("| \n").split("|") for row in table.splitlines()] for table in found]
    return [[[cell.strip() for cell in row] for row in [table[0], *table[2:]]] for table in rows]


def figures() -> list[tuple[str, str, str]]:
    """What the tables of families say: the page that a row names, a method, and its figure."""
    found = []
    for head, *rows in tables(PAGE.read_text())[1:]:
        for row in rows:
            page = re.search(r"\((.*?)\)", row[0])
            assert page, row
            for what, cell in zip(head[1:], row[1:]):
                if what == "kept" or not cell:
                    continue
                value, _, own = cell.partition(" ")
                name = re.search(r"`(\w+)`", own or what)
                found.append((page[1], name[1] if name else what, value))
    return found


@pytest.mark.parametrize(("page", "method", "value"), sorted(set(figures())))
def test_a_figure_is_that_of_its_page(page, method, value):
    rows = [row for table in tables((PAGE.parent / page).read_text()) for row in table]
    of_method = [row for row in rows if re.match(rf"{method}(\b|_)", row[0].strip("*"))]
    assert any(value in row[1:] for row in of_method), of_method


def families() -> list[dict[str, float]]:
    """The means of each family by what they are of."""
    head, *rows = tables(PAGE.read_text())[1]
    names = [name.strip("`") for name in head]
    return [{name: float(cell) for name, cell in zip(names[1:], row[1:]) if cell} for row in rows]


def ranked(means: dict[str, float]) -> list[str]:
    return sorted((name for name in METHODS if name in means), key=lambda name: -means[name])


def test_what_the_best_merge_keeps_is_its_share_of_the_gain():
    for means in families():
        best = means[ranked(means)[0]]
        assert means["kept"] == round((best - means["base"]) / (means["experts"] - means["base"]), 2)


def test_what_the_page_says_of_all_families_is_counted_rightly():
    found = families()
    orders = [ranked(means) for means in found]
    assert len(found) == 11
    near_the_top = {method: sum(method in order[:2] for order in orders) for method in METHODS}
    assert near_the_top.pop("tsv_merge") == 9 and max(near_the_top.values()) == 5
    with_wudi = [order for order in orders if "wudi" in order]
    assert len(with_wudi) == 8 and not any(order[-1] == "wudi" for order in with_wudi)
    firsts = [order[0] for order in orders]
    assert firsts.count("wudi") == 4 and firsts.count("iso_c") == 3
    assert not {"average", "task_arithmetic", "cart"} & {*firsts}
    for method, ahead in (("cart", 6), ("ties", 4)):
        assert sum(means[method] > means["task_arithmetic"] for means in found) == ahead
    by_pixel = next(means for means in found if ranked(means)[0] == "ties")
    assert max(by_pixel["tsv_merge"], by_pixel["iso_c"]) < by_pixel["average"]
