"""Tiny T5 and BART models over bytes, and tables that they can be measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence

import torch

CONFIG: dict[str, Any] = {
    "vocab_size": 259, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "initializer_factor": 2.0,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip


_LAYERS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def save_t5(folder: Path, seed: int, **config: Any) -> Any:
    """A T5 with random weights, ByT5's tokenizer beside it; returns the model."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**{**CONFIG, "tie_word_embeddings": True, **config})).eval()
    save(model, folder)
    return model


def save_bart(folder: Path, seed: int) -> Any:
    """The same of a BART, which has positions and a bias of its logits."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(seed)
    sizes = {"vocab_size": 259, "d_model": 32, "max_position_embeddings": 40, "init_std": 0.3}
    layers = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in _LAYERS.items()}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    model = BartForConditionalGeneration(
        BartConfig(**sizes, **layers, **tokens, forced_eos_token_id=None)
    ).eval()
    save(model, folder)
    return model


def save(model: Any, folder: Path) -> None:
    from transformers import ByT5Tokenizer

    model.save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)


def teach(model: Any, pairs: Sequence[tuple[str, str]], steps: int = 40) -> None:
    """Fine-tune a model on (source, target) pairs of like lengths until it knows some of them."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    sources, targets = (
        tokenizer([p[side] for p in pairs], padding=True, return_tensors="pt") for side in (0, 1)
    )
    labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**sources, labels=labels).loss.backward()
        optimizer.step()


def save_table(folder: Path, rows: Sequence[dict[str, Any]], splits: Sequence[str] = ("val", "test")) -> None:
    """The same rows as each of some splits."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for split in splits:
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
