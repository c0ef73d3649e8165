"""The command line on good input: what it prints, writes and understands."""

from __future__ import annotations

import json
import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit, same_tensors, save_family
from page_blocks import blocks
from places import MERGELINE, REPOSITORY
from safetensors.torch import load_file, save_file

from mergeline.flows.cli import values
from mergeline.flows.cli.grammar import STEPS
from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.learning.contract import learned_methods
from mergeline.merging.methods import catalogue
from mergeline.merging.recipes.loading import load_recipe

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
        "sweep",
        "plan",
        "methods",
        "inspect",
        "diff",
        "verify",
    ):
        assert re.search(rf"^    {command}\b", outcome.out, re.MULTILINE), command
        assert mergeline(command, "--help").code == 0


def test_version_names_what_decides_the_bytes(mergeline):
    names = ("mergeline", "torch", "safetensors")
    assert mergeline("--version") == (0, "".join(f"{name} {version(name)}\n" for name in names), "")


def test_without_a_command_the_help_is_printed(mergeline):
    outcome = mergeline()
    assert outcome.code == 2 and outcome.out == "" and outcome.err.startswith("usage: mergeline")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sweeep"], "there is no command 'sweeep'; did you mean 'sweep'? (see mergeline --help)"),
        (["--hepl"], "there is no option --hepl; did you mean '--help'? (see mergeline --help)"),
        (
            ["merge", "--bsae", "x"],
            "there is no option --bsae; did you mean '--base'? (see mergeline merge --help)",
        ),
        (["merge", "--methd=ties"], "there is no option --methd; did you mean '--method'?"),
        (["run", "--onyl", "x"], "there is no option --onyl; did you mean '--only'?"),
        (
            ["merge", "--dtype", "fp16"],
            "argument --dtype: 'fp16' is none of its values; did you mean 'float16'?",
        ),
        (["merge", "--dtype", "bf16"], "did you mean 'bfloat16'?"),
        (["merge", "--dtype", "flaot32"], "did you mean 'float32'?"),
        (["completion", "tcsh"], "'tcsh' is none of its values; known: bash, zsh, fish"),
        (["run", "--dry-run", "--status"], "not allowed with argument"),
    ],
)
def test_a_misspelt_word_gets_the_nearest_one(arguments, said, mergeline):
    outcome = mergeline(*arguments)
    assert outcome.code == 2 and outcome.out == "" and outcome.err.count("\n") == 1
    assert outcome.err.startswith(f"mergeline: {said}") or said in outcome.err


def test_the_beginning_of_an_option_stands_for_it(mergeline, family):
    assert mergeline("plan", "--method", "average", *family, "--excl", "*.bias", "--tab").code == 0


# --------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "count"),
    [("60", 60), ("60B", 60), ("1.5KiB", 1536), ("2 gib", 2 << 30), ("500MB", 500 * 10**6), ("1e3kb", 10**6)],
)
def test_sizes(text, count):
    assert values.size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "2TB", "2 GiB more", "nan", "inf", "1_0 B_"])
def test_what_is_no_size_is_refused(text, mergeline):
    outcome = mergeline("inspect", "x", "--memory", text)
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err == (
        f"mergeline: argument --memory: '{text}' is no size; write 500MB or 2GiB (see mergeline inspect --help)\n"
    )


# --------------------------------------------------------------------------------------- merge and plan


def test_merge_prints_where_and_what(mergeline, family, tmp_path):
    outcome = mergeline("merge", "--method", "cart", *family, "--set", "rank=0.5", "--out", tmp_path / "out")
    assert outcome == (0, f"{tmp_path / 'out'}  {open_checkpoint(tmp_path / 'out').digest()}\n", "")
    assert same_tensors(
        load_file(tmp_path / "out" / "model.safetensors"), in_memory(family, "cart", rank=0.5)
    )


