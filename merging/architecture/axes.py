"""Which dimensions of a model's tensors move together: what may be permuted without a change of what it computes.

A label is given only where all its members are known. Anything in a module that is not understood, and has a dimension
of the same size, takes the label from the whole module.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, Collection, Iterable, Iterator, Mapping, NamedTuple, Sequence

from mergeline.merging.architecture.classes import is_causal
from mergeline.merging.architecture.tensors import Role, TensorRole

_UP = (Role.MLP_UP, Role.MLP_GATE, Role.MLP_GATE_UP)
_QKV = (Role.QKV_THIRDS, Role.QKV_INTERLEAVED)
_SEPARATE = (Role.QUERY, Role.KEY, Role.VALUE)
# How ResNet blocks number their convolutions and norms.
_CHAINS = (("conv{}", "bn{}"), ("layer.{}.convolution", "layer.{}.normalization"))
_NORM_VECTORS = ("weight", "bias", "running_mean", "running_var")
_SHORTCUTS = ("downsample.", "shortcut.")
_READERS = (Role.CLASSIFIER, Role.HEAD, Role.PROJECTION)  # of what the last layer gives


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
    permutes: Collection[str],
    towers: Mapping[str, str],
    config: Mapping[str, Any],
) -> tuple[dict[str, tuple[str | None, ...]], dict[str, int]]:
    """The labels of all tensors' dimensions, and how many units each counts. permutes, towers: as of a `rows.Row`."""
    labels = _Labels()
    if not _label_chain(labels, tensors):
        members = _members(tensors)
        _label_vocabulary(labels, tensors.values())
        for module, inside in members.items():
            _label_hidden(labels, module, inside)
        if "channels" in permutes:
            _label_channels(labels, tensors)
        for name, own, settings in _towers(tensors, towers, config):
            if "heads" in permutes:
                groups = settings.get("num_key_value_heads") or _heads(settings)
                for module, inside in members.items():
                    if module in own:
                        _label_heads(labels, module, inside, groups, _heads(settings))
            if "residual" in permutes:
                _label_residual(labels, name, [tensors[n] for n in own if n in tensors], settings)
    return {name: labels.of(tensor) for name, tensor in tensors.items()}, labels.units


def _towers(
    tensors: Mapping[str, TensorRole], towers: Mapping[str, str], config: Mapping[str, Any]
) -> Iterator[tuple[str, set[str], Mapping[str, Any]]]:
    """Of the parts of a model that have layers of one kind: a name, its tensors and modules, its own configuration."""
    for key, pattern in (towers or {"": ""}).items():
        own = [tensor for tensor in tensors.values() if re.match(pattern, tensor.name)]
        if len({tensor.tower for tensor in own if tensor.layer is not None}) == 1:
            part = config.get(key)
            settings = part if isinstance(part, Mapping) else config
            modules = {tensor.module for tensor in own if tensor.module is not None}
            yield re.sub("_(config|cfg)$", "", key), {tensor.name for tensor in own} | modules, settings


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
    keys = next((t for t in found if t.of is None and t.role is Role.KEY), None)
    if keys and heads and keys.shape[keys.outputs] * heads != queries.shape[queries.outputs] * groups:
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
    """How many heads an attention has, in the words of transformers, timm and open_clip."""
    if isinstance(config.get("model_args"), Mapping):  # of timm
        config = {**config, **config["model_args"]}
    keys = ("num_attention_heads", "n_head", "n_heads", "num_heads", "heads")
    found = next((config[k] for k in keys if k in config), None)
    if found is None and "head_width" in config and isinstance(config.get("width"), int):
        found = config["width"] // max(1, int(config["head_width"]))
    return found if isinstance(found, int) else None


def _label_chain(labels: _Labels, tensors: Mapping[str, TensorRole]) -> bool:
    """The hidden units of a model that is linear layers alone, numbered, each as wide as the next takes in."""
    weights = {name.removesuffix(".weight"): t for name, t in tensors.items() if name.endswith(".weight")}
    biases = {name.removesuffix(".bias"): t for name, t in tensors.items() if name.endswith(".bias")}
    found = {module: re.fullmatch(r"(.*?)(\d+)", module) for module in weights}
    names = {match.group(1) for match in found.values() if match}
    if (
        len(weights) < 2
        or len(names) != 1
        or len(weights) + len(biases) != len(tensors)
        or not biases.keys() <= weights.keys()
        or any(len(t.shape) != 2 or t.transposed for t in weights.values())
        or any(t.shape != weights[module].shape[:1] for module, t in biases.items())
        or not all(found.values())
        or any(t.module for t in weights.values())
    ):
        return False
    order = sorted(weights, key=lambda module: int(found[module].group(2)))  # type: ignore[union-attr]
    pairs = list(zip(order, order[1:]))
    if any(weights[a].shape[0] != weights[b].shape[1] for a, b in pairs):
        return False
    for a, b in pairs:
        places = [_Place(t, 0) for t in (weights[a], biases.get(a)) if t]
        labels.add(f"{a}.hidden", weights[a].shape[0], [*places, _Place(weights[b], 1)])
    return True


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
    for label, places in _streams(tensors).items():
        labels.add(label, places[0].tensor.shape[places[0].axis], places)


