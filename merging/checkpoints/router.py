"""Routers of compressed stores: what finds, for an input whose task is not known, the expert to give back.

A store's folder holds one as `router.safetensors`. The base is run on the input, and what comes into some of its linear
maps is looked at; the expert of the largest score is taken.

    residual    LAYER/basis (E, k, N): what of the first token's input x of a map each expert's task vector would move:
                the score of expert e is the sum over layers of -log(|x - x V_e' V_e|² / |x|²), V_e its basis
    features    weight (E, F), offset (E): a linear discriminant on the inputs' first token and mean over tokens, one
                layer after the other: F = 2 N a layer
    network     I/weight, I/bias (I = 0, 1, 2): three linear maps on the same, with leaky ReLUs between

MASS (arXiv 2504.05342) and SMILE (arXiv 2408.10174) for the first; Fisher's linear discriminant for the second;
Twin-Merging (arXiv 2406.15479) for the third.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Literal, Mapping, Sequence, cast, get_args

from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.errors import UserError
from mergeline.merging.files import write_bytes
from mergeline.merging.reading import parsed_json

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["residual", "features", "network"]

ROUTER = "router.safetensors"
_METADATA = "mergeline.router"
_DEPTH = 3  # of a network
_LEAST = 1e-6  # of what is left of an input, before its logarithm


@dataclass(frozen=True, eq=False)
class Router:
    """What chooses among `experts` by the inputs of the linear maps `layers` of the base of digest `base`."""

    kind: Kind
    experts: Sequence[str]
    base: str
    layers: Sequence[str]
    tensors: Mapping[str, Tensor]
    file: Path = field(default=Path(), kw_only=True)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def scores(self, module: nn.Module, run: Callable[[], Any]) -> Tensor:
        """Of the examples that `run` runs through `module`, which has the base's weights: float64 (B, E)."""
        import torch

        inputs = layer_inputs(module, self.layers, run, self.file)
        if self.kind == "features":
            x_BF = described(inputs)
            weight, offset = (self.tensors[name].to(x_BF) for name in ("weight", "offset"))
            if weight.shape[1] != x_BF.shape[1]:
                raise UserError(f"{self.file}: is for models of another width; fit it again")
            return x_BF @ weight.T + offset
        if self.kind == "network":
            return self._network(described(inputs))
        scores = []
        for layer, x in zip(self.layers, inputs):
            first_BN, basis_EKN = x[:, 0].double(), self.tensors[f"{layer}/basis"].to(x.device, torch.float64)
            if basis_EKN.shape[2] != first_BN.shape[1]:
                raise UserError(f"{self.file}: is for models of another width; fit it again")
            inside_BE = torch.einsum("bn,ekn->bek", first_BN, basis_EKN).square().sum(2)
            whole_B1 = first_BN.square().sum(1, keepdim=True).clamp_min(1e-30)
            scores.append(-torch.log((1 - inside_BE / whole_B1).clamp_min(_LEAST)))
        return torch.stack(scores).sum(0)

    def _network(self, x_BF: Tensor) -> Tensor:
        from torch.nn.functional import leaky_relu

        if self.tensors["0/weight"].shape[1] != x_BF.shape[1]:
            raise UserError(f"{self.file}: is for models of another width; fit it again")
        for i in range(_DEPTH):
            weight, bias = (self.tensors[f"{i}/{part}"].to(x_BF) for part in ("weight", "bias"))
            x_BF = (leaky_relu(x_BF) if i else x_BF) @ weight.T + bias
        return x_BF


def layer_inputs(
    module: nn.Module, layers: Sequence[str], run: Callable[[], Any], file: Path = Path()
) -> list[Tensor]:
    """The inputs (B, tokens, N) of linear maps, by their modules' names, while `run` runs the module.

    Raises:
        UserError: the model has no such module, or did not use it on tokens.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, _module: Any, given: Any) -> None:
        seen[name] = given[0]

    handles = []
    try:
        for name in layers:
            try:
                handles.append(module.get_submodule(name).register_forward_pre_hook(partial(keep, name)))
            except AttributeError:
                raise UserError(f"{file}: looks at '{name}', which the model has not; fit it again") from None
        run()
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in seen or seen[name].ndim != 3:
            raise UserError(f"'{name}' is not applied to tokens; a router needs a transformer")
    return [seen[name] for name in layers]


def described(inputs: Sequence[Tensor]) -> Tensor:
    """What a discriminant sees of the inputs (B, tokens, N) of layers: float64 (B, F)."""
    import torch

    parts = [part for x in inputs for part in (x[:, 0], x.mean(1))]
    return torch.cat(parts, dim=1).double()


# ---------------------------------------------------------------------------------------------- files


def write_router(path: Path, router: Router) -> None:
    """Write a router, in float32 (raises UserError if a number is not finite)."""
    import torch
    from safetensors.torch import save

    tensors = {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in router.tensors.items()
    }
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise UserError("the router is not finite; use more examples, or a larger ridge")
    facts = {name: getattr(router, name) for name in ("kind", "experts", "base", "layers")}
    write_bytes(path, save(tensors, {_METADATA: json.dumps(facts, sort_keys=True, default=list)}))


def read_router(path: Path, experts: Sequence[str]) -> Router:
    """The router of a store of these experts.

    Raises:
        UserError: no such file, no router of Mergeline's, one of other experts, or a damaged one.
    """
    import torch

    checkpoint = open_checkpoint(path)
    text = checkpoint.metadata.get(_METADATA)
    if text is None:
        raise UserError(f"{path}: is no router of a store; `mergeline fit` makes one (routed_by_residual)")
    damaged = UserError(
        f"{path}: is no router of a known kind, or was damaged; copy it again, or fit it again"
    )
    try:
        facts = parsed_json(text)
        kind, base = str(facts["kind"]), str(facts["base"])
        own, layers = ([str(name) for name in facts[key]] for key in ("experts", "layers"))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if own != list(experts):
        raise UserError(
            f"{path}: chooses among {', '.join(own)}, and the store holds {', '.join(experts)}; fit it again"
        )
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    finite = all(t.is_floating_point() and bool(torch.isfinite(t).all()) for t in tensors.values())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if kind not in get_args(Kind) or not finite or not layers or not _fits(kind, shapes, len(own), layers):
        raise damaged
    return Router(cast(Kind, kind), own, base, layers, tensors, file=path)


def _fits(kind: str, shapes: Mapping[str, tuple[int, ...]], experts: int, layers: Sequence[str]) -> bool:
    """Whether tensors of these shapes are those of a kind."""
    if kind == "features":
        weight = shapes.get("weight", ())
        return (
            len(weight) == 2 and shapes == {"weight": weight, "offset": (experts,)} and weight[0] == experts
        )
    if kind == "network":
        weights, biases = (
            [shapes.get(f"{i}/{part}", ()) for i in range(_DEPTH)] for part in ("weight", "bias")
        )
        chained = all(len(w) == 2 and b == w[:1] for w, b in zip(weights, biases))
        widths = [w[1] for w in weights[1:]] == [w[0] for w in weights[:-1]] if chained else False
        return widths and len(shapes) == 2 * _DEPTH and weights[-1][0] == experts
    bases = [shapes.get(f"{layer}/basis", ()) for layer in layers]
    return len(shapes) == len(layers) and all(len(b) == 3 and b[0] == experts for b in bases)