def test_a_merge_as_json(mergeline, family, tmp_path):
    outcome = mergeline("merge", "--method", "average", *family, "--json", "--out", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert json.loads(outcome.out) == {"out": str(tmp_path / "out"), **manifest} and outcome.err == ""


@pytest.mark.parametrize(
    ("setting", "params"),
    [
        ("scale=0.5", {"scale": 0.5}),
        ("scale=1", {"scale": 1}),
        ("weights=[1, 0.5, -1]", {"weights": [1, 0.5, -1]}),
        ("normalize=true", {"normalize": True}),
        ("weights=null", {"weights": None}),
        ("weights=1,0.5,-1", {"weights": [1, 0.5, -1]}),
    ],
)
def test_set_takes_json_values(setting, params, mergeline, family, tmp_path):
    outcome = mergeline(
        "merge", "--method", "task_arithmetic", *family, "--set", setting, "--out", tmp_path / "x.safetensors"
    )
    assert outcome.code == 0
    assert same_tensors(load_file(tmp_path / "x.safetensors"), in_memory(family, "task_arithmetic", **params))


def test_a_list_of_one_an_expert_may_be_given_by_name(mergeline, family, tmp_path):
    def merged(*settings: str) -> Any:
        chosen = [part for setting in settings for part in ("--set", setting)]
        out = ["--out", tmp_path / "x.safetensors"]
        return mergeline("merge", "--method", "task_arithmetic", *family, *chosen, *out)

    assert merged("weights.c=-1", "weights.a=1", "weights.b=0.5").code == 0
    expected = in_memory(family, "task_arithmetic", weights=[1, 0.5, -1])
    assert same_tensors(load_file(tmp_path / "x.safetensors"), expected)
    assert "weights.d: no expert is named so; known: a, b, c" in merged("weights.d=1").err
    assert "give weights.b too; every expert needs one" in merged("weights.a=1", "weights.c=1").err
    assert "give a list, or weights.NAME" in merged("weights=1,2,3", "weights.a=1").err


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


def test_patterns_statistics_and_factors_reach_the_merge(mergeline, family, tmp_path):
    experts = [load_file(part.split("=")[1]) for part in map(str, family[3::2])]
    masks = [{name: (t > 0).float() for name, t in state.items()} for state in experts]
    statistics = []
    for t, mask in enumerate(masks):
        save_file(mask, tmp_path / f"{t}.safetensors")
        statistics += ["--statistics", f"masks={tmp_path / f'{t}.safetensors'}"]
    options = ["--set", "masks=given", *statistics, "--include", "blocks.0.*", "--include", "logit*"]
    options += ["--exclude", "*.mlp.*", "--exclude", "blocks.1.*", "--out", tmp_path / "x.safetensors"]
    outcome = mergeline("merge", "--method", "dare", *family, *options)
    assert outcome.code == 0, outcome.err
    base = load_file(family[1])
    expected = merge_state_dicts(
        "dare", dict(zip("abc", experts)), base, params={"masks": "given"}, statistics={"masks": masks}
    )
    kept = {name: base[name] for name in ("blocks.1.bias", "blocks.0.mlp.weight")}
    assert same_tensors(load_file(tmp_path / "x.safetensors"), expected | kept)
    factors = ["--factors", tmp_path / "factors", "--out", tmp_path / "out"]
    assert mergeline("merge", "--method", "cart", *family, *factors).code == 0
    assert any(f.is_file() for f in (tmp_path / "factors").rglob("*"))


def test_a_merge_that_was_stopped_says_that_it_goes_on(mergeline, family, tmp_path):
    paths = [Path(str(part).split("=")[-1]) for part in family[1::2]]
    recipe = {"method": "average", "base": paths[0], "experts": dict(zip("abc", paths[1:]))}

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out", progress=stop)
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([line for line in lines if "tensor" not in line] + lines[-2:]) + "\n")
    arguments = ["merge", "--method", "average", *family, "--out", tmp_path / "out"]
    outcome = mergeline(*arguments)
    assert outcome.code == 0 and outcome.err == "going on: 2 of 4 tensors are there\n"
    assert "going on" not in mergeline(*arguments).err


