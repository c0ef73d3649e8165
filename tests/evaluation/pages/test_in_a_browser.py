"""What the script of a page does in a real browser: tables sort, boxes that hold more say so, nothing else runs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from html_pages import Page
from made_up_results import made_up

from mergeline.evaluation.pages.report import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]
POLICY = re.compile(r"<meta http-equiv=[^>]*>")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    experts = tuple(f"expert-{i}" for i in range(20))
    render(path, **made_up(tasks=experts, merges=("average", "ties", "cart")), costs=[], verdict=None)
    return path


def shown(page: Path, width: int = 1280) -> str:
    """The document as it is after the page's scripts have run."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={page.parent / 'profile'}",
    ]
    command += [f"--window-size={width},2000", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def clicked(report: Path, header: str, times: int) -> tuple[list[str], str | None]:
    """The models of the leaderboard after clicks on a header, and what is said to be sorted how."""
    clicks = f"""<script>
    const headers = [...document.querySelectorAll("#leaderboard th[scope=col]")];
    const header = headers.find((h) => h.textContent.startsWith("{header}"));
    for (let i = 0; i < {times}; i++) header.querySelector("button").click();
    </script></body>"""
    html = POLICY.sub("", report.read_text()).replace("</body>", clicks)
    (report.parent / "clicked.html").write_text(html)
    dom = shown(report.parent / "clicked.html")
    table = dom[dom.index('id="leaderboard"') :].partition("</table>")[0]
    models = re.findall(r'<th scope="row"><span class="name">(\w+)</span>', table)
    return models, next(iter(re.findall('aria-sort="([a-z]+)"', table)), None)


def test_a_click_on_a_header_sorts_and_a_third_brings_the_order_back(report):
    ranked = ["experts", "cart", "ties", "average", "base"]
    assert clicked(report, "Model", 0) == (ranked, None)
    assert clicked(report, "Model", 1) == (sorted(ranked), "ascending")
    assert clicked(report, "Mean test", 2) == (ranked[::-1], "ascending")
    assert clicked(report, "Mean test", 3) == (ranked, None)
    # A dash is no number: it stays last, whichever way.
    assert clicked(report, "Settings tried", 1)[0] == ["cart", "ties", "average", "experts", "base"]
    assert clicked(report, "Settings tried", 2)[0] == ["average", "ties", "cart", "experts", "base"]


def test_headers_are_buttons_and_what_is_cut_off_shows_it(report):
    page = Page(shown(report, width=500))
    buttons = [attrs for tag, attrs in page.tags if tag == "button"]
    assert len(buttons) > 20 and all(attrs["type"] == "button" for attrs in buttons)
    assert boxes(page)["Cosine between task vectors"] == "scroll more"


def boxes(page: Page) -> dict[str, str]:
    """The classes of the boxes that scroll, by their names."""
    return {attrs["aria-label"]: attrs["class"] for _, attrs in page.tags if attrs.get("role") == "region"}


def test_what_the_gates_found_is_read_whole_at_400_pixels(tmp_path):
    sentence = (
        "Against the base the largest drop in accuracy is 0.0000 (task fashion); at most 0.0500 is allowed."
    )
    findings = [
        {"gate": gate, "passed": True, "sentence": sentence}
        for gate in ("largest_norm_ratio", "minimum_mean", "largest_drop")
    ]
    verdict = {"candidate": "cart", "version": "1", "champion_before": None, "champion_after": "1"}
    path = tmp_path / "report.html"
    render(path, **made_up(), costs=[], verdict=verdict | {"passed": True, "findings": findings})
    # Chromium makes no window narrower than 500.
    narrow = POLICY.sub("", path.read_text()).replace(
        "</head>", "<style>html { width: 400px }</style></head>"
    )
    path.write_text(narrow)
    found = boxes(Page(shown(path, width=500)))
    assert (found["Findings"], found["Leaderboard"]) == ("scroll", "scroll more")


def test_what_is_slipped_in_does_not_run(report):
    hostile = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
    report.write_text(report.read_text().replace("<main>", f"<main>{hostile}"))
    assert "<title>sample: merge report</title>" in shown(report)
    report.write_text(POLICY.sub("", report.read_text()))
    assert "<title>run</title>" in shown(report)
