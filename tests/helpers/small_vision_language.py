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
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
_TEXT = {**_TOWER, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def tokenizer(more: Sequence[str] = ()) -> Any:
    """Of whole words, and of `more` tokens that stand for images."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = dict.fromkeys([*_SPECIAL, *more])
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        additional_special_tokens=["<image>", *more], model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def processor(chat_template: str | None = CHAT) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        images, tokenizer(), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat_template,
    )  # fmt: skip


def save_llava(folder: Path, seed: int, chat_template: str | None = CHAT) -> Any:
    """A LLaVA with random weights, its processor beside it; returns the model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_TOWER, image_size=SIDE, patch_size=4, projection_dim=16),
        text_config=LlamaConfig(**_TEXT, vocab_size=len(tokenizer())),
        image_token_index=_SPECIAL.index("<image>"),
    )
    model = LlavaForConditionalGeneration(config).eval()
    save(model, folder, chat_template)
    return model


def save(model: Any, folder: Path, chat_template: str | None = CHAT) -> None:
    model.save_pretrained(folder)
    processor(chat_template).save_pretrained(folder)


def save_qwen2_vl(folder: Path) -> None:
    """A Qwen2-VL with random weights, whose images have as many tokens as they are large."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    torch.manual_seed(0)
    begin, inside, video, end = own = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]
    words = tokenizer(own)
    names = ("vision_start_token_id", "image_token_id", "video_token_id", "vision_end_token_id")
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    cut = {"patch_size": 4, "temporal_patch_size": 2}
    sizes = {
        "embed_dim": 16,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2,
        "spatial_merge_size": 2,
    }
    config = Qwen2VLConfig(
        text_config={**_TEXT, "num_key_value_heads": 2, "vocab_size": len(words), "rope_parameters": rope},
        vision_config={**sizes, **cut},
        **dict(zip(names, words.convert_tokens_to_ids(own))),
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    images = Qwen2VLImageProcessor(**cut, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1 << 14})
    chat = CHAT.replace("<image>", f"{begin}{inside}{end}")
    videos = Qwen2VLVideoProcessor(**cut, merge_size=2)
    Qwen2VLProcessor(images, words, videos, chat_template=chat).save_pretrained(folder)


def save_idefics3(folder: Path) -> None:
    """An Idefics3 with random weights, which pads images of different sizes."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    torch.manual_seed(0)
    words = tokenizer(["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"])
    config = Idefics3Config(
        vision_config={**_TOWER, "image_size": 16, "patch_size": 4},
        text_config={"model_type": "llama", **_TEXT, "vocab_size": len(words)},
        image_token_id=_SPECIAL.index("<image>"),
        pad_token_id=0,
        scale_factor=2,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    size = {"longest_edge": 16}
    images = Idefics3ImageProcessor(size=size, max_image_size=size, do_image_splitting=False)
    Idefics3Processor(images, words, image_seq_len=4, chat_template=CHAT).save_pretrained(folder)


def save_paligemma(folder: Path) -> None:
    """A PaliGemma with random weights, which has no chat template."""
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    torch.manual_seed(0)
    words, tower = tokenizer(), {"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": 4}
    text = {"model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1, "vocab_size": len(words)}
    config = PaliGemmaConfig(
        vision_config={**_TOWER, **tower, "projection_dim": 32},
        text_config={**_TEXT, **text},
        image_token_index=_SPECIAL.index("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    images = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = 4
    PaliGemmaProcessor(images, words).save_pretrained(folder)


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
