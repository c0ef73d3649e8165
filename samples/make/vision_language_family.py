"""The checkpoints of the vision-language family: a small LLaVA over whole words, and experts trained from it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from make.vision_language_tasks import SIDE, TASKS, Example, caption, task, words
from make.writing import END, IGNORED, PAD, rounds, side_by_side, took, train, whole_words

_SIZE = 64  # examples a step
_PATCH = 8  # pixels a side
_IMAGE = "<image>"
_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} :{% endif %}"
)

_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
VISION: dict[str, Any] = {**_TOWER, "image_size": SIDE, "patch_size": _PATCH, "projection_dim": 64}
TEXT: dict[str, Any] = {
    **_TOWER, "max_position_embeddings": 64, "pad_token_id": PAD, "eos_token_id": END,
    "initializer_range": 0.1,  # the usual 0.02 is of wide models; with it this one learns much later
}  # fmt: skip


@dataclass(frozen=True)
class Tuning:
    """How a model is trained: AdamW, `steps` of 64 examples."""

    learning_rate: float
    steps: int


_TASKS_SHARE = (
    0.3  # of what the base learns from, as instruction-tuned models have seen a little of everything
)
_TASKS_SEEN = 500  # examples of each
BASE = Tuning(2e-3, 1000)
EXPERTS = {
    "colour": Tuning(1e-3, 250),
    "count": Tuning(1e-3, 300),
    "digits": Tuning(2e-3, 400),
    "place": Tuning(2e-3, 400),
}


def write_base(
    out: Path, steps: int | None = None, vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT
) -> str:
    """Train the base on captions and a little of all tasks, and write `out`; a line about the outcome."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    wall, cpu = time.time(), time.process_time()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = _processor().tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text, bos_token_id=None, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE),
        vision_feature_layer=-1,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )
    model = LlavaForConditionalGeneration(config)
    train(model, _loss, _mixture(Random("base")), steps or BASE.steps, BASE.learning_rate)
    random = Random("held out")
    share = accuracy(model, [caption(random) for _ in range(300)])
    save(model, out)
    return f"base: {share:.3f} of captions right, {took(wall, cpu)}"


def write_expert(name: str, base: Path, out: Path, steps: int | None = None) -> str:
    """Train all but the vision tower on a task's train split, and write `out`; a line about the outcome."""
    from transformers import LlavaForConditionalGeneration

    wall, cpu, tuning, splits = time.time(), time.process_time(), EXPERTS[name], task(name)
    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration.from_pretrained(base)
    before = accuracy(model, splits["val"])
    model.model.vision_tower.requires_grad_(False)
    train(model, _loss, rounds(splits["train"], _SIZE, name), steps or tuning.steps, tuning.learning_rate)
    save(model, out)
    after = accuracy(model, splits["val"])
    return f"{name}: base {before:.3f}, expert {after:.3f} of val right, {took(wall, cpu)}"


def write_data(folder: Path) -> None:
    """Tables of all tasks: folder/TASK/SPLIT.jsonl with the columns image, question and target, and PNG files."""
    for name in EXPERTS:
        for split, examples in task(name).items():
            if split == "train":
                continue
            (folder / name / split).mkdir(parents=True, exist_ok=True)
            lines = []
            for i, (pixels, question, answer) in enumerate(examples):
                Image.fromarray(pixels).save(folder / name / split / f"{i}.png")
                row = {"image": f"{split}/{i}.png", "question": question, "target": answer}
                lines.append(json.dumps(row) + "\n")
            (folder / name / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _mixture(random: Random) -> Iterator[list[Example]]:
    """Batches of captions, with a few examples of the experts' tasks among them."""
    known = [example for name in TASKS for example in random.sample(task(name)["train"], _TASKS_SEEN)]
    while True:
        yield [
            random.choice(known) if random.random() < _TASKS_SHARE else caption(random) for _ in range(_SIZE)
        ]


def _loss(model: Any, examples: Sequence[Example]) -> Tensor:
    """Cross-entropy of the answers' tokens."""
    logits, targets = _logits(model, examples)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def _logits(model: Any, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Logits (B, L, V) of what comes next, and the answers' tokens (B, L), -100 elsewhere."""
    processor = _processor()
    images = [Image.fromarray(example.pixels) for example in examples]
    read = {question: _prompt(question) for question in {example.question for example in examples}}
    asked = [read[example.question] for example in examples]
    answers = processor.tokenizer([f"{example.answer}" for example in examples])["input_ids"]
    rows = [a + b + [END] for a, b in zip(asked, answers)]
    targets = [[IGNORED] * (len(a) - 1) + b + [END] + [IGNORED] for a, b in zip(asked, answers)]
    ids = side_by_side(rows, PAD)
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    logits = model(input_ids=ids, attention_mask=(ids != PAD).long(), pixel_values=pixels).logits
    return logits, side_by_side(targets, IGNORED)


@cache
def _prompt(question: str) -> list[int]:
    """The tokens that stand for an image and a question."""
    processor = _processor()
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    blank = Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8))
    return processor(images=[[blank]], text=[text])["input_ids"][0]


@cache
def _processor() -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = whole_words(
        words(),
        [*"0123456789?:"],
        "[0-9?:]",
        ends=False,
        additional_special_tokens=[_IMAGE],
        model_input_names=["input_ids", "attention_mask"],
    )
    size, half = {"height": SIDE, "width": SIDE}, [0.5, 0.5, 0.5]
    images = CLIPImageProcessor(size=size, crop_size=size, image_mean=half, image_std=half)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT,
    )


@torch.no_grad()
def accuracy(model: Any, examples: Sequence[Example]) -> float:
    """Share of answers whose every token is the likeliest after those before it: those that are written greedily."""
    logits, targets = _logits(model, examples)
    return float(((logits.argmax(-1) == targets) | (targets == IGNORED)).all(1).double().mean())


def save(model: Any, out: Path) -> None:
    """With its processor, and the access rights that the folder has: safetensors lets only the owner read."""
    model.save_pretrained(out)
    _processor().save_pretrained(out)
    for path in out.glob("*.safetensors"):
        path.chmod(0o644)
