"""What the command line does with bad input: exit code 2, one line, no traceback, nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from checkpoints import another_process, edit, save_family, write_raw
from places import MERGELINE, REPOSITORY
from safetensors.torch import load_file


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """base, a, b and c, and what is wrong with a checkpoint in every way."""
    folder = tmp_path / "in"
    folder.mkdir()
    recipe = save_family(folder)
    a = recipe["experts"]["a"]

    def changed(name: str, **changes: Any) -> Path:
        shutil.copy(a, folder / name)
        edit(folder / name, **changes)
        return folder / name

    def index(name: str, shard: str) -> Path:
        (folder / name).mkdir()
        shutil.copy(a, folder / name / "a.safetensors")
        text = json.dumps({"weight_map": dict.fromkeys(load_file(a), shard)})
        (folder / name / "model.safetensors.index.json").write_text(text)
        return folder / name

    torch.save(load_file(a), folder / "pickle.bin")
    (folder / "truncated.safetensors").write_bytes(a.read_bytes()[:-9])
    (folder / "text.safetensors").write_text("hello")
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    (folder / "folder").mkdir()
    return {
        "base": recipe["base"],
        **recipe["experts"],
        "missing": folder / "missing.safetensors",
        "empty": folder / "folder",
        "pickle": folder / "pickle.bin",
        "truncated": folder / "truncated.safetensors",
        "text": folder / "text.safetensors",
        "long-header": write_raw(folder / "long.safetensors", {}, length=1 << 40),
        "overlap": write_raw(folder / "overlap.safetensors", {"v": entry, "w": entry}, b"\0" * 8),
        "duplicate": write_raw(folder / "duplicate.safetensors", b'{"w": 1, "w": 1}'),
        "outside": index("outside", "../a.safetensors"),
        "no-shard": index("no-shard", "z.safetensors"),
        "nan": changed("nan.safetensors", logit_scale=torch.tensor(float("nan"))),
        "inf": changed("inf.safetensors", logit_scale=torch.tensor(float("inf"))),
        "shape": changed("shape.safetensors", blocks__1__bias=torch.ones(8)),
        "lacking": changed("lacking.safetensors", blocks__1__bias=None),
        "more": changed("more.safetensors", more=torch.ones(8)),
        "float8": changed("float8.safetensors", logit_scale=torch.tensor(1.0).to(torch.float8_e5m2)),
        "quantised": changed("quantised.safetensors", blocks__0__mlp__qweight=torch.ones(2).int()),
        "integer": changed("integer.safetensors", blocks__1__bias=torch.ones(7, dtype=torch.int32)),
    }


@pytest.fixture
def refused(mergeline: Callable) -> Callable[..., str]:
    """The command must fail as bad input does; returns its one line."""

    def run(*arguments: Any, of: int = 1) -> str:
        outcome = mergeline(*arguments)
        assert outcome.code == 2, outcome
        lines = outcome.err.splitlines()
        assert len(lines) == of and outcome.err.endswith("\n"), outcome.err
        assert lines[-1].startswith("mergeline: ") and "Traceback" not in outcome.err
        return lines[-1]

    return run


CHECKPOINTS = {
    "missing": "no such file",
    "empty": "needs model.safetensors",
    "pickle": "pickle",
    "truncated": "truncated",
    "text": "header does not fit",
    "long-header": "header does not fit",
    "overlap": "overlaps",
    "duplicate": "twice",
    "outside": "only plain file names",
    "no-shard": "missing",
}
FAMILIES = {
    "nan": "NaN",
    "inf": "Inf",
    "shape": "'blocks.1.bias'",
    "lacking": "'blocks.1.bias'",
    "more": "'more'",
    "float8": "F8_E5M2",
    "quantised": "is quantised",
    "integer": "I32",
    "a": "the same checkpoint",
    "base": "the same checkpoint",
}


@pytest.mark.parametrize(("kind", "part"), {**CHECKPOINTS, **FAMILIES}.items())
def test_merge_of_a_bad_expert(kind, part, files, refused, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for out in ("out", "out.safetensors"):
        line = refused(
            "merge", "--method", "ties", "--base", files["base"], "--expert", f"a={files['a']}",
            "--expert", f"bad={files[kind]}", "--out", tmp_path / out,
        )  # fmt: skip
        assert part in line and ("bad" in line or files[kind].name in line)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "part"),
    {k: v for k, v in {**CHECKPOINTS, **FAMILIES}.items() if k not in ("nan", "inf")}.items(),
)
def test_plan_of_a_bad_expert(kind, part, files, mergeline):
    arguments = [
        "plan",
        "--method",
        "ties",
        "--base",
        files["base"],
        "--expert",
        f"a={files['a']}",
        "--expert",
        f"bad={files[kind]}",
    ]
    outcome = mergeline(*arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and "see above" in outcome.err
    assert any(line.startswith("problem") and part in line for line in outcome.out.splitlines())
    outcome = mergeline(*arguments, "--json")
    assert outcome.code == 2 and part in " ".join(json.loads(outcome.out)["problems"])


@pytest.mark.parametrize("command", ["inspect", "diff", "verify"])
@pytest.mark.parametrize(("kind", "part"), CHECKPOINTS.items())
def test_inspect_diff_and_verify_of_a_bad_checkpoint(command, kind, part, files, refused):
    if command == "verify":
        assert "no manifest" in refused("verify", files[kind])
    else:
        assert part in refused(command, files[kind], *[files["a"]] * (command == "diff"))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--method", "tie"], "did you mean 'ties'?"),
        (["--method", "ties"], "--base"),
        (["--method", "cart", "--set", "rnak=1"], "did you mean 'rank'?"),
        (["--method", "cart", "--set", "rank=7"], "rank = 7"),
        (["--method", "cart", "--set", "rank"], "KEY=VALUE"),
        (["--method", "cart", "--set", "scale=NaN"], "scale"),
        (["--method", "cart", "--set", "scale=1e999"], "scale"),
        (
            ["--method", "task_arithmetic", "--base", "{base}", "--set", "weights=[1,2,3]"],
            "3 weights for 2 experts",
        ),
        (["--method", "average", "--dtype", "int8"], "int8"),
        (["--method", "average", "--memory", "1"], "allow more"),
        (["--method", "average", "--memory", "much"], "no size"),
        (["--method", "average", "--memory", "inf"], "no size"),
        (["--method", "average", "--shard-size", "-1"], "shard_size"),
        (["--method", "average", "--shard-size", "0"], "shard_size"),
        (["--method", "average", "--workers", "0"], "workers"),
        (["--method", "average", "--workers", "-1"], "workers"),
        (["--method", "average", "--seed", "x"], "seed"),
        (["--method", "average", "--device", "gpu"], "'gpu' is not known"),
        (["--method", "average", "--device", "cuda:99"], "not in this machine"),
        (["--method", "average", "--device", "cuda:x"], "'cuda:x' is not known"),
        (["--method", "average", "--expert", "a={c}"], "two experts are named 'a'"),
        (["--method", "average", "--expert", "base={c}"], "'base'"),
        (["--method", "average", "--typo"], "--typo"),
        ([], "--method"),
    ],
)
def test_merge_with_bad_arguments(arguments, part, files, refused, tmp_path):
    given = [argument.format(**files) for argument in arguments]
    line = refused(
        "merge",
        "--expert",
        f"a={files['a']}",
        "--expert",
        f"b={files['b']}",
        "--out",
        tmp_path / "out",
        *given,
    )
    assert part in line
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_commands_that_are_none(refused):
    assert "there is no command 'mrege'; did you mean 'merge'?" in refused("mrege")
    assert "did you mean 'cart'?" in refused("methods", "crat")


def test_cart_of_two_says_so_before_it_fails(files, refused, tmp_path):
    line = refused(
        "merge",
        "--method",
        "cart",
        "--expert",
        files["a"],
        "--expert",
        files["nan"],
        "--out",
        tmp_path / "out",
        of=2,
    )
    assert "NaN" in line


# --------------------------------------------------------------------------------------- steps


@pytest.fixture
def change(workspace: Path) -> Callable[..., Path]:
    """Sets values in the workspace's params.yaml by dotted key; returns its path."""
    from ruamel.yaml import YAML

    def to(**values: Any) -> Path:
        path, yaml = workspace / "params.yaml", YAML()
        params = yaml.load(path)
        for dotted, value in values.items():
            *parents, last = dotted.split("__")
            inner = params
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
        yaml.dump(params, path)
        return path

    return to


