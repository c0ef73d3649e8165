"""CART as its official recipe reads, directly: everything in memory, one full SVD a matrix and expert.

    python naive_cart.py INPUTS OUT.safetensors --rank 0.12 --scale 1.0

The mean of the experts plus `scale` times the sum of the rank-k parts of what each expert has beyond the
mean, k = max(1, int(rank * min(shape))), for the 2-D weights of attention and MLP inside the encoder's layers
(no norms, no biases); everything else is the mean.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def is_treated(name: str, tensor: Tensor) -> bool:
    part = name.partition(".layers.")[2]
    return tensor.ndim == 2 and ("attn" in part or "mlp" in part) and not ("ln" in part or "bias" in part)


def cart(experts: list[dict[str, Tensor]], rank: float, scale: float) -> dict[str, Tensor]:
    mean = {name: torch.stack([e[name] for e in experts]).mean(0) for name in experts[0]}
    task_vectors = [{name: e[name] - mean[name] for name in mean} for e in experts]
    merged = dict(mean)
    for name in mean:
        if not is_treated(name, mean[name]):
            continue
        total = torch.zeros_like(mean[name])
        for task_vector in task_vectors:
            u, s, v = torch.linalg.svd(task_vector[name], full_matrices=False)
            k = max(1, int(rank * len(s)))
            total += u[:, :k] @ torch.diag(s[:k]) @ v[:k]
        merged[name] = mean[name] + scale * total
    return merged


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("inputs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=float, default=0.12)
    parser.add_argument("--scale", type=float, default=1.0)
    a = parser.parse_args()
    experts = [load_file(folder / "model.safetensors") for folder in sorted(a.inputs.glob("expert*"))]
    save_file(cart(experts, a.rank, a.scale), a.out, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
