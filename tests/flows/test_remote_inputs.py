"""Plans of remote headers, merges that read their data over the network: a loopback hub counts bytes and requests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
from hub_server import Fault, Hub, Sparse, running_hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipelines import pipeline_files
from places import GOLDENS
from s3_server import running_s3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sparse_llama import fp8_llama, llama_70b

from mergeline.merging import merge
from mergeline.merging.checkpoints import remote as registry
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.quantised.formats import dequantised
from mergeline.merging.engine import output
from mergeline.merging.errors import UserError
from mergeline.merging.files import JOURNAL
from mergeline.tasks import remote, sources

CONFIG = b'{"model_type": "llama"}'
NAMES = ("base", "a", "b")


def weights(seed: int, rows: int = 64) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{i}.mlp.up_proj.weight": torch.randn(rows, 48, generator=made) for i in range(4)
    } | {"model.norm.weight": torch.randn(48, generator=made)}


def repository(seed: int, **others: bytes) -> dict[str, bytes | Sparse]:
    return {
        "model.safetensors": save(weights(seed), metadata={"format": "pt"}),
        "config.json": CONFIG,
        "README.md": b"no",
        **others,
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with running_hub() as hub:
        for seed, name in enumerate(NAMES):
            hub.repositories[f"org/{name}"] = repository(seed)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(sources, "sleep", lambda seconds: None)
        monkeypatch.setattr(sources, "TRAFFIC", sources.Traffic())
        monkeypatch.setattr(remote, "_BROUGHT", {})
        monkeypatch.setattr(registry, "_DATA", {})
        yield hub


def family(method: str = "task_arithmetic", prefix: str = "hf://org/") -> list[str]:
    return [
        f"--method={method}",
        f"--base={prefix}base",
        f"--expert=a={prefix}a",
        f"--expert=b={prefix}b",
    ]


@pytest.fixture
def here(hub: Hub, tmp_path: Path) -> list[str]:
    """The options of the same family, on this machine."""
    for name in NAMES:
        (tmp_path / "here" / name).mkdir(parents=True)
        for file, body in hub.repositories[f"org/{name}"].items():
            assert isinstance(body, bytes)
            (tmp_path / "here" / name / file).write_bytes(body)
    return family(prefix=f"{tmp_path}/here/")


def data_bytes(hub: Hub) -> int:
    """The bytes of weights that went out, without those that headers are looked for in."""
    first = f"bytes=0-{remote._FIRST_BYTES - 1}"
    return sum(
        seen.sent for seen in hub.bodies("/cdn/") if "safetensors" in seen.path and seen.range != first
    )


# Plans


def test_a_plan_reads_headers_alone_and_says_what_the_local_one_says(hub, here, mergeline):
    local = json.loads(mergeline("plan", *here, "--json").out)
    told = json.loads(mergeline("plan", *family(), "--json").out)
    commits = {name: f"hf://org/{name}@{hub.commit(f'org/{name}')}" for name in NAMES}
    assert told.pop("sources") == commits
    assert told.pop("network")["bytes"] == hub.sent
    assert told.pop("bytes_over_network") == local["bytes_read"]
    assert told.pop("peak_bytes") > local.pop("peak_bytes")  # what is read ahead
    assert told == local
    assert not hub.bodies("README")


def test_headers_are_read_once_for_a_commit(hub, mergeline):
    mergeline("plan", *family())
    hub.seen.clear()
    assert mergeline("plan", *family()).code == 0
    assert {seen.path.split("/")[1] for seen in hub.seen} == {"api"}
    hub.repositories["org/a"] = repository(7)
    hub.seen.clear()
    mergeline("plan", *family())
    assert len(hub.bodies("/cdn/")) == 1


def test_plan_of_70b_reads_kilobytes(hub, mergeline):
    for name in NAMES:
        hub.repositories[f"org/{name}"] = llama_70b() | {"generation_config.json": name.encode()}
    told = json.loads(mergeline("plan", *family("ties"), "--json").out)
    assert not told["problems"]
    assert told["bytes_written"] == 141_107_412_992
    assert told["network"]["bytes"] == hub.sent < 700_000


def test_every_problem_is_told_and_nothing_is_brought(hub, mergeline, tmp_path):
    odd = weights(1)
    odd["model.norm.weight"] = torch.zeros(47)
    hub.repositories["org/a"] = {**repository(1), "model.safetensors": save(odd)}
    del hub.repositories["org/b"]["model.safetensors"]
    outcome = mergeline("plan", *family())
    assert outcome.code == 2
    assert "b: hf://org/b: no checkpoint there" in outcome.out
    hub.seen.clear()
    outcome = mergeline("merge", *family(), "--out", tmp_path / "out")
    assert outcome.code == 2 and "no checkpoint there" in outcome.err and not data_bytes(hub)
    hub.repositories["org/b"] = {**repository(2), "model.safetensors": save({"other": torch.zeros(2)})}
    outcome = mergeline("merge", *family(), "--out", tmp_path / "out")
    assert outcome.code == 2 and data_bytes(hub) < 10_000
    assert outcome.err.count("problem: ") == 2 and "nothing was brought" in outcome.err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (save(weights(1))[:-4], "hf://org/a@.*: model.safetensors: truncated: download it again"),
        (save(weights(1))[:100], "model.safetensors: the header does not fit into the file"),
        (struct.pack("<Q", 200_000_000) + b"{" * 40, "the header does not fit into the file"),
        (Sparse(struct.pack("<Q", 200_000_000) + b"{", 1 << 40), "the header does not fit into the file"),
        (struct.pack("<Q", 24) + b"{" * 24, "malformed safetensors header"),
        (b"", "the header does not fit into the file"),
        (b"GGUF" + bytes(100), "the header does not fit into the file"),
    ],
)
def test_damaged_headers(hub, mergeline, body, message):
    hub.repositories["org/a"]["model.safetensors"] = body
    outcome = mergeline("plan", *family())
    assert outcome.code == 2 and re.search(message, outcome.out), outcome
    assert str(sources.Path.home()) not in outcome.out and "/cache/" not in outcome.out
    assert data_bytes(hub) < 100_000


@pytest.mark.parametrize("status", [401, 403])
def test_gated_repositories_ask_for_a_token(hub, mergeline, status):
    hub.faults = [Fault("/api/models/org/a", status=status)]
    outcome = mergeline("plan", *family())
    assert outcome.code == 2 and f"access denied (HTTP {status})" in outcome.out and "HF_TOKEN" in outcome.out


def test_a_pickle_is_refused(hub, mergeline):
    hub.repositories["org/a"] = {"pytorch_model.bin": b"x" * 50_000, "config.json": CONFIG}
    outcome = mergeline("plan", *family())
    assert "'pytorch_model.bin' is a pickle" in outcome.out and not hub.bodies("pytorch_model.bin")


def test_a_server_that_ignores_ranges_is_never_read_whole_by_a_plan(hub, mergeline, tmp_path, here):
    for name in NAMES:
        hub.web[f"{name}.safetensors"] = save(weights(NAMES.index(name), rows=4096))
    urls = [f"--base={hub.endpoint}/web/base.safetensors", "--method=task_arithmetic"]
    urls += [f"--expert={name}={hub.endpoint}/web/{name}.safetensors" for name in NAMES[1:]]
    assert mergeline("plan", *urls).code == 0
    hub.ranges = False
    outcome = mergeline("plan", *urls)
    assert outcome.code == 2 and outcome.out.count("the server sends no parts of files") == 3
    outcome = mergeline("merge", *urls, "--no-cache", "--out", tmp_path / "out")
    assert outcome.code == 2 and "the server sends no parts of files" in outcome.err
    outcome = mergeline("merge", *urls, "--out", tmp_path / "out")
    assert outcome.code == 0 and "it is brought here whole" in outcome.err


def test_a_tokenizer_that_experts_share_comes_once(hub, mergeline):
    tokens = json.dumps({"model": {"vocab": {"x": 0}}}).encode()
    for name in NAMES:
        hub.repositories[f"org/{name}"]["tokenizer.json"] = tokens
    mergeline("plan", *family())
    assert len(hub.bodies("tokenizer.json")) == 1


# Quantised


def test_a_plan_of_fp8_reads_headers_alone(hub, mergeline):
    for name in NAMES:
        hub.repositories[f"org/{name}"] = fp8_llama() | {"generation_config.json": name.encode()}
    told = json.loads(mergeline("plan", *family("ties"), "--json").out)
    assert not told["problems"] and told["tensors"] == {"merge": 226, "copy": 0}
    assert (
        sum("224 tensors are quantised (224 of FP8 in blocks of 128 x 128" in w for w in told["warnings"])
        == 3
    )
    assert told["bytes_written"] > 15 * 10**9 and told["network"]["bytes"] == hub.sent < 400_000
    shown = mergeline("inspect", "org/a").out
    assert "224 tensors are quantised" in shown and "architecture: llama" in shown


def gguf_repositories(hub: Hub, folder: Path, tokens: int = 3) -> None:
    """The family as GGUF of one file each, with so many tokens in its header."""
    gguf = pytest.importorskip("gguf")
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(NAMES):
        draw, file = torch.Generator().manual_seed(seed), folder / f"{name}.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        for key, value in {"block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 4}.items():
            writer.add_uint32(f"llama.{key}", value)
        writer.add_array("tokenizer.ggml.tokens", [f"token{i}" for i in range(tokens)])
        q8 = gguf.GGMLQuantizationType.Q8_0
        for layer in range(2):
            weight = torch.randn(1024, 1024, generator=draw).numpy()
            writer.add_tensor(f"blk.{layer}.ffn_up.weight", gguf.quants.quantize(weight, q8), raw_dtype=q8)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        hub.repositories[f"org/{name}"] = {"model-Q8_0.gguf": file.read_bytes(), "README.md": b"no"}


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "most"), [(3, 3 * 5000), (20_000, 3 * 800_000)])
def test_a_plan_of_gguf_reads_headers_alone(tokens, most, hub, mergeline, tmp_path):
    gguf_repositories(hub, tmp_path / "files", tokens)
    local = [o.replace("hf://org/", f"{tmp_path}/files/") + ".gguf" for o in family()[1:]]
    expected = json.loads(mergeline("plan", "--method=ties", *local, "--json").out)
    told = json.loads(mergeline("plan", *family("ties"), "--json").out)
    assert not told["problems"] and told["tensors"] == expected["tensors"] == {"merge": 2, "copy": 0}
    size = sum(len(hub.repositories[f"org/{name}"]["model-Q8_0.gguf"]) for name in NAMES)
    assert told["network"]["bytes"] == hub.sent < most and size > 3 * 2_000_000
    assert told["bytes_over_network"] >= expected["bytes_read"]
    header = open_checkpoint(tmp_path / "files/a.gguf")
    folders = [*(tmp_path / "cache").rglob("model-Q8_0.gguf")]
    assert len(folders) == 3 and max(file.stat().st_size for file in folders) <= min(
        info.start for info in header.tensors.values()
    )


@pytest.mark.slow
def test_gguf_is_merged_over_the_network_as_it_is_here(hub, mergeline, tmp_path):
    gguf_repositories(hub, tmp_path / "files")
    local = [o.replace("hf://org/", f"{tmp_path}/files/") + ".gguf" for o in family()[1:]]
    here = merged(mergeline, tmp_path / "local", "--method=average", *local)
    there = merged(mergeline, tmp_path / "there", *family("average"), "--no-cache")
    assert there["output"]["digest"] == here["output"]["digest"]
    assert not list((tmp_path / "cache").rglob("checkpoints/*"))


@pytest.mark.parametrize("cut", [0, 3, 30, 100])
def test_damaged_gguf_is_refused(cut, hub, mergeline, tmp_path):
    gguf_repositories(hub, tmp_path / "files")
    hub.repositories["org/a"] = {"x.gguf": (tmp_path / "files/a.gguf").read_bytes()[:cut]}
    outcome = mergeline("inspect", "org/a")
    assert outcome.code == 2 and "malformed GGUF header" in outcome.err and "x.gguf" in outcome.err
    assert outcome.err.count("\n") == 1 and not list((tmp_path / "cache").rglob("*.partial"))


def test_settings_of_a_few_bytes_are_read_for_a_plan_and_nothing_larger(hub, mergeline):
    with safe_open(GOLDENS / "quantised.safetensors", "pt") as file:
        config = json.loads(file.metadata()["configs"])["nf4"]
        names = [name for name in file.keys() if name.startswith("nf4/")]
        tensors = {name.removeprefix("nf4/"): file.get_tensor(name) for name in names}
    settings = next(n for n in tensors if ".quant_state." in n)
    for seed, name in enumerate(NAMES):
        more = {
            "config.json": json.dumps({"quantization_config": config}).encode(),
            "README.md": bytes([seed]),
        }
        hub.repositories[f"org/{name}"] = {
            "model.safetensors": save(tensors | {"n": torch.ones(seed + 1)}),
            **more,
        }
    found = json.loads(mergeline("inspect", "org/a", "--json").out)
    assert any("of NF4" in note for note in found["notes"]), found["notes"]
    assert data_bytes(hub) == tensors[settings].nbytes
    headers = remote.remote_headers(sources.locate("hf://org/a"), "hf://org/a")
    remote.let_data_be_read(headers, most=tensors[settings].nbytes - 1)
    for read in (
        open_checkpoint(headers.folder).digest,
        lambda: dequantised(open_checkpoint(headers.folder)),
    ):
        with pytest.raises(UserError, match="its headers alone are here"):
            read()


# Looking


def test_a_remote_checkpoint_is_inspected_from_headers_alone(hub, here, mergeline, tmp_path):
    hub.repositories["org/a"] |= {"tokenizer.json": b'{"model": {"vocab": {}}}', "vocab.json": b"{}" * 9000}
    (tmp_path / "here/a/tokenizer.json").write_bytes(hub.repositories["org/a"]["tokenizer.json"])
    (tmp_path / "here/a/vocab.json").write_bytes(b"{}" * 9000)
    local = json.loads(mergeline("inspect", tmp_path / "here/a", "--table", "--json").out)
    told = json.loads(mergeline("inspect", "org/a", "--table", "--json").out)
    assert told.pop("path") == f"hf://org/a@{hub.commit('org/a')}" and local.pop("path")
    assert told.pop("network") == {"bytes": hub.sent, "answers": len(hub.seen)}
    assert hub.sent < 10_000 and not data_bytes(hub) and not hub.bodies("vocab.json")
    assert told.pop("digest") is None and local.pop("digest")
    assert told.pop("unread") == ["vocab.json"] and local.pop("unread") == []
    assert told == local
    assert told["architecture"] == "llama" and told["layers"] == {"model.layers": 4}
    assert told["companions"] == ["config.json", "tokenizer.json", "vocab.json"]
    assert told["table"][0] == {
        "tensor": "model.layers.0.mlp.up_proj.weight", "dtype": "F32", "shape": [64, 48], "role": "mlp up",
    }  # fmt: skip
    shown = mergeline("inspect", "org/a").out
    assert "not read: values, vocab.json; --no-cache reads them over the network" in shown
    assert "sha256:" not in shown and f"network: {hub.sent / 1024:.4g} KiB in " in shown


def test_inspect_of_70b_reads_kilobytes(hub, mergeline):
    hub.repositories["org/a"] = llama_70b()
    told = json.loads(mergeline("inspect", "hf://org/a", "--json").out)
    assert (told["tensors"], told["bytes"]) == (723, 141_107_412_992)
    assert told["layers"] == {"model.layers": 80} and hub.sent < 300_000


def test_a_file_of_a_web_server_is_inspected(hub, mergeline):
    hub.web["a.safetensors"] = save(weights(1))
    told = json.loads(mergeline("inspect", f"{hub.endpoint}/web/a.safetensors", "--json").out)
    assert told["tensors"] == 5 and told["companions"] == [] and hub.sent == remote._FIRST_BYTES
    hub.ranges = False
    outcome = mergeline("inspect", f"{hub.endpoint}/web/a.safetensors")
    assert outcome.code == 2 and "the server sends no parts of files" in outcome.err


def test_the_digest_of_a_remote_checkpoint_is_read_over_the_network(hub, here, mergeline, tmp_path):
    local = json.loads(mergeline("inspect", tmp_path / "here/a", "--json").out)
    told = json.loads(mergeline("inspect", "org/a", "--no-cache", "--json").out)
    assert told["digest"] == local["digest"] and told["unread"] == []
    assert data_bytes(hub) == local["bytes"] and not list((tmp_path / "cache").rglob("checkpoints/*"))


@pytest.mark.parametrize(
    "made", [lambda seed: pipeline_files(seed, width=256), lambda seed: sentence_model(seed)]
)
def test_remote_pipelines_are_inspected(hub, mergeline, tmp_path, made):
    for seed, name in enumerate(NAMES):
        hub.repositories[f"org/{name}"] = made(seed)
    lay_down(hub, tmp_path / "here")
    local = json.loads(mergeline("inspect", tmp_path / "here/a", "--json").out)
    told = json.loads(mergeline("inspect", "org/a", "--json").out)
    assert told["components"] == local["components"] and told["components"]
    assert told["companions"] == local["companions"] and hub.sent < 80_000


def test_remote_checkpoints_are_compared_by_headers_and_the_rest_is_said(hub, here, mergeline, tmp_path):
    odd = weights(1) | {"model.norm.weight": torch.zeros(47), "more": torch.zeros(3)}
    hub.repositories["org/a"]["model.safetensors"] = save(odd)
    told = json.loads(mergeline("diff", "org/base", "org/a", "--json").out)
    assert [row["what"] for row in told["differences"]] == ["shape", "missing"]
    assert told["differences"][1]["words"] == f"only in hf://org/a@{hub.commit('org/a')}"
    assert told["unread"] == 4 and told["unread_bytes"] == 4 * 64 * 48 * 4
    assert told["norm"] is None and told["relative_norm"] is None
    assert told["network"]["bytes"] == hub.sent < 20_000 and not data_bytes(hub)
    shown = mergeline("diff", tmp_path / "here/base", "hf://org/b").out
    assert "the same names, dtypes and shapes" in shown and "bit for bit" not in shown
    assert "values of 5 tensors, which may differ; --no-cache reads them over the network (48.19 KiB" in shown


def test_values_of_remote_checkpoints_are_compared_over_the_network(hub, here, mergeline, tmp_path):
    local = json.loads(mergeline("diff", tmp_path / "here/base", tmp_path / "here/a", "--json").out)
    told = json.loads(mergeline("diff", "org/base", "org/a", "--no-cache", "--json").out)
    assert told["differences"] == local["differences"] and told["unread"] == 0
    assert told["relative_norm"] == local["relative_norm"] > 1
    assert data_bytes(hub) == 2 * sum(t.nbytes for t in weights(0).values())  # each tensor comes once
    assert "bit for bit" in mergeline("diff", "org/base", tmp_path / "here/base", "--no-cache").out
    assert not list((tmp_path / "cache").rglob("checkpoints/*"))


@pytest.mark.parametrize("stream", [True, False])
def test_a_remote_family_is_described_as_a_local_one(stream, hub, here, mergeline, tmp_path):
    local = json.loads(mergeline("inspect", *here[1:], "--json").out)
    told = json.loads(mergeline("inspect", *family()[1:], "--json", *["--no-cache"] * stream).out)
    assert told.pop("network")["bytes"] == hub.sent > 3 * sum(t.nbytes for t in weights(0).values())
    assert told.pop("base") == f"hf://org/base@{hub.commit('org/base')}" or not stream
    assert told | {"base": ""} == local | {"base": ""}
    assert bool(list((tmp_path / "cache").rglob("checkpoints/*"))) != stream


@pytest.mark.parametrize("command", [["inspect", "org/a"], ["diff", "org/base", "org/a"], ["inspect"]])
def test_what_is_wrong_with_remote_checkpoints_is_told_before_data_is_brought(command, hub, mergeline):
    command = command if command[1:] else ["inspect", *family()[1:]]
    odd = weights(1) | {"model.norm.weight": torch.zeros(47)}
    hub.repositories["org/a"]["model.safetensors"] = save(odd)[:-4]
    outcome = mergeline(*command)
    assert (
        outcome.code == 2 and "model.safetensors: truncated" in outcome.err and "hf://org/a@" in outcome.err
    )
    assert "/cache/" not in outcome.err and outcome.err.count("\n") == 1 and not data_bytes(hub)
    hub.repositories["org/a"] = {"pytorch_model.bin": b"x" * 50_000, "config.json": CONFIG}
    assert "'pytorch_model.bin' is a pickle" in mergeline(*command).err
    hub.faults = [Fault("/api/models/org/a", status=401)]
    outcome = mergeline(*command)
    assert outcome.code == 2 and "access denied (HTTP 401)" in outcome.err and outcome.err.count("\n") == 1


def test_a_file_that_changes_while_it_is_compared_is_noticed(hub, memory, mergeline, monkeypatch):
    from mergeline.merging import describe as family_of
    from mergeline.tasks import inspection

    read = inspection.Checkpoint.read

    def changing(self, name):
        memory.pipe("/a/model.safetensors", save(weights(9)))
        return read(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(inspection.Checkpoint, "read", changing)
        outcome = mergeline("diff", "memory://base", "memory://a", "--no-cache")
    assert outcome.code == 2 and "was changed while it was read" in outcome.err
    describe_family = family_of.describe_family

    def described(*args, **options):
        found = describe_family(*args, **options)
        memory.pipe("/a/model.safetensors", save(weights(10)))
        return found

    monkeypatch.setattr(family_of, "describe_family", described)
    outcome = mergeline("inspect", *family(prefix="memory://")[1:], "--no-cache")
    assert outcome.code == 2 and "was changed while it was read" in outcome.err


# Pipelines


def sentence_model(seed: int) -> dict[str, bytes | Sparse]:
    """A model of sentence-transformers, of which one module has weights."""
    package = "sentence_transformers.models"
    listed = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    dense = torch.randn(400, 48, generator=torch.Generator().manual_seed(seed))
    return repository(seed) | {
        "modules.json": json.dumps(
            [{"path": path, "type": f"{package}.{kind}"} for path, kind in listed]
        ).encode(),
        "1_Pooling/config.json": b"{}",
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": save({"linear.weight": dense}),
    }


def lay_down(hub: Hub, root: Path) -> None:
    """The repositories of a family, on this machine."""
    for name in NAMES:
        for file, body in hub.repositories[f"org/{name}"].items():
            assert isinstance(body, bytes)
            (root / name / file).parent.mkdir(parents=True, exist_ok=True)
            (root / name / file).write_bytes(body)


@pytest.mark.parametrize("made", [lambda seed: pipeline_files(seed, width=256), sentence_model])
def test_pipelines_are_planned_and_merged_over_the_network(hub, mergeline, tmp_path, made):
    for seed, name in enumerate(NAMES):
        hub.repositories[f"org/{name}"] = made(seed)
    lay_down(hub, tmp_path / "here")
    here = family(prefix=f"{tmp_path}/here/")
    local = json.loads(mergeline("plan", *here, "--json").out)
    told = json.loads(mergeline("plan", *family(), "--json").out)
    assert not told["problems"] and told["network"]["bytes"] == hub.sent < 80_000
    assert told["bytes_over_network"] == local["bytes_read"] and told["tensors"] == local["tensors"]
    assert [w for w in told["warnings"] if "not carried" not in w] == [
        w for w in local["warnings"] if "not carried" not in w
    ]
    hub.seen.clear()
    assert mergeline("plan", *family()).code == 0
    assert {seen.path.split("/")[1] for seen in hub.seen} == {"api"}
    for out, options in {"local": here, "streamed": [*family(), "--no-cache"], "brought": family()}.items():
        outcome = mergeline("merge", *options, "--out", tmp_path / out)
        assert outcome.code == 0, outcome.err
        files = {path.relative_to(tmp_path / out) for path in (tmp_path / out).rglob("*") if path.is_file()}
        assert files == {
            f.relative_to(tmp_path / "local") for f in (tmp_path / "local").rglob("*") if f.is_file()
        }
        for file in files:
            if file.suffix == ".safetensors" or file.parent.name:
                assert (tmp_path / out / file).read_bytes() == (tmp_path / "local" / file).read_bytes()
    assert mergeline("verify", tmp_path / "streamed").code == 0


def test_a_pipeline_that_changes_while_it_is_read_is_noticed(hub, memory, mergeline, tmp_path):
    for seed, name in enumerate(NAMES):
        for file, body in sentence_model(seed).items():
            memory.pipe(f"/{name}/{file}", body)
    options = family(prefix="memory://")
    assert mergeline("plan", *options).code == 0
    memory.pipe("/a/2_Dense/model.safetensors", save({"linear.weight": torch.zeros(401, 48)}))
    outcome = mergeline("plan", *options)
    assert outcome.code == 2 and "2_Dense/linear.weight" in outcome.out


# Names


def test_a_repository_is_named_without_its_scheme(hub, mergeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = json.loads(mergeline("plan", *family(prefix="org/"), "--json").out)
    assert told["sources"]["a"] == f"hf://org/a@{hub.commit('org/a')}"
    (tmp_path / "recipe.yaml").write_text(
        "method: task_arithmetic\nbase: org/base\nexperts: {a: org/a, b: hf://org/b@main}\n"
    )
    assert json.loads(mergeline("plan", "--recipe", "recipe.yaml", "--json").out) == {
        **told,
        "network": {"bytes": hub.sent, "answers": len(hub.seen)},
    }
    (tmp_path / "org" / "a").mkdir(parents=True)
    outcome = mergeline("plan", *family(prefix="org/"))
    assert outcome.code == 2 and "org/a: needs model.safetensors" in outcome.out


def test_a_path_that_is_mistyped_is_told_as_one(hub, mergeline):
    outcome = mergeline("plan", "--method=average", "--expert=a=experts/none", "--expert=b=org/b")
    assert outcome.code == 2
    assert "a: experts/none: no such file or folder, and as a repository: hf://experts/none" in outcome.out


def test_what_looks_like_a_path_is_asked_for_once(hub, mergeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.faults = [Fault("experts/none", status=503) for _ in range(3)]
    (tmp_path / "experts").mkdir()
    outcome = mergeline("plan", "--method=average", "--expert=a=experts/none", "--expert=b=org/b")
    assert outcome.code == 2 and "a: experts/none: no such file or folder" in outcome.out
    assert sum("experts/none" in request.path for request in hub.seen) == 1


def test_modules_of_mergekit_that_differ_are_planned_from_headers(hub, mergeline, tmp_path):
    def module(expert: str) -> dict[str, Any]:
        return {"models": [{"model": f"org/{expert}", "parameters": {"weight": 1.0}}]}

    config = {"merge_method": "task_arithmetic", "base_model": "org/base"}
    config["modules"] = {"model.layers": module("a"), "default": module("b")}
    (tmp_path / "mergekit.yml").write_text(json.dumps(config))
    told = json.loads(mergeline("plan", "--recipe", tmp_path / "mergekit.yml", "--table", "--json").out)
    assert not told["problems"] and not data_bytes(hub)
    weights = {row["tensor"]: row["params"]["weights"] for row in told["table"]}
    assert weights.pop("model.norm.weight") == [0.0, 1.0]
    assert len(weights) == 4 and all(own == [1.0, 0.0] for own in weights.values())
    del hub.repositories["org/base"]
    for command in (["plan"], ["merge", "--out", tmp_path / "out"]):
        outcome = mergeline(*command, "--recipe", tmp_path / "mergekit.yml")
        assert (
            outcome.code == 2
            and "which tensors are whose is seen from org/base: hf://org/base" in outcome.err
        )
        assert "no such repository" in outcome.err and outcome.err.count("\n") == 1


# Data over the network


def merged(mergeline, out: Path, *options: object) -> dict:
    outcome = mergeline("merge", *options, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@pytest.mark.parametrize("method", ["average", "ties", "cart", "lines(dare(ties))"])
def test_a_merge_over_the_network_is_bit_identical_and_keeps_no_copy(hub, here, mergeline, tmp_path, method):
    here[0] = f"--method={method}"
    local = merged(mergeline, tmp_path / "local", *here)
    hub.seen.clear()
    there = merged(mergeline, tmp_path / "there", *family(method), "--no-cache")
    assert there["output"] == local["output"]
    assert (tmp_path / "there" / "config.json").read_bytes() == CONFIG
    for name, origin in there["recipe"]["experts"].items():
        pinned = f"hf://org/{name}@{hub.commit(f'org/{name}')}"
        assert origin == {**local["recipe"]["experts"][name], "path": pinned, "source": pinned}
        assert pinned in (tmp_path / "there" / "README.md").read_text()
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert kept < 3 * 1000


@pytest.mark.parametrize(
    ("method", "least", "most"),
    [("average", 1, 1), ("ties", 1, 1), ("breadcrumbs", 1, 1), ("cart", 1, 1.7), ("ram", 0.5, 1)],
)
def test_the_plan_says_about_how_many_bytes_come_over_the_network(
    hub, mergeline, tmp_path, method, least, most
):
    told = json.loads(mergeline("plan", *family(method), "--json").out)
    merged(mergeline, tmp_path / "out", *family(method), "--no-cache")
    assert least <= data_bytes(hub) / told["bytes_over_network"] <= most


def test_other_commands_of_a_recipe_read_over_the_network(hub, here, mergeline, tmp_path):
    def made(command: str, options: list[str], *more: str) -> dict[str, bytes]:
        out = tmp_path / "out"
        outcome = mergeline(command, *options, *more, "--out", out)
        assert outcome.code == 0, outcome.err
        found = {path.name: path.read_bytes() for path in out.rglob("*.safetensors")}
        shutil.rmtree(out)
        return found

    for command, more in (("extract-lora", ["--rank=4"]), ("sweep", ["--grid=scale=0.3,0.5"])):
        assert made(command, here, *more) == made(command, family(), *more, "--no-cache")
    here[0] = "--method=emr"
    assert made("compress", here) == made("compress", family("emr"), "--no-cache")
    assert not list((tmp_path / "cache").rglob("checkpoints/*"))


def test_tokens_with_other_ids_are_told_to_be_many_questions(hub, mergeline):
    tokens = 1200

    def model(ids: list[int], seed: int) -> dict[str, bytes | Sparse]:
        vocab = {f"t{id}": row for row, id in enumerate(ids)}
        state = {"model.embed_tokens.weight": torch.full((tokens, 2), float(seed))} | weights(seed)
        return repository(seed) | {
            "model.safetensors": save(state),
            "tokenizer.json": json.dumps({"model": {"vocab": vocab}}).encode(),
        }

    for seed, name in enumerate(NAMES):
        order = range(tokens) if name != "b" else range(tokens - 1, -1, -1)
        hub.repositories[f"org/{name}"] = model(list(order), seed)
    told = mergeline("plan", *family()).out
    assert "'b': 'model.embed_tokens.weight' lies in 1200 pieces" in told
    assert "'a': 'model.embed" not in told


def test_an_adapter_over_the_network_is_merged_as_a_local_one(hub, here, mergeline, tmp_path):
    name = "model.layers.0.mlp.up_proj"
    factors = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(2, 48),
        f"base_model.model.{name}.lora_B.weight": torch.randn(64, 2),
    }
    config = {"peft_type": "LORA", "lora_alpha": 2, "r": 2, "base_model_name_or_path": "org/base"}
    files = {
        "adapter_model.safetensors": save(factors),
        "adapter_config.json": json.dumps(config).encode(),
    }
    hub.repositories["org/a"] = files
    for file in (tmp_path / "here" / "a").iterdir():
        file.unlink()
    for file_name, body in files.items():
        (tmp_path / "here" / "a" / file_name).write_bytes(body)
    local = merged(mergeline, tmp_path / "local", *here)
    told = json.loads(mergeline("plan", *family(), "--json").out)
    hub.seen.clear()
    there = merged(mergeline, tmp_path / "there", *family(), "--no-cache")
    assert there["output"] == local["output"]
    assert data_bytes(hub) == pytest.approx(told["bytes_over_network"], rel=0.02)
    hub.repositories["org/a"]["adapter_config.json"] = json.dumps(
        config | {"base_model_name_or_path": "org/other"}
    ).encode()
    assert "was trained on 'org/other', the base is 'org/base'" in mergeline("plan", *family()).out


def test_shards_are_read_over_the_network(hub, here, mergeline, tmp_path):
    tensors = weights(1)
    names = list(tensors)
    parts = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    weight_map = {name: file for file, part in parts.items() for name in part}
    hub.repositories["org/a"] = {
        **{file: save({name: tensors[name] for name in part}) for file, part in parts.items()},
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "config.json": CONFIG,
    }
    local = merged(mergeline, tmp_path / "local", *here)
    there = merged(mergeline, tmp_path / "there", *family(), "--no-cache")
    assert there["output"]["digest"] == local["output"]["digest"]
    del hub.repositories["org/a"]["model-2.safetensors"]
    assert "'model-2.safetensors' is missing" in mergeline("plan", *family()).out


def test_connections_that_break_are_asked_for_the_rest(hub, here, mergeline, tmp_path):
    local = merged(mergeline, tmp_path / "local", *here)
    merged(mergeline, tmp_path / "other", *family("average"), "--no-cache")
    hub.faults = [Fault("/cdn/", drop_after=5000), Fault("/cdn/", status=403), Fault("/cdn/", status=503)]
    there = merged(mergeline, tmp_path / "there", *family(), "--no-cache", "--workers=1")
    assert there["output"] == local["output"] and not hub.faults


def test_the_token_goes_no_further_than_the_hub(hub, mergeline, tmp_path):
    hub.private = True
    merged(mergeline, tmp_path / "out", *family(), "--no-cache")
    assert {seen.authorization for seen in hub.seen if "127.0.0.1" in seen.host} == {"Bearer hf_secret"}
    assert {seen.authorization for seen in hub.seen if "localhost" in seen.host} == {None}
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hf_secret" not in written and b"signature=" not in written


# What changes meanwhile


def web_family(hub: Hub) -> list[str]:
    for i, name in enumerate(NAMES):
        hub.web[f"{name}.safetensors"] = save(weights(i))
    web = f"{hub.endpoint}/web"
    experts = [f"--expert={name}={web}/{name}.safetensors" for name in NAMES[1:]]
    return ["--method=task_arithmetic", f"--base={web}/base.safetensors", *experts]


def test_a_file_of_a_web_server_that_changes_while_it_is_read_is_noticed(hub, mergeline, tmp_path):
    options = web_family(hub)
    out = tmp_path / "out"
    merged(mergeline, out, *options, "--no-cache")
    before = (out / "model.safetensors").read_bytes()

    class Changing(output.FileInputs):
        def stored(self, *place):
            hub.web["a.safetensors"] = save(weights(9))
            return super().stored(*place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "FileInputs", Changing)
        outcome = mergeline("merge", *options, "--out", out, "--no-cache")
    assert outcome.code == 2 and "a.safetensors: was changed while it was read" in outcome.err
    assert (out / "model.safetensors").read_bytes() == before
    again = merged(mergeline, out, *options, "--no-cache")
    assert again["recipe"]["experts"]["a"]["path"] == f"{hub.endpoint}/web/a.safetensors"
    assert (out / "model.safetensors").read_bytes() != before


@pytest.fixture
def memory(hub: Hub) -> Iterator[Any]:
    import fsspec

    filesystem = fsspec.filesystem("memory")
    for name in NAMES:
        for file, body in hub.repositories[f"org/{name}"].items():
            filesystem.pipe(f"/{name}/{file}", body)
    yield filesystem
    filesystem.rm("/", recursive=True)


def test_other_file_systems_are_read_in_parts(hub, here, memory, mergeline, tmp_path):
    local = merged(mergeline, tmp_path / "local", *here)
    options = family(prefix="memory://")
    told = json.loads(mergeline("plan", *options, "--json").out)
    assert told["sources"]["a"] == "memory://a" and told["network"]["bytes"] < 3 * 5000
    there = merged(mergeline, tmp_path / "there", *options, "--no-cache")
    assert there["output"] == local["output"]


def test_s3_is_read_in_parts(hub, here, mergeline, tmp_path, monkeypatch):
    local = merged(mergeline, tmp_path / "local", *here)
    with running_s3("models") as bucket:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S3CR3T")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in NAMES:
            for file, body in hub.repositories[f"org/{name}"].items():
                bucket.objects[f"{name}/{file}"] = body
        options = family(prefix="s3://models/")
        assert json.loads(mergeline("inspect", "s3://models/a", "--json").out)["tensors"] == 5
        assert bucket.sent < remote._FIRST_BYTES + 100
        bucket.sent = 0
        told = json.loads(mergeline("plan", *options, "--json").out)
        assert told["sources"]["a"] == "s3://models/a"
        assert bucket.sent < 3 * (remote._FIRST_BYTES + 100)
        bucket.sent = 0
        there = merged(mergeline, tmp_path / "there", *options, "--no-cache")
        assert there["output"] == local["output"]
        assert bucket.sent < 1.1 * told["bytes_over_network"] + 3 * remote._FIRST_BYTES
        assert "bit-identical" in mergeline("verify", tmp_path / "there").out
        bucket.objects["a/model.safetensors"] = save(weights(9))
        assert "is no longer the 'a'" in mergeline("verify", tmp_path / "there").err
        assert "s3://models/none: not found" in mergeline("plan", *options, "--expert=c=s3://models/none").out


def test_a_file_of_another_file_system_that_changes_is_noticed(hub, memory, mergeline, tmp_path):
    class Changing(output.FileInputs):
        def stored(self, *place):
            memory.pipe("/a/model.safetensors", save(weights(9)))
            return super().stored(*place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "FileInputs", Changing)
        outcome = mergeline("merge", *family(prefix="memory://"), "--no-cache", "--out", tmp_path / "out")
    assert outcome.code == 2 and "was changed while it was read" in outcome.err
    assert not (tmp_path / "out").exists()


# Afterwards


def test_verify_reads_again_what_was_read_over_the_network(hub, mergeline, tmp_path):
    out = tmp_path / "out"
    merged(mergeline, out, *family(), "--no-cache")
    commit = hub.commit("org/a")
    hub.seen.clear()
    outcome = mergeline("verify", out)
    assert outcome.code == 0 and "bit-identical" in outcome.out
    assert f"hf://org/a@{commit} was read over the network" in outcome.out
    assert data_bytes(hub) < 3 * len(hub.repositories["org/a"]["model.safetensors"])
    assert mergeline("verify", out, "--no-merge").code == 0
    hub.repositories["org/a"] = repository(8)
    outcome = mergeline("verify", out)
    assert outcome.code == 2 and f"hf://org/a@{commit}: no such revision" in outcome.err


def test_verify_notices_another_file_at_the_same_address(hub, mergeline, tmp_path):
    merged(mergeline, tmp_path / "out", *web_family(hub), "--no-cache")
    assert mergeline("verify", tmp_path / "out").code == 0
    hub.web["a.safetensors"] = save(weights(9))
    outcome = mergeline("verify", tmp_path / "out")
    assert outcome.code == 2
    assert f"{hub.endpoint}/web/a.safetensors: is no longer the 'a' that was read for it" in outcome.err


def test_verify_brings_a_commit_that_is_no_longer_here(hub, mergeline, tmp_path):
    merged(mergeline, tmp_path / "out", *family(prefix="org/"))
    shutil.rmtree(tmp_path / "cache")
    outcome = mergeline("verify", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert f"hf://org/a@{hub.commit('org/a')} was read over the network" in outcome.out


def test_headers_are_never_read_for_data(hub, mergeline, tmp_path):

    from mergeline.merging.checkpoints.checkpoint import open_checkpoint
    from mergeline.merging.errors import UserError

    folder = remote.remote_headers(sources.locate("hf://org/a"), "hf://org/a").folder
    headers = open_checkpoint(folder)
    assert headers.nbytes == sum(tensor.nbytes for tensor in weights(1).values())
    for read in (headers.digest, lambda: headers.read("model.norm.weight")):
        with pytest.raises(UserError, match="hf://org/a@.*: its headers alone are here.*--no-cache"):
            read()
    with pytest.raises(UserError, match="its headers alone are here"):
        merge({"method": "average", "experts": {"a": folder}}, tmp_path / "out")
    with pytest.raises(SafetensorError):
        safe_open(folder / "model.safetensors", framework="pt")


@pytest.mark.slow
def test_a_merge_that_was_killed_reads_the_rest_alone(hub, mergeline, tmp_path):
    tensors, size = 12, 4 * 64 * 1024
    for i, name in enumerate(NAMES):
        made = torch.Generator().manual_seed(i)
        state = {f"layers.{n:02}.weight": torch.randn(64, 1024, generator=made) for n in range(tensors)}
        hub.repositories[f"org/{name}"] = {"model.safetensors": save(state), "config.json": CONFIG}
    out = tmp_path / "out"
    options = [*family(), "--no-cache", "--workers", "1"]
    command = [sys.executable, "-m", "mergeline.flows.cli", "merge", *options, "--out", str(out)]
    hub.pause = 0.05
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as running:
        journal = tmp_path / ".out.partial" / JOURNAL
        deadline = time.monotonic() + 60
        while not journal.exists() or journal.read_text().count('"tensor"') < 4:
            assert running.poll() is None and time.monotonic() < deadline, running.communicate()
            time.sleep(0.02)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    done = journal.read_text().count('"tensor"')
    assert 4 <= done < tensors
    hub.pause = 0.0
    hub.seen.clear()
    there = merged(mergeline, out, *options)
    assert data_bytes(hub) == 3 * size * (tensors - done)
    monolithic = merged(mergeline, tmp_path / "once", *options)
    assert monolithic["output"]["digest"] == there["output"]["digest"]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
ENTRIES = st.fixed_dictionaries(
    {
        "rfilename": st.sampled_from(
            ["model.safetensors", "config.json", "../x", "model.safetensors.index.json"]
        )
        | JUNK
    },
    optional={"size": JUNK | st.integers(0, 3000), "blobId": JUNK, "lfs": JUNK | st.just({"sha256": 3})},
)
LISTINGS = st.one_of(
    JUNK,
    st.fixed_dictionaries(
        {"sha": st.just("a" * 40) | JUNK, "siblings": st.lists(ENTRIES | JUNK, max_size=4) | JUNK}
    ),
)
RANGES = st.one_of(
    st.from_regex(r"bytes (\d{1,5}-\d{1,5}|\*)/(\d{1,30}|\*)", fullmatch=True),
    st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=9),
)
FAULTS = st.one_of(
    st.builds(lambda listing: Fault("/api/", body=json.dumps(listing).encode()), LISTINGS),
    st.builds(lambda told: Fault("/cdn/", headers={"Content-Range": told}), RANGES),
    st.builds(lambda body: Fault("/cdn/", body=body), st.binary(max_size=40)),
    st.builds(lambda sent: Fault("/cdn/", truncate=sent), st.integers(0, 600)),
    st.builds(lambda body: Fault("/config.json", body=body), st.binary(max_size=9)),
)


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(FAULTS, min_size=1, max_size=3), at=st.integers(0, 496))
def test_fuzzed_answers(faults, at, hub, tmp_path):
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    body = bytearray(save(weights(1)))
    body[at] ^= 1 << at % 8
    hub.repositories["org/a"] = {"model.safetensors": bytes(body), "config.json": CONFIG}
    hub.faults = faults
    try:
        open_checkpoint(remote.remote_headers(sources.locate("hf://org/a"), "hf://org/a").folder)
    except UserError as error:
        assert "\n" not in str(error)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.endswith(".partial")]
