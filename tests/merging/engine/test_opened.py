"""Merged folders as other programs open them: transformers, lm-eval's command line, and what vLLM's loader reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_language_model import TOKENS, save_experts, save_model, save_tasks, skill
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mergeline.evaluation.language import Language, LanguageEvaluator, load_model
from mergeline.merging import merge, merge_state_dicts

SKILLS = {"one": skill(0), "two": skill(14)}


def make_family(folder: Path, **config: Any) -> dict[str, Any]:
    """A recipe's base and experts; and tasks/."""
    save_experts(folder, save_model(folder / "base", 0, **config), SKILLS)
    save_tasks(folder / "tasks", SKILLS)
    return {"base": folder / "base", "experts": {name: folder / name for name in SKILLS}}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_family(tmp_path_factory.mktemp("family"), tie_word_embeddings=request.param)


@pytest.mark.parametrize("method", ["task_arithmetic", "slerp", "dare", "tsv_merge"])
@pytest.mark.parametrize("shard_size", [None, 9000])
def test_transformers_computes_what_the_state_dict_computes(method, shard_size, family, tmp_path):
    merge({"method": method, **family, "shard_size": shard_size}, tmp_path / "out")
    base, *experts = (
        load_file(p / "model.safetensors") for p in (family["base"], *family["experts"].values())
    )
    expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(family["base"]))
    expected.load_state_dict(merge_state_dicts(method, dict(zip(SKILLS, experts)), base), strict=False)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(len(TOKENS))[None]
    with torch.inference_mode():
        assert torch.equal(found(ids).logits, expected(ids).logits)
        assert not torch.equal(
            found(ids).logits, AutoModelForCausalLM.from_pretrained(family["base"])(ids).logits
        )


@pytest.mark.parametrize(("dtype", "shard_size"), [("bfloat16", None), ("float16", 9000), (None, 9000)])
def test_the_folder_is_what_vllm_loads(dtype, shard_size, family, tmp_path):
    """What its DefaultModelLoader reads, from https://github.com/vllm-project/vllm.

    It takes *.safetensors, of which an index drops those that it does not name; prefers consolidated*.safetensors;
    looks up every stored name among the parameters, where a tied head is none; and has config.json say the dtype.
    Configuration, tokenizer and generation defaults are those that transformers finds.
    """
    out = tmp_path / "out"
    merge({"method": "task_arithmetic", **family, "dtype": dtype, "shard_size": shard_size}, out)
    files = sorted(out.glob("*.safetensors"))
    stored = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            assert not stored.keys() & set(opened.keys())
            stored |= {name: opened.get_tensor(name) for name in opened.keys()}
    assert not [
        f.name for f in out.iterdir() if f.suffix in (".bin", ".pt") or f.stem.startswith("consolidated")
    ]
    if shard_size:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
        assert index["weight_map"].keys() == stored.keys()
        assert {out / name for name in index["weight_map"].values()} == set(files) and len(files) > 1
    config = AutoConfig.from_pretrained(out)
    parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        n: p.shape for n, p in parameters.items()
    }
    assert ("lm_head.weight" in stored) != config.tie_word_embeddings
    written = json.loads((out / "config.json").read_text())
    named = written.get("torch_dtype") or written["dtype"]
    assert named == (dtype or "float32") and {tensor.dtype for tensor in stored.values()} == {
        getattr(torch, named)
    }
    assert written["architectures"] == ["LlamaForCausalLM"] and written["vocab_size"] == len(TOKENS)
    assert GenerationConfig.from_pretrained(out).eos_token_id == 2
    assert AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"] == [
        TOKENS.index("w1"),
        TOKENS.index("w2"),
    ]
    assert AutoTokenizer.from_pretrained(out).chat_template


@pytest.mark.slow
def test_lm_evals_command_line_finds_what_the_pipeline_finds(tmp_path):
    merge({"method": "average", **make_family(tmp_path)}, tmp_path / "out")
    tasks = [*SKILLS, "prose"]
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--tasks",
        ",".join(tasks),
        "--device",
        "cpu",
    ]
    command += [
        "--model_args",
        f"pretrained={tmp_path / 'out'},dtype=float32",
        "--include_path",
        tmp_path / "tasks",
    ]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command += ["--output_path", tmp_path / "results.json"]
    subprocess.run(command, check=True, capture_output=True, env=offline)
    [results] = tmp_path.glob("results*.json")
    theirs = json.loads(results.read_text())["results"]
    language = Language(tasks=str(tmp_path / "tasks"), suites={"skills": [*SKILLS]}, perplexity=["prose"])
    ours = LanguageEvaluator(language).score(load_model(tmp_path / "out"), "test", [*SKILLS], ["prose"])
    for task in SKILLS:
        assert theirs[task]["acc,none"] == pytest.approx(ours.graded[task].mean()) and ours.graded[task].any()
    assert theirs["prose"]["word_perplexity,none"] == pytest.approx(
        ours.perplexity["prose"]["value"], rel=1e-4
    )
