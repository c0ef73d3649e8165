"""Plans of remote headers, merges that read their data over the network: a loopback hub counts bytes and requests."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Iterator

import pytest
import torch
from hub_server import Fault, Hub, Sparse, running_hub
from safetensors.torch import save

from mergeline.merging.checkpoints import remote as registry
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


def header(tensors: dict[str, tuple[int, ...]]) -> Sparse:
    """A file of bf16 tensors of these shapes, of which the header alone is held."""
    entries, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * int(torch.Size(shape).numel())
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return Sparse(struct.pack("<Q", len(text)) + text, 8 + len(text) + end)


def llama_70b(shards: int = 30) -> dict[str, bytes | Sparse]:
    """A repository of the shape of Llama-3-70B: 80 layers in 30 shards, 141 GB."""
    width, inner, keys, tokens = 8192, 28672, 1024, 128256
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (tokens, width)}
    for layer in range(80):
        own = f"model.layers.{layer}."
        tensors |= {
            f"{own}self_attn.q_proj.weight": (width, width),
            f"{own}self_attn.k_proj.weight": (keys, width),
            f"{own}self_attn.v_proj.weight": (keys, width),
            f"{own}self_attn.o_proj.weight": (width, width),
            f"{own}mlp.gate_proj.weight": (inner, width),
            f"{own}mlp.up_proj.weight": (inner, width),
            f"{own}mlp.down_proj.weight": (width, inner),
            f"{own}input_layernorm.weight": (width,),
            f"{own}post_attention_layernorm.weight": (width,),
        }
    tensors |= {"model.norm.weight": (width,), "lm_head.weight": (tokens, width)}
    names, each = list(tensors), -(-len(tensors) // shards)
    parts = [names[i : i + each] for i in range(0, len(names), each)]
    files: dict[str, bytes | Sparse] = {"config.json": CONFIG}
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        files[file] = header({name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files


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
    return sum(seen.sent for seen in hub.bodies("/cdn/") if "safetensors" in seen.path)


# Plans


def test_a_plan_reads_headers_alone_and_says_what_the_local_one_says(hub, here, mergeline):
    local = json.loads(mergeline("plan", *here, "--json").out)
    told = json.loads(mergeline("plan", *family(), "--json").out)
    commits = {name: f"hf://org/{name}@{hub.commit(f'org/{name}')}" for name in NAMES}
    assert told.pop("sources") == commits
    assert told.pop("network")["bytes"] == hub.sent
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
