"""The checkpoints of the text-to-text family: a small T5 over whole words, and experts trained from it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from make.text_tasks import TASKS, UNITS, Pair, operation, task, words
from make.writing import END, IGNORED, PAD, rounds, side_by_side, took, train, whole_words

_SIZE = 64  # examples a step

CONFIG: dict[str, Any] = {
    "d_model": 64, "d_kv": 32, "num_heads": 2, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2,
    "feed_forward_proj": "relu", "dropout_rate": 0.0, "tie_word_embeddings": True,
    "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD,
}  # fmt: skip


@dataclass(frozen=True)
class Tuning:
    """How a model is trained: AdamW, `steps` of 64 examples."""

    learning_rate: float
    steps: int


_TASKS_SHARE = (
    0.25  # of what the base learns from, as instruction-tuned models have seen a little of everything
)
BASE = Tuning(3e-3, 700)
EXPERTS = {
    "numbers": Tuning(1e-3, 200),
    "dates": Tuning(1e-3, 250),
    "clock": Tuning(1e-3, 250),
    "likeness": Tuning(1e-3, 500),
}


def write_base(out: Path, steps: int | None = None, config: dict[str, Any] = CONFIG) -> str:
    """Train the base on operations on lists and a little of all tasks, and write `out`; a line about the outcome."""
    from transformers import T5Config, T5ForConditionalGeneration

    wall, cpu = time.time(), time.process_time()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(_tokenizer()), **config))
    train(model, _loss, _mixture(Random("base")), steps or BASE.steps, BASE.learning_rate)
    random = Random("held out")
    share = accuracy(model, [operation(random) for _ in range(400)])
    save(model, out)
    return f"base: {share:.3f} of operations right, {took(wall, cpu)}"


def write_expert(name: str, base: Path, out: Path, steps: int | None = None) -> str:
    """Train all weights on a task's train split, and write `out`; a line about the outcome."""
    from transformers import T5ForConditionalGeneration

    wall, cpu, tuning, splits = time.time(), time.process_time(), EXPERTS[name], task(name)
    torch.set_num_threads(1)
    model = T5ForConditionalGeneration.from_pretrained(base)
    before = accuracy(model, splits["val"])
    train(model, _loss, rounds(splits["train"], _SIZE, name), steps or tuning.steps, tuning.learning_rate)
    save(model, out)
    after = accuracy(model, splits["val"])
    return f"{name}: base {before:.3f}, expert {after:.3f} of val right, {took(wall, cpu)}"


def write_data(folder: Path) -> None:
    """Tables of all tasks: folder/TASK/SPLIT.jsonl with the columns source and target."""
    for name in EXPERTS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, pairs in task(name).items():
            lines = [json.dumps({"source": source, "target": target}) + "\n" for source, target in pairs]
            (folder / name / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _mixture(random: Random) -> Iterator[list[Pair]]:
    """Batches of operations, with a few examples of the experts' tasks among them."""
    known = [pair for name in TASKS for pair in random.sample(task(name)["train"], 500)]

    def example() -> Pair:
        return random.choice(known) if random.random() < _TASKS_SHARE else operation(random)

    while True:
        yield [example() for _ in range(_SIZE)]


def _loss(model: Any, pairs: Sequence[Pair]) -> Tensor:
    """Cross-entropy of the targets' tokens."""
    logits, targets = _logits(model, pairs)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def _logits(model: Any, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Logits (B, L, V), and the targets' tokens (B, L), -100 behind their ends."""
    sources = side_by_side(_rows([source for source, _ in pairs]), PAD)
    targets = side_by_side(_rows([target for _, target in pairs]), IGNORED)
    return model(input_ids=sources, attention_mask=(sources != PAD).long(), labels=targets).logits, targets


def _rows(texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, and its end."""
    return _tokenizer()(list(texts))["input_ids"]


@cache
def _tokenizer() -> Any:
    """Whole words, digits and signs."""
    return whole_words(words(), [*"0123456789-:,/", *UNITS], r"[0-9,/-]|(?<=[0-9]):", ends=True)


@torch.no_grad()
def accuracy(model: Any, examples: Sequence[Pair]) -> float:
    """Share of targets whose every token is the likeliest after those before it: those that are written greedily."""
    logits, targets = _logits(model, examples)
    return float(((logits.argmax(-1) == targets) | (targets == IGNORED)).all(1).double().mean())


def save(model: Any, out: Path) -> None:
    """With its tokenizer, and the access rights that the folder has: safetensors lets only the owner read."""
    model.save_pretrained(out)
    _tokenizer().save_pretrained(out)
    for path in out.glob("*.safetensors"):
        path.chmod(0o644)