@pytest.mark.parametrize("form", ["file", "folder"])
def test_pickles_on_this_machine_are_converted_if_they_are_allowed(
    form, mergeline, family, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pickle = tmp_path / "old" / "pytorch_model.bin"
    pickle.parent.mkdir()
    torch.save(load_file(str(family[3]).split("=")[1]), pickle)
    where = pickle if form == "file" else pickle.parent
    others, given = (
        [*family[:2], *family[4:]],
        ["--expert", f"a={where}", "--out", tmp_path / "x.safetensors"],
    )
    outcome = mergeline("merge", "--method", "ties", *others, *given)
    assert outcome.code == 2 and "--allow-pickle" in outcome.err and not (tmp_path / "cache").exists()
    outcome = mergeline("merge", "--method", "ties", *others, *given, "--allow-pickle")
    assert outcome.code == 0 and f"note: {where} is a pickle; its tensors were converted into" in outcome.err
    ordered = {
        name: load_file(str(part).split("=")[1]) for name, part in zip("bca", [*family[5::2], family[3]])
    }
    expected = merge_state_dicts("ties", ordered, load_file(family[1]))
    assert same_tensors(load_file(tmp_path / "x.safetensors"), expected)
    (tmp_path / "recipe.yaml").write_text(
        f"method: ties\nbase: in/base.safetensors\nexperts: {{a: {where}}}\n"
    )
    recipe = ["--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "y.safetensors"]
    assert "--allow-pickle" in mergeline("merge", *recipe).err
    assert mergeline("merge", *recipe, "--allow-pickle").code == 0
    [converted] = (tmp_path / "cache" / "mergeline" / "checkpoints").iterdir()
    assert open_checkpoint(converted).digest() == open_checkpoint(str(family[3]).split("=")[1]).digest()
    assert mergeline("plan", "--method", "ties", *others, *given[:2], "--allow-pickle").code == 0


# --------------------------------------------------------------------------------------- recipes in files


@pytest.fixture
def recipe_file(family, tmp_path: Path) -> Path:
    """The family in a recipe in YAML, with paths relative to it."""
    names = [Path(str(part).split("=")[-1]).name for part in family[1::2]]
    lines = [
        "method: cart",
        "params:",
        "  rank: 0.5",
        "  keys: matrices",
        f"base: {names[0]}",
        "experts:",
        *(f"  {name}: {file}" for name, file in zip("abc", names[1:])),
        "rules:",
        "  - match: '*.mlp.*'",
        "    params: {rank: 0.9}",
        "seed: 5",
        "dtype: float16",
    ]
    path = tmp_path / "in" / "recipe.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_recipe_file_and_what_the_command_line_changes_in_it(mergeline, recipe_file, tmp_path):
    assert mergeline("merge", "--recipe", recipe_file, "--out", tmp_path / "out").code == 0
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]
    assert found["params"]["rank"] == 0.5 and found["rules"][0]["params"] == {"rank": 0.9}
    assert found["seed"] == 5 and found["dtype"] == "float16" and found["shard_size"] is None
    options = ["--set", "rank=0.25", "--seed", "0", "--dtype", "bfloat16", "--shard-size", "100B"]
    options += ["--exclude", "*.bias", "--out", tmp_path / "other"]
    assert mergeline("merge", "--recipe", recipe_file, *options).code == 0
    found = json.loads((tmp_path / "other" / "manifest.json").read_text())["recipe"]
    assert found["params"]["rank"] == 0.25 and found["params"]["keys"] == "matrices"
    assert found["seed"] == 0 and found["dtype"] == "bfloat16" and found["shard_size"] == 100
    assert found["exclude"] == ["*.bias"] and found["rules"][0]["params"] == {"rank": 0.9}


def test_a_recipe_file_may_name_uris(mergeline, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "in" / "a.safetensors"
    recipe_file.write_text(recipe_file.read_text().replace("a: a.safetensors", f"a: file://{source}"))
    outcome = mergeline("merge", "--recipe", recipe_file, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    experts = json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]["experts"]
    assert experts["a"]["digest"] == open_checkpoint(source).digest() and "cache" in experts["a"]["path"]


@pytest.mark.parametrize(
    ("old", "new", "line", "parts"),
    [
        ("seed: 5", "sead: 5", 13, ["sead", "unknown key", "did you mean 'seed'?"]),
        ("  rank: 0.5", "  rnak: 0.5", 3, ["unknown parameter 'rnak'", "did you mean 'rank'?"]),
        ("  rank: 0.5", "  rank: 5", 3, ["rank = 5"]),
        ("{rank: 0.9}", "{rnak: 0.9}", 12, ["unknown parameter 'rnak'", "did you mean 'rank'?"]),
        ("params: {rank: 0.9}", "gradient: {rnak: [1, 2]}", 12, ["unknown parameter 'rnak'"]),
        ("match: '", "mach: '", 11, ["mach", "did you mean 'match'?"]),
        ("method: cart", "method: crat", 1, ["unknown method 'crat'", "did you mean 'cart'?"]),
        ("method: cart", "method: [", 3, ["not valid YAML"]),
    ],
)
def test_a_mistake_in_a_recipe_file_is_blamed_by_line(old, new, line, parts, mergeline, recipe_file):
    text = recipe_file.read_text()
    assert old in text
    recipe_file.write_text(text.replace(old, new, 1))
    outcome = mergeline("plan", "--recipe", recipe_file)
    assert outcome.code == 2 and outcome.err.startswith(f"mergeline: {recipe_file}:{line}: ")
    assert outcome.err.count("\n") == 1 and all(part in outcome.err for part in parts)


def test_parameters_of_an_inner_method_are_known_in_a_recipe_file(mergeline, recipe_file):
    text = recipe_file.read_text().replace("method: cart", "method: lines")
    recipe_file.write_text(text.replace("  rank: 0.5\n  keys: matrices", "  inner: ties\n  density: 0.5"))
    outcome = mergeline("plan", "--recipe", recipe_file)
    assert f"{recipe_file}:12: " in outcome.err and "unknown parameter 'rank'" in outcome.err
    recipe_file.write_text(recipe_file.read_text().replace("{rank: 0.9}", "{scale: 0.9}"))
    assert mergeline("plan", "--recipe", recipe_file).out.startswith("method     lines ")


def test_the_recipe_that_the_page_of_merging_shows_is_right(tmp_path):
    [block] = blocks("docs/merging.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(block.text)
    recipe = load_recipe(tmp_path / "recipe.yaml", Path)
    assert recipe.base == tmp_path / "base" and recipe.rules[1].gradient == {"scale": [1.0, 3.0]}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "name --method and every --expert, or a --recipe"),
        (["--method", "cart"], "name --method and every --expert, or a --recipe"),
        (["--recipe", "x.yaml", "--method", "cart"], "leave out --method"),
        (["--recipe", "x.yaml", "--expert", "a"], "leave out --method"),
        (["--recipe", "x.yaml"], "x.yaml: No such file"),
        (["--method", "cart", "--expert", "a", "--statistics", "masks"], "write KIND=P"),
    ],
)
def test_what_names_no_recipe_is_refused(arguments, part, mergeline):
    outcome = mergeline("plan", *arguments)
    assert outcome.code == 2 and part in outcome.err and outcome.err.count("\n") == 1


