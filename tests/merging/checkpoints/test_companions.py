"""What is carried over beside merged weights: whose, and true to what was written."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused, save_family, shard
from safetensors.torch import load_file

from mergeline.merging import merge
from mergeline.merging.checkpoints.companions import is_repository, source_of
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.errors import printable

CONFIG = {
    "model_type": "llama", "torch_dtype": "float32", "tie_word_embeddings": True, "label": "ä",
    "text_config": {"dtype": "float32", "hidden_size": 4}, "vision_config": {"hidden_size": 2},
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Base and expert `a` are folders with a configuration each, `b` and `c` single files."""
    recipe = save_family(tmp_path / "in", method="average")
    for name, path in (("base", recipe["base"]), ("a", recipe["experts"]["a"])):
        folder = tmp_path / "in" / name
        folder.mkdir()
        path.rename(folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**CONFIG, "of": name}))
        (folder / "tokenizer.json").write_text(f"of {name}")
        (folder / "chat_template.jinja").write_text(f"{{# of {name} #}}")
    return {
        **recipe,
        "base": tmp_path / "in" / "base",
        "experts": {**recipe["experts"], "a": tmp_path / "in" / "a"},
    }


@pytest.mark.parametrize(
    ("change", "donor"),
    [({}, "base"), ({"donor": "a"}, "a"), ({"donor": "base"}, "base"), ({"base": None}, "a")],
)
def test_configuration_and_tokenizer_come_from_the_donor(change, donor, recipe, tmp_path):
    merge({**recipe, **change}, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**CONFIG, "of": donor}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == f"of {donor}"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == f"{{# of {donor} #}}"


