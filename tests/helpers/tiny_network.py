"""A small network with the family that it is merged from, in float64 or float32, and examples of two tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mergeline.merging.learning.network import Examples, Network

WIDTHS = (5, 8, 7, 6)  # of the inputs, two hidden layers and the features
CLASSES = 4


class Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.attn = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.attn(x))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i, o) for i, o in zip(WIDTHS, WIDTHS[1:]))
        self.gain = nn.Parameter(torch.ones(WIDTHS[-1]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.gain


@dataclass
class Family:
    """recipe: of the files. states: of the base and the experts."""

    recipe: dict[str, Any]
    states: dict[str, dict[str, Tensor]]
    network: Network
    examples: Examples
    heads: dict[str, Tensor]


def make_family(
    folder: Path, experts: int = 3, dtype: torch.dtype = torch.float64, count: int = 24
) -> Family:
    """A base, experts beside it, and `count` examples a task, one of each expert."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    folder.mkdir(parents=True, exist_ok=True)
    module = Tiny().to(dtype).eval()
    names = ["abcdefgh"[t] for t in range(experts)]
    base = {k: drawn(*v.shape).mul(0.6).to(dtype) for k, v in module.state_dict().items()}
    states = {"base": base} | {
        n: {k: v + 0.3 * drawn(*v.shape).to(dtype) for k, v in base.items()} for n in names
    }
    files = {name: folder / f"{name}.safetensors" for name in states}
    for name, state in states.items():
        if not files[name].exists():  # a fit goes on only with files that nobody wrote again
            save_file(state, files[name])
    heads = {name: drawn(CLASSES, WIDTHS[-1]).to(dtype) for name in names}
    inputs = {name: drawn(count, WIDTHS[0]).to(dtype) for name in names}
    labels = {name: torch.randint(CLASSES, (count,), generator=generator) for name in names}
    network = Network(
        module,
        lambda module, batch: module(batch["inputs"]),
        lambda features, task: 3 * nn.functional.normalize(features, dim=-1) @ heads[task].T,
    )

    def batches(task: str) -> Any:
        return lambda: iter(
            {"inputs": inputs[task][i : i + 10], "labels": labels[task][i : i + 10], "task": task}
            for i in range(0, count, 10)
        )

    examples = Examples(
        {n: batches(n) for n in names}, dict.fromkeys(names, count), {n: n for n in names},
        dict.fromkeys(names, "sha256:0"), "fit", labelled=True,
    )  # fmt: skip
    recipe = {"method": "average", "base": files.pop("base"), "experts": files}
    return Family(recipe, states, network, examples, heads)
