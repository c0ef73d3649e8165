"""A model's tensors described: from their names and shapes and, where there is one, its configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

from mergeline.merging.architecture.axes import label_axes
from mergeline.merging.architecture.classes import is_causal
from mergeline.merging.architecture.rows import COMMON, Pattern, rows_for
from mergeline.merging.architecture.tensors import PackedExperts, Role, TensorRole, kind_of

_LAYER = re.compile(r"^(.*?(?:^|\.))(\d+)\.")
_EXPERT = re.compile(r"(?<![^.])(experts\.(?:expert_)?)(\d+)(?=\.)")
_BUFFERS = {
    "running_mean": Role.RUNNING_MEAN,
    "running_var": Role.RUNNING_VARIANCE,
    "num_batches_tracked": Role.COUNTER,
}
_NORM = re.compile(r"norm[^.]*$", re.IGNORECASE)
_CONVOLUTION = re.compile(r"conv[^.]*(\.[^.]*)?$")
_UNSPLIT = (
    "neither the configuration nor the shapes say which of their dimensions are inputs and which outputs"
)


@dataclass(frozen=True)
class Model:
    """What `describe` returns.

    architecture: the id of the first row that was used, `unknown` if none was.
    layers: how many layers each tower has.
    units: how many things the dimensions of a label count: heads of several indices are one unit each.
    permutes: what keeps its function when it is permuted, as of a `rows.Row`.
    causal: whether the configuration names a causal language model.
    """

    architecture: str
    tensors: Mapping[str, TensorRole]
    layers: dict[str, int]
    units: dict[str, int] = field(default_factory=dict)
    causal: bool = False
    permutes: frozenset[str] = frozenset()

    def depth(self, name: str) -> float | None:
        """Where a tensor stands between the first layer of its tower (0) and the last (1); None outside of layers."""
        tower, layer = layer_of(name)
        if layer is None or tower not in self.layers:
            return None
        return layer / max(1, self.layers[tower] - 1)

    def modules(self) -> dict[str, dict[Role, TensorRole]]:
        """The weights of each attention and MLP, by their role; the first where two have one."""
        found: dict[str, dict[Role, TensorRole]] = {}
        for tensor in self.tensors.values():
            if tensor.module is not None and tensor.of is None:
                found.setdefault(tensor.module, {}).setdefault(tensor.role, tensor)
        return found


def layer_of(name: str) -> tuple[str | None, int | None]:
    """The tower (what stands before the first number) and the layer of a tensor; None outside of numbered layers."""
    found = _LAYER.match(name)
    return (found.group(1), int(found.group(2))) if found else (None, None)


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """How many layers each tower has."""
    return _counts(map(layer_of, names))


def _counts(places: Iterable[tuple[str | None, int | None]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tower, layer in places:
        if tower is not None and layer is not None:
            counts[tower] = max(counts.get(tower, 0), layer + 1)
    return counts


def describe(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any] | None = None) -> Model:
    """Say what each tensor is. shapes: of all tensors of a model, by name; config: its config.json, if there is one."""
    all_shapes = {name: tuple(shape) for name, shape in shapes.items()}
    config = config or {}
    rows = rows_for(all_shapes, config)
    reader = _Reader(all_shapes, (*(pattern for row in rows for pattern in row.patterns), *COMMON))
    tensors = _with_fused({name: reader.read(name) for name in all_shapes})
    layers = _counts((tensor.tower, tensor.layer) for tensor in tensors.values())
    permutes = rows[0].permutes if rows else frozenset()
    types = rows[0].model_types if rows else ()
    if types and config.get("model_type", types[0]) not in types:
        permutes -= {"heads"}  # names do not tell how many there are in each layer
    axes, units = label_axes(tensors, permutes, rows[0].towers if rows else {}, config)
    for name, tensor in tensors.items():
        object.__setattr__(tensor, "axes", axes[name])  # nobody has it yet; thousands of copies take long
    return Model(
        architecture=rows[0].id if rows else "unknown",
        tensors=tensors,
        layers=layers,
        units=units,
        causal=is_causal(config),
        permutes=permutes,
    )


def describe_all(shapes: Mapping[str, Sequence[int]], configs: Mapping[str, Mapping[str, Any]]) -> Model:
    """The same of a model of several components, by what stands before the names of their tensors.

    configs: of each component, and under "" of what belongs to none.
    """
    groups: dict[str, dict[str, Sequence[int]]] = {}
    for name, shape in shapes.items():
        prefix = next((p for p in configs if p and name.startswith(p)), "")
        groups.setdefault(prefix, {})[name.removeprefix(prefix)] = shape
    if groups.keys() <= {""}:
        return describe(shapes, configs.get(""))
    models = {prefix: describe(own, configs.get(prefix)) for prefix, own in groups.items()}
    return Model(
        architecture=" + ".join(dict.fromkeys(model.architecture for model in models.values())),
        tensors={
            p + name: _inside(p, role) for p, model in models.items() for name, role in model.tensors.items()
        },
        layers={p + tower: count for p, model in models.items() for tower, count in model.layers.items()},
        units={p + label: count for p, model in models.items() for label, count in model.units.items()},
    )


def _inside(prefix: str, role: TensorRole) -> TensorRole:
    """What a tensor of a component is among those of the others."""

    def named(name: str | None) -> str | None:
        return None if name is None else prefix + name

    packed = role.packed and replace(role.packed, prefix=prefix + role.packed.prefix)
    return replace(
        role, name=prefix + role.name, tower=named(role.tower), kind=prefix + role.kind, module=named(role.module),
        axes=tuple(map(named, role.axes)), packed=packed,
    )  # fmt: skip


class _Found(NamedTuple):
    """The pattern that fits a module's name, and how much of its end."""

    pattern: Pattern
    length: int