def test_a_configuration_that_is_true_is_copied_as_it_is(recipe, tmp_path):
    text = '{"torch_dtype":   "float32"}'
    (recipe["base"] / "config.json").write_text(text)
    merge(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_configuration_names_the_dtype_of_the_weights(dtype, recipe, tmp_path):
    merge({**recipe, "dtype": dtype}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        **CONFIG, "of": "base", "torch_dtype": dtype, "text_config": {"dtype": dtype, "hidden_size": 4}
    }  # fmt: skip


def test_the_donor_does_not_change_the_weights(recipe, tmp_path):
    digests = {merge({**recipe, "donor": d}, tmp_path / d)["output"]["digest"] for d in ("base", "a")}
    assert len(digests) == 1


def test_an_unknown_donor(recipe, tmp_path):
    with refused("donor 'bas' is neither the base nor an expert", "did you mean 'base'"):
        merge({**recipe, "donor": "bas"}, tmp_path / "out")
    with refused("donor 'b'", "one file", "name a folder"):
        merge({**recipe, "donor": "b"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["{", "[1]", '"x"', "\x80", '{"a": 1, "a": 2}', '{"a_config":' * 900 + "1" + "}" * 900]
)
def test_a_configuration_that_is_none(text, recipe, tmp_path):
    (recipe["base"] / "config.json").write_bytes(text.encode("latin-1"))
    with refused("config.json", "JSON", "download it again"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "config.json"])
def test_a_link_out_of_the_donors_folder_is_not_followed(name, recipe, tmp_path):
    (tmp_path / "id_rsa").write_text('{"secret": 1}')
    (recipe["base"] / name).unlink(missing_ok=True)
    (recipe["base"] / name).symlink_to(tmp_path / "id_rsa")
    assert any(name in problem for problem in make_plan(recipe).problems)
    with refused(name, "link out of its folder"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def hub_cache(folder: Path, root: Path) -> Path:
    """The files of a folder as the Hugging Face cache has them: links from a snapshot to blobs."""
    cache = root / "models--org--name"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in folder.iterdir():
        path.rename(cache / "blobs" / f"hash-of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-of-{path.name}")
    return snapshot


@pytest.mark.parametrize("sharded", [False, True])
def test_a_snapshot_of_the_hugging_face_cache_is_a_checkpoint(sharded, recipe, tmp_path):
    expected = merge(recipe, tmp_path / "plain")
    if sharded:
        state = load_file(recipe["base"] / "model.safetensors")
        (recipe["base"] / "model.safetensors").unlink()
        for path in shard(state, tmp_path / "shards", 2).iterdir():
            path.rename(recipe["base"] / path.name)
    snapshot = hub_cache(recipe["base"], tmp_path / "hub")
    (tmp_path / "link").symlink_to(snapshot)
    for name, base in (("one", snapshot), ("two", tmp_path / "link")):
        found = merge({**recipe, "base": base}, tmp_path / name)
        assert found["output"]["digest"] == expected["output"]["digest"]
        assert (tmp_path / name / "tokenizer.json").read_text() == "of base"
        assert not (tmp_path / name / "tokenizer.json").is_symlink()


def test_a_cache_whose_blobs_lie_elsewhere_is_none(recipe, tmp_path):
    snapshot = hub_cache(recipe["base"], tmp_path / "hub")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "hash-of-vocab.txt").write_text("a secret")
    blobs = snapshot.parent.parent / "blobs"
    for link in (
        "../../blobs/../../../secrets/hash-of-vocab.txt",
        str(tmp_path / "secrets" / "hash-of-vocab.txt"),
    ):
        (snapshot / "vocab.txt").unlink(missing_ok=True)
        (snapshot / "vocab.txt").symlink_to(link)
        with refused("vocab.txt", "link out of its folder"):
            merge({**recipe, "base": snapshot}, tmp_path / "out")
    (snapshot / "vocab.txt").unlink()
    (snapshot / "vocab.txt").symlink_to("../../blobs/hash-of-vocab.txt")
    (blobs / "hash-of-vocab.txt").symlink_to(tmp_path / "secrets" / "hash-of-vocab.txt")
    with refused("vocab.txt", "link out of its folder"):
        merge({**recipe, "base": snapshot}, tmp_path / "out")
    (blobs / "hash-of-vocab.txt").unlink()
    for path in blobs.iterdir():
        path.rename(tmp_path / "secrets" / path.name)
    blobs.rmdir()
    blobs.symlink_to(tmp_path / "secrets")
    with refused("link out of its folder"):
        merge({**recipe, "base": snapshot}, tmp_path / "out")


def test_the_card_names_models_of_the_hub(recipe, tmp_path):
    sources = {"base": "hf://org/base@0123", "a": "hf://org/a"}
    for name, source in sources.items():
        (tmp_path / "in" / name / "provenance.json").write_text(json.dumps({"source": source}))
    manifest = merge(recipe, tmp_path / "out")
    assert manifest["recipe"]["base"]["source"] == sources["base"]
    assert "source" not in manifest["recipe"]["experts"]["b"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith(
        "---\nbase_model:\n- org/base\n- org/a\nbase_model_relation: merge\ntags:\n- merge\n"
    )


HOSTILE = "<img src=x onerror=alert(1)>[a](javascript:b)|`c`*d*\n\n# e \x1b[2J"


@pytest.mark.parametrize("name", [HOSTILE, "<!--", "a&lt;b", "https://x.example/y", "\\|", "![](x)"])
def test_names_are_no_markup_in_the_card(name, recipe, tmp_path):
    merge(
        {**recipe, "experts": {name: recipe["experts"]["b"], "v1.0 my-x+y_z": recipe["experts"]["c"]}},
        tmp_path / "out",
    )
    card = (tmp_path / "out" / "README.md").read_text()
    [row] = [
        line
        for line in card.splitlines()
        if line.endswith("|") and "| expert |" in line and "v1.0" not in line
    ]
    shown = row.removeprefix("| ").partition(" | expert |")[0]
    assert not set(shown.replace("&#", "").replace(";", "")) & set("<>[]()|`*!\\#:/&\x1b")
    assert html.unescape(shown) == printable(name)
    assert "| v1.0 my-x+y_z | expert |" in card


def test_a_card_without_models_of_the_hub(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\ntags:\n- merge\n")


def test_transformers_loads_what_was_merged(tmp_path):
    """A tied model of transformers, saved in shards: no phantom lm_head, and the dtype that was written."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    folders = {}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        folders[name] = tmp_path / name
        transformers.LlamaForCausalLM(config).save_pretrained(folders[name], max_shard_size="10KB")
    base = folders.pop("base")
    recipe = {
        "method": "task_arithmetic",
        "base": base,
        "experts": folders,
        "dtype": "bfloat16",
        "shard_size": 9000,
    }
    merge(recipe, tmp_path / "out")
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and not loaded["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize(
    ("source", "pinned"),
    [
        ("hf://org/name", "hf://org/name@{commit}"),
        ("hf://org/name@main", "hf://org/name@{commit}"),
        ("hf://org/name@v1/folder/x.safetensors", "hf://org/name@{commit}/folder/x.safetensors"),
        ("https://host/model.safetensors", "https://host/model.safetensors"),
    ],
)
def test_the_source_of_a_checkpoint_names_its_commit(tmp_path, source, pinned):
    commit = "0123456789" * 4
    (tmp_path / "provenance.json").write_text(json.dumps({"source": source, "revision": commit}))
    assert source_of(tmp_path) == pinned.format(commit=commit)
    (tmp_path / "provenance.json").write_text(json.dumps({"source": source, "revision": None}))
    assert source_of(tmp_path) == source


def test_what_looks_like_a_repository_is_one_where_there_is_no_such_path(tmp_path):
    assert is_repository("org/name-7B.v2", tmp_path / "none")
    assert not is_repository("org/name", tmp_path)
    for path in ("name", "./name", "a/b/c", "/a/b", "in/a.safetensors", "../a", "a/b@main"):
        assert not is_repository(path, tmp_path / "none")