class _Block:
    """A block of a ResNet: its convolutions and norms in their order, those of its shortcut, and what else is in it."""

    def __init__(self) -> None:
        self.main: dict[int, TensorRole] = {}
        self.norms: dict[int, list[TensorRole]] = defaultdict(list)
        self.shortcut: list[TensorRole] = []
        self.shortcut_norm: list[TensorRole] = []
        self.is_understood = True

    def add(self, tensor: TensorRole, inside: str) -> None:
        """Take in a tensor by its name in the block."""
        found = re.fullmatch(r"(?:(conv|bn)|layer\.)(\d+)\.(?:(convolution|normalization)\.)?(\w+)", inside)
        if inside.startswith(_SHORTCUTS):
            (self.shortcut if tensor.role is Role.CONVOLUTION else self.shortcut_norm).append(tensor)
        elif found and tensor.role is Role.CONVOLUTION:
            self.main[int(found.group(2))] = tensor
        elif found and found.group(4) in _NORM_VECTORS and len(tensor.shape) == 1:
            self.norms[int(found.group(2))].append(tensor)
        else:
            self.is_understood = False

    def inputs(self) -> list[_Place]:
        return [_Place(t, 1) for t in (self.main[min(self.main)], *self.shortcut)]

    def outputs(self) -> list[_Place]:
        last = max(self.main)
        return [
            _Place(t, 0) for t in (self.main[last], *self.norms[last], *self.shortcut, *self.shortcut_norm)
        ]


def _streams(tensors: Mapping[str, TensorRole]) -> dict[str, list[_Place]]:
    """What the blocks of a ResNet read from and add to, a stream until a shortcut has a convolution of its own.

    Nothing of models in which anything is not understood.
    """
    blocks: dict[str, _Block] = defaultdict(_Block)
    stem, readers = list[TensorRole](), list[TensorRole]()
    for tensor in tensors.values():
        inside = re.match(r"(?:.*\.)?(?:layer\d+\.\d+|stages\.\d+\.layers\.\d+)(?=\.)", tensor.name)
        if tensor.role is Role.COUNTER or Role.CLASSIFIER is tensor.of:
            continue
        if inside:
            blocks[inside.group()].add(tensor, tensor.name[inside.end() + 1 :])
        else:
            (readers if tensor.role is Role.CLASSIFIER else stem).append(tensor)
    convolutions = [tensor for tensor in stem if len(tensor.shape) == 4]
    known = all(block.is_understood and block.main for block in blocks.values())
    if not known or not blocks or len(convolutions) != 1 or len(stem) != 5 or len(readers) != 1:
        return {}
    name = f"{convolutions[0].name.removesuffix('.weight')}.residual"
    found = {name: [_Place(tensor, 0) for tensor in stem]}
    for prefix in sorted(blocks, key=lambda p: [int(n) for n in re.findall(r"\d+", p)]):
        block = blocks[prefix]
        found[name] += block.inputs()
        if block.shortcut:
            name = f"{prefix}.residual"
            found[name] = block.outputs()
        else:
            found[name] += block.outputs()
    found[name].append(_Place(readers[0], 1))
    alike = all(len({t.shape[axis] for t, axis in places}) == 1 for places in found.values())
    return found if alike else {}


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


def _label_residual(
    labels: _Labels, name: str, everything: Sequence[TensorRole], config: Mapping[str, Any]
) -> None:
    """The one width that all layers of a tower read from and add to; of towers of which every tensor is understood.

    What the last layer gives must be read by one of the tensors: else the order of the outputs would change.
    """
    if not is_causal(config) and not any(tensor.role in _READERS for tensor in everything):
        return
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
    labels.add(f"{name}.residual".lstrip("."), width, places)


_NOT_UNDERSTOOD = (
    Role.OTHER, Role.LINEAR, Role.CONVOLUTION, Role.STEM, Role.EXPERTS, Role.MLP_GATE_UP, Role.QKV_GROUPED,
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
    elif tensor.role is Role.PROJECTION:
        yield _Place(tensor, 0 if tensor.multiplied_from_left else tensor.inputs)
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
