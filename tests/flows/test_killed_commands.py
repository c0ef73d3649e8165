"""kill -9 and SIGTERM of every command that writes, at random moments.

It ends soon; what is there then is the old one or the new one, whole; and it goes on.
KILLS=20 kills each command more often than by default.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from checkpoints import file_hashes, save_family
from places import MERGELINE, REPOSITORY

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "2"))
SHAPES = {f"blocks.{i}.weight": (96, 64) for i in range(40)}
TIME_LIMIT = 300
SIGNALS = (signal.SIGKILL, signal.SIGTERM)  # in turn
END_SECONDS = 10

# What is written, and by which arguments; {0} is the folder of the family, {1} that of the outputs.
COMMANDS = {
    "merged": "merge --method cart {family} --out {1}/merged",
    "shards": "merge --method ties {family} --shard-size 100KB --out {1}/shards",
    "single.safetensors": "merge --method karcher {family} --out {1}/single.safetensors",
    "swept": "sweep --method tsv_merge {family} --grid scale=1,2,3 --out {1}/swept",
    "store.safetensors": "compress --method tall_mask {family} --out {1}/store.safetensors",
    "expert": "extract-expert {0}/store.safetensors a --base {0}/base.safetensors --out {1}/expert",
    "adapter": "extract-lora --method average {family} --rank 4 --out {1}/adapter",
    "dask": "merge --method ties {family} --executor dask:2 --out {1}/dask",
    "family.html": "inspect {family} --html {1}/family.html",
}  # fmt: skip


class Command:
    """A command of a family, to be run in one folder of outputs or another."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder

    def start(self, place: Path) -> subprocess.Popen[str]:
        experts = " ".join(f"--expert {n}={self.folder}/{n}.safetensors" for n in "abc")
        family = f"--base {self.folder}/base.safetensors {experts}"
        words = COMMANDS[self.name].format(self.folder, place, family=family).split()
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*MERGELINE, *words], cwd=REPOSITORY, **pipes)

    def finish(self, place: Path) -> dict[str, str]:
        """Run it to its end; what lies in the place, by digests."""
        with self.start(place) as process:
            _, errors = process.communicate(timeout=TIME_LIMIT)
        assert process.returncode == 0, errors
        return digests(place)


def digests(place: Path) -> dict[str, str]:
    """Of all files that are in no staging folder, be it within a sweep's."""
    found = {f"{p.name}/{name}": digest for p in place.iterdir() for name, digest in file_hashes(p).items()}
    return {path: digest for path, digest in found.items() if ".partial/" not in path}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family, and a store of it."""
    made = tmp_path_factory.mktemp("family") / "in"
    save_family(made, shapes=SHAPES)
    Command("store.safetensors", made).finish(made)
    return made


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_killed_command_has_left_is_whole_and_goes_on(
    name: str, folder: Path, tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    command = Command(name, folder)
    (tmp_path / "new").mkdir()
    begin = time.monotonic()
    expected = command.finish(tmp_path / "new")
    seconds = time.monotonic() - begin
    killed = 0  # not ended before
    for number in range(KILLS):
        place = tmp_path / f"killed{number}"
        place.mkdir()
        with command.start(place) as process:
            time.sleep(random.Random(f"{name} {number}").uniform(0.3, 1) * seconds)
            process.send_signal(SIGNALS[number % 2])
            process.communicate(timeout=END_SECONDS)
        killed += process.returncode != 0
        # Of a sweep, points and the table appear one after the other.
        assert digests(place).items() <= expected.items()
        assert command.finish(place) == expected
        assert not [path.name for path in place.rglob("*") if path.name.endswith(".partial")]
        shutil.rmtree(place)
    record_testsuite_property(f"killed {name}", killed)