class _Reader:
    """Reads one tensor after the other; what is found for one layer holds for all but the first."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], patterns: Sequence[Pattern]):
        self._shapes, self._patterns = shapes, patterns
        self._known: dict[tuple[str, int | None], _Found | None] = {}

    def read(self, name: str) -> TensorRole:
        shape, (tower, layer), expert = self._shapes[name], layer_of(name), _EXPERT.search(name)
        return TensorRole(
            name=name,
            shape=shape,
            tower=tower,
            layer=layer,
            expert=int(expert.group(2)) if expert else None,
            kind=kind_of(name),
            axes=(None,) * len(shape),
            **self._role(name, shape, tower if layer else None, expert),
        )

    def _role(
        self, name: str, shape: tuple[int, ...], tower: str | None, expert: re.Match[str] | None
    ) -> dict[str, Any]:
        """What the patterns say of a tensor. tower: None in the first layer, which may hold a stem."""
        module, part = self._split(name)
        if part in _BUFFERS:
            return {"role": _BUFFERS[part]}
        key = module
        if expert:
            key = f"{key[: expert.start(2)]}*{key[expert.end(2) :]}"
        if tower is not None and "." in key[len(tower) :]:
            key = f"{tower}*{key[key.index('.', len(tower)) :]}"
        if part == "bias":
            return self._bias(name, shape, module, key)
        found = self._find(key, module, len(shape))
        if found is None:
            return {"role": _by_shape(name, part, len(shape))}
        start = len(module) - found.length
        if found.pattern.role is Role.EXPERTS:
            return {"role": Role.EXPERTS, **self._packed(name, shape, module[:start], found.pattern)}
        return {
            "role": found.pattern.role,
            "module": _module(module, start, found.pattern.role),
            "transposed": found.pattern.transposed,
        }

    def _bias(self, name: str, shape: tuple[int, ...], module: str, key: str) -> dict[str, Any]:
        if len(shape) > 2:
            return {"role": Role.CONSTANT}  # a mask
        own = module == name  # no weight has this name without `bias`
        weight = None if own else self._shapes.get(f"{module}.weight", self._shapes.get(module))
        found = self._find(key, module, None if weight is None else len(weight))
        if found is None:
            return {"role": Role.BIAS}
        role = found.pattern.role
        if role is Role.NORM and len(shape) == 1 and (weight is not None or _NORM.search(module)):
            return {"role": Role.NORM}
        if role in (Role.SCALE, Role.POSITION, Role.NORM, Role.CONSTANT):
            return {"role": role if own else Role.BIAS}
        if len(shape) != 1 and role is not Role.EXPERTS:
            return {"role": Role.BIAS}
        return {"role": Role.BIAS, "of": role, "module": _module(module, len(module) - found.length, role)}

    def _packed(self, name: str, shape: tuple[int, ...], prefix: str, pattern: Pattern) -> dict[str, Any]:
        if pattern.counted_by:
            router = self._shapes.get(prefix + pattern.counted_by)
            if not router or not router[0] or shape[0] % router[0]:
                return {"unsplit": f"there is no '{pattern.counted_by}' beside them that counts them"}
            shape = (router[0], shape[0] // router[0], shape[1])
        outputs_first = self._outputs_first(name, shape, pattern)
        if outputs_first is None or shape[1 if outputs_first else 2] % len(pattern.experts):
            return {"unsplit": _UNSPLIT}
        return {
            "packed": PackedExperts(
                prefix=prefix,
                names=pattern.experts,
                slab=(shape[1], shape[2]),
                count=shape[0],
                transposed=not outputs_first,
                interleaved=pattern.interleaved,
            )
        }

    def _outputs_first(self, name: str, shape: tuple[int, ...], pattern: Pattern) -> bool | None:
        """Whether packed experts are (E, outputs, inputs): gate and up have twice the outputs that down has inputs."""
        if pattern.partner:
            end = ".weight" if name.endswith(".weight") else ""
            path = name.removesuffix(end).rpartition(".")[0]
            partner = self._shapes.get(f"{path}.{pattern.partner}{end}", ())
            both, down = (shape, partner) if len(pattern.experts) == 2 else (partner, shape)
            if len(both) == len(down) == 3:
                if (both[1], both[2]) == (2 * down[2], down[1]):
                    return True
                if (both[1], both[2]) == (down[2], 2 * down[1]):
                    return False
        return pattern.outputs_first

    def _split(self, name: str) -> tuple[str, str]:
        """The module and the part of it that a tensor is: `weight`, `bias`, a buffer, or nothing."""
        before, _, last = name.rpartition(".")
        if last in ("weight", "bias") or last in _BUFFERS:
            return before, last
        if last in ("gamma", "beta") and _NORM.search(before):
            return before, "weight" if last == "gamma" else "bias"
        if last.endswith("_bias"):
            stem = name.removesuffix("_bias")
            return next((known for known in (stem, f"{stem}_weight") if known in self._shapes), name), "bias"
        return name, ""

    def _find(self, key: str, module: str, dimensions: int | None) -> _Found | None:
        """The first pattern that fits. key: the module's name without the numbers of layers and experts."""
        if (key, dimensions) not in self._known:
            self._known[key, dimensions] = self._search(module, dimensions)
        return self._known[key, dimensions]

    def _search(self, module: str, dimensions: int | None) -> _Found | None:
        for pattern in self._patterns:
            start = pattern.start(module, dimensions)
            if start is not None:
                return _Found(pattern, len(module) - start)
        return None


