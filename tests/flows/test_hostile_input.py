"""The command line on input that means harm: one line, soon, and no character of it that commands the terminal."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from checkpoints import edit, save_family
from places import MERGELINE, REPOSITORY
from safetensors.torch import load_file, save_file
from soon import soon

ESCAPE = "\x1b[2J\x1b]0;title\x07\r\x9b31m\u202e"


@pytest.fixture
def family(tmp_path: Path) -> list[Any]:
    """The arguments that name base, a and b."""
    recipe = save_family(tmp_path / "in", experts=2)
    experts = [part for name, path in recipe["experts"].items() for part in ("--expert", f"{name}={path}")]
    return ["--base", recipe["base"], *experts]


@pytest.fixture
def refused(mergeline: Callable) -> Callable[..., str]:
    """The command must refuse soon, in one line; returns it."""

    def run(*arguments: Any) -> str:
        with soon():
            outcome = mergeline(*arguments)
        assert outcome.code == 2 and outcome.out == "", outcome
        assert outcome.err.startswith("mergeline: ") and outcome.err.count("\n") == 1, outcome.err
        assert len(outcome.err) < 2500
        return outcome.err

    return run


# --------------------------------------------------------------------------------------- bombs and hangs


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--method", "cart", "--set", "rank=" + "[" * 100 + "]" * 100], "nests deeper than 64 lists"),
        (["--method", "cart", "--set", "rank=" + "[" * 50_000], "nests deeper than 64 lists"),
        (["--method", "cart", "--set", "rank=" + '{"a":' * 90 + "1" + "}" * 90], "nests deeper than 64 lists"),
        (["--method", "cart", "--set", "rank=" + "1" * 5000], "rank"),
        (["--method", "cart", "--set", "scale=" + "1" * 400], "scale"),
        (["--method", "cart", "--set", "k" * 100_000 + "=1"], "unknown parameter"),
        (["--method", "average", "--seed", "1" * 5000], "--seed"),
        (["--method", "average", "--seed", "1" * 4000], "seed"),
        (["--method", "lines(" * 500 + "ties" + ")" * 500], "a chain of 501 methods"),
        (["--method", "lines(" * 20_000], "chain"),
        (["--method", "x" * 100_000], "unknown method"),
    ],
)  # fmt: skip
def test_values_that_are_bombs(options, part, family, refused, tmp_path):
    assert part in refused("merge", *family, *options, "--out", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def test_a_chain_of_methods_by_their_parameters(family, refused, tmp_path):
    inner = [part for i in range(40) for part in ("--set", f"{'inner_' * i}inner=lines")]
    line = refused("merge", "--method", "lines", *family, *inner, "--out", tmp_path / "out")
    assert "a chain of more than 16 methods" in line


def test_a_grid_of_a_million_points(family, refused, tmp_path):
    values = ",".join(f"{i / 1000:g}" for i in range(1, 1001))
    grid = ["--grid", f"rank={values}", "--grid", f"scale={values}"]
    line = refused("sweep", "--method", "cart", *family, *grid, "--out", tmp_path / "out")
    assert "the grid has 1000000 points, 10000 at most" in line
    assert os.listdir(tmp_path) == ["in"]


def test_a_search_of_a_million_points(workspace, refused):
    path = workspace / "params.yaml"
    values = f"[{', '.join(f'{i / 1000:g}' for i in range(1, 1001))}]"
    start, _, _ = path.read_text().partition("  cart:")
    path.write_text(
        start + f"  cart:\n    method: cart\n    search:\n      rank: {values}\n      scale: {values}\n"
    )
    line = refused("fetch", "--params", path)
    assert "params.yaml:" in line and "the grid has 1000000 points" in line


@pytest.mark.parametrize("option", ["--base", "--expert", "--statistics", "--recipe", "--methods"])
def test_a_pipe_in_place_of_a_file(option, family, refused, tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    method, rest = "task_arithmetic", family
    if option == "--base":
        rest = family[2:]
    elif option == "--statistics":
        method = "fisher"
    given = {
        "--expert": f"c={tmp_path / 'pipe.py'}",
        "--statistics": f"fisher={tmp_path / 'pipe.py'}",
    }.get(option, tmp_path / "pipe.py")
    arguments = [] if option == "--recipe" else ["--method", method, *rest]
    line = refused("merge", *arguments, option, given, "--out", tmp_path / "out")
    assert "pipe.py" in line


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "extract-expert"])
def test_a_device_in_place_of_a_file(command, refused, tmp_path):
    more = {"diff": ["/dev/zero"], "extract-expert": ["a", "--out", tmp_path / "out"]}.get(command, [])
    refused(command, "/dev/zero", *more)


def test_a_pipe_in_a_workspace(workspace, refused):
    os.mkfifo(workspace / "pipe.safetensors")
    os.mkfifo(workspace / "pipe.npz")
    path = workspace / "params.yaml"
    digits = str(REPOSITORY / "samples/experts/digits.safetensors")
    path.write_text(path.read_text().replace(digits, "pipe.safetensors"))
    assert "pipe.safetensors" in refused("fetch", "--params", path, "digits")
    path.write_text(path.read_text().replace(str(REPOSITORY / "samples/data/digits.npz"), "pipe.npz"))
    assert "pipe.npz" in refused("data", "--params", path, "digits")


@pytest.mark.parametrize("out", ["/proc/x", "/dev/null/x", "/dev/null", "loop/x", "a\0b", "x" * 300])
def test_places_where_nothing_can_be_written(out, family, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    refused("merge", "--method", "average", *family, "--out", out)
    refused("sweep", "--method", "ties", *family, "--grid", "scale=1", "--out", out)
    assert sorted(os.listdir(tmp_path)) == ["in", "loop"]


# --------------------------------------------------------------------------------------- limits of the process


def limited(limits: str, *arguments: Any, stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess:
    """The command in a process of its own, under limits of a shell."""
    command = ["bash", "-c", f'{limits}; exec "$@"', "bash", *MERGELINE, *map(str, arguments)]
    return subprocess.run(
        command, cwd=REPOSITORY, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=300
    )


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "cart"], ["--version"]])
def test_a_full_place_for_the_output(arguments):
    with open("/dev/full", "w") as full:
        done = limited(":", *arguments, stdout=full)
    assert (done.returncode, done.stderr) == (
        2,
        "mergeline: the output cannot be written (No space left on device)\n",
    )


def test_a_closed_output():
    done = limited("exec >&-", "methods")
    assert (done.returncode, done.stderr) == (0, "")


def test_names_that_the_terminals_encoding_lacks(tmp_path):
    save_file({"ä\u4e2d": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"y": torch.ones(1)}, tmp_path / "y.safetensors")
    done = limited(
        "export PYTHONIOENCODING=ascii", "diff", tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    )
    assert done.returncode == 0 and "\\xe4\\u4e2d" in done.stdout


@pytest.mark.slow
def test_files_that_may_not_grow(family, tmp_path):
    large = tmp_path / "large"
    recipe = save_family(large, experts=1, shapes={"w": (400, 400)})
    arguments = ["--base", recipe["base"], "--expert", recipe["experts"]["a"], "--out", tmp_path / "out"]
    done = limited("ulimit -f 100", "merge", "--method", "average", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["in", "large"]


@pytest.mark.slow
def test_a_sweep_that_may_open_few_files(family, tmp_path):
    grid = ["--grid", f"scale={','.join(str(i / 10) for i in range(64))}"]
    arguments = ["sweep", "--method", "task_arithmetic", *family, *grid, "--workers", "1", "--out"]
    done = limited("ulimit -n 64", *arguments, tmp_path / "few")
    assert done.returncode == 0, done.stderr
    assert limited(":", *arguments, tmp_path / "many").returncode == 0
    few, many = (json.loads((tmp_path / out / "sweep.json").read_text()) for out in ("few", "many"))
    assert few == many and len(few["points"]) == 64


# --------------------------------------------------------------------------------------- escapes


@pytest.fixture
def hostile(family, tmp_path) -> list[Any]:
    """The family with a tensor, and metadata, whose names command a terminal."""
    for part in (family[1], *(part.split("=")[1] for part in map(str, family[3::2]))):
        state = load_file(part)
        save_file(
            {**state, f"w{ESCAPE}\nproblem    none": torch.ones(2)},
            part,
            {f"k{ESCAPE}": f"v{ESCAPE}\nsha256:0"},
        )
    return family


def check(outcome: Any) -> None:
    for text in (outcome.out, outcome.err):
        assert all(c.isprintable() or c == "\n" for c in text), text
    assert "\\x1b[2J\\x1b]0;title\\x07" in outcome.out + outcome.err
    assert not any(line.startswith(("problem    none", "sha256:0")) for line in outcome.out.splitlines())


def test_escapes_in_files_are_shown(hostile, mergeline, tmp_path):
    a = str(hostile[3]).split("=")[1]
    check(mergeline("inspect", a))
    check(mergeline("plan", "--method", "ties", *hostile, "--table"))
    edit(Path(a), **{f"w{ESCAPE}\nproblem    none": torch.zeros(2)})
    check(mergeline("diff", a, hostile[1]))
    edit(Path(a), **{f"w{ESCAPE}\nproblem    none": torch.zeros(3)})
    check(mergeline("diff", a, hostile[1]))
    check(mergeline("plan", "--method", "ties", *hostile))
    check(mergeline("merge", "--method", "ties", *hostile, "--out", tmp_path / "out"))


def test_escapes_in_names_of_experts_are_shown(family, mergeline):
    named = [
        f"n{ESCAPE}={str(part).split('=')[1]}" if str(part).startswith("a=") else part for part in family
    ]
    check(mergeline("inspect", *named))


def test_escapes_in_methods_from_outside_are_shown(mergeline, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from mergeline.merging.methods.contract import method\\nfrom mergeline.merging.algebra.slots import Slot\\n"
        f"@method(paper={'p' + ESCAPE!r})\\ndef hostile_one(x: Slot):\\n    {'s' + ESCAPE!r}\\n    return None\\n"
    )
    path.write_text(path.read_text().replace("\\n", "\n"))
    from mergeline.merging.methods import contract

    try:
        check(mergeline("methods", "--methods", path, "hostile_one"))
        check(mergeline("methods", "--methods", path))
    finally:
        contract._METHODS.pop("hostile_one", None)


def test_commands_print_by_what_shows_control_characters():
    for path in (REPOSITORY / "flows" / "cli").glob("*_commands.py"):
        text = path.read_text()
        assert "print(" not in text or "from mergeline.flows.cli.text import say as print" in text, path
