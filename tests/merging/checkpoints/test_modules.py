"""Folders of sentence-transformers are fetched, merged, verified and replaced whole, with what lies in sub-folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import refused
from hub_server import running_hub
from safetensors.torch import load_file, save_file
from small_embeddings import EXPERTS, save_embedding_family, save_expert

from mergeline.merging import merge
from mergeline.merging.checkpoints.modules import read_modules
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.verify import verify
from mergeline.tasks.fetch import fetch

pytest.importorskip("sentence_transformers")

INSIDE = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    save_embedding_family(root)
    return root


@pytest.fixture
def family(made, tmp_path):
    """A copy to change."""
    for name in ("base", *EXPERTS):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def recipe(family: Path, **more: Any) -> dict[str, Any]:
    return {"method": "average", "base": family / "base", "experts": {n: family / n for n in EXPERTS}, **more}


def encoded(folder: Path, state: dict[str, torch.Tensor] | None = None) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    if state:
        model[0].auto_model.load_state_dict(state)
    return model.encode(TEXTS, prompt_name="query")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_merged_folder_opens_and_encodes_as_an_average_made_by_hand(family, tmp_path):
    merge(recipe(family), tmp_path / "out")
    assert INSIDE | {
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    } <= files(tmp_path / "out")
    states = [load_file(family / name / "model.safetensors") for name in EXPERTS]
    average = {key: sum(state[key] for state in states) / len(states) for key in states[0]}
    wanted = encoded(family / "base", average)
    assert np.abs(encoded(tmp_path / "out") - wanted).max() < 1e-5
    assert np.abs(encoded(family / "base") - wanted).max() > 1e-3


def test_a_merged_folder_is_verified_and_replaced_with_its_sub_folders(family, tmp_path):
    out = tmp_path / "out"
    merge(recipe(family), out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert {*manifest["files"], *manifest["output"]["files"]} >= INSIDE
    said = verify(out)
    assert "bit-identical" in said and "does not list" not in said
    merge(recipe(family), out)
    (out / "1_Pooling/mine.json").write_text("{}")
    assert "beside it lies what the manifest does not list: 1_Pooling/mine.json" in verify(out)
    with refused("holds '1_Pooling/mine.json', which Mergeline did not write"):
        merge(recipe(family), out)
    (out / "1_Pooling/mine.json").unlink()
    (out / "1_Pooling/config.json").write_text("{}")
    with refused("1_Pooling/config.json: is ", "it was changed after the merge"):
        verify(out)


def test_a_manifest_names_no_file_outside_of_its_folder(family, tmp_path):
    out = tmp_path / "out"
    merge(recipe(family), out)
    written = json.loads((out / "manifest.json").read_text())
    for name in ("../base/config.json", "1_Pooling/../config.json", "/etc/passwd", "1_Pooling//config.json"):
        (out / "manifest.json").write_text(
            json.dumps({**written, "files": {**written["files"], name: "sha256:0"}})
        )
        with refused("is named by the manifest, and is not there"):
            verify(out)


def test_weights_of_modules_are_merged_with_those_of_the_transformer(family, tmp_path):
    save_expert(family / "base", family / "dense", 9, dense=True)
    experts = {"near": family / "near", "dense": family / "dense"}
    merge({**recipe(family), "experts": experts}, tmp_path / "out")
    own, other, found = (
        load_file(folder / "2_Dense/model.safetensors") for folder in (*experts.values(), tmp_path / "out")
    )
    assert not torch.equal(own["linear.weight"], other["linear.weight"])
    for name, tensor in found.items():
        assert torch.allclose(tensor, (own[name] + other[name]) / 2, atol=1e-7)
    assert encoded(tmp_path / "out").shape[1] == found["linear.weight"].shape[0]
    assert "bit-identical" in verify(tmp_path / "out")


def test_modules_that_do_otherwise_are_noted(family):
    pooling = family / "find/1_Pooling/config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "pooling_mode": "cls"}))
    [note] = [n for n in make_plan(recipe(family)).warnings if "Pooling" in n]
    assert note == "'find' has another 1_Pooling/config.json than base, whose own is carried"
    (family / "base/modules.json").unlink()
    warnings = make_plan(recipe(family)).warnings
    assert "'near': 2_Dense is left out, for the base has none" in warnings
    assert any("whose configuration is carried, is not: name a donor that is" in note for note in warnings)


def test_modules_that_the_base_lacks_are_the_donors(family, tmp_path):
    (family / "base/modules.json").unlink()
    plan = make_plan(recipe(family, donor="near"))
    assert plan.problems == [] and "the base has no 2_Dense: it is as 'near' there" in plan.warnings
    merge(plan.recipe, tmp_path / "out")
    assert INSIDE <= files(tmp_path / "out")
    assert encoded(tmp_path / "out").shape == encoded(family / "near").shape


def test_a_module_of_unknown_code_is_noted_and_not_carried(family, tmp_path):
    listed = json.loads((family / "base/modules.json").read_text())
    listed.append({"idx": 3, "name": "3", "path": "3_Own", "type": "own.Module"})
    (family / "base/modules.json").write_text(json.dumps(listed))
    (family / "base/3_Own").mkdir()
    (family / "base/3_Own/config.json").write_text("{}")
    assert (
        "modules.json: the files of 'own.Module' in '3_Own' are not carried"
        in make_plan(recipe(family)).warnings
    )
    merge(recipe(family), tmp_path / "out")
    assert not (tmp_path / "out/3_Own").exists()


@pytest.mark.parametrize("path", ["../near", "/etc", "a/b", "..", "a\\b"])
def test_a_folder_outside_is_refused(family, path, tmp_path):
    listed = json.loads((family / "base/modules.json").read_text())
    listed[1]["path"] = path
    (family / "base/modules.json").write_text(json.dumps(listed))
    with refused("modules.json: names the file", "only plain file names inside the folder are allowed"):
        read_modules(family / "base")
    with refused("only plain file names inside the folder are allowed"):
        fetch(str(family / "base"), tmp_path / "fetched", cache=tmp_path / "cache")
    assert "only plain file names" in make_plan(recipe(family)).problems[0]


@pytest.mark.parametrize("text", ["{", "3", '[{"path": ""}]', '[{"path": 1, "type": "x"}]', "[1]"])
def test_a_list_of_modules_that_is_none_is_refused(family, text):
    (family / "base/modules.json").write_text(text)
    with refused("modules.json: is no list of modules"):
        read_modules(family / "base")


def test_a_link_out_of_a_sub_folder_is_refused(family, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (family / "base/1_Pooling/config.json").unlink()
    (family / "base/1_Pooling/config.json").symlink_to(tmp_path / "secret")
    assert "is a link out of its folder" in make_plan(recipe(family)).problems[0]


def test_a_module_of_pickles_is_refused(family, tmp_path):
    (family / "base/2_Dense/model.safetensors").rename(family / "base/2_Dense/pytorch_model.bin")
    told = (
        "'2_Dense/pytorch_model.bin' is a pickle, which can run code when it is opened; save the model again"
    )
    assert told in make_plan(recipe(family)).problems[0]
    with refused(told):
        fetch(str(family / "base"), tmp_path / "fetched", cache=tmp_path / "cache")


def test_a_folder_is_fetched_whole(family, tmp_path):
    fetch(str(family / "base"), tmp_path / "fetched", cache=tmp_path / "cache")
    (family / "base/README.md").write_text("not carried")
    assert files(tmp_path / "fetched") == files(family / "base") - {"README.md"} | {"provenance.json"}
    told = json.loads((tmp_path / "fetched/provenance.json").read_text())["files"]
    assert INSIDE <= set(told)
    assert np.array_equal(encoded(tmp_path / "fetched"), encoded(family / "base"))


@pytest.mark.parametrize("inside", ["", "small/"])
def test_a_repository_of_the_hub_is_fetched_whole(family, inside, tmp_path, monkeypatch):
    with running_hub() as hub:
        hub.repositories["org/model"] = {
            f"{inside}{name}": (family / "base" / name).read_bytes() for name in files(family / "base")
        }
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        source = f"hf://org/model/{inside}".rstrip("/")
        fetch(source, tmp_path / "fetched", cache=tmp_path / "cache")
    assert files(tmp_path / "fetched") == files(family / "base") | {"provenance.json"}
    assert (tmp_path / "fetched/2_Dense/model.safetensors").read_bytes() == (
        family / "base/2_Dense/model.safetensors"
    ).read_bytes()


def test_any_file_system_gives_the_sub_folders(family, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in files(family / "base"):
        memory.pipe(f"/model/{name}", (family / "base" / name).read_bytes())
    try:
        fetch("memory://model", tmp_path / "fetched", cache=tmp_path / "cache")
    finally:
        memory.rm("/model", recursive=True)
    assert files(tmp_path / "fetched") == files(family / "base") | {"provenance.json"}


def test_experts_without_a_buffer_of_older_bases_are_merged(family, tmp_path):
    """all-MiniLM-L6-v2 holds position_ids, which transformers no longer writes."""
    state = load_file(family / "base/model.safetensors")
    ids = torch.arange(16)[None]
    save_file({**state, "embeddings.position_ids": ids}, family / "base/model.safetensors", {"format": "pt"})
    merge(recipe(family), tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["embeddings.position_ids"], ids)
