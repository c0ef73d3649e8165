"""Train a small mixture of experts for real: bytes of Python's standard library and of the tables that come with it.

    python samples/make_moe.py OUT            writes OUT, a folder of transformers, in minutes on one core

Eight experts in each of four layers, each byte sent to two of them. `benchmarks/experts_kept.py` makes it smaller.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any, Iterator

import torch

EXPERTS, LENGTH, BATCH, STEPS = 8, 128, 16, 700
HELD_OUT = 10  # one file of so many is for measuring, another for statistics
_RATE = 2e-3


def files(part: str) -> list[Path]:
    """The modules of the standard library that are for `train`, `fit` (statistics) or `test`."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in sorted(folder.glob("*.py")) if path.stat().st_size > 4000]
    parts = {"test": [0], "fit": [1], "train": list(range(2, HELD_OUT))}[part]
    return [path for i, path in enumerate(found) if i % HELD_OUT in parts]


def windows(part: str) -> torch.Tensor:
    """Their bytes in windows, int64 (windows, LENGTH)."""
    held = b"".join(path.read_bytes() for path in files(part))
    data = torch.frombuffer(bytearray(held), dtype=torch.uint8).long()
    return data[: len(data) // LENGTH * LENGTH].reshape(-1, LENGTH)


def _batches(data: torch.Tensor) -> Iterator[torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    while True:
        yield data[torch.randint(len(data), (BATCH,), generator=draws)]


def train(steps: int = STEPS) -> Any:
    """The model, in eval mode."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256, hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=LENGTH,
        sliding_window=None, tie_word_embeddings=True, output_router_logits=True, router_aux_loss_coef=0.02,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, steps, pct_start=0.1)
    for step, ids in zip(range(steps), _batches(windows("train"))):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}", flush=True)
    model.config.output_router_logits = False
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    train(arguments.steps).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
