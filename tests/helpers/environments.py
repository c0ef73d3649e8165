"""Environments that hold what our package asks for and nothing else, made of links to what is installed here.

So they are whole within seconds, need no network, and an import that is not asked for fails in them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections import defaultdict
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class Environment:
    """A virtual environment in which a wheel of ours is installed with some of its extras."""

    def __init__(self, folder: Path, wheel: Path, *extras: str):
        """Skips the test where a distribution that is asked for is not installed here."""
        venv.create(folder, with_pip=False)
        self.bin = folder / "bin"
        [self.packages] = folder.glob("lib/*/site-packages")
        self.pip("install", "--no-deps", wheel)
        [ours] = distributions(path=[str(self.packages)])
        _link(_needed(ours, set(extras)), self.packages)

    def run(
        self, command: str, *arguments: object, cwd: Path, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """A command of the environment, or a module of it as `-m NAME`, that knows nothing of this checkout."""
        program = (
            [self.bin / "python", "-m", command[3:]] if command.startswith("-m ") else [self.bin / command]
        )
        ours = ("PYTHONPATH", "PREFECT_", "MLFLOW_", "DVC_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment |= {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "HOME": str(cwd), **more}
        return subprocess.run(
            [*program, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
        )

    def check(self, command: str, *arguments: object, cwd: Path, **more: str) -> str:
        """A command that must end well; what it prints."""
        done = self.run(command, *arguments, cwd=cwd, **more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pip(self, *arguments: object) -> str:
        """What pip prints about this environment."""
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.bin / "python"]
        done = subprocess.run([*map(str, (*pip, *arguments))], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _needed(ours: Distribution, extras: set[str]) -> list[Distribution]:
    """What a distribution and some of its extras need, and what that needs in turn."""
    found: dict[str, Distribution] = {canonicalize_name(ours.metadata["Name"]): ours}
    asked: dict[str, set[str]] = defaultdict(set)
    todo = [(ours, extra) for extra in ("", *extras)]
    while todo:
        owner, extra = todo.pop()
        for text in owner.requires or ():
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            name = canonicalize_name(requirement.name)
            if name not in found:
                try:
                    found[name] = distribution(name)
                except PackageNotFoundError:
                    pytest.skip(f"{name} is not installed here")
            new = {"", *requirement.extras} - asked[name]
            asked[name] |= new
            todo += [(found[name], wanted) for wanted in sorted(new)]
    return [found[name] for name in sorted(found) if found[name] is not ours]


def _link(wanted: list[Distribution], packages: Path) -> None:
    """Link the files of distributions into a site-packages: whole folders, where no other distribution has a part."""
    names = {canonicalize_name(each.metadata["Name"]) for each in wanted}
    owners: dict[str, set[str]] = defaultdict(set)  # of every file and folder
    roots: dict[str, Path] = {}
    for each in distributions():
        name, root = canonicalize_name(each.metadata["Name"]), Path(str(each.locate_file("")))
        for file in each.files or ():
            parts = file.parts
            if ".." in parts or "__pycache__" in parts:
                continue
            for end in range(1, len(parts) + 1):
                path = "/".join(parts[:end])
                owners[path].add(name)
                roots[path] = root
    linked = ""
    for path in sorted(owners, key=lambda path: path.split("/")):  # what is in a folder comes right after it
        if (linked and path.startswith(f"{linked}/")) or not owners[path] & names:
            continue
        source = roots[path] / path
        if owners[path] <= names or not source.is_dir():
            linked = path
            (packages / path).parent.mkdir(parents=True, exist_ok=True)
            (packages / path).symlink_to(source)
