"""What verify covers: every file and every value that a merge leaves; and what it says it does not cover."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest
from checkpoints import random_state, refused, save_family
from junk import junked
from safetensors.torch import save_file

from mergeline.merging import merge
from mergeline.merging.checkpoints.checkpoint import header_digest
from mergeline.merging.checkpoints.companions import INDEX
from mergeline.merging.engine.manifest import manifest_path
from mergeline.merging.errors import UserError
from mergeline.merging.extract_lora import extract_lora
from mergeline.merging.reading import sha256_of
from mergeline.merging.signature import signature_path, write_signature
from mergeline.merging.verify import verify

CONFIG = {"model_type": "llama", "torch_dtype": "float32", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """The base is a folder with configuration, tokenizer and chat template; the base and `a` were fetched."""
    recipe = save_family(tmp_path / "in", method="task_arithmetic", params={"scale": 0.5}, seed=3)
    base = tmp_path / "in" / "base"
    base.mkdir()
    recipe["base"].rename(base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(CONFIG))
    (base / "tokenizer.json").write_text("{}")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "provenance.json").write_text('{"source": "hf://org/base@0123"}')
    return {**recipe, "base": base}


def edit_manifest(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def sentence(out: Path) -> str:
    return f"{out}: bit-identical to a new merge of its inputs"


def test_the_manifest_lists_every_file_beside_the_weights(recipe, tmp_path):
    manifest = merge({**recipe, "shard_size": 100}, tmp_path / "out")
    listed = {*manifest["files"], *manifest["output"]["files"], "manifest.json"}
    assert listed == {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "README.md", INDEX} <= manifest[
        "files"
    ].keys()
    assert verify(tmp_path / "out") == f"{sentence(tmp_path / 'out')} ({manifest['output']['digest']})"
    assert merge(recipe, tmp_path / "x.safetensors")["files"] == {}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "README.md", INDEX])
def test_a_file_beside_the_weights_that_was_changed(name, recipe, tmp_path):
    merge({**recipe, "shard_size": 100}, tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes() + b" ")
    with refused(name, "it was changed after the merge"):
        verify(tmp_path / "out")
    path.unlink()
    with refused(name):
        verify(tmp_path / "out")


def test_a_file_beside_the_weights_that_was_changed_together_with_its_digest(recipe, tmp_path):
    """As an attacker would who wants code to be run."""
    merge(recipe, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps({**CONFIG, "auto_map": {"AutoModel": "evil.Model"}}))
    edit_manifest(
        tmp_path / "out", lambda m: m["files"].update({"config.json": f"sha256:{sha256_of(config)}"})
    )
    with refused("manifest.json", "files.config.json is not that of a new merge"):
        verify(tmp_path / "out")


def test_files_that_the_manifest_does_not_list_are_named(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    for name in ("evil.py", "pytorch_model.bin"):
        (tmp_path / "out" / name).write_text("x")
    (tmp_path / "out" / "notes").mkdir()
    told = verify(tmp_path / "out")
    assert told.startswith(sentence(tmp_path / "out"))
    assert told.endswith("what the manifest does not list: evil.py, notes, pytorch_model.bin")


def test_a_shard_beside_the_only_file_is_named(recipe, tmp_path):
    merge({**recipe, "shard_size": 100}, tmp_path / "out")
    save_file(random_state(9), tmp_path / "out" / "model.safetensors")
    assert verify(tmp_path / "out").endswith("does not list: model.safetensors")


@pytest.mark.parametrize("shard_size", [None, 100])
def test_the_recipe_in_the_header_of_the_weights_is_compared(shard_size, recipe, tmp_path):
    manifest = merge({**recipe, "shard_size": shard_size}, tmp_path / "out")
    path = tmp_path / "out" / manifest["output"]["files"][-1]
    whole = path.read_bytes()
    assert whole.count(b'\\"scale\\":0.5') == 1
    path.write_bytes(whole.replace(b'\\"scale\\":0.5', b'\\"scale\\":0.7'))
    with refused(path.name, "header is not what the manifest says"):
        verify(tmp_path / "out")
    changed = {path.name: header_digest(path)}
    edit_manifest(tmp_path / "out", lambda m: m["output"]["headers"].update(changed))
    with refused("output.headers", "not that of a new merge"):
        verify(tmp_path / "out")
    edit_manifest(tmp_path / "out", lambda m: (m.pop("files"), m["output"].pop("headers")))
    with refused(path.name, "header is not that of a new merge"):
        verify(tmp_path / "out")


VALUES: dict[str, Callable[[dict[str, Any]], None]] = {
    "recipe_digest": lambda m: m.update(recipe_digest="sha256:" + "0" * 64),
    "a tensor's hash": lambda m: m["output"]["tensors"].update({"logit_scale": "0" * 64}),
    "the seed": lambda m: m["recipe"].update(seed=4),
    "the seed as text": lambda m: m["recipe"].update(seed="3"),
    "the seed as a truth": lambda m: m["recipe"]["params"].update(normalize=0),
    "treatments": lambda m: m["treatments"].update(merged=99),
    "a treatment": lambda m: m.update(treatments={}),
    "the source": lambda m: m["recipe"]["base"].update(source="hf://org/other@0123"),
    "bytes": lambda m: m["output"].update(bytes=1),
    "files": lambda m: m["output"].update(files=["other.safetensors"]),
    "the format": lambda m: m.update(format=2),
    "a value that is not there": lambda m: m.update(more=1),
    "a value less": lambda m: m.pop("format"),
    "a setting less": lambda m: m["recipe"].pop("vocabulary"),
    "the order of the experts": lambda m: m["recipe"].update(
        experts=dict(reversed(m["recipe"]["experts"].items()))
    ),
}


@pytest.mark.parametrize("what", VALUES)
def test_a_value_of_the_manifest_that_was_changed(what, recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    edit_manifest(tmp_path / "out", VALUES[what])
    with refused("out"):
        verify(tmp_path / "out")


def test_a_name_that_stands_twice_in_the_manifest(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1,', '"format": 1, "format": 1,'))
    with refused("manifest.json", "twice"):
        verify(tmp_path / "out")


def flipped(out: Path, count: int, seed: int) -> None:
    """Any byte of the manifest that is changed is noticed, by a refusal or by another sentence."""
    path, told = out / "manifest.json", verify(out)
    whole, draw = path.read_bytes(), random.Random(seed)
    solid = [i for i, byte in enumerate(whole) if not chr(byte).isspace()]
    for place in draw.sample(solid, count):
        new = draw.choice([b for b in range(33, 127) if b != whole[place]])
        path.write_bytes(whole[:place] + bytes([new]) + whole[place + 1 :])
        try:
            assert verify(out) != told, (place, chr(whole[place]), chr(new))
        except UserError as error:
            assert "\n" not in str(error)
    path.write_bytes(whole)
    path.write_bytes(b"\n" + whole.replace(b"\n", b"\n\t"))
    assert verify(out) == told


def test_any_byte_of_the_manifest_counts(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    flipped(tmp_path / "out", 25, 0)


@pytest.mark.slow
def test_any_byte_of_the_manifest_counts_everywhere(recipe, tmp_path):
    merge({**recipe, "method": "cart", "params": {}, "shard_size": 100}, tmp_path / "out")
    flipped(tmp_path / "out", 600, 1)


@pytest.mark.slow
@pytest.mark.parametrize("out", ["out", "x.safetensors"])
def test_any_value_of_the_manifest_may_be_anything(out, recipe, tmp_path):
    """What stands there is a refusal of one line, or told: never an accident."""
    out = tmp_path / out
    whole, told = merge(recipe, out), verify(out)
    for place, junk, changed in junked(whole):
        manifest_path(out).write_text(json.dumps(changed, indent=1, ensure_ascii=False) + "\n")
        try:
            assert verify(out) != told, (place, junk)
        except UserError as error:
            assert "\n" not in str(error)


def test_other_versions_are_told(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    edit_manifest(tmp_path / "out", lambda m: m["versions"].update(torch="1.13"))
    assert verify(tmp_path / "out").endswith("; made, as it says, with torch 1.13")


def test_the_card_of_another_version_may_be_another(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    card.write_text("of old")
    digest = f"sha256:{sha256_of(card)}"
    edit_manifest(tmp_path / "out", lambda m: m["files"].update({"README.md": digest}))
    with refused("files.README.md is not that of a new merge"):
        verify(tmp_path / "out")
    edit_manifest(tmp_path / "out", lambda m: m["versions"].update(mergeline="0.0.1"))
    told = verify(tmp_path / "out")
    assert "README.md is as the manifest says, but a new merge writes another" in told
    assert told.endswith("; made, as it says, with mergeline 0.0.1")


def test_a_source_that_the_input_no_longer_names_is_told(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    (recipe["base"] / "provenance.json").unlink()
    told = verify(tmp_path / "out")
    assert "its source hf://org/base@0123 is not proved" in told


def test_a_manifest_without_the_files_is_read_and_told(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    edit_manifest(tmp_path / "out", lambda m: (m.pop("files"), m["output"].pop("headers")))
    told = verify(tmp_path / "out")
    assert told.startswith(sentence(tmp_path / "out"))
    assert told.endswith("does not cover the files beside the weights")


def test_an_adapter_names_its_base_by_a_path_of_its_own(tmp_path, monkeypatch):
    shapes = {f"layers.{i}.{n}.weight": (6, 4) for i in range(2) for n in ("q_proj", "v_proj")}
    recipe = save_family(tmp_path / "in", experts=1, shapes=shapes)
    (tmp_path / "in" / "base").mkdir()
    recipe["base"].rename(tmp_path / "in" / "base" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    extract_lora({**recipe, "base": Path("in/base")}, Path("lora"), rank=2)
    config = json.loads(Path("lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "in/base"
    assert "the name of its base, in/base, is not proved" in verify(Path("lora"))


def test_it_works_where_the_merge_cannot_be_written_to(recipe, tmpfs):
    disk = tmpfs("size=1m")
    shutil.copytree(recipe["base"].parent, disk / "in")
    moved = {name: disk / "in" / path.name for name, path in recipe["experts"].items()}
    merge({**recipe, "base": disk / "in" / "base", "experts": moved}, disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert verify(disk / "out").startswith(sentence(disk / "out"))


def test_nothing_is_left_behind(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    before = sorted(os.listdir(tmp_path))
    verify(tmp_path / "out")
    edit_manifest(tmp_path / "out", lambda m: m["recipe"].update(seed=4))
    with refused("out"):
        verify(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


# --------------------------------------------------------------------------------------- signatures


def keys(folder: Path, kind: str = "ed25519") -> tuple[Path, Path]:
    """A private and a public key that openssl made."""
    private, public = folder / f"{kind}.pem", folder / f"{kind}-public.pem"
    options = [kind] if kind == "ed25519" else ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
    for command in (
        ["genpkey", "-algorithm", *options, "-out", private],
        ["pkey", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    return private, public


@pytest.mark.parametrize("out", ["out", "x.safetensors"])
@pytest.mark.parametrize("kind", ["ed25519", "ec"])
def test_a_merge_is_signed_and_openssl_agrees(kind, out, recipe, mergeline, tmp_path):
    private, public = keys(tmp_path, kind)
    merge(recipe, tmp_path / out)
    found = mergeline("sign", tmp_path / out, "--key", private)
    signature = signature_path(tmp_path / out)
    assert found == (0, f"{signature}\n", "")
    assert "its signature was not checked" in verify(tmp_path / out)
    told = mergeline("verify", tmp_path / out, "--public-key", public)
    assert told.code == 0 and f"; signed by the owner of {public}\n" in told.out
    manifest = manifest_path(tmp_path / out)
    check = ["-inkey", public, "-in", manifest, "-sigfile", signature]
    digest = [] if kind == "ed25519" else ["-digest", "sha256"]
    subprocess.run(
        ["openssl", "pkeyutl", "-verify", "-rawin", *digest, "-pubin", *check],
        check=True,
        capture_output=True,
    )


def test_a_signature_without_the_inputs(recipe, mergeline, tmp_path):
    private, public = keys(tmp_path)
    merge(recipe, tmp_path / "out")
    assert mergeline("sign", tmp_path / "out", "--key", private).code == 0
    shutil.rmtree(tmp_path / "in")
    arguments = ["verify", tmp_path / "out", "--public-key", public]
    assert mergeline(*arguments).code == 2
    found = mergeline(*arguments, "--no-merge")
    assert found.code == 0 and "its files are as its manifest says" in found.out and "signed by" in found.out
    for name in ("config.json", "README.md", "model.safetensors", "manifest.json", "manifest.json.sig"):
        path = tmp_path / "out" / name
        whole = path.read_bytes()
        for place in (12, len(whole) // 2, len(whole) - 3):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert mergeline(*arguments, "--no-merge").code == 2, (name, place)
        path.write_bytes(whole)
    assert mergeline(*arguments, "--no-merge") == found


def test_whose_signature_it_is_not(recipe, tmp_path):
    private, public = keys(tmp_path)
    (tmp_path / "other").mkdir()
    _, other = keys(tmp_path / "other")
    merge(recipe, tmp_path / "out")
    with refused("manifest.json.sig", "no such file"):
        verify(tmp_path / "out", public)
    write_signature(tmp_path / "out", private)
    with refused("did not sign this manifest"):
        verify(tmp_path / "out", other)
    with refused("public.pem", "is no key in PEM"):
        write_signature(tmp_path / "out", public)
    with refused("config.json", "is no key in PEM"):
        verify(tmp_path / "out", recipe["base"] / "config.json")
    with refused("none.pem", "no such file"):
        verify(tmp_path / "out", tmp_path / "none.pem")


def test_what_was_changed_is_not_signed(recipe, mergeline, tmp_path):
    private, _ = keys(tmp_path)
    merge(recipe, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    found = mergeline("sign", tmp_path / "out", "--key", private)
    assert found.code == 2 and "was changed after the merge" in found.err
    assert not (tmp_path / "out" / "manifest.json.sig").exists()
    merge(recipe, tmp_path / "old")
    edit_manifest(tmp_path / "old", lambda m: (m.pop("files"), m["output"].pop("headers")))
    with refused("does not cover the files beside the weights"):
        write_signature(tmp_path / "old", private)


def test_a_pipe_is_no_manifest(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    os.mkfifo(tmp_path / "out" / "manifest.json")
    with refused("manifest.json", "pipe"):
        verify(tmp_path / "out")
