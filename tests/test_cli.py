"""The command line on good input: what it prints, writes and understands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit, same_tensors, save_family
from safetensors.torch import load_file

from flows.cli import STEPS
from merging import merge_state_dicts
from merging.checkpoint import open_checkpoint
from merging.methods import catalogue

REPOSITORY = Path(__file__).parent.parent
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@pytest.fixture
def family(tmp_path: Path) -> list[Any]:
    """The arguments that name base, a, b and c."""
    (tmp_path / "in").mkdir()
    recipe = save_family(tmp_path / "in")
    experts = [part for name, path in recipe["experts"].items() for part in ("--expert", f"{name}={path}")]
    return ["--base", recipe["base"], *experts]


def in_memory(family: list[Any], method: str, **params: Any) -> dict[str, torch.Tensor]:
    paths = [Path(str(part).split("=")[-1]) for part in family[1::2]]
    base, *experts = map(load_file, paths)
    return merge_state_dicts(method, dict(zip("abc", experts)), base, params=params)


# --------------------------------------------------------------------------------------- help


def test_help_names_every_command(mergeline):
    outcome = mergeline("--help")
    assert outcome.code == 0
    for command in (
        "run",
        *STEPS,
        "register",
        "report",
        "serve",
        "merge",
        "plan",
        "methods",
        "inspect",
        "diff",
        "verify",
    ):
        assert re.search(rf"^    {command}\b", outcome.out, re.MULTILINE), command
        assert mergeline(command, "--help").code == 0


# --------------------------------------------------------------------------------------- merge and plan


def test_merge_prints_where_and_what(mergeline, family, tmp_path):
    outcome = mergeline("merge", "--method", "cart", *family, "--set", "rank=0.5", "--out", tmp_path / "out")
    assert outcome == (0, f"{tmp_path / 'out'}  {open_checkpoint(tmp_path / 'out').digest()}\n", "")
    assert same_tensors(
        load_file(tmp_path / "out" / "model.safetensors"), in_memory(family, "cart", rank=0.5)
    )


@pytest.mark.parametrize(
    ("setting", "params"),
    [
        ("scale=0.5", {"scale": 0.5}),
        ("scale=1", {"scale": 1}),
        ("weights=[1, 0.5, -1]", {"weights": [1, 0.5, -1]}),
        ("normalize=true", {"normalize": True}),
        ("weights=null", {"weights": None}),
    ],
)
def test_set_takes_json_values(setting, params, mergeline, family, tmp_path):
    outcome = mergeline(
        "merge", "--method", "task_arithmetic", *family, "--set", setting, "--out", tmp_path / "x.safetensors"
    )
    assert outcome.code == 0
    assert same_tensors(load_file(tmp_path / "x.safetensors"), in_memory(family, "task_arithmetic", **params))


def test_set_takes_plain_words(mergeline, family, tmp_path):
    arguments = [
        *family,
        "--set",
        "variant=mergekit",
        "--set",
        "scope=tensor",
        "--out",
        tmp_path / "x.safetensors",
    ]
    assert mergeline("merge", "--method", "ties", *arguments).code == 0
    expected = in_memory(family, "ties", variant="mergekit", scope="tensor")
    assert same_tensors(load_file(tmp_path / "x.safetensors"), expected)


def test_options_reach_the_merge(mergeline, family, tmp_path):
    options = [
        "--dtype",
        "float16",
        "--seed",
        "7",
        "--shard-size",
        "60B",
        "--memory",
        "1GiB",
        "--workers",
        "1",
    ]
    assert mergeline("merge", "--method", "average", *family, *options, "--out", tmp_path / "out").code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["recipe"]["seed"] == 7 and manifest["recipe"]["dtype"] == "float16"
    assert len(manifest["output"]["files"]) == 2
    assert {t.dtype for t in open_checkpoint(tmp_path / "out").tensors.values()} == {"F16"}


def test_an_expert_without_a_name_takes_its_file_name(mergeline, family, tmp_path):
    paths = [part.split("=")[1] for part in family[3::2]]
    experts = [part for path in paths for part in ("--expert", path)]
    assert mergeline("merge", "--method", "average", *experts, "--out", tmp_path / "out").code == 0
    assert list(json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]["experts"]) == [
        "a",
        "b",
        "c",
    ]


def test_a_path_may_hold_an_equals_sign(mergeline, family, tmp_path):
    (tmp_path / "in").rename(tmp_path / "lr=0.1")
    moved = [str(part).replace("/in/", "/lr=0.1/") for part in family]
    outcome = mergeline("merge", "--method", "average", *moved, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert list(json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]["experts"]) == [
        "a",
        "b",
        "c",
    ]


def test_a_warning_is_a_note(mergeline, family, tmp_path):
    outcome = mergeline("merge", "--method", "cart", *family[:-2], "--out", tmp_path / "out")
    assert outcome.code == 0
    assert outcome.err.startswith("note: ") and "average" in outcome.err and outcome.err.count("\n") == 1


def test_plan_writes_nothing(mergeline, family, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    outcome = mergeline("plan", "--method", "cart", *family)
    assert outcome.code == 0 and "4 merged, 0 copied" in outcome.out and outcome.err == ""
    summary = json.loads(mergeline("plan", "--method", "cart", *family, "--json").out)
    assert summary["params"]["rank"] == 0.12 and summary["problems"] == []
    assert summary["bytes_read"] == 4 * 188 and summary["bytes_written"] == 188
    assert sorted(tmp_path.rglob("*")) == before


# --------------------------------------------------------------------------------------- looking


def test_methods_lists_the_catalogue(mergeline):
    assert [line.split()[0] for line in mergeline("methods").out.splitlines()] == list(catalogue())
    listed = json.loads(mergeline("methods", "--json").out)
    assert [entry["id"] for entry in listed] == list(catalogue())
    [ties] = json.loads(mergeline("methods", "ties", "--json").out)
    assert ties["parameters"]["density"] == 0.2 and ties["needs_base"] is True
    assert "density" in mergeline("methods", "ties").out


def test_inspect(mergeline, family):
    base, a = family[1], Path(family[3].split("=")[1])
    outcome = mergeline("inspect", base, a)
    assert outcome.code == 0 and DIGEST.findall(outcome.out) == [
        open_checkpoint(p).digest() for p in (base, a)
    ]
    found = json.loads(mergeline("inspect", base, "--json").out)
    assert found["tensors"] == 4 and found["bytes"] == 188 and found["dtypes"] == {"F32": 4}


def test_diff(mergeline, family, tmp_path):
    base, a = family[1], Path(family[3].split("=")[1])
    assert mergeline("diff", base, base) == (0, "the same tensors, bit for bit\n", "")
    assert "4 tensor(s) differ" in mergeline("diff", base, a).out
    edit(a, logit_scale=torch.ones(2), blocks__1__bias=None, flags=torch.tensor([True]))
    out = mergeline("diff", base, a).out
    assert "logit_scale: F32 [] against F32 [2]" in out
    assert f"blocks.1.bias: only in {base}" in out and f"flags: only in {a}" in out


def test_verify(mergeline, family, tmp_path):
    mergeline("merge", "--method", "cart", *family, "--out", tmp_path / "out.safetensors")
    outcome = mergeline("verify", tmp_path / "out.safetensors")
    assert outcome.code == 0 and "bit-identical" in outcome.out


# --------------------------------------------------------------------------------------- steps


def test_steps_run_from_anywhere_and_fetch_only_what_is_named(workspace, mergeline):
    assert mergeline("fetch", "--params", workspace / "params.yaml", "digits", "base").code == 0
    assert sorted(p.name for p in (workspace / "build" / "checkpoints").iterdir()) == ["base", "digits"]
    assert mergeline("fetch", "--params", workspace / "params.yaml").code == 0
    assert mergeline("extract", "--params", workspace / "params.yaml").code == 0
    found = json.loads((workspace / "build" / "extract" / "description.json").read_text())
    assert list(found["experts"]) == ["digits", "shapes", "textures"]
    cost = json.loads((workspace / ".mergeline" / "costs" / "extract.json").read_text())
    assert cost["stage"] == "extract" and cost["seconds"] > 0 and cost["peak_rss_bytes"] > 1 << 20


def test_a_step_removes_what_params_no_longer_name(workspace, mergeline):
    (workspace / "build" / "merges" / "gone").mkdir(parents=True)
    (workspace / "build" / "merges" / "cart").mkdir()
    mergeline("fetch", "--params", workspace / "params.yaml", "base")
    assert [p.name for p in (workspace / "build" / "merges").iterdir()] == ["cart"]


# --------------------------------------------------------------------------------------- as a process


def test_the_module_runs_and_reports_its_exit_code(family, tmp_path):
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "merge",
        "--method",
        "average",
        *map(str, family),
        "--out",
        "out",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and DIGEST.search(done.stdout)


def test_a_reader_that_went_away_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "flows.cli", "methods"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""
