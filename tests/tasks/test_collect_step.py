"""The collect step: what params.yaml may say of statistics, which stages there are, and merges that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import refused
from ruamel.yaml import YAML
from safetensors.torch import load_file

from mergeline.merging.learning.collect import provenance
from mergeline.tasks.collect import statistics_for
from mergeline.tasks.fit import fit_merge
from mergeline.tasks.modalities import modality_of
from mergeline.tasks.params import load_params
from mergeline.tasks.workspace import Workspace

MERGES: dict[str, Any] = {
    "regmean": {"method": "regmean", "search": {"nondiagonal": [0.9, 1.0]}},
    "cart": {"method": "cart"},
}


def write(workspace: Path, **sections: Any) -> Path:
    yaml, file = YAML(typ="safe"), workspace / "params.yaml"
    params = {**yaml.load(file), "merges": MERGES, **sections}
    YAML().dump(params, file)
    return file


def test_searches_and_merges_wait_for_statistics_through_their_fits(workspace):
    file = write(workspace, statistics={"gram": {"images": 4}, "fisher": {"labels": "sampled"}})
    found = Workspace(file)
    stages = {stage.name: stage for stage in found.stages}
    needed = {name: [s.name for s in found.needs(stage)] for name, stage in stages.items()}
    for merge in MERGES:
        assert {"statistics@gram", "statistics@fisher"} <= set(needed[f"fit@{merge}"])
        for step in ("search", "merge"):
            assert f"fit@{merge}" in needed[f"{step}@{merge}"]
            assert not [name for name in needed[f"{step}@{merge}"] if "statistics" in name]
    assert stages["statistics@gram"].out == "build/statistics/gram"
    assert "statistics.gram" in stages["statistics@gram"].params
    write(workspace, merges={"cart": MERGES["cart"]}, statistics={})
    assert not [stage.name for stage in Workspace(file).stages if "statistics" in stage.name]


@pytest.mark.parametrize("sections", [{}, {"statistics": {"gram": {"images": 4}, "usage": {}}}])
def test_dvc_has_the_same_stages_with_the_section_and_without(sections, workspace):
    from dvc.repo import Repo

    file = write(workspace, merges={"cart": MERGES["cart"]}, **sections)
    Repo.init(workspace, no_scm=True).close()
    with Repo(workspace) as repo:
        seen = {stage.name for stage in repo.index.stages}
    assert seen == {stage.name for stage in Workspace(file).stages}
    assert {name for name in seen if "statistics" in name} == {
        f"statistics@{k}" for k in sections.get("statistics", {})
    }


def test_a_fit_changes_with_the_statistics_that_its_merge_reads_and_with_no_others(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    params = Workspace(write(workspace, statistics={"gram": {"images": 4}, "fisher": {}})).params
    for kind in ("gram", "fisher"):
        for expert in params.experts:
            file = Path("build/statistics", kind, f"{expert}.safetensors")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{kind} of {expert}")

    def fits() -> dict[str, str]:
        for name in params.merges:
            fit_merge(modality_of(params), params, name, Path("build"), Path("build/fits", name))
        return {name: Path(f"build/fits/{name}/points.json").read_text() for name in params.merges}

    first = fits()
    Path("build/statistics/fisher/digits.safetensors").write_text("other")
    assert fits() == first
    Path("build/statistics/gram/digits.safetensors").write_text("other")
    second = fits()
    assert second["cart"] == first["cart"] and second["regmean"] != first["regmean"]
    Path("build/statistics/gram/digits.safetensors").unlink()
    with refused("gram/digits.safetensors", "mergeline collect gram"):
        fits()


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({}, ["regmean", "needs the statistics 'gram'", "add `gram: {examples: 32}`", "`statistics:`"]),
        ({"statistics": {"gramm": {}}}, ["gramm"]),
        ({"statistics": {"gram": {"images": 0}}}, ["images"]),
        ({"statistics": {"gram": {"images": 3, "examples": 3}}}, ["say the same"]),
        ({"statistics": {"gram": {"labels": "true"}}}, ["'labels' is no setting of gram"]),
        ({"merges": {"a": {"method": "lata"}}}, ["'instruction'", "not collected from examples"]),
    ],
)
def test_what_params_yaml_says_wrongly_of_statistics_is_refused_by_its_line(sections, parts, workspace):
    with refused("params.yaml:", *parts):
        load_params(write(workspace, **sections))


def test_what_was_not_collected_is_refused(tmp_path):
    with refused("gram/a.safetensors", "mergeline collect gram"):
        statistics_for("regmean", {}, tmp_path, ["a"])
    assert statistics_for("cart", {}, tmp_path, ["a"]) == {}


@pytest.mark.slow
def test_statistics_are_collected_searched_and_merged_with(workspace, monkeypatch):
    """And collected anew where their settings change, of none but the experts that are listed."""
    monkeypatch.chdir(workspace)
    statistics = {"gram": {"images": 4}, "fisher": {"images": 2, "labels": "sampled"}}
    merges = {**MERGES, "fisher": {"method": "fisher"}, "esm": {"method": "esm"}}
    file = write(workspace, statistics=statistics, merges=merges)
    opened = Workspace(file)
    for stage in opened.stages:
        if stage.step in ("fetch", "data", "heads", "collect", "fit", "search", "merge-all"):
            opened.run(stage)
    files = sorted(Path("build/statistics/gram").iterdir())
    assert [f.stem for f in files] == ["digits", "shapes", "textures"]
    told = provenance(files[0])["made_from"]
    assert told["examples"] == {"digits": 4} and told["split"] == "fit"
    merged = {name: load_file(f"build/merges/{name}/model.safetensors") for name in merges}
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    assert len({float(state[name].sum()) for state in merged.values()}) == len(merges)
    old = [f.read_bytes() for f in files]
    (Path("build/statistics/gram") / "old.safetensors").write_bytes(b"")
    again = {stage.name: stage for stage in opened.stages}["statistics@gram"]
    opened.run(again)
    assert [f.read_bytes() for f in sorted(Path("build/statistics/gram").iterdir())] == old
