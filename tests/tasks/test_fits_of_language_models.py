"""Language models fitted to prompts: by hidden states and by distributions of the next token, in closed form too."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from checkpoints import refused
from safetensors.torch import load_file
from small_language_model import TOKENS, WORDS, save_model, save_tasks, skill
from torch import Tensor

from mergeline.merging import merge
from mergeline.merging.learning.answering import answered
from mergeline.merging.learning.contract import Job
from mergeline.merging.recipes.recipe import Recipe
from mergeline.tasks.collect import collect_all
from mergeline.tasks.fit import examples_of, fit_recipe
from mergeline.tasks.modalities import modality_of
from mergeline.tasks.params import load_params

SKILLS = {"first": skill(0), "second": skill(20)}
# Prompts of one to five words, so that all but the longest are padded.
PROMPTS = {
    name: [" ".join(WORDS[20 * t + i : 20 * t + i + 1 + i % 5]) for i in range(12)]
    for t, name in enumerate(SKILLS)
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A workspace of a base and two experts that differ in every tensor, embeddings and head too."""
    root = tmp_path_factory.mktemp("texts")
    models = {
        name: save_model(root / "build/checkpoints" / name, i) for i, name in enumerate(("base", *SKILLS))
    }
    save_tasks(root / "tasks", SKILLS)
    for name, prompts in PROMPTS.items():
        file = root / "tasks" / f"{name}.yaml"
        rows = [json.dumps({"question": prompt, "answer": "w0"}) for prompt in prompts]
        (root / "tasks" / f"{name}-train.jsonl").write_text("\n".join(rows) + "\n")
        task = json.loads(file.read_text())
        task["dataset_kwargs"]["data_files"]["train"] = str(root / "tasks" / f"{name}-train.jsonl")
        file.write_text(json.dumps({**task, "training_split": "train"}))
    params = {
        "name": "texts", "seed": 0, "base": "base", "experts": [*SKILLS],
        "checkpoints": {"layout": "as_is", "files": {n: n for n in models}, "uris": {}},
        "language": {"tasks": str(root / "tasks"), "suites": {name: [name] for name in SKILLS}},
        "merges": {"average": {"method": "average"}},
    }  # fmt: skip
    (root / "params.yaml").write_text(json.dumps(params))
    return root, models


