"""The blocks of code of a page, and how they are run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Mapping, NamedTuple

from places import REPOSITORY

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# ([\w.-]+\.ya?ml)\n")  # the first line of a block that is a file


class Block(NamedTuple):
    language: str
    text: str


def blocks(page: str, *languages: str) -> list[Block]:
    """The blocks of these languages, or of all, in the order of the page; `page`: its path in the repository."""
    found = [Block(*match) for match in _BLOCK.findall((REPOSITORY / page).read_text())]
    return [block for block in found if not languages or block.language in languages]


def run_block(block: Block, folder: Path, environment: Mapping[str, str]) -> str:
    """What a block of commands or of Python says in `folder`; one of YAML is written to the file that it names."""
    if block.language == "yaml":
        named = _FILE.match(block.text)
        assert named, f"a file without a name: {block.text}"
        (folder / named[1]).write_text(block.text)
        return ""
    command = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
    done = subprocess.run(
        [*command, block.text], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    return done.stdout
