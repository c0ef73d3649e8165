"""The tensors of a checkpoint, in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn


# What configurations call the number of layers.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "layers", "depth")


def refuse_unfounded_layers(path: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Building the layers that a configuration promises must end: there are no more than the weights have tensors.

    Raises:
        UserError: there are.
    """
    for key, value in config.items():
        counts = [c for c in (value if isinstance(value, list) else [value]) if isinstance(c, int)]
        if key in _LAYERS and sum(counts) > tensors:
            raise UserError(
                f"{path}: {key} is {value}, and the weights have {tensors} tensors; download it again"
            )
        if isinstance(value, dict):
            refuse_unfounded_layers(path, value, tensors)


def fill(module: nn.Module, state: Mapping[str, Tensor], where: object, by: str, required: str = "") -> None:
    """Give a module the tensors of a checkpoint; of its own, those may be missing that do not start with `required`.

    where, by: what errors call the checkpoint, and what says how the module is built.

    Raises:
        UserError: a tensor is none of the module's, is missing, or has another shape.
    """
    own = module.state_dict()
    for name in sorted(state.keys() | own.keys()):
        if name not in own:
            raise UserError(f"{where}: {by} has no tensor '{name}'{did_you_mean(name, own)}")
        if name not in state and name.startswith(required):
            raise UserError(f"{where}: tensor '{name}' is missing")
        if name in state and state[name].shape != own[name].shape:
            shapes = f"{tuple(state[name].shape)}, by {by} {tuple(own[name].shape)}"
            raise UserError(f"{where}: '{name}' is {shapes}")
    module.load_state_dict(state, strict=False)


def load_state(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a folder with one or with shards and an index (raises UserError)."""
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}
