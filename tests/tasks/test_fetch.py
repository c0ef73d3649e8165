"""The fetch step: local files, a loopback server with faults on demand, fsspec's memory, open_clip."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from fsspec.registry import _registry
from hub_server import Fault, running_hub
from pipelines import PIPELINE_BROUGHT, pipeline_files
from safetensors.torch import load_file, save

from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.errors import UserError
from mergeline.tasks import fetch as fetch_step
from mergeline.tasks import sources
from mergeline.tasks.fetch import fetch

TENSORS = {
    "embed": torch.arange(60_000, dtype=torch.float32).reshape(200, 300),
    "head": torch.linspace(-1, 1, 5000, dtype=torch.float16),
}
WEIGHTS = save(TENSORS)
SHARDS = {
    "model-00001-of-00002.safetensors": save({"embed": TENSORS["embed"]}),
    "model-00002-of-00002.safetensors": save({"head": TENSORS["head"]}),
    "model.safetensors.index.json": json.dumps(
        {
            "weight_map": {
                "embed": "model-00001-of-00002.safetensors",
                "head": "model-00002-of-00002.safetensors",
            }
        }
    ).encode(),
}
CONFIG = b'{"hidden_size": 300}'


@pytest.fixture
def waits(monkeypatch):
    """Waits are recorded, not waited for."""
    waited: list[float] = []
    monkeypatch.setattr(sources, "sleep", waited.append)
    return waited


@pytest.fixture
def hub(monkeypatch, waits):
    from huggingface_hub import constants

    with running_hub() as hub:
        hub.repositories["org/clip"] = {
            "model.safetensors": WEIGHTS,
            "config.json": CONFIG,
            "README.md": b"no",
        }
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture
def bring(tmp_path):
    """`bring(source)` fetches into a folder, which it returns; a failure must leave everything as it was."""

    def bring(source: object, out: str = "out", **options: bool) -> Path:
        checkpoints = tmp_path / "checkpoints"
        before = _tree(checkpoints)
        try:
            fetch(str(source), checkpoints / out, cache=tmp_path / "downloads", **options)
        except BaseException:
            assert _tree(checkpoints) == before
            raise
        assert not list(checkpoints.glob(".*"))
        return checkpoints / out

    return bring


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


def _tree(folder: Path) -> dict[str, dict[str, bytes]]:
    return {path.name: _content(path) for path in sorted(folder.glob("*"))}


def _folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True)
    for name, body in files.items():
        (path / name).write_bytes(body)
    return path


def _provenance(out: Path) -> dict:
    return json.loads((out / "provenance.json").read_text())


# Local sources


def test_file_becomes_a_checkpoint_folder(tmp_path, bring):
    folder = _folder(
        tmp_path / "mine", {"expert.safetensors": WEIGHTS, "other.safetensors": b"", "config.json": CONFIG}
    )
    out = bring(folder / "expert.safetensors")
    assert sorted(_content(out)) == ["config.json", "model.safetensors", "provenance.json"]
    assert (out / "model.safetensors").read_bytes() == WEIGHTS
    assert (out / "model.safetensors").stat().st_ino != (folder / "expert.safetensors").stat().st_ino
    assert _provenance(out)["digest"] == open_checkpoint(folder / "expert.safetensors").digest()
    assert _provenance(out)["files"]["config.json"]["size"] == len(CONFIG)


@pytest.mark.parametrize("form", ["{}", "file:{}", "file://{}"])
def test_forms_of_a_path(tmp_path, bring, form):
    folder = _folder(tmp_path / "mine", {"model.safetensors": WEIGHTS})
    out = bring(form.format(folder))
    assert _provenance(out)["source"] == form.format(folder)


def test_shards_keep_their_names(tmp_path, bring):
    out = bring(_folder(tmp_path / "mine", SHARDS | {"tokenizer.json": b"{}", "notes.txt": b"no"}))
    assert sorted(_content(out)) == sorted([*SHARDS, "provenance.json", "tokenizer.json"])
    one = bring(_folder(tmp_path / "one", {"model.safetensors": WEIGHTS}), "one")
    assert _provenance(out)["digest"] == _provenance(one)["digest"]


def test_repeated_fetch_is_byte_identical_and_replaces(tmp_path, bring):
    source = _folder(tmp_path / "mine", {"model.safetensors": WEIGHTS, "config.json": CONFIG})
    first = _content(bring(source))
    (tmp_path / "checkpoints" / "out" / "stale.txt").write_text("left over")
    assert _content(bring(source)) == first


def test_modes_follow_the_umask(tmp_path, bring):
    torch.save(TENSORS, tmp_path / "old.pt")
    before = os.umask(0o027)
    try:
        out = bring(tmp_path / "old.pt", allow_pickle=True)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}


def test_open_clip_weights_win_over_those_of_transformers(tmp_path, bring):
    files = {
        "open_clip_model.safetensors": WEIGHTS,
        "model.safetensors": SHARDS["model-00001-of-00002.safetensors"],
    }
    out = bring(_folder(tmp_path / "mine", files | {"open_clip_config.json": b"{}"}))
    assert sorted(open_checkpoint(out).tensors) == ["embed", "head"]


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "config.json"]
)
def test_index_naming_other_places_is_refused(tmp_path, bring, shard):
    index = json.dumps({"weight_map": {"embed": shard}}).encode()
    (tmp_path / "x.safetensors").write_bytes(WEIGHTS)
    source = _folder(tmp_path / "mine", {"model.safetensors.index.json": index, "config.json": CONFIG})
    with pytest.raises(UserError, match="only plain file names|not a file of weights"):
        bring(source)


@pytest.mark.parametrize("index", [b"[]", b"{}", b"nonsense", b'{"weight_map": []}', b"[" * 100_000])
def test_malformed_index(tmp_path, bring, index):
    with pytest.raises(UserError, match="model.safetensors.index.json:? is not"):
        bring(_folder(tmp_path / "mine", {"model.safetensors.index.json": index}))


def test_missing_shard(tmp_path, bring):
    source = _folder(tmp_path / "mine", SHARDS)
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="'model-00002-of-00002.safetensors' is missing"):
        bring(source)


def test_a_snapshot_of_the_hugging_face_cache_is_copied(tmp_path, bring):
    cache = tmp_path / "models--org--name"
    _folder(cache / "blobs", {"0123": WEIGHTS, "4567": b"{}"})
    snapshot = _folder(cache / "snapshots" / "abc", {})
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    (snapshot / "config.json").symlink_to("../../blobs/4567")
    out = bring(snapshot)
    assert (out / "model.safetensors").read_bytes() == WEIGHTS and (out / "config.json").read_bytes() == b"{}"
    assert not any(path.is_symlink() for path in out.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pipe_is_not_waited_for(tmp_path, bring, name):
    folder = _folder(tmp_path / "mine", {"model.safetensors": WEIGHTS})
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == "config.json":
        assert not (bring(folder) / name).exists()
    else:
        with pytest.raises(UserError, match="no checkpoint there"):
            bring(folder)


def test_link_out_of_the_folder_is_refused_unless_named(tmp_path, bring):
    (tmp_path / "secret").write_bytes(WEIGHTS)
    source = _folder(tmp_path / "mine", {})
    (source / "model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link out of its folder"):
        bring(source)
    bring(source / "model.safetensors")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": b""}, "no checkpoint there.*found notes.txt"),
        ({"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS}, "several checkpoints .*name one"),
        ({"model.safetensors": WEIGHTS[:-1]}, r"mine: model.safetensors: truncated"),
        ({"model.Q4_K.gguf": b"GGUF"}, "mine: model.Q4_K.gguf: malformed GGUF header"),
        ({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, "several checkpoints .*name one"),
        (
            {
                "model.safetensors": WEIGHTS,
                "config.json": b'{"quantization_config": {"quant_method": "hqq"}}',
            },
            r"mine: is quantised \(hqq in config.json\), which cannot be read",
        ),
        ({"model.safetensors": WEIGHTS, "config.json": b"{"}, "config.json: is not valid JSON"),
        ({"__0_0.distcp": b"", ".metadata": b""}, "holds training shards.*passthrough"),
        ({"pytorch_model.bin": b"", "notes.txt": b""}, r"'pytorch_model.bin' is a pickle.*--allow-pickle"),
    ],
)
def test_refused_folders(tmp_path, bring, files, message):
    with pytest.raises(UserError, match=message):
        bring(_folder(tmp_path / "mine", files))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "no such file or folder"),
        ("org/name", "no such file or folder, and as a repository: .*HF_HUB_OFFLINE"),
        ("mmemory://x/y", "unknown scheme 'mmemory'; did you mean 'memory'"),
        ("hf://justname", "write hf://org/name@revision"),
        ("open_clip://ViT-B-33/openai", "unknown architecture; did you mean 'ViT-B-32'"),
        ("open_clip://ViT-B-32/openia", "unknown weights; did you mean 'openai'.*known are"),
        ("http://127.0.0.1:9/", "name a file"),
    ],
)
def test_refused_sources(bring, source, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        bring(source)


# Pickles


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("name", ["old.pt", "model-best.pth.tar"])
def test_allowed_pickle_is_converted(tmp_path, bring, name, zipped, wrapped):
    tied = {**TENSORS, "tied": TENSORS["embed"], "turned": TENSORS["embed"].T, "count": torch.tensor(3)}
    state = {"state_dict": tied, "epoch": 3} if wrapped else tied
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
    read = load_file(bring(tmp_path / name, allow_pickle=True) / "model.safetensors")
    assert read.keys() == tied.keys()
    assert all(torch.equal(read[key], tied[key]) and read[key].dtype == tied[key].dtype for key in tied)


def test_sharded_pickle(tmp_path, bring):
    index = {"weight_map": {"embed": "pytorch_model-1.bin", "head": "pytorch_model-2.bin"}}
    source = _folder(tmp_path / "mine", {"pytorch_model.bin.index.json": json.dumps(index).encode()})
    torch.save({"embed": TENSORS["embed"]}, source / "pytorch_model-1.bin")
    torch.save({"head": TENSORS["head"]}, source / "pytorch_model-2.bin")
    assert sorted(open_checkpoint(bring(source, allow_pickle=True)).tensors) == ["embed", "head"]


def test_safetensors_win_over_a_pickle(tmp_path, bring):
    bring(_folder(tmp_path / "mine", {"model.safetensors": WEIGHTS, "pytorch_model.bin": b"anything"}))


class _Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "state",
    [{"a": _Evil()}, {"a": 3}, {"a": torch.eye(2).to_sparse()}, [torch.eye(2)], {}, {3: torch.eye(2)}],
)
def test_pickle_of_other_things_is_refused(tmp_path, bring, monkeypatch, state):
    monkeypatch.chdir(tmp_path)
    torch.save(state, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match="holds more than tensors|is not a dense tensor|no state dict"):
        bring(tmp_path / "old.ckpt", allow_pickle=True)
    assert not (tmp_path / "evil-was-here").exists()


# Pipelines


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _pipeline(folder: Path, files: dict[str, bytes]) -> Path:
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


def test_a_pipeline_is_brought_whole_and_nothing_twice(tmp_path, hub, bring):
    hub.repositories["org/pipe"] = pipeline_files(0)
    out = bring("hf://org/pipe", "remote")
    assert _files(out) == PIPELINE_BROUGHT
    found = open_checkpoint(out)
    assert {name.partition("/")[0] for name in found.tensors} == {"unet", "vae", "text_encoder"}
    assert _provenance(out)["digest"] == found.digest()
    assert _provenance(out)["files"].keys() == PIPELINE_BROUGHT - {"provenance.json"}
    assert not any("fp16" in seen.path and "unet" in seen.path or "v1-5" in seen.path for seen in hub.seen)
    here = bring(_pipeline(tmp_path / "here", pipeline_files(0)), "local")
    for name in PIPELINE_BROUGHT - {"provenance.json"}:
        assert (here / name).read_bytes() == (out / name).read_bytes()
    assert open_checkpoint(tmp_path / "here").tensors.keys() == found.tensors.keys()


def test_a_component_or_a_file_of_a_pipeline_is_brought_alone(hub, bring):
    hub.repositories["org/pipe"] = pipeline_files(0)
    assert _files(bring("hf://org/pipe/vae", "vae")) == {
        "config.json", "provenance.json", "diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    hub.repositories["org/pipe"]["v1-5-pruned.safetensors"] = WEIGHTS
    assert _files(bring("hf://org/pipe/v1-5-pruned.safetensors", "file")) == {
        "provenance.json", "model.safetensors"
    }  # fmt: skip


def test_components_that_are_pickles_are_converted_if_allowed(tmp_path, bring):
    files = pipeline_files(0)
    for name in [n for n in files if n.startswith("unet/") and n != "unet/config.json"]:
        del files[name]
    folder = _pipeline(tmp_path / "here", files)
    torch.save({"a.weight": torch.ones(2, 2)}, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="here/unet: 'diffusion_pytorch_model.bin' is a pickle"):
        bring(folder)
    out = bring(folder, allow_pickle=True)
    assert "unet/a.weight" in open_checkpoint(out).tensors
    assert (out / "unet/diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "body", "message"),
    [
        ("model_index.json", b"[]", "here: model_index.json: is not a JSON object"),
        ("model_index.json", b'{"../x": ["a", "b"]}', "only plain file names inside the folder"),
        ("vae/config.json", b'{"quantization_config": {"quant_method": "quanto"}}', "vae: is quantised"),
        ("vae/diffusion_pytorch_model.fp16.safetensors", None, "vae holds 'model.onnx' and no safetensors"),
        ("vae/diffusion_pytorch_model.ema.safetensors", WEIGHTS, "vae: several checkpoints"),
    ],
)
def test_refused_pipelines(tmp_path, bring, file, body, message):
    files = {**pipeline_files(0), file: body, "vae/model.onnx": b""}
    folder = _pipeline(tmp_path / "here", {name: body for name, body in files.items() if body is not None})
    with pytest.raises(UserError, match=message):
        bring(folder)


# The Hub


def test_hub_brings_only_what_is_needed(hub, bring):
    out = bring("hf://org/clip@main")
    assert sorted(_content(out)) == ["config.json", "model.safetensors", "provenance.json"]
    assert (out / "model.safetensors").read_bytes() == WEIGHTS
    assert _provenance(out)["source"] == "hf://org/clip@main"
    assert _provenance(out)["revision"] == hub.commit("org/clip")
    assert not hub.bodies("README")
    assert _content(bring("hf://org/clip@main", "again")) == _content(out)


def test_hub_files_and_folders(hub, bring):
    hub.repositories["org/many"] = {f"a b/{name}": body for name, body in SHARDS.items()} | {
        "a b/config.json": CONFIG,
        "config.json": b"{}",
        "single.safetensors": WEIGHTS,
    }
    folder = bring("hf://org/many/a b", "folder")
    assert sorted(_content(folder)) == sorted([*SHARDS, "config.json", "provenance.json"])
    assert (folder / "config.json").read_bytes() == CONFIG
    single = bring("hf://org/many@main/single.safetensors", "single")
    assert (single / "config.json").read_bytes() == b"{}"
    with pytest.raises(UserError, match=r"org/many@main: there is no 'singel.safetensors'.*did you mean"):
        bring("hf://org/many@main/singel.safetensors", "none")


def test_token_goes_to_the_hub_and_no_further(hub, bring, tmp_path):
    hub.private = True
    out = bring("hf://org/clip")
    assert {seen.authorization for seen in hub.seen if "127.0.0.1" in seen.host} == {"Bearer hf_secret"}
    assert {seen.authorization for seen in hub.seen if "localhost" in seen.host} == {None}
    assert b"secret" not in b"".join(_content(out).values()).lower()


def test_no_token(hub, bring, monkeypatch):
    hub.private = True
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(UserError, match=r"hf://org/clip@main: access denied \(HTTP 401\).*HF_TOKEN"):
        bring("hf://org/clip@main")


def test_dropped_connection_is_resumed(hub, bring, waits):
    hub.faults = [Fault("/cdn/", drop_after=100_000), Fault("/cdn/", drop_after=70_000)]
    out = bring("hf://org/clip")
    assert (out / "model.safetensors").read_bytes() == WEIGHTS
    first, second, third = hub.bodies("/cdn/")
    assert (first.range, second.range, third.range) == (None, "bytes=65536-", "bytes=131072-")
    assert third.sent == len(WEIGHTS) - 131_072
    assert len(waits) == 2


def test_later_run_goes_on_where_an_earlier_one_stopped(hub, bring, tmp_path):
    hub.repositories["org/clip"] = SHARDS | {"config.json": CONFIG}
    hub.faults = [Fault("/cdn/", drop_after=100_000)] + [Fault("/cdn/", status=503)] * (sources.ATTEMPTS - 1)
    with pytest.raises(UserError, match=r"hf://org/clip@main/.*HTTP 503; gave up after 6 attempts"):
        bring("hf://org/clip")
    hub.faults = [Fault("/resolve/", status=503)]
    hub.seen.clear()
    out = bring("hf://org/clip")
    assert [seen.range for seen in hub.bodies("/cdn/")] == ["bytes=65536-", None]
    assert len(hub.bodies("/config.json")) == 0
    assert {name: (out / name).read_bytes() for name in SHARDS} == SHARDS
    assert [path for path in (tmp_path / "downloads").rglob("*")] == []


def test_wrong_hash_is_thrown_away(hub, bring, tmp_path):
    hub.faults = [Fault("/cdn/", body=WEIGHTS[:-1] + b"\x77")]
    with pytest.raises(UserError, match="model.safetensors: has SHA-256 .* was thrown away"):
        bring("hf://org/clip")
    bring("hf://org/clip")
    assert hub.bodies("/cdn/")[1].range is None


def test_wrong_size_is_thrown_away(hub, bring):
    hub.faults = [Fault("/cdn/", body=WEIGHTS + b"more")]
    with pytest.raises(UserError, match=f"has {len(WEIGHTS) + 4} bytes, not {len(WEIGHTS)}"):
        bring("hf://org/clip")


def test_truncated_content_length_is_resumed(hub, bring):
    hub.faults = [Fault("/cdn/", truncate=65_536)]
    bring("hf://org/clip")
    assert [seen.range for seen in hub.bodies("/cdn/")] == [None, "bytes=65536-"]


def test_file_that_ends_early_for_good(hub, bring):
    hub.faults = [Fault("/cdn/", body=WEIGHTS[:65_536])] * 2
    with pytest.raises(UserError, match=f"has 65536 bytes, not {len(WEIGHTS)}"):
        bring("hf://org/clip")


def test_busy_server_is_waited_for(hub, bring, waits):
    hub.faults = [
        Fault("/api/", status=429, headers={"Retry-After": "7"}),
        Fault("/api/", status=429, headers={"RateLimit": '"api";r=0;t=55'}),
        Fault("/resolve/", status=503),
        Fault("/resolve/", status=502),
        Fault("/resolve/", status=500),
    ]
    bring("hf://org/clip")
    assert waits[:2] == [7.0, 55.0]
    assert [0.5 <= wait / 2**n <= 1.0 for n, wait in enumerate(waits[2:])] == [True] * 3


def test_waiting_has_an_end(hub, bring, waits):
    hub.faults = [Fault("/api/", status=429, headers={"Retry-After": "4000"})]
    with pytest.raises(UserError, match="org/clip@main.*HTTP 429.*4000 s"):
        bring("hf://org/clip")
    hub.faults = [Fault("/api/", status=429, headers={"Retry-After": "1"})] * sources.ATTEMPTS
    with pytest.raises(UserError, match="gave up after 6 attempts"):
        bring("hf://org/clip")
    assert waits == [1.0] * (sources.ATTEMPTS - 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://org/none@main", "hf://org/none@main: no such repository.*404"),
        ("hf://org/clip@v9", "hf://org/clip@v9: no such revision"),
        ("hf://org/clip@main/none", "hf://org/clip@main: there is no 'none'"),
    ],
)
def test_not_found(hub, bring, source, message):
    with pytest.raises(UserError, match=message) as caught:
        bring(source)
    assert "\n" not in str(caught.value)


def test_file_gone_between_listing_and_download(hub, bring):
    hub.faults = [Fault("/resolve/", status=404, headers={"X-Error-Code": "EntryNotFound"})]
    with pytest.raises(UserError, match="hf://org/clip@main/config.json: no such file"):
        bring("hf://org/clip")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "a/../../model.safetensors", "a\\b"]
)
def test_hub_listing_other_places_is_refused(hub, bring, name):
    hub.repositories["org/clip"][name] = WEIGHTS
    with pytest.raises(UserError, match="only names inside the repository"):
        bring("hf://org/clip")


def test_unreachable_hub(hub, bring, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"hf://org/clip@main: the connection failed \(ConnectionError\); gave up"
    ):
        bring("hf://org/clip")


# Other servers and file systems


def test_web_file_and_its_credentials(hub, bring, tmp_path):
    hub.web["it/some model.safetensors"] = WEIGHTS
    url = f"http://user:password@127.0.0.1:{hub.port}/web/it/some%20model.safetensors?token=SECRET"
    out = bring(url)
    assert _provenance(out)["source"] == f"{hub.endpoint}/web/it/some%20model.safetensors"
    with pytest.raises(UserError) as caught:
        bring(url.replace("some", "no"), "none")
    assert (
        "no such file" in str(caught.value)
        and "SECRET" not in str(caught.value)
        and "password" not in str(caught.value)
    )


def test_messages_of_other_libraries_are_shown_without_credentials(bring, memory, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("403 for https://bob:S3CR3T@host/x?sig=S3CR3T")

    memory.pipe("/it/model.safetensors", WEIGHTS)
    monkeypatch.setattr(type(memory), "info", fail)
    with pytest.raises(UserError, match="RuntimeError: 403 for https://host/x$"):
        bring("memory://it")


def test_a_malformed_name_of_the_hub_is_shown_without_its_token(bring):
    with pytest.raises(UserError, match="hf://org/name/x: write hf://") as caught:
        bring("hf://user:S3CR3T@org/name/x")
    assert "S3CR3T" not in str(caught.value)


def test_web_index_brings_its_shards(hub, bring):
    hub.web |= {f"it/{name}": body for name, body in SHARDS.items()}
    out = bring(f"{hub.endpoint}/web/it/model.safetensors.index.json?token=SECRET")
    assert sorted(_content(out)) == sorted([*SHARDS, "provenance.json"])


def test_web_download_is_resumed_only_if_the_file_is_still_the_same(hub, bring):
    url = f"{hub.endpoint}/web/model.safetensors"
    for changed in (False, True):
        hub.web["model.safetensors"] = WEIGHTS
        hub.faults = [Fault("/web/", drop_after=100_000)] + [Fault("/web/", status=503)] * (
            sources.ATTEMPTS - 1
        )
        with pytest.raises(UserError):
            bring(url)
        hub.seen.clear()
        if changed:
            hub.web["model.safetensors"] = save({"embed": TENSORS["embed"] + 1})
        out = bring(url)
        (seen,) = hub.bodies("/web/")
        assert seen.range == "bytes=65536-"
        assert seen.sent == len(hub.web["model.safetensors"]) - (0 if changed else 65_536)
        assert (out / "model.safetensors").read_bytes() == hub.web["model.safetensors"]
        shutil.rmtree(out)


def test_complete_web_download_is_not_sent_again(hub, bring):
    hub.web |= {f"it/{name}": body for name, body in SHARDS.items()}
    hub.faults = [Fault("00002-of", status=404)]
    with pytest.raises(UserError, match="00002-of-00002.safetensors: not found"):
        bring(f"{hub.endpoint}/web/it/model.safetensors.index.json")
    hub.seen.clear()
    bring(f"{hub.endpoint}/web/it/model.safetensors.index.json")
    assert [seen.sent for seen in hub.bodies("00001-of")] == [0]


@pytest.fixture
def memory():
    import fsspec

    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


def test_fsspec_file_and_folder(bring, memory):
    memory.pipe({"/it/expert.safetensors": WEIGHTS, "/it/config.json": CONFIG})
    for source in ("memory://it/expert.safetensors", "memory://it"):
        out = bring(source)
        assert sorted(_content(out)) == ["config.json", "model.safetensors", "provenance.json"]
        assert (out / "model.safetensors").read_bytes() == WEIGHTS
    with pytest.raises(UserError, match="memory://it/none: not found"):
        bring("memory://it/none")


def test_fsspec_download_is_resumed(bring, memory, waits, monkeypatch):
    """The file system breaks after a while; what came by then is not read again."""
    memory.pipe("/it/model.safetensors", WEIGHTS)
    reads: list[int] = []
    plain_open = type(memory)._open

    class Breaking:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def seek(self, position):
            self.file.seek(position)

        def read(self, size):
            reads.append(self.file.tell())
            if len(reads) == 2:
                raise ConnectionResetError("gone")
            return self.file.read(size)

    monkeypatch.setattr(
        type(memory), "_open", lambda *args, **options: Breaking(plain_open(*args, **options))
    )
    out = bring("memory://it")
    assert (out / "model.safetensors").read_bytes() == WEIGHTS
    assert reads[:3] == [0, 65_536, 65_536]


def test_missing_driver_is_named(bring, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # that an earlier test opened
    with pytest.raises(
        UserError, match=r"s3://bucket/key: s3fs is not installed; pip install 'mergeline\[s3\]'"
    ):
        bring("s3://bucket/key")


# open_clip


def test_open_clip_weights(tmp_path, bring, monkeypatch):
    """A small architecture and a local file, entered in open_clip's own lists, stand for the large ones."""
    import open_clip
    from open_clip import factory, pretrained

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 1, "layers": 1},
    }
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", config)
    weights = tmp_path / "tiny.pt"
    torch.manual_seed(0)
    model = open_clip.create_model("tiny", force_quick_gelu=True)
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, weights)
    entry = {"file": str(weights), "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"local": entry})

    out = bring("open_clip://tiny/local")
    read = load_file(out / "model.safetensors")
    assert all(torch.equal(read[name], tensor.half().float()) for name, tensor in model.state_dict().items())
    written = json.loads((out / "open_clip_config.json").read_text())
    assert written["model_cfg"] == config | {"quick_gelu": True}
    assert written["preprocess_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert written["preprocess_cfg"]["interpolation"] == "bilinear"

    opened = open_clip.create_model(f"local-dir:{out}")
    image = torch.randn(2, 3, 16, 16)
    model.load_state_dict(read)
    assert torch.equal(opened.eval().encode_image(image), model.eval().encode_image(image))

    weights.write_bytes(b"damaged")
    with pytest.raises(UserError, match="open_clip could not load it"):
        bring("open_clip://tiny/local")


# The machine


def test_full_disk(tmp_path, bring, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fetch_step.shutil, "copyfile", full)
    with pytest.raises(UserError, match="no space left"):
        bring(_folder(tmp_path / "mine", {"model.safetensors": WEIGHTS}))


def test_failure_keeps_the_old_checkpoint(tmp_path, bring):
    bring(_folder(tmp_path / "good", {"model.safetensors": WEIGHTS}))
    with pytest.raises(UserError):
        bring(_folder(tmp_path / "bad", {"model.safetensors": WEIGHTS[:100]}))


def test_two_at_once_into_the_same_folder(hub, tmp_path):
    """The second is refused while the first is downloading."""
    out, cache = tmp_path / "out", tmp_path / "downloads"
    hub.faults = [Fault("/cdn/", status=503)]
    refused: list[str] = []

    def second(_: float) -> None:
        with pytest.raises(UserError) as caught:
            fetch("hf://org/clip", out, cache=cache)
        refused.append(str(caught.value))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "sleep", lambda wait: _in_thread(second, wait))
        fetch("hf://org/clip", out, cache=cache)
    assert refused and "another process is writing it" in refused[0]
    assert (out / "model.safetensors").read_bytes() == WEIGHTS


def _in_thread(function, *arguments) -> None:
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    thread.join()
