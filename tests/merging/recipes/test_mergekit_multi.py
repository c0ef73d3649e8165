"""Files of several merges (mergekit-multi): what they make, where results lie that others take, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import refused
from places import GOLDENS
from safetensors.torch import load_file

from mergeline.flows.cli import main
from mergeline.merging.recipes.loading import load_merges, load_recipe
from mergeline.merging.verify import verify

STORED = GOLDENS / "mergekit"


@pytest.fixture
def family(tmp_path) -> Path:
    """A folder where the file and its models lie."""
    for name in ("base", "expert0", "expert1", "expert2"):
        (tmp_path / name).mkdir()
        shutil.copyfile(STORED / f"{name}.safetensors", tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"num_hidden_layers": 4}')
    shutil.copyfile(STORED / "multi.yml", tmp_path / "multi.yml")
    return tmp_path


def test_a_chain_is_what_mergekit_multi_makes_of_it(family, capsys):
    out, recipe = family / "out", ["--recipe", str(family / "multi.yml")]
    assert main(["merge", *recipe, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["merges"]
    places = [family / "out.merges" / "mean", family / "out.merges" / "turned", out]
    assert [one["out"] for one in told] == [str(place) for place in places]
    found, expected = load_file(out / "model.safetensors"), load_file(STORED / "multi.safetensors")
    assert found.keys() == expected.keys()
    assert max(float((found[n] - value).abs().max()) for n, value in expected.items()) < 2e-7
    for place in places:
        assert "bit-identical" in verify(place)


def test_a_chain_goes_on_where_it_was_and_makes_anew_what_is_no_longer_the_same(family):
    out, recipe = family / "out", ["--recipe", str(family / "multi.yml")]
    assert main(["merge", *recipe, "--out", str(out)]) == 0
    mean, turned = (family / "out.merges" / name / "model.safetensors" for name in ("mean", "turned"))
    before = [path.stat().st_ino for path in (mean, turned)]
    assert main(["merge", *recipe, "--out", str(out)]) == 0
    assert [path.stat().st_ino for path in (mean, turned)] == before
    text = (family / "multi.yml").read_text()
    (family / "multi.yml").write_text(text.replace("t: 0.3", "t: 0.6"))
    assert main(["merge", *recipe, "--out", str(out)]) == 0
    assert mean.stat().st_ino == before[0] and turned.stat().st_ino != before[1]
    changed = turned.read_bytes()
    turned.write_bytes(changed[:-4] + b"\0\0\0\0")
    assert main(["merge", *recipe, "--out", str(out)]) == 0
    assert turned.read_bytes() == changed


def test_where_all_have_names_the_output_is_the_folder_of_all(family):
    text = (family / "multi.yml").read_text()
    (family / "multi.yml").write_text(text.replace("merge_method: ties", "name: last\nmerge_method: ties"))
    assert main(["merge", "--recipe", str(family / "multi.yml"), "--out", str(family / "all")]) == 0
    assert sorted(path.name for path in (family / "all").iterdir()) == ["last", "mean", "turned"]
    found = load_file(family / "all" / "last" / "model.safetensors")
    expected = load_file(STORED / "multi.safetensors")
    assert all(torch.allclose(found[name], value, atol=2e-7) for name, value in expected.items())


def test_a_plan_tells_what_it_can_of_each(family, capsys):
    recipe = ["--recipe", str(family / "multi.yml")]
    assert main(["plan", *recipe, "--json"]) == 0
    told = {one["name"]: one for one in json.loads(capsys.readouterr().out)["merges"]}
    assert told["mean"]["method"] == "linear" and told["turned"]["waits"] and told[None]["waits"]
    assert main(["plan", *recipe]) == 0
    assert "planned once they are" in capsys.readouterr().out
    shutil.rmtree(family / "expert0")
    assert main(["plan", *recipe]) == 2
    assert "expert0" in capsys.readouterr().out


ONE = "merge_method: linear\nparameters: {weight: 1.0}\nmodels: [{model: %s}, {model: expert1}]\n"


@pytest.mark.parametrize(
    ("documents", "parts"),
    [
        (
            ["name: a\n" + ONE % "b", "name: b\n" + ONE % "a", ONE % "a"],
            ["wait for each other: 'a', 'b', the last"],
        ),
        (
            ["name: a\n" + ONE % "expert0", "name: a\n" + ONE % "expert0"],
            [":6:", "two merges have the name 'a'"],
        ),
        ([ONE % "expert0", ONE % "expert0"], [":5:", "two merges have no name"]),
        (["name: ../a\n" + ONE % "expert0", ONE % "expert0"], [":1:", "'../a'", "that of a folder"]),
        (["name: [1]\n" + ONE % "expert0", ONE % "expert0"], [":1:", "that of a folder"]),
        (["method: average\nexperts: {a: a}\n", ONE % "expert0"], [":1:", "each must be a configuration"]),
        (["name: a\n" + ONE % "expert0", "wieght: 1\n" + ONE % "a"], [":6:", "wieght"]),
    ],
)
def test_chains_that_make_no_sense_are_refused_by_line(documents, parts, family):
    (family / "multi.yml").write_text("---\n".join(documents).replace("\\\n", "\n"))
    with refused("multi.yml", *parts):
        load_merges(family / "multi.yml", family / "place", Path)


def test_options_of_one_merge_are_none_of_several(family, capsys):
    recipe = ["--recipe", str(family / "multi.yml"), "--out", str(family / "out")]
    assert main(["merge", *recipe, "--set", "scale=1"]) == 2
    assert "leave out --set" in capsys.readouterr().err
    with refused("multi.yml:10:", "another document"):
        load_recipe(family / "multi.yml", Path)
