"""Mixtures of experts: where in a model's tensors the experts of each layer lie, and the rows of their router."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Iterator, Mapping

from mergeline.merging.architecture.model import Model
from mergeline.merging.architecture.renames import in_memory
from mergeline.merging.architecture.tensors import Matrix, Role, TensorRole, whole
from mergeline.merging.errors import UserError

_OF_EXPERT = re.compile(r"^(?P<module>(?:.*\.)?)experts\.(?P<expert>\d{1,9})\.(?P<part>[^.]+)\.weight$")
_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_CORRECTION = "e_score_correction_bias"

# Of config.json: how many experts a layer has, to how many a token is sent; how many groups the router tells apart,
# each of neighbouring experts, and in how many of them it chooses for a token.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
GROUPS = ("n_group", "num_expert_group")
CHOSEN_GROUPS = ("topk_group", "topk_groups")


@dataclass(frozen=True)
class Place:
    """Where one matrix (M outputs, N inputs) of an expert lies: the stored tensor, and the matrix in it."""

    tensor: str
    matrix: Matrix


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer.

    name: what transformers 5 calls the module that holds experts and router. experts: of each expert `gate`, `up` and
    `down`, where it has them. router: the tensors with a row for each expert, by name.
    """

    name: str
    experts: tuple[Mapping[str, Place], ...]
    router: tuple[str, ...]

    @property
    def least_in_group(self) -> int:
        """How many experts score a group of the router: its best one, or of DeepSeek-V3 and its like its best two."""
        return 2 if any(name.endswith(_CORRECTION) for name in self.router) else 1

    @property
    def tensors(self) -> dict[str, None]:
        """The stored tensors of experts and router, in order."""
        places = (place.tensor for expert in self.experts for place in expert.values())
        return dict.fromkeys([*places, *self.router])


def mixtures(model: Model, config: Mapping[str, Any]) -> list[Mixture]:
    """The mixtures of a model, in the order of its layers; [] where it has none. config: its config.json.

    Raises:
        UserError: experts of which not all is known: numbers that are missing, biases, packed ones that nothing tells
            apart, rows of a router that are not one for each.
    """
    found: dict[str, dict[int, dict[str, Place]]] = {}
    for tensor in model.tensors.values():
        for matrix in _matrices(tensor):
            named = _OF_EXPERT.match(matrix.name)
            part = named and _PARTS.get(named["part"])
            if not named or not part:
                raise UserError(
                    f"'{tensor.name}': which part of an expert it is is not known; leave this model out"
                )
            experts = found.setdefault(named["module"], {})
            experts.setdefault(int(named["expert"]), {})[part] = Place(tensor.name, matrix)
    return [
        _mixture(model, module, experts, config) for module, experts in sorted(found.items(), key=_in_order)
    ]


def _in_order(item: tuple[str, Any]) -> list[Any]:
    return [int(word) if word.isdigit() else -1 for word in item[0].split(".")]


def _matrices(tensor: TensorRole) -> Iterator[Matrix]:
    """Those of experts that lie in a tensor."""
    if tensor.role is Role.EXPERTS:
        if tensor.packed is None:
            raise UserError(f"'{tensor.name}': {tensor.unsplit or 'its experts cannot be told apart'}")
        yield from tensor.packed.matrices()
    elif tensor.expert is not None or tensor.of is Role.EXPERTS:
        if len(tensor.shape) != 2 or tensor.of is not None:
            raise UserError(f"'{tensor.name}': experts with biases are not merged; leave this model out")
        yield whole(tensor.name, (tensor.shape[0], tensor.shape[1]))


def _mixture(
    model: Model, module: str, experts: Mapping[int, Mapping[str, Place]], config: Mapping[str, Any]
) -> Mixture:
    count = len(experts)
    forms = {tuple((part, place.matrix.shape) for part, place in sorted(e.items())) for e in experts.values()}
    if set(experts) != set(range(count)) or len(forms) > 1:
        raise UserError(f"'{module}experts': an expert, or a matrix of one, is missing or has another shape")
    parts = dict(next(iter(forms)))
    if not {"up", "down"} <= parts.keys():
        raise UserError(
            f"'{module}experts': has {', '.join(parts)}, but no up and down; leave this model out"
        )
    first = next(iter(experts[0].values()))
    name = in_memory(first.tensor, config).name.partition(".experts.")[0]
    router = []
    for tensor in model.tensors.values():
        if not tensor.name.startswith((module, f"{name}.")):
            continue
        is_bias = tensor.of is Role.ROUTER or tensor.name.endswith(_CORRECTION)
        if is_bias or tensor.role is Role.ROUTER and "shared_expert" not in tensor.name:
            if not tensor.shape or tensor.shape[0] != count:
                raise UserError(
                    f"'{tensor.name}': has shape {list(tensor.shape)}, not a row for each of {count} experts"
                )
            router.append(tensor.name)
    if not router:
        raise UserError(f"'{name}': the router of its experts is not known; leave this model out")
    return Mixture(name, tuple(experts[i] for i in range(count)), tuple(router))
