"""Completion, as the shells themselves do it where they are installed; of all, that the words are there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from places import REPOSITORY

from mergeline.merging.methods import catalogue
from mergeline.tasks import status
from mergeline.tasks.workspace import Workspace


@pytest.fixture
def completed(mergeline):
    """What bash offers at the end of a line, by the function that the script registers for `mergeline`."""
    script = mergeline("completion", "bash").out

    def complete(*words: str) -> list[str]:
        line = [
            script,
            'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()',
            "registered=$(complete -p mergeline); registered=${registered##*-F }; ${registered%% *}",
            'printf "%s\\n" "${COMPREPLY[@]}"',
        ]
        bash = ["bash", "-u", "-c", "\n".join(line), "bash", "mergeline", *words]
        done = subprocess.run(bash, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout.split()

    return complete


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_completes_commands_options_methods_parameters_and_files(completed, tmp_path):
    assert completed("sw") == ["sweep"] and {"run", "merge", "verify"} <= set(completed(""))
    assert completed("merge", "--me") == ["--method", "--methods", "--memory"]
    assert completed("run", "--o") == ["--only"]
    assert completed("merge", "--method", "cart") == [id for id in catalogue() if id.startswith("cart")]
    assert completed("methods", "sler") == ["slerp"]
    assert completed("merge", "--dtype", "b") == ["bfloat16"]
    assert "rank=0.12" in completed("merge", "--method", "cart", "--set", "ra")
    assert completed("merge", "--method", "cart", "--set", "densi") == []
    assert completed("merge", "--set", "densi") == ["density="]
    assert completed("completion", "z") == ["zsh"]
    (tmp_path / "recipe.yaml").touch()
    assert completed("merge", "--recipe", f"{tmp_path}/rec") == [f"{tmp_path}/recipe.yaml"]


def test_names_are_those_that_run_knows(mergeline, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    found = mergeline("completion", "names").out.split()
    assert found == sorted(status.names(Workspace("params.yaml")))
    for name in found:
        assert mergeline("run", "--dry-run", "--only", name).code == 0, name
    assert mergeline("completion", "names", "--params", "nowhere.yaml").code == 2


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`mergeline`, as shells find it."""
    (tmp_path / "bin").mkdir()
    file = tmp_path / "bin" / "mergeline"
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mergeline.flows.cli "$@"\n')
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_completes_what_run_may_name(completed, command, workspace, monkeypatch):
    monkeypatch.chdir(workspace.parent)
    assert completed("run", "--only", "") == []
    there = ("--params", "workspace/params.yaml", "--only")
    assert completed("run", *there, "ca") == ["cart"]
    monkeypatch.chdir(workspace)
    assert completed("run", "--force", "extr") == ["extract"]
    assert completed("run", "--only", "evaluate", "@") == ["average", "cart"]
    assert completed("run", "--only", "evaluate", "@", "av") == ["average"]
    assert completed("run", "--only", "evaluate", "@", "cart", "--force", "ca") == ["cart"]
    assert completed("merge", "--force", "--me") == ["--method", "--methods", "--memory"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("fish"), reason="there is no fish")
def test_fish_completes_what_run_may_name(mergeline, command, workspace):
    script = mergeline("completion", "fish").out
    line = f"{script}\ncomplete -C 'mergeline run --only evaluate@'"
    done = subprocess.run(["fish", "-N", "-c", line], cwd=workspace, capture_output=True, text=True)
    assert [word.partition("\t")[0] for word in done.stdout.splitlines()] == [
        f"evaluate@{name}" for name in ("average", "cart")
    ], done.stderr


ZSH = r"""
zmodload zsh/zpty
zpty shell 'zsh -f -i'
zpty -w shell 'PS1=; autoload -Uz compinit; compinit -u -D; eval "$(<./completion)"; echo rea""dy'
zpty -r shell said '*ready*'
zpty -w -n shell $'mergeline run --only ext\t'
zpty -r shell said '*extract*' && print found
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("zsh"), reason="there is no zsh")
def test_zsh_completes_what_run_may_name(mergeline, command, workspace):
    (workspace / "completion").write_text(mergeline("completion", "zsh").out)
    done = subprocess.run(
        ["zsh", "-f", "-c", ZSH], cwd=workspace, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.endswith("found\n"), done


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_command_and_method(shell, mergeline):
    script = mergeline("completion", shell).out
    commands = re.findall(r"^    ([\w-]+)", mergeline("--help").out.partition("COMMAND\n")[2], re.MULTILINE)
    assert len(commands) > 20
    for word in (*commands, *catalogue(), "dry-run", "density="):
        assert word in script, word
    assert shell != "zsh" or "(eval|file)" in script  # `source` registers it


# What is typed after `mergeline`, up to the tab, and what has become of it; {0} is a folder.
LINES = {
    "sw": "sweep",
    "run --onl": "run --only",
    "merge --method sler": "merge --method slerp",
    "methods sler": "methods slerp",
    "merge --dtype bf": "merge --dtype bfloat16",
    "merge --set densi": "merge --set density=",
    "completion z": "completion zsh",
    "merge --recipe {0}/rec": "merge --recipe {0}/recipe.yaml",
}

# Types lines, each with a tab and a return behind it, into a terminal with a zsh, where `mergeline` notes its words.
TYPIST = r"""
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "$1; mergeline() { print -r -- \"\$*\" >> ${(q)2} }"
shift 2
for line; do zpty -w shell "mergeline $line"$'\t'; done
zpty -w shell exit
while zpty -r shell; do :; done
"""
COMPINIT = "autoload -U compinit; compinit -D -u"


@pytest.mark.skipif(not shutil.which("zsh"), reason="there is no zsh")
@pytest.mark.parametrize(
    "known_by",
    [
        f"{COMPINIT}; source {{0}}/_mergeline",
        f"{COMPINIT}; source <(cat {{0}}/_mergeline)",
        f'{COMPINIT}; eval "$(cat {{0}}/_mergeline)"',
        f"fpath=({{0}} $fpath); {COMPINIT}",
    ],
    ids=["sourced", "sourced from a pipe", "evaluated", "in a folder of functions"],
)
def test_zsh_completes_what_is_typed_however_the_script_was_read(known_by, mergeline, tmp_path):
    (tmp_path / "_mergeline").write_text(mergeline("completion", "zsh").out)
    (tmp_path / "recipe.yaml").touch()
    typed = [line.format(tmp_path) for line in LINES]
    zsh = ["zsh", "-f", "-c", TYPIST, "zsh", known_by.format(tmp_path), tmp_path / "words", *typed]
    done = subprocess.run(zsh, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "words").exists(), done.stdout + done.stderr
    found = (tmp_path / "words").read_text().splitlines()
    assert found == [line.format(tmp_path) for line in LINES.values()]


@pytest.mark.skipif(not shutil.which("fish"), reason="there is no fish")
def test_fish_completes_what_is_typed(mergeline, tmp_path):
    (tmp_path / "mergeline.fish").write_text(mergeline("completion", "fish").out)
    (tmp_path / "recipe.yaml").touch()
    for line, expected in LINES.items():
        ask = "source $argv[1]; complete --do-complete $argv[2]"
        typed = f"mergeline {line.format(tmp_path)}"
        fish = ["fish", "--no-config", "-c", ask, tmp_path / "mergeline.fish", typed]
        done = subprocess.run(fish, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        words = [offered.split("\t")[0] for offered in done.stdout.splitlines()]
        assert words == [expected.format(tmp_path).split()[-1]]
