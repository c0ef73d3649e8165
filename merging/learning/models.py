"""Models of one base, whose weights a network is given one after the other."""

from __future__ import annotations

from math import prod
from pathlib import Path

from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.learning.network import Network


def load_base(network: Network, base: Path) -> None:
    """Give a network the weights of a base (raises UserError as `Network.load`)."""
    checkpoint = open_checkpoint(base)
    network.load({name: checkpoint.read(name) for name in checkpoint.tensors})


def load_model(network: Network, base: Path, model: Path) -> None:
    """Give a network the weights of a model, the base's where it has none; of an adapter, what it makes of the base.

    Raises:
        UserError: a checkpoint that does not match the base, or that the network cannot take over.
    """
    load_base(network, base)
    heads = sorted(network.apart & open_checkpoint(model).tensors.keys())
    plan = make_plan({"method": "average", "base": base, "experts": {"model": model}, "heads": heads})
    plan.check()
    shapes = {entry.name: entry.spec.shape for entry in plan.entries if entry.action == "merge"}
    with FileInputs(plan) as source:
        for name, shape in shapes.items():
            network.load({name: source.stored("model", name, 0, prod(shape)).reshape(shape)})
