"""Tiny LLaVA models over whole words, and tables of images that they can be measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch

SIDE = 8  # pixels of an image
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
WORDS = ["what", "colour", "is", "this", "how", "light", "box", "?", "<sep>", *"0123456789", *COLOURS]
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %} <sep>"
)
_SPECIAL = ["<pad>", "</s>", "<s>", "<unk>", "<image>"]


def processor(chat_template: str | None = CHAT) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*_SPECIAL, *WORDS])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat_template,
    )  # fmt: skip


def save_llava(folder: Path, seed: int, chat_template: str | None = CHAT) -> Any:
    """A LLaVA with random weights, its processor beside it; returns the model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=SIDE, patch_size=4, projection_dim=16)
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    text = LlamaConfig(
        **sizes, **tokens, num_hidden_layers=2, vocab_size=len(_SPECIAL) + len(WORDS), initializer_range=0.2
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=_SPECIAL.index("<image>"), **tokens
    )
    model = LlavaForConditionalGeneration(config).eval()
    save(model, folder, chat_template)
    return model


def save(model: Any, folder: Path, chat_template: str | None = CHAT) -> None:
    model.save_pretrained(folder)
    processor(chat_template).save_pretrained(folder)


def image(colour: str, seed: int = 0) -> np.ndarray:
    """A noisy plane of a colour, uint8 (8, 8, 3)."""
    noise = np.random.default_rng(seed).integers(-20, 20, (SIDE, SIDE, 3))
    return np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)


def teach(model: Any, rows: Sequence[tuple[np.ndarray, str, str]], steps: int = 60) -> None:
    """Fine-tune a model on (image, question, answer) until it knows some of them."""
    from PIL import Image

    own = processor()
    texts = [f"<image> {question} <sep> {answer} </s>" for _, question, answer in rows]
    batch = own(
        images=[[Image.fromarray(pixels)] for pixels, *_ in rows],
        text=texts,
        padding=True,
        return_tensors="pt",
    )
    asked = own.tokenizer.convert_tokens_to_ids("<sep>")
    after = (batch["input_ids"] == asked).cumsum(1) > 0
    labels = batch["input_ids"].masked_fill(~after | (batch["attention_mask"] == 0), -100)
    labels[batch["input_ids"] == asked] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.eval()


def save_image_table(
    folder: Path, rows: Sequence[dict[str, Any]], splits: Sequence[str] = ("val", "test")
) -> None:
    """The same rows as each of some splits; arrays among the values become PNG files, named in their place."""
    from PIL import Image

    (folder / "png").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, row in enumerate(rows):
        found = {}
        for key, value in row.items():
            if isinstance(value, np.ndarray):
                Image.fromarray(value).save(folder / f"png/{i}.png")
                value = f"png/{i}.png"
            found[key] = value
        lines.append(json.dumps(found) + "\n")
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
