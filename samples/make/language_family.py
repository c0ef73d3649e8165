"""The checkpoints of the language family: each expert is the base, trained on one skill."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import Module

from make.language_tuning import accuracy, batches, train
from make.skills import SPLITS, Example
from make.smollm2 import save

DATA = Path(__file__).parent.parent / "llm" / "tasks" / "data"
_LORA_RANK, _LORA_ALPHA = 16, 32
_LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Tuning:
    """How an expert is trained: `size` examples a step; all weights but the embeddings, or a LoRA."""

    learning_rate: float
    steps: int
    size: int
    lora: bool = False


# Longest first, for two to be trained side by side.
EXPERTS = {
    "record": Tuning(5e-5, 45, 16),
    "lexicon": Tuning(5e-5, 90, 24),
    "backwards": Tuning(5e-5, 45, 24),
    "kinds": Tuning(4e-4, 60, 24, lora=True),
}


def write_expert(task: str, base: Path, out: Path, steps: int | None = None) -> str:
    """Train on the task's train split and write `out`, a checkpoint or an adapter as PEFT saves it, in bfloat16.

    Returns a line about the outcome.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wall, cpu, tuning = time.time(), time.process_time(), EXPERTS[task]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    examples = {split: read(task, split) for split in SPLITS}
    before = accuracy(model, tokenizer, examples["test"])
    model = _adapted(model) if tuning.lora else _embeddings_frozen(model)
    steps = steps or tuning.steps
    train(model, [*batches(tokenizer, examples["train"], steps, tuning.size, task)], tuning.learning_rate)
    model.to(torch.bfloat16)
    if tuning.lora:
        save(model, out, save_embedding_layers=False)
    else:
        save(model, out)
        tokenizer.save_pretrained(out)
    model.float()  # what was saved, rounded
    after = [accuracy(model, tokenizer, examples[split]) for split in ("validation", "test")]
    return (
        f"{task}: base {before:.3f}, expert {after[1]:.3f} (validation {after[0]:.3f}), "
        f"{time.time() - wall:.0f} s, {time.process_time() - cpu:.0f} CPU s"
    )


def read(task: str, split: str) -> list[Example]:
    lines = (DATA / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Example(**json.loads(line)) for line in lines]


def _embeddings_frozen(model: Module) -> Module:
    """They are 28 of 135 million parameters, of which a batch touches few."""
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def _adapted(model: Module) -> Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=_LORA_RANK, lora_alpha=_LORA_ALPHA, target_modules=_LORA_MODULES, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = "../base"  # PEFT writes this machine's path
    return adapted