# --------------------------------------------------------------------------------------- sweeps


def test_a_sweep_as_json(mergeline, family, tmp_path):
    arguments = ["sweep", "--method", "cart", *family, "--grid", "rank=0.2,0.6", "--out", tmp_path / "out"]
    outcome = mergeline(*arguments, "--json")
    listed = json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]
    assert json.loads(outcome.out) == {"out": str(tmp_path / "out"), "points": listed} and len(listed) == 2


def test_sweep_prints_every_point(mergeline, family, tmp_path):
    grid = ["--grid", "rank=0.2,0.6", "--grid", 'keys=["matrices"]', "--set", "scale=2"]
    outcome = mergeline("sweep", "--method", "cart", *family, *grid, "--out", tmp_path / "out")
    folders = [tmp_path / "out" / f"rank-{rank}_keys-matrices" for rank in (0.2, 0.6)]
    lines = [f"{folder}  {open_checkpoint(folder).digest()}" for folder in folders]
    assert outcome == (0, "\n".join(lines) + "\n", "")
    expected = in_memory(family, "cart", rank=0.6, keys="matrices", scale=2)
    assert same_tensors(load_file(folders[1] / "model.safetensors"), expected)


def test_a_grid_takes_lists_and_words(mergeline, family, tmp_path):
    grid = ["--grid", "weights=[[1,2,3],null]", "--grid", "variant=official,mergekit"]
    outcome = mergeline("sweep", "--method", "ties", *family, *grid, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    points = json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]
    assert [p["params"] for p in points] == [
        {"weights": w, "variant": v} for w in ([1, 2, 3], None) for v in ("official", "mergekit")
    ]


