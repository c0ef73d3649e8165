"""A tiny Llama with a tokenizer of whole words, and task files of lm-eval that it can be measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = [f"w{i}" for i in range(40)]
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", *WORDS, *"The capital of France is Paris, and 2 + = 4.".split()]


def save_tokenizer(folder: Path, tokens: list[str] = TOKENS) -> None:
    """A fast tokenizer that knows whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    ).save_pretrained(folder)


def save_model(
    folder: Path, seed: int, *, tokens: list[str] = TOKENS, dtype: torch.dtype = torch.float32, **config: Any
) -> Any:
    """A Llama of two layers with random weights, its tokenizer beside it; returns the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    others = {"num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.2}
    settings = LlamaConfig(
        vocab_size=len(tokens), **{**sizes, **others, **config},
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(settings).to(dtype)
    model.save_pretrained(folder)
    save_tokenizer(folder, tokens)
    return model


def teach(model: Any, pairs: list[tuple[str, str]], steps: int = 60) -> None:
    """Fine-tune a model on (word, next word) pairs until it knows them."""
    model.train()
    ids = torch.tensor([[TOKENS.index(a), TOKENS.index(b)] for a, b in pairs])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(ids[:, :1]).logits[:, 0].float(), ids[:, 1])
        loss.backward()
        optimizer.step()


def save_experts(folder: Path, base: Any, skills: dict[str, list[tuple[str, str]]]) -> None:
    """One expert a skill, each taught from the base."""
    from copy import deepcopy

    for name, pairs in skills.items():
        expert = deepcopy(base)
        teach(expert, pairs)
        expert.save_pretrained(folder / name)
        save_tokenizer(folder / name)


def skill(first: int, count: int = 12, shift: int = 3) -> list[tuple[str, str]]:
    """Words and the words that follow them."""
    return [(WORDS[first + i], WORDS[first + (i + shift) % count]) for i in range(count)]


def save_tasks(folder: Path, skills: dict[str, list[tuple[str, str]]]) -> None:
    """A task a skill, of greedy matches, with all its pairs in both splits; and a perplexity task `prose`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in skills.items():
        lines = [json.dumps({"question": a, "answer": b}) for a, b in pairs]
        for split in ("validation", "test"):
            (folder / f"{name}-{split}.jsonl").write_text("\n".join(lines) + "\n")
        _write_task(
            folder,
            name,
            {
                "output_type": "loglikelihood",
                "doc_to_text": "{{question}}",
                "doc_to_target": " {{answer}}",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            },
        )
    texts = [json.dumps({"text": " ".join(WORDS[i : i + 8])}) for i in range(0, 32, 4)]
    for split in ("validation", "test"):
        (folder / f"prose-{split}.jsonl").write_text("\n".join(texts) + "\n")
    metrics = [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    text = {"doc_to_text": "", "doc_to_target": "{{text}}"}
    _write_task(folder, "prose", {"output_type": "loglikelihood_rolling", **text, "metric_list": metrics})


def _write_task(folder: Path, name: str, task: dict[str, Any]) -> None:
    splits = ("validation", "test")
    whole = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {s: str(folder / f"{name}-{s}.jsonl") for s in splits}},
        "validation_split": "validation",
        "test_split": "test",
        **task,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