_IN_MODULES = {
    Role.QUERY, Role.KEY, Role.VALUE, Role.QKV_THIRDS, Role.QKV_GROUPED, Role.QKV_INTERLEAVED, Role.ATTENTION_OUTPUT,
    Role.MLP_UP, Role.MLP_GATE, Role.MLP_GATE_UP, Role.MLP_DOWN,
}  # fmt: skip


def _module(module: str, start: int, role: Role) -> str | None:
    return module[:start].rstrip(".") if role in _IN_MODULES else None


def _by_shape(name: str, part: str, dimensions: int) -> Role:
    """What a tensor is that no pattern fits."""
    if part != "weight":
        return Role.OTHER
    if dimensions == 2:
        return Role.LINEAR
    if dimensions in (4, 5) or dimensions == 3 and _CONVOLUTION.search(name.removesuffix(".weight")):
        return Role.CONVOLUTION
    return Role.OTHER


_FUSED = (Role.QKV_THIRDS, Role.QKV_GROUPED, Role.MLP_UP, Role.MLP_GATE_UP)


def _with_fused(tensors: dict[str, TensorRole]) -> dict[str, TensorRole]:
    """Say of fused weights what only the output of their module tells: how many rows are queries, or gate and up."""
    outputs = {t.module: t for t in tensors.values() if t.role in (Role.ATTENTION_OUTPUT, Role.MLP_DOWN)}
    fused = {name: _fused(t, outputs.get(t.module)) for name, t in tensors.items() if t.role in _FUSED}
    weights = {(fused[name].module, tensors[name].role): fused[name] for name in fused}
    for name, tensor in tensors.items():
        weight = weights.get((tensor.module, tensor.of)) if tensor.of else None
        if weight:
            fused[name] = replace(tensor, of=weight.role, parts=weight.parts)
    return tensors | fused


def _fused(tensor: TensorRole, output: TensorRole | None) -> TensorRole:
    rows, columns = tensor.shape[tensor.outputs], tensor.shape[tensor.inputs]
    width = output.shape[output.inputs] if output else None
    if tensor.role in (Role.MLP_UP, Role.MLP_GATE_UP):
        halves = width is not None and rows == 2 * width
        return replace(tensor, role=Role.MLP_GATE_UP, parts=2) if halves else tensor
    if width is None and (tensor.role is Role.QKV_THIRDS or rows == 3 * columns):
        width = rows // 3
    if width is not None and rows == 3 * width:
        return replace(tensor, role=Role.QKV_THIRDS, parts=3, query_rows=width)
    grouped = width is not None and width < rows and (rows - width) % 2 == 0
    return replace(tensor, role=Role.QKV_GROUPED, query_rows=width if grouped else None)