@pytest.fixture(scope="module")
def near(family, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The same workspace with experts that differ from the base in the maps of their blocks alone."""
    root, models = tmp_path_factory.mktemp("near"), {"base": family[1]["base"]}
    shutil.copytree(family[0], root, dirs_exist_ok=True)
    for i, name in enumerate(SKILLS):
        expert = models[name] = deepcopy(models["base"])
        generator = torch.Generator().manual_seed(i)
        for matrix in (p for p in expert.model.layers.parameters() if p.ndim == 2):
            matrix.data += 0.1 * torch.randn(matrix.shape, generator=generator)
        expert.save_pretrained(root / "build/checkpoints" / name)
    return root, models


def fitted(root: Path, out: Path, method: str, **settings: Any) -> Any:
    params = load_params(root / "params.yaml")
    checkpoints = root / "build/checkpoints"
    recipe = {
        "method": method, "params": settings, "base": checkpoints / "base",
        "experts": {name: checkpoints / name for name in SKILLS},
    }  # fmt: skip
    return fit_recipe(modality_of(params), params, root / "build", recipe, out)


def words(prompt: str) -> Tensor:
    return torch.tensor([[TOKENS.index(word) for word in prompt.split()]])


def divergence(base: Any, expert: Any, prompts: list[str], temperature: float) -> float:
    """Mean over tokens, of prompts that are run alone."""
    with torch.no_grad():
        pairs = [[model(words(p)).logits[0] / temperature for model in (base, expert)] for p in prompts]
    rows = [(e.softmax(-1) * (e.log_softmax(-1) - b.log_softmax(-1))).sum(-1) for b, e in pairs]
    return float(torch.cat(rows).mean()) * temperature**2


def blocks_of(model: Any, prompt: str) -> list[Tensor]:
    """What each block of a model makes of a prompt that is run alone: (tokens, d)."""
    found: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, __, out: found.append(out.flatten(0, 1)))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(words(prompt))
    for handle in handles:
        handle.remove()
    return found


def distance(base: Any, expert: Any, prompts: list[str]) -> float:
    """Mean over blocks and tokens."""
    pairs = [(blocks_of(base, prompt), blocks_of(expert, prompt)) for prompt in prompts]
    blocks = [[(b[k] - e[k]).square() for b, e in pairs] for k in range(len(base.model.layers))]
    return sum(float(torch.cat(rows).mean()) for rows in blocks) / len(blocks)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"objective": "kl"}, lambda *of: divergence(*of, temperature=1.0)),
        ({"objective": "kl", "temperature": 3.0}, lambda *of: divergence(*of, temperature=3.0)),
        ({"objective": "hidden"}, distance),
    ],
    ids=["kl", "kl at a temperature", "hidden states"],
)
def test_what_is_minimised_is_that_of_prompts_alone_and_of_the_experts_own_head(
    family, tmp_path, settings: dict[str, Any], expected: Callable[..., float]
):
    root, models = family
    at_base = {"directions": "task_vectors", "over": "whole", "initial": 0.0, "batch": 12, "iterations": 1}
    fitted(root, tmp_path / "fit", "coefficients", **at_base, **settings)
    [step] = json.loads((tmp_path / "fit/curve.json").read_text())
    for name, prompts in PROMPTS.items():
        assert step["tasks"][name] == pytest.approx(expected(models["base"], models[name], prompts), rel=1e-4)


def test_agreement_is_with_what_the_expert_says_by_its_own_head(family, tmp_path):
    root, models = family
    half = {"objective": "kl", "held_out": 0.5, "iterations": 0}
    at_base = {"directions": "task_vectors", "over": "whole", "initial": 0.0}
    fitted(root, tmp_path / "fit", "coefficients", **at_base, **half)
    [checked] = json.loads((tmp_path / "fit/curve.json").read_text())
    order = {
        name: [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))][::2]
        for name, prompts in PROMPTS.items()
    }
    shares = []
    for name, held in order.items():
        with torch.no_grad():
            guesses = [
                [m(words(p)).logits[0].argmax(-1) for p in held] for m in (models["base"], models[name])
            ]
        shares.append(float((torch.cat(guesses[0]) == torch.cat(guesses[1])).double().mean()))
    assert checked["agreement"] == pytest.approx(sum(shares) / len(shares)) and checked["agreement"] < 0.5


def test_only_kl_has_a_temperature(family, tmp_path):
    with refused("the objective 'cosine' has no temperature"):
        fitted(family[0], tmp_path / "fit", "coefficients", temperature=2.0)


def test_least_squares_answers_prompts_as_each_expert_does(near, tmp_path):
    from transformers import AutoModelForCausalLM

    root, models = near
    recipe = fitted(
        root, tmp_path / "fit", "progressive_least_squares", inner="average", ridge=0.01, floor=0.1
    )
    notes = json.loads((tmp_path / "fit/fit.json").read_text())["notes"]
    assert notes["kept"] == {"model.embed_tokens.weight": "it has a row for each token of a vocabulary"}
    assert not notes["branch"]  # what attention and MLP write is solved for on the residual stream
    merge(recipe, tmp_path / "merged")
    merge({**recipe.model_dump(), "method": "average", "params": {}, "statistics": {}}, tmp_path / "start")
    solved, start = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("merged", "start"))
    for name, prompts in PROMPTS.items():
        before, after = (divergence(model, models[name], prompts, 1.0) for model in (start, solved))
        assert after < before / 3
    held = ("embed_tokens", "norm")
    weights = start.state_dict()
    for name, value in solved.state_dict().items():
        assert torch.equal(value, weights[name]) == any(part in name or "lm_head" in name for part in held)


def test_gram_matrices_are_of_the_tokens_of_prompts_alone(near, tmp_path):
    root, models = near
    text = json.loads((root / "params.yaml").read_text())
    (root / "gram.yaml").write_text(json.dumps({**text, "statistics": {"gram": {"examples": 12}}}))
    params = load_params(root / "gram.yaml")
    collect_all(modality_of(params), params, "gram", root / "build", tmp_path)
    for name, prompts in PROMPTS.items():
        seen: list[Tensor] = []
        layer = models[name].model.layers[1]
        handle = layer.mlp.down_proj.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0][0]))
        with torch.no_grad():
            for prompt in prompts:
                models[name](words(prompt))
        handle.remove()
        x_RN = torch.cat(seen)
        found = load_file(tmp_path / f"{name}.safetensors")["model.layers.1.mlp.down_proj.weight"]
        torch.testing.assert_close(found, x_RN.T @ x_RN / len(x_RN), rtol=1e-4, atol=1e-6)


def test_answers_are_what_each_expert_writes_after_a_prompt_that_it_reads_alone(family, tmp_path):
    root, models = family
    params = load_params(root / "params.yaml")
    modality, build = modality_of(params), root / "build"
    recipe = Recipe.of(
        {
            "method": "progressive_least_squares", "base": build / "checkpoints/base",
            "experts": {name: build / "checkpoints" / name for name in SKILLS},
        }
    )  # fmt: skip
    network = modality.network(params, build, build / "checkpoints/base")
    job = Job(recipe, network, examples_of(modality, params, build), tmp_path)
    longer = answered(job, 4)
    for name in SKILLS:
        assert longer.count(name) == len(PROMPTS[name])
        batches = zip(job.examples.of(name), longer.of(name), strict=True)
        for prompts, found in batches:
            rows = zip(*(batch[key] for batch in (prompts, found) for key in ("input_ids", "attention_mask")))
            for ids, mask, new_ids, new_mask in rows:
                expected = ids[mask.bool()].tolist()
                for _ in range(4):
                    with torch.no_grad():
                        expected.append(int(models[name](torch.tensor([expected])).logits[0, -1].argmax()))
                    if expected[-1] == TOKENS.index("</s>"):
                        break
                assert new_ids[new_mask.bool()].tolist() == expected
    without = replace(job, network=replace(network, extend=None))
    with refused("only language models write answers"):
        answered(without, 4)