@pytest.mark.parametrize(
    ("grid", "part"),
    [
        (["rank=0.1", "rank=0.2"], "'rank' is given twice"),
        (["scale=1"], "'scale' is given twice"),
        (["rank="], "'rank' has no values"),
        (["rank=[]"], "'rank' has no values"),
        (["rank"], "write KEY=V1,V2"),
        (["rnak=0.1"], "did you mean 'rank'?"),
    ],
)
def test_bad_grids_are_refused(grid, part, mergeline, family, tmp_path):
    options = [part for text in grid for part in ("--grid", text)] + ["--set", "scale=2"]
    outcome = mergeline("sweep", "--method", "cart", *family, *options, "--out", tmp_path / "out")
    assert outcome.code == 2 and part in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


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


def test_plan_shows_what_becomes_of_every_tensor(mergeline, recipe_file):
    arguments = ["plan", "--recipe", recipe_file, "--exclude", "*.bias", "--set", "scale=2", "--table"]
    lines = [line.split() for line in mergeline(*arguments).out.splitlines()[-4:]]
    assert lines == [
        ["blocks.0.attn.weight", "6x4", "merge", "matrix", "cart"],
        ["blocks.0.mlp.weight", "3x5", "merge", "matrix", "cart", "rank=0.9"],
        ["blocks.1.bias", "7", "copy", "base"],
        ["logit_scale", "scalar", "merge", "mean", "cart"],
    ]
    found = json.loads(mergeline(*arguments, "--json").out)
    assert found["problems"] == [] and [row["tensor"] for row in found["table"]] == [
        line[0] for line in lines
    ]
    assert found["table"][1]["params"]["rank"] == 0.9 and found["table"][1]["params"]["scale"] == 2
    assert "table" not in json.loads(mergeline(*arguments[:-1], "--json").out)


# --------------------------------------------------------------------------------------- looking


def test_methods_lists_the_catalogue(mergeline):
    listed = json.loads(mergeline("methods", "--json").out)
    assert [entry["id"] for entry in listed] == [*catalogue(), *learned_methods()]
    [ties] = json.loads(mergeline("methods", "ties", "--json").out)
    assert ties["parameters"]["density"] == 0.2 and ties["needs_base"] is True
    assert "density" in mergeline("methods", "ties").out


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("ties", ["unit element", "needs the base", "density 0.2"]),
        ("slerp", ["needs 2 experts", "t 0.5"]),
        ("model_stock", ["needs 2 experts or more; the base"]),
        ("cart", ["unit matrix", "needs experts alone", 'origin "mean"']),
        ("dare", ["statistics", 'inner "task_arithmetic"', "and those of its inner method"]),
        ("average", ["parameters none"]),
    ],
)
def test_a_method_says_what_it_needs(method, words, mergeline):
    text = " ".join(mergeline("methods", method).out.split())
    assert all(part in text for part in words), text
    assert ("inner method" in text) == catalogue()[method].wraps


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
    assert "4 of 4 tensors differ" in mergeline("diff", base, a).out
    edit(a, logit_scale=torch.ones(2), blocks__1__bias=None, flags=torch.tensor([True]))
    out = " ".join(mergeline("diff", base, a).out.split())
    assert "logit_scale F32 [] against F32 [2]" in out
    assert f"blocks.1.bias only in {base}" in out and f"flags only in {a}" in out


