"""Which dimensions of a model's tensors move together: what may be permuted without a change of what it computes.

A label is given only where all its members are known. Anything in a module that is not understood, and has a dimension
of the same size, takes the label from the whole module.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Collection, Iterable, Iterator, Mapping, NamedTuple, Sequence

from mergeline.merging.architecture.tensors import Role, TensorRole

_UP = (Role.MLP_UP, Role.MLP_GATE, Role.MLP_GATE_UP)
_QKV = (Role.QKV_THIRDS, Role.QKV_INTERLEAVED)
_SEPARATE = (Role.QUERY, Role.KEY, Role.VALUE)
# How ResNet blocks number their convolutions and norms.
_CHAINS = (("conv{}", "bn{}"), ("layer.{}.convolution", "layer.{}.normalization"))
_NORM_VECTORS = ("weight", "bias", "running_mean", "running_var")


class _Place(NamedTuple):
    """A dimension of a tensor."""

    tensor: TensorRole
    axis: int


class _Labels:
    """Labels as they are found."""

    def __init__(self) -> None:
        self.axes: dict[str, dict[int, str]] = defaultdict(dict)
        self.units: dict[str, int] = {}

    def add(self, label: str, units: int, places: Iterable[_Place]) -> None:
        self.units[label] = units
        for tensor, axis in places:
            self.axes[tensor.name][axis] = label

    def of(self, tensor: TensorRole) -> tuple[str | None, ...]:
        found = self.axes.get(tensor.name, {})
        return tuple(found.get(axis) for axis in range(len(tensor.shape)))


def label_axes(
    tensors: Mapping[str, TensorRole],
    layers: Mapping[str, int],
    permutes: Collection[str],
    config: Mapping[str, Any],
) -> tuple[dict[str, tuple[str | None, ...]], dict[str, int]]:
    """The labels of all tensors' dimensions, and how many units each counts. permutes: as of a row (`rows.Row`)."""
    labels = _Labels()
    members = _members(tensors)
    _label_vocabulary(labels, tensors.values())
    for module, inside in members.items():
        _label_hidden(labels, module, inside)
    if "heads" in permutes and len(layers) == 1:
        groups = config.get("num_key_value_heads") or _heads(config)
        for module, inside in members.items():
            _label_heads(labels, module, inside, groups, _heads(config))
    if "channels" in permutes:
        _label_channels(labels, tensors)
    if "residual" in permutes and len(layers) == 1:
        _label_residual(labels, tensors.values())
    return {name: labels.of(tensor) for name, tensor in tensors.items()}, labels.units


def _members(tensors: Mapping[str, TensorRole]) -> dict[str, list[TensorRole]]:
    """All tensors whose names begin with that of a module, for each module."""
    members: dict[str, list[TensorRole]] = {
        t.module: [] for t in tensors.values() if t.module is not None and t.of is None
    }
    for name, tensor in tensors.items():
        at = name.find(".")
        while at >= 0:
            if name[:at] in members:
                members[name[:at]].append(tensor)
            at = name.find(".", at + 1)
    return members


def _label_vocabulary(labels: _Labels, tensors: Iterable[TensorRole]) -> None:
    found = [tensor for tensor in tensors if tensor.by_token]
    sizes = {tensor.shape[0] for tensor in found}
    if len(sizes) == 1:
        labels.add("vocabulary", sizes.pop(), (_Place(tensor, 0) for tensor in found))


def _label_hidden(labels: _Labels, module: str, inside: Sequence[TensorRole]) -> None:
    """The hidden units of an MLP: what up and gate put out, and down takes in."""
    own = [tensor for tensor in inside if tensor.module == module]
    downs = [tensor for tensor in own if tensor.role is Role.MLP_DOWN]
    ups = [tensor for tensor in own if tensor.role in _UP]
    biases = [tensor for tensor in own if tensor.of in _UP]
    if len(downs) != 1 or not ups:
        return
    units = downs[0].shape[downs[0].inputs]
    places = [_Place(t, t.outputs) for t in (*ups, *biases)] + [_Place(downs[0], downs[0].inputs)]
    if all(t.shape[axis] == t.parts * units for t, axis in places if t is not downs[0]) and _is_whole(
        places, inside, units
    ):
        labels.add(f"{module}.hidden", units, places)


def _label_heads(
    labels: _Labels, module: str, inside: Sequence[TensorRole], groups: Any, heads: int | None
) -> None:
    """The groups of heads of an attention: those that share keys and values, one each where none are shared."""
    own = [tensor for tensor in inside if tensor.module == module]
    outputs = [tensor for tensor in own if tensor.role is Role.ATTENTION_OUTPUT]
    found = [tensor for tensor in own if (tensor.of or tensor.role) in (*_QKV, *_SEPARATE)]
    roles = sorted(tensor.role for tensor in found if tensor.of is None)
    known = roles == sorted(_SEPARATE) or len(roles) == 1 and roles[0] in _QKV
    if not isinstance(groups, int) or groups < 1 or len(outputs) != 1 or not known:
        return
    width = outputs[0].shape[outputs[0].inputs]
    queries = next(t for t in found if t.of is None and t.role in (*_QKV, Role.QUERY))
    if queries.shape[queries.outputs] != (width if queries.role is Role.QUERY else 3 * width):
        return
    # Norms of all heads at once, and a number for each head; a norm of one head's width is the same for all.
    heights = {tensor.shape[tensor.outputs] for tensor in found}
    vectors = [t for t in inside if t.module is None and len(t.shape) == 1]
    long = [t for t in vectors if t.role is Role.NORM and t.shape[0] in heights and "_norm." in t.name]
    sinks = [t for t in vectors if t.role is Role.OTHER and t.shape[0] == heads]
    places = [_Place(t, t.outputs) for t in (*found, *long, *sinks)] + [_Place(outputs[0], outputs[0].inputs)]
    rest = [t for t in inside if t.module is None and t not in long and t not in sinks]
    if any(t.shape[axis] % (groups * _parts(t, axis)) for t, axis in places) or any(
        t.role in (Role.OTHER, Role.LINEAR, Role.BIAS, Role.POSITION) for t in rest
    ):
        return
    labels.add(f"{module}.heads", groups, places)


