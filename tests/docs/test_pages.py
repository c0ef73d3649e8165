"""Pages: files and headings that they name are there, all can be found, and the picture of the rooms is complete."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Iterator

import pytest
from places import REPOSITORY

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md"))),
]
_FOLDERS = "deploy|merging|evaluation|tasks|flows|mergeline|tests|tools|docs|samples|examples|benchmarks"
_PATH = re.compile(rf"(?<![\w/.-])(?:{_FOLDERS})/[\w./-]*")
_HEADING = re.compile(r"\]\(([^)#:]*)#([^)]+)\)")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```\w*\n.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def named(page: str) -> Iterator[Path]:
    """The files and folders that a page names: in code, where they begin with a folder of ours, and in links."""
    path = REPOSITORY / page
    text = prose(path)
    for code in re.findall(r"`([^`\n]+)`", text):
        if " " not in code and "*" not in code and not re.search("[A-Z]{3}", code):
            yield from (REPOSITORY / found.rstrip(".") for found in _PATH.findall(code))
    for link in _LINK.findall(text):
        yield path.parent / link


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    assert [str(path) for path in named(page) if not path.exists()] == []


def test_what_pages_name_is_found():
    assert REPOSITORY / "docs/report.png" in named("README.md")
    assert REPOSITORY / "merging/verify.py" in named("docs/architecture.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_headings_that_a_page_links_to_are_there(page):
    path = REPOSITORY / page
    for target, heading in _HEADING.findall(path.read_text()):
        text = prose(path.parent / target if target else path)
        lines = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines], target


def test_every_page_is_named_in_the_readme_or_by_one_that_is():
    """So that nobody has to look for it."""
    reached, left = set(), [REPOSITORY / "README.md"]
    while left:
        page = left.pop().resolve()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            left += [path for path in named(str(page.relative_to(REPOSITORY))) if path.is_file()]
    assert {REPOSITORY / page for page in PAGES} <= reached


def test_the_picture_of_the_rooms_has_all_of_them():
    [picture] = re.findall(
        r"^```\n(flows/.*?)^```$", (REPOSITORY / "docs/architecture.md").read_text(), re.DOTALL | re.MULTILINE
    )
    words = set(re.findall(r"[a-z_]+", picture))
    there = {
        path.stem
        for path in (REPOSITORY / "merging").iterdir()
        if path.suffix == ".py" or list(path.glob("*.py"))
    }
    assert there - {"__init__"} <= words
    drawn = re.search(r"verbs +((?:\w+ )+) .*ground +([\w/ ]+)\n", picture, re.DOTALL)
    assert drawn
    for name in " ".join(drawn.groups()).split():
        place = REPOSITORY / "merging" / name
        assert place.is_dir() or place.with_suffix(".py").is_file(), name


def test_the_page_of_installation_has_every_extra():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| `([\w-]+)` \|", (REPOSITORY / "docs/installation.md").read_text(), re.MULTILINE)
    assert {*rows} == {*extras} - {"test", "lint"}
