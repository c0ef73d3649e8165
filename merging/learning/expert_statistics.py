"""What the experts of a mixture are used for: how often each is chosen, and how alike router logits and outputs are.

Shape suffixes: E experts of a layer, T tokens, K experts that a token is sent to, H width of the model.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Iterator

from mergeline.merging.lazy import torch
from mergeline.merging.learning.gathering import Collected, Gathering, Subject, refuse_nonfinite
from mergeline.merging.merge_experts import LOGITS, OUTPUTS, USAGE

if TYPE_CHECKING:
    from torch import Tensor, nn

_HELD = 1 << 24  # numbers of outputs of all experts that are held at once


@dataclass
class _Layer:
    """Sums over the tokens that one mixture saw."""

    usage_E: Tensor
    logits_EE: Tensor
    cosines_EE: Tensor | None
    tokens: int = 0


def expert_statistics(subject: Subject, gathering: Gathering) -> Collected:
    """Of each mixture, by the name that transformers 5 has for the module of its experts and router; see `collect`.

    NAME/usage (E,): the share of choices that fell on each expert. NAME/logits (E, E): the mean over tokens of
    products of router logits. With `outputs`, NAME/outputs (E, E): the mean over tokens of the cosines between what
    any two experts make of it, for which all are run on every token.
    """
    found: dict[str, _Layer] = {}
    module, prefix = subject.network.module, subject.network.prefix
    with ExitStack() as stack, torch.no_grad():
        for name, experts, weight_EH, bias_E in _mixtures(module):

            def see(
                experts: Any,
                args: Any,
                kwargs: Any,
                name: str = name,
                weight: Any = weight_EH,
                bias: Any = bias_E,
            ) -> None:
                given = _given(args, kwargs)
                if given is not None:
                    _add(found, prefix + name, experts, *given, weight, bias, gathering.outputs)

            stack.enter_context(_Hook(experts.register_forward_pre_hook(see, with_kwargs=True)))
        for task, batches in subject.batches.items():
            for batch, numbers in batches():
                refuse_nonfinite(subject, task, subject.network.features(batch), "features")
                subject.step(len(numbers))
    tensors: dict[str, Tensor] = {}
    for name, layer in found.items():
        tensors[f"{name}/{USAGE}"] = layer.usage_E / layer.usage_E.sum().clamp(min=1)
        tensors[f"{name}/{LOGITS}"] = layer.logits_EE / layer.tokens
        if layer.cosines_EE is not None:
            tensors[f"{name}/{OUTPUTS}"] = layer.cosines_EE / layer.tokens
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    told = {"rows": {name: layer.tokens for name, layer in found.items()}}
    return Collected(shapes, iter(tensors.items()), told)


class _Hook:
    """Removes a hook at the end of a block."""

    def __init__(self, handle: Any):
        self._handle = handle

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()


def _mixtures(module: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor, Tensor | None]]:
    """Of each mixture, its name, what holds its experts, and the router's weight (E, H) and bias."""
    for name, part in module.named_modules():
        experts = getattr(part, "experts", None)
        if not isinstance(experts, torch.nn.Module):
            continue
        for child in part.children():
            weight, bias = getattr(child, "weight", None), getattr(child, "bias", None)
            count = getattr(experts, "num_experts", None)
            if isinstance(weight, torch.Tensor) and weight.ndim == 2 and len(weight) == count:
                yield name, experts, weight, bias if isinstance(bias, torch.Tensor) else None
                break


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Hidden states (T, H), chosen experts (T, K) and their weights, as transformers 5 hands them on."""
    values = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor)]
    indices = [value for value in values if value.ndim == 2 and not value.is_floating_point()]
    if len(values) < 3 or len(indices) != 1 or values[0].ndim < 2:
        return None
    others = [value for value in values[1:] if value is not indices[0]]
    return values[0].reshape(-1, values[0].shape[-1]), indices[0], others[0]


def _add(
    found: dict[str, _Layer],
    name: str,
    experts: Any,
    hidden_TH: Tensor,
    chosen_TK: Tensor,
    weights_TK: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    outputs: bool,
) -> None:
    count = len(weight_EH)
    if name not in found:
        square = weight_EH.new_zeros(count, count, dtype=torch.float64)
        found[name] = _Layer(square[0].clone(), square.clone(), square.clone() if outputs else None)
    layer = found[name]
    layer.usage_E += torch.bincount(chosen_TK.flatten(), minlength=count)[:count]
    logits_TE = torch.nn.functional.linear(hidden_TH, weight_EH, bias_E).double()
    layer.logits_EE += logits_TE.T @ logits_TE
    layer.tokens += len(hidden_TH)
    if layer.cosines_EE is None:
        return
    step = max(_HELD // (count * hidden_TH.shape[1]), 1)
    for part_TH in hidden_TH.split(step):
        made = []
        for expert in range(count):
            index_T1 = chosen_TK.new_full((len(part_TH), 1), expert)
            out_TH = experts.forward(part_TH, index_T1, weights_TK.new_ones(len(part_TH), 1))
            made.append(torch.nn.functional.normalize(out_TH.reshape(len(part_TH), -1).double(), dim=-1))
        unit_ETH = torch.stack(made).flatten(1)
        layer.cosines_EE += unit_ETH @ unit_ETH.T
