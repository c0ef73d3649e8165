"""Pages that people write: the files that they name are there, and the picture of the rooms is complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator

import pytest
from places import REPOSITORY

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/add-a-method.md",
    "docs/formats.md",
    "docs/moe.md",
    "docs/prompts.md",
]
_FOLDERS = "merging|evaluation|tasks|flows|mergeline|tests|tools|docs|samples|examples|benchmarks"
_PATH = re.compile(rf"(?<![\w/.-])(?:{_FOLDERS})/[\w./-]*")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def named(page: str) -> Iterator[Path]:
    """The files and folders that a page names: in code, where they begin with a folder of ours, and in links."""
    path = REPOSITORY / page
    text = re.sub(r"^```\w*\n.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`\n]+)`", text):
        if " " not in code and "*" not in code and not re.search("[A-Z]{3}", code):
            yield from (REPOSITORY / found.rstrip(".") for found in _PATH.findall(code))
    for link in _LINK.findall(text):
        yield path.parent / link


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    found = list(named(page))
    assert found
    assert [str(path.relative_to(REPOSITORY)) for path in found if not path.exists()] == []


def test_the_picture_of_the_rooms_has_all_of_them():
    [picture] = re.findall(
        r"^```\n(flows/.*?)^```$", (REPOSITORY / PAGES[2]).read_text(), re.DOTALL | re.MULTILINE
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