def test_no_params_file(refused, tmp_path):
    assert "No such file" in refused("fetch", "--params", tmp_path / "params.yaml")
    assert "No such file" in refused("run", "--params", tmp_path / "none" / "params.yaml")


def test_a_mistake_in_params_stops_every_step(change, refused):
    params = change(merges__cart__method="crat")
    for step in (
        "run",
        "fetch",
        "data",
        "heads",
        "extract",
        "fit",
        "search",
        "merge-all",
        "evaluate",
        "baselines",
        "compare",
        "register",
    ):
        line = refused(step, "--params", params)
        assert f"{params}:" in line and "did you mean 'cart'?" in line
    assert not (params.parent / "build").exists()


def test_an_item_that_params_do_not_name(workspace, refused):
    line = refused("merge-all", "--params", workspace / "params.yaml", "crat")
    assert "has no 'crat' to merge-all" in line and "did you mean 'cart'?" in line


@pytest.mark.parametrize(
    "step", ["heads", "extract", "fit", "search", "merge-all", "evaluate", "baselines", "compare"]
)
def test_a_step_before_its_turn(step, workspace, refused):
    line = refused(step, "--params", workspace / "params.yaml")
    assert "is missing" in line and "mergeline run" in line
    assert not list(workspace.glob("build/*"))