@pytest.fixture
def changed(tmp_path: Path) -> tuple[Path, Path]:
    """Two files: `small` differs by 1 % of its norm, `large` by 50 %, `new` has a NaN, `far` is longer."""
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    old = {name: torch.full((4,), 5.0) for name in ("far", "large", "new", "same", "small")}
    save_file(old, a)
    save_file(
        {
            **old,
            "far": torch.ones(5),
            "large": torch.full((4,), 7.5),
            "new": torch.tensor([5, 5, 5, float("nan")]),
            "small": torch.tensor([5.1, 5, 5, 5]),
        },
        b,
    )
    return a, b


def test_diff_sums_up_and_puts_the_largest_first(mergeline, changed):
    lines = mergeline("diff", *changed).out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["far", "new", "large", "small"]
    assert lines[2].split(maxsplit=1)[1] == "relative norm 0.5, norm 5, largest 2.5"
    assert lines[3].split(maxsplit=1)[1] == "relative norm 0.01, norm 0.1, largest 0.1"
    assert lines[-1] == "4 of 5 tensors differ; in all, relative norm not finite, norm not finite"
    by_name = mergeline("diff", *changed, "--sort", "name", "--limit", "2").out.splitlines()
    assert [line.split()[0] for line in by_name] == ["far", "large", "and", "4"] and by_name[
        2
    ] == "and 2 more"


def test_the_relative_norm_is_of_all_tensors_that_both_have(mergeline, changed):
    a, b = changed
    edit(b, far=None, new=None)
    found = json.loads(mergeline("diff", a, b, "--json", "--limit", "1").out)
    assert (found["tensors"], found["differing"]) == (5, 4) and len(found["differences"]) == 1
    norm = (5**2 + 0.1**2) ** 0.5
    assert found["norm"] == pytest.approx(norm, rel=1e-6)
    assert found["relative_norm"] == pytest.approx(norm / (3 * 4 * 25) ** 0.5, rel=1e-6)
    found = json.loads(mergeline("diff", a, b, "--json", "--sort", "name").out)
    assert [row["what"] for row in found["differences"]] == ["missing", "values", "missing", "values"]


def test_of_tensors_of_other_dtypes_the_values_are_compared_too(mergeline, tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    old = {"half": torch.full((4,), 2.0), "less": torch.full((4,), 5.0), "none": torch.ones(0, 3)}
    save_file(old, a)
    save_file(
        {"half": old["half"].half(), "less": torch.full((4,), 4.0).bfloat16(), "none": old["none"].half()}, b
    )
    lines = dict(line.split(maxsplit=1) for line in mergeline("diff", a, b).out.splitlines()[:3])
    assert lines["half"] == "F32 against F16, relative norm 0, norm 0, largest 0"
    assert lines["less"] == "F32 against BF16, relative norm 0.2, norm 2, largest 1"
    assert lines["none"] == "F32 against F16, relative norm 0, norm 0, largest 0"
    found = json.loads(mergeline("diff", a, b, "--json").out)
    assert {row["what"] for row in found["differences"]} == {"dtype"}
    assert found["relative_norm"] == pytest.approx(2 / (4 * 4 + 4 * 25) ** 0.5)


def test_verify(mergeline, family, tmp_path):
    mergeline("merge", "--method", "cart", *family, "--out", tmp_path / "out.safetensors")
    outcome = mergeline("verify", tmp_path / "out.safetensors")
    assert outcome.code == 0 and "bit-identical" in outcome.out
    found = json.loads(mergeline("verify", tmp_path / "out.safetensors", "--json").out)
    assert found == {"out": str(tmp_path / "out.safetensors"), "verified": True, "said": outcome.out.strip()}
    edit(tmp_path / "out.safetensors", logit_scale=torch.tensor(9.0))
    outcome = mergeline("verify", tmp_path / "out.safetensors", "--json")
    found = json.loads(outcome.out)
    assert (
        outcome.code == 2 and found["verified"] is False and f"mergeline: {found['problem']}\n" == outcome.err
    )


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
        *MERGELINE,
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
    command = [*MERGELINE, "methods"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""
