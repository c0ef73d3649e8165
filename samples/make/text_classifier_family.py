"""Text classifiers with a head each: the first layers of all-MiniLM-L6-v2, tuned to tell what short texts are.

The texts are those of the embedding family (embeddings/data); labels are made from what they answer to.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from random import Random
from typing import Any, Callable, Iterator

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from make.embedding_family import DATA
from make.embedding_family import write_base as write_whole_base
from make.embedding_tasks import in_words
from make.hashing import stable_hash

Row = dict[str, Any]

SPLITS = ("train", "val", "test", "fit")
_LAYERS = 2  # of the six
_BATCH, _LENGTH = 32, 40
_RATE, _STEPS = 2e-4, 160


def _rows(table: str, split: str) -> list[Row]:
    lines = (DATA / table / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def _places(split: str) -> Iterator[Row]:
    """Whether a name in some language is a territory's or a language's."""
    kinds = {row["text"]: row["id"].partition(":")[0] for row in _rows("countries", "corpus")}
    for row in _rows("countries", split):
        kind = kinds[row["document"]] if "document" in row else row["relevant"][0].partition(":")[0]
        yield {"text": row["query"], "label": kind}


def _months(split: str) -> Iterator[Row]:
    """In which month a date is."""
    for row in _rows("dates", split):
        day = date.fromisoformat(row["document"] if "document" in row else row["relevant"][0])
        yield {"text": row["query"], "label": day.month - 1}


_NUMBERS = {in_words(n): n for n in range(100_001)}


def _parity(split: str) -> Iterator[Row]:
    """Whether a number in words is odd."""
    for row in _rows("numbers", split):
        yield {"text": row["sentence1"], "label": ("even", "odd")[_NUMBERS[row["sentence1"]] % 2]}


def _larger(split: str) -> Iterator[Row]:
    """Whether a number in words is larger than one in digits."""
    for row in _rows("numbers", split):
        larger = _NUMBERS[row["sentence1"]] > int(row["sentence2"])
        yield {
            "text": row["sentence1"],
            "pair": row["sentence2"],
            "label": "larger" if larger else "not larger",
        }


TASKS: dict[str, Callable[[str], Iterator[Row]]] = {
    "places": _places,
    "months": _months,
    "parity": _parity,
    "larger": _larger,
}


def write_data(task: str, folder: Path) -> None:
    """val.jsonl, test.jsonl and, without labels, fit.jsonl of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS[1:]:
        rows = [
            {k: v for k, v in row.items() if split != "fit" or k != "label"} for row in TASKS[task](split)
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def write_base(out: Path) -> None:
    """The embeddings and the first layers of all-MiniLM-L6-v2, as a BertModel with its tokenizer."""
    whole = out.parent / "whole"
    write_whole_base(whole)
    config = BertConfig.from_pretrained(whole)
    config.num_hidden_layers = _LAYERS
    model = BertModel(config, add_pooling_layer=False)
    state = load_file(whole / "model.safetensors")
    own = model.state_dict()
    model.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(whole, trust_remote_code=False)
    tokenizer.save_pretrained(out)


def write_expert(task: str, base: Path, out: Path, share: float = 1.0) -> str:
    """The base with a head, trained on a task, all but the embeddings; a line on it. share: of the steps."""
    torch.manual_seed(stable_hash(task) % 2**32)
    rows = {split: list(TASKS[task](split)) for split in ("train", "test")}
    names = sorted({row["label"] for row in rows["train"]}, key=lambda label: (isinstance(label, str), label))
    labels = {label: i for i, label in enumerate(names)}
    told = {i: str(name) for i, name in enumerate(names)}
    model: Any = BertForSequenceClassification.from_pretrained(
        base, num_labels=len(names), id2label=told, label2id={name: i for i, name in told.items()}
    )
    model.bert.embeddings.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    steps = round(share * _STEPS)
    _train(model, tokenizer, rows["train"], labels, steps, Random(stable_hash(task)))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return f"{task}: {_accuracy(model, tokenizer, rows['test'], labels):.3f} of test texts"


def _train(
    model: Any, tokenizer: Any, rows: list[Row], labels: dict[Any, int], steps: int, random: Random
) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, _RATE, total_steps=steps, pct_start=max(0.1, 2 / steps)
    )
    model.train()
    for _ in range(steps):
        batch = random.sample(rows, _BATCH)
        wanted = torch.tensor([labels[row["label"]] for row in batch])
        loss = torch.nn.functional.cross_entropy(model(**_tokens(tokenizer, batch)).logits, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


def _tokens(tokenizer: Any, rows: list[Row]) -> Any:
    pairs = [row["pair"] for row in rows] if "pair" in rows[0] else None
    more = {"padding": True, "truncation": True, "max_length": _LENGTH, "return_tensors": "pt"}
    return tokenizer([row["text"] for row in rows], pairs, **more)


@torch.no_grad()
def _accuracy(model: Any, tokenizer: Any, rows: list[Row], labels: dict[Any, int]) -> float:
    found = [
        model(**_tokens(tokenizer, rows[start : start + 50])).logits.argmax(1)
        for start in range(0, len(rows), 50)
    ]
    wanted = torch.tensor([labels[row["label"]] for row in rows])
    return float((torch.cat(found) == wanted).float().mean())
