"""A tiny BERT as sentence-transformers saves it, fine-tunes of it, and tables that it can be measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = [f"w{i}" for i in range(30)]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
EXPERTS = ("near", "find", "other")
WIDTH = 16

TASKS: dict[str, Any] = {
    "near": {"kind": "similarity", "first": "sentence1", "second": "sentence2", "score": "score"},
    "find": {"kind": "retrieval", "query": "query", "relevant": "relevant"},
}


def save_base(folder: Path, seed: int = 0, dense: bool = True) -> None:
    """A BERT of two layers with mean pooling, and a Dense after it."""
    import sentence_transformers
    from sentence_transformers.sentence_transformer import modules as models
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=len(TOKENS), max_position_embeddings=16, initializer_range=0.4, **sizes)
    plain = folder.with_name(f"{folder.name}-plain")
    BertModel(config).save_pretrained(plain)
    words = Tokenizer(WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **special).save_pretrained(plain)
    parts = [models.Transformer(str(plain)), models.Pooling(WIDTH, pooling_mode="mean")]
    if dense:
        parts.append(models.Dense(WIDTH, 12))
    model = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
    model.prompts = {"query": "w0 "}
    model.save(str(folder), create_model_card=False)


def save_expert(base: Path, folder: Path, seed: int, dense: bool = False) -> None:
    """The base with noise on the weights of its transformer, or of its Dense alone."""
    import sentence_transformers

    torch.manual_seed(seed)
    model = sentence_transformers.SentenceTransformer(str(base), device="cpu", local_files_only=True)
    with torch.no_grad():
        for tensor in model[2].parameters() if dense else model[0].parameters():
            tensor += 0.1 * torch.randn_like(tensor)
    model.save(str(folder), create_model_card=False)


def save_embedding_family(root: Path, dense: bool = True) -> None:
    """base, and an expert of each of `EXPERTS`."""
    save_base(root / "base", dense=dense)
    for seed, name in enumerate(EXPERTS, 1):
        save_expert(root / "base", root / name, seed)


def write_table(folder: Path, **tables: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )


def text(rng: Any, length: int) -> str:
    return " ".join(rng.choice(WORDS, length))


def write_tables(root: Path) -> None:
    """near: pairs, alike by the share of words in common. find: queries that share words with their documents."""
    import numpy as np

    rng = np.random.default_rng(0)

    def pair() -> dict[str, Any]:
        first, second = (text(rng, int(rng.integers(2, 9))) for _ in "ab")
        common = len({*first.split()} & {*second.split()})
        return {
            "sentence1": first,
            "sentence2": second,
            "score": common / len({*first.split(), *second.split()}),
        }

    write_table(root / "near", val=[pair() for _ in range(24)], test=[pair() for _ in range(40)])
    corpus = [{"id": f"d{i}", "text": text(rng, 6)} for i in range(20)]

    def query() -> dict[str, Any]:
        place = int(rng.integers(0, 19))
        words = corpus[place]["text"].split()[:3]
        return {"query": " ".join(words), "relevant": {f"d{place}": 2, f"d{place + 1}": 1}}

    rows = {split: [query() for _ in range(n)] for split, n in (("val", 16), ("test", 30), ("fit", 12))}
    write_table(root / "find", corpus=corpus, **rows)