def _heads(config: Mapping[str, Any]) -> int | None:
    found = next(
        (config[k] for k in ("num_attention_heads", "n_head", "n_heads", "num_heads") if k in config), None
    )
    return found if isinstance(found, int) else None


def _label_channels(labels: _Labels, tensors: Mapping[str, TensorRole]) -> None:
    """The channels inside of ResNet blocks: of a convolution, its batch norm, and the next convolution's inputs.

    A norm of another width than its convolution's shows that norms come first in this model: then nothing is labelled.
    """
    links = list(_links(tensors))
    if any(vector.shape != (link.first.shape[0],) for link in links for vector in link.norm):
        return
    for link in links:
        if link.is_grouped or link.second.shape[1] != link.first.shape[0] or len(link.norm) != 4:
            continue
        places = [_Place(link.first, 0), *(_Place(vector, 0) for vector in link.norm), _Place(link.second, 1)]
        labels.add(link.first.name.removesuffix(".weight"), link.first.shape[0], places)


class _Link(NamedTuple):
    """A convolution, the vectors of its norm, and the convolution that reads it."""

    first: TensorRole
    norm: list[TensorRole]
    second: TensorRole
    is_grouped: bool


def _links(tensors: Mapping[str, TensorRole]) -> Iterator[_Link]:
    for name, first in tensors.items():
        if first.role is not Role.CONVOLUTION or first.layer is None:
            continue
        for convolution, norm in _CHAINS:
            for number in range(3):
                block = name.removesuffix(f".{convolution.format(number)}.weight")
                before, second = (
                    tensors.get(f"{block}.{convolution.format(number + step)}.weight") for step in (-1, 1)
                )
                if block != name and second:
                    vectors = (f"{block}.{norm.format(number)}.{part}" for part in _NORM_VECTORS)
                    found = [tensors[vector] for vector in vectors if vector in tensors]
                    grouped = before is not None and first.shape[1] != before.shape[0]
                    yield _Link(first, found, second, grouped)


def _label_residual(labels: _Labels, tensors: Iterable[TensorRole]) -> None:
    """The one width that all layers read from and add to; of models of which every tensor is understood."""
    everything = list(tensors)
    places = [place for tensor in everything for place in _residual_places(tensor)]
    widths = {place.tensor.shape[place.axis] for place in places}
    if len(widths) != 1:
        return
    width = widths.pop()
    known = {(place.tensor.name, place.axis) for place in places}
    for tensor in everything:
        free = [
            axis
            for axis, size in enumerate(tensor.shape)
            if size == width and (tensor.name, axis) not in known and axis not in labels.axes[tensor.name]
        ]
        if free and (tensor.role in _NOT_UNDERSTOOD or tensor.role is Role.BIAS and tensor.of is None):
            return
    labels.add("residual", width, places)


_NOT_UNDERSTOOD = (
    Role.OTHER, Role.LINEAR, Role.CONVOLUTION, Role.PROJECTION, Role.STEM, Role.EXPERTS, Role.MLP_GATE_UP,
    Role.QKV_GROUPED,
)  # fmt: skip
_READ = (
    *_UP, *_QKV, *_SEPARATE, Role.QKV_GROUPED, Role.HEAD, Role.CLASSIFIER, Role.ROUTER,
)  # fmt: skip
_WRITTEN = (Role.ATTENTION_OUTPUT, Role.MLP_DOWN, Role.PATCH_EMBEDDING)
_VECTORS = (Role.POSITION, Role.TOKEN, Role.EMBEDDING)


def _residual_places(tensor: TensorRole) -> Iterator[_Place]:
    """The dimensions of a tensor that are the residual stream's."""
    if tensor.role in _READ:
        yield _Place(tensor, tensor.inputs)
    elif tensor.role in _WRITTEN or tensor.of in _WRITTEN:
        yield _Place(tensor, tensor.outputs)
    elif tensor.role in _VECTORS and tensor.shape:
        yield _Place(tensor, len(tensor.shape) - 1)
    elif tensor.role is Role.SCALE and len(tensor.shape) == 1:
        yield _Place(tensor, 0)
    elif tensor.role is Role.NORM and not any(part in tensor.name for part in ("q_norm.", "k_norm.")):
        yield _Place(tensor, 0)
    elif tensor.packed and len(tensor.shape) == 3:
        gated = len(tensor.packed.names) == 2
        yield _Place(tensor, 1 if gated == tensor.packed.transposed else 2)


def _is_whole(places: Sequence[_Place], inside: Sequence[TensorRole], units: int) -> bool:
    """Whether nothing else in a module has a dimension of that size."""
    names = {tensor.name for tensor, _ in places}
    return not any(units in tensor.shape for tensor in inside if tensor.name not in names)


def _parts(tensor: TensorRole, axis: int) -> int:
    return tensor.parts if axis == tensor.outputs else 1