@pytest.mark.parametrize(("kind", "part"), [*CHECKPOINTS.items()])
def test_fetch_of_a_bad_checkpoint(kind, part, files, change, refused):
    params = change(checkpoints__files__digits=str(files[kind]))
    line = refused("fetch", "--params", params, "digits")
    assert files[kind].name in line or "digits" in line
    assert not list(params.parent.glob("build/checkpoints/*"))


@pytest.mark.parametrize(("kind", "part"), [(k, v) for k, v in FAMILIES.items() if k not in ("base", "a")])
def test_extract_of_a_bad_family(kind, part, files, change, mergeline, refused):
    params = change(
        checkpoints__files={"base": str(files["base"]), "a": str(files["a"]), "bad": str(files[kind])},
        experts=["a", "bad"],
    )
    assert mergeline("fetch", "--params", params).code == 0
    line = refused("extract", "--params", params)
    assert part in line and "bad" in line
    assert not (params.parent / "build" / "extract").exists()


def test_a_workspace_in_use(workspace, refused):
    (workspace / ".mergeline").mkdir()
    with another_process("FileLock(path)", workspace / ".mergeline" / "run.lock"):
        assert "another run" in refused("fetch", "--params", workspace / "params.yaml")


def test_a_damaged_dvc_file(workspace, refused):
    (workspace / "dvc.yaml").write_text("vars: [")
    assert "dvc.yaml:1: not valid YAML" in refused("fetch", "--params", workspace / "params.yaml")


def test_names_from_the_input_cannot_command_the_terminal(files, refused):
    edit(files["b"], **{"a\nb\x1b[2Jä": torch.ones(2)})
    line = refused("diff", files["b"], files["missing"].with_name("a\nb"))
    assert "a\\nb" in line
    line = refused(
        "merge", "--method", "average", "--expert", files["a"], "--expert", files["b"], "--out", "out"
    )
    assert "'a\\nb\\x1b[2Jä'" in line


def test_a_process_of_its_own(files, tmp_path):
    """Exit code and streams of a real process, not only of `main`."""
    command = [
        *MERGELINE,
        "merge",
        "--method",
        "average",
        "--out",
        tmp_path / "out",
    ]
    command += ["--expert", files["truncated"]]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("mergeline: ") and done.stderr.count("\n") == 1
