"""Laws that every method keeps, those from outside too, tried on small random models.

    from mergeline.merging.laws import check_method

    def test_my_method():
        check_method("my_method")

A check raises AssertionError with a sentence that says what does not hold.
"""

from __future__ import annotations

import operator
from contextlib import contextmanager
from random import Random
from types import MappingProxyType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Iterator,
    Literal,
    Mapping,
    Sequence,
    Union,
    get_args,
    get_origin,
)
from unittest.mock import patch

from annotated_types import Ge, Gt, Le, Lt

from mergeline.merging.algebra import slots
from mergeline.merging.algebra.slots import Experts, Slot
from mergeline.merging.algebra.statistics import STATISTICS
from mergeline.merging.api import merge_state_dicts_points
from mergeline.merging.architecture import TensorRole, describe
from mergeline.merging.lazy import torch
from mergeline.merging.methods.bound import bind
from mergeline.merging.methods.contract import Method, get_method
from mergeline.merging.methods.parameters import AnExpert, OneAnExpert

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]
    Params = Mapping[str, Any]

# Matrices of blocks, one of them a convolution, packed MoE experts, what is no matrix, and what has no elements.
SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.attn.weight": (6, 4),
    "layers.0.conv.weight": (3, 2, 2, 1),
    "layers.1.attn.weight": (3, 5),
    "layers.1.mlp.experts.down_proj": (2, 4, 3),
    "layers.1.mlp.experts.gate_up_proj": (2, 6, 4),
    "layers.1.bias": (7,),
    "embed.weight": (5, 3),
    "empty": (0, 3),
    "scale": (),
}
NOTHING: Mapping[str, Any] = MappingProxyType({})
_CUTS = (1, 20)  # elements of all experts in a block
_PAIRS = 4  # of settings that are tried in one sweep
_TRIES = 200  # draws, until parameters are legal together
_INNER = ("task_arithmetic", "ties", "cart")


def check_method(id: str, params: Params | None = None) -> None:
    """Try all laws on a method, with these parameters (the defaults); takes a few seconds.

    Raises:
        AssertionError: a law does not hold.
        UserError: there is no such method, or its parameters are wrong.
    """
    given = dict(params or {})
    if any("iterations" in level.method.parameters for level in get_method(id).levels(given)):
        given.setdefault("iterations", 3)
    for dtype in (torch.float64, torch.float32):
        check_reads_only(id, given, dtype)
    check_copies_of_the_base(id, given)
    check_dtypes_and_shapes(id, given)
    check_cuts(id, given)
    check_device(id, given)
    random = Random(0)
    for _ in range(_PAIRS):
        first = legal_params(id, random, given)
        check_sweep(id, [first, legal_params(id, random, given, like=first)])
        check_sweep(id, with_other_scales(id, first))


# ---------------------------------------------------------------------------------------------- the laws


def check_reads_only(id: str, params: Params, dtype: torch.dtype) -> None:
    """What slots give is not written to, and so neither are the inputs."""
    base, experts = family(id, dtype)
    states = {"base": base, **experts}
    before = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in states.items()}
    with _watched() as given:
        merged(id, experts, base, [params])
    for what, name, tensor, version in given:
        assert tensor._version == version, (
            f"{id}: writes to {what} of '{name}', which is read-only; copy it first"
        )
    for name, state in states.items():
        changed = [key for key in state if not _same_bits(state[key], before[name][key])]
        assert not changed, f"{id}: changes the input '{changed[0]}' of '{name}'; copy what is written to"


def check_sweep(id: str, points: Sequence[Params]) -> None:
    """Points of a sweep have the bits of single merges."""
    base, experts = family(id)
    for params, found in zip(points, merged(id, experts, base, points)):
        [alone] = merged(id, experts, base, [params])
        differ = [name for name in alone if not _same_bits(found[name], alone[name])]
        assert not differ, (
            f"{id}: of the points {list(map(dict, points))} merged together, {dict(params)} has another '{differ[0]}' "
            "than alone; what is remembered in a slot must have all that it depends on in its key"
        )


def check_copies_of_the_base(id: str, params: Params) -> None:
    """Experts that are the base merge into the base: bit for bit, or where it makes weights within rounding."""
    base, experts = family(id)
    weights = get_method(id).reference_of(get_method(id).resolve(params)) == "none"
    [found] = merged(id, dict.fromkeys(experts, base), base, [params])
    for name, tensor in base.items():
        same = close(found[name], tensor) if weights else _same_bits(found[name], tensor)
        assert same, f"{id}: copies of the base do not give the base, first in '{name}'"


def check_dtypes_and_shapes(id: str, params: Params) -> None:
    """Every tensor keeps its dtype and shape, and is finite; integers are copied."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        base, experts = family(id, dtype)
        for state in (base, *experts.values()):
            state["ids"] = torch.arange(3)
        [found] = merged(id, experts, base, [params])
        assert found.keys() == base.keys(), f"{id}: tensors are missing or added"
        for name, tensor in base.items():
            made = found[name]
            assert made.shape == tensor.shape, (
                f"{id}: '{name}' has shape {list(made.shape)}, not {list(tensor.shape)}"
            )
            assert made.dtype == tensor.dtype, f"{id}: '{name}' has dtype {made.dtype}, not {tensor.dtype}"
            assert torch.isfinite(made).all(), f"{id}: '{name}' holds NaN or Inf"
        assert torch.equal(found["ids"], base["ids"]), f"{id}: integers are changed"


def check_cuts(id: str, params: Params) -> None:
    """How tensors are cut into blocks changes nothing but the rounding of sums over blocks."""
    base, experts = family(id)
    [whole] = merged(id, experts, base, [params])
    for elements in _CUTS:
        with patch.object(slots, "_BLOCK", elements):
            [found] = merged(id, experts, base, [params])
        for name in whole:
            assert close(found[name], whole[name]), (
                f"{id}: blocks of {elements} elements give another '{name}'; declare the unit that it needs, "
                "or measure before the blocks"
            )


def check_device(id: str, params: Params) -> None:
    """On a device of its own, it mixes no tensors of the CPU with those of the device, and gives the same.

    The device is none (`pretended_device`), so that any machine finds what would fail on an accelerator.
    """
    from mergeline.merging.pretended_device import Mixed, pretended_device

    base, experts = family(id)
    [here] = merged(id, experts, base, [params])
    try:
        with pretended_device() as device:
            [there] = merged(id, experts, base, [params], device)
    except Mixed as error:
        raise AssertionError(
            f"{id}: fails on an accelerator: {error}; make tensors where those of the slot lie, with device=..."
        ) from error
    for name, tensor in here.items():
        assert torch.allclose(there[name], tensor, rtol=1e-5, atol=1e-5), f"{id}: has another '{name}' there"


def close(a: Tensor, b: Tensor) -> bool:
    """Whether no element differs by more than 1e-6."""
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=0, atol=1e-6)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


@contextmanager
def _watched() -> Iterator[list[tuple[str, str, Tensor, int]]]:
    """What slots give during the block: what it is, of which tensor, itself, and its version then."""
    given: list[tuple[str, str, Tensor, int]] = []

    def note(what: str, name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is not None:
            given.append((what, name, tensor, tensor._version))
        return tensor

    def of_slot(name: str) -> property:
        original = vars(Slot)[name]
        return property(lambda x: note(name.replace("_", " "), x.name, original.__get__(x, Slot)))

    get, stacked = Experts.__getitem__, vars(Experts)["stacked"]
    with (
        patch.object(Slot, "base", of_slot("base")),
        patch.object(Slot, "reference", of_slot("reference")),
        patch.object(Slot, "task_vectors", of_slot("task_vectors")),
        patch.object(Experts, "__getitem__", lambda experts, t: note("expert", str(t), get(experts, t))),
        patch.object(
            Experts,
            "stacked",
            property(lambda e: note("stacked experts", "all", stacked.__get__(e, Experts))),
        ),
    ):
        yield given


# ---------------------------------------------------------------------------------------------- small models


def count_for(entry: Method, params: Params = NOTHING) -> int:
    """How many experts it is tried with: three, or what it, and what it wraps, takes."""
    ranges = [level.method.experts for level in entry.levels(params)]
    most = min((most for _, most in ranges if most), default=3)
    return max(min(most, 3), *(least for least, _ in ranges))


def family(id: str, dtype: torch.dtype | None = None, seed: int = 0) -> tuple[State, dict[str, State]]:
    """A base and experts near it, of `SHAPES`, as many as the method takes."""
    dtype = dtype or torch.float32
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> State:
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in SHAPES.items()
        }

    base, experts = drawn(), [drawn() for _ in range(count_for(get_method(id)))]
    return {name: tensor.to(dtype) for name, tensor in base.items()}, {
        f"expert{t}": {name: (base[name] + 0.1 * tau).to(dtype) for name, tau in taus.items()}
        for t, taus in enumerate(experts)
    }


def merged(
    id: str, experts: Mapping[str, State], base: State, points: Sequence[Params], device: str = "cpu"
) -> list[State]:
    """Merges in one pass, with the statistics that the first point reads."""
    count = min(count_for(get_method(id), params) for params in points)
    experts = dict(list(experts.items())[:count])
    statistics = gathered(id, experts, points[0])
    return merge_state_dicts_points(id, experts, base, points=points, statistics=statistics, device=device)


def gathered(id: str, experts: Mapping[str, State], params: Params = NOTHING) -> dict[str, Any]:
    """Statistics that the method reads, made from the experts' own weights so that they go where these go."""
    found: dict[str, Any] = {}
    for kind in kinds_of(id, params):
        if STATISTICS[kind].free:  # which only a fit can make
            found[kind] = {}
        elif STATISTICS[kind].for_all:  # a further expert
            found[kind] = {name: tensor * 1.5 for name, tensor in experts[min(experts)].items()}
        else:
            found[kind] = [_MADE[kind](state) for state in experts.values()]
    return found


def kinds_of(id: str, params: Params) -> list[str]:
    """The kinds of statistics that the method, and what it wraps, reads."""
    entry = get_method(id)
    return entry.kinds(entry.resolve(params))


def _grams(state: State) -> State:
    """Of matrices of blocks, also of those that lie in packed experts: of full rank, whatever the weights."""
    tensors = describe({name: tuple(tensor.shape) for name, tensor in state.items()}).tensors
    return {key: gram for name in state for key, gram in _grams_of(state[name].double(), tensors[name])}


def _grams_of(tensor: Tensor, role: TensorRole) -> Iterator[tuple[str, Tensor]]:
    flat = tensor.reshape(-1)
    for matrix in role.matrices("block_linear", convolutions=False):
        stored_MN = matrix.read(lambda start, stop: flat[start:stop])
        yield matrix.name, stored_MN.T @ stored_MN + torch.eye(stored_MN.shape[1], dtype=torch.float64)


def _floats(state: State) -> State:
    return {name: tensor.double() for name, tensor in state.items() if tensor.is_floating_point()}


_MADE = {
    "fisher": lambda state: {name: 0.1 + tensor.square() for name, tensor in _floats(state).items()},
    "gradients": lambda state: {name: tensor.abs() for name, tensor in _floats(state).items()},
    "gram": _grams,
    "usage": lambda state: {n: t.flatten(1)[:, 0].abs() for n, t in _floats(state).items() if t.ndim > 1},
    "masks": lambda state: {name: (tensor > 0).to(torch.uint8) for name, tensor in _floats(state).items()},
}


# ---------------------------------------------------------------------------------------------- legal parameters


def with_other_scales(id: str, params: Params) -> list[Params]:
    """The setting, and for each parameter that only multiplies an update the same with another one."""
    entry = get_method(id)
    resolved = entry.resolve(params)
    return [
        params,
        *({**params, name: resolved[name] / 2 + 0.2} for name in sorted(bind(entry, resolved).scales)),
    ]


def legal_params(
    id: str, random: Random, fixed: Params = NOTHING, like: Params | None = None
) -> dict[str, Any]:
    """All parameters of a method: those in `fixed`, the others drawn from their types, choices and ranges.

    like: parameters that read the same statistics and take as many experts. Where nothing that is drawn is legal, these
    or the defaults.
    """
    entry = get_method(id)
    for _ in range(_TRIES):
        params = dict(fixed)
        while missing := [
            (level, name, flat)
            for level in entry.levels(params)
            for name, flat in level.names.items()
            if flat not in params
        ]:
            level, name, flat = missing[0]
            default = level.defaults.get(name, level.method.parameters[name])
            types = {
                **level.method.annotations,
                **{k: kind for k, (kind, _) in level.method.executed.items()},
            }
            params[flat] = _drawn(random, types[name], default, count_for(entry))
        kinds = {kind: None for kind in kinds_of(id, params)}
        fits = (
            like is None
            or list(kinds) == kinds_of(id, like)
            and count_for(entry, params) == count_for(entry, like)
        )
        if fits and not list(entry.misuses(entry.resolve(params), count_for(entry, params), True, kinds)):
            return params
    return dict(like) if like is not None else entry.resolve(fixed)


def _drawn(random: Random, annotation: Any, default: Any, experts: int) -> Any:
    """A value of a type."""
    marks: tuple[Any, ...] = ()
    if get_origin(annotation) is Annotated:
        annotation, *rest = get_args(annotation)
        marks = tuple(rest)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return random.choice(args)
    if origin in (Union, UnionType):
        return _drawn(random, random.choice(args), default, experts)
    if origin is list:
        count = experts if any(isinstance(mark, OneAnExpert) for mark in marks) else 1 + random.randrange(2)
        return [_drawn(random, args[0], None, experts) for _ in range(count)]
    if annotation is type(None):
        return None
    if annotation is bool:
        return random.choice([False, True])
    if annotation is str:
        return random.choice(_INNER) if default in (None, *_INNER, "average", "mean") else default
    if any(isinstance(mark, AnExpert) for mark in marks):
        return random.randrange(experts)
    assert annotation in (int, float), f"nothing is drawn of {annotation}"
    return annotation(random.choice(_numbers(annotation is int, marks, default)))


def _numbers(whole: bool, marks: Sequence[Any], default: Any) -> list[float]:
    """A few numbers in a range: round ones, or around the default where the range has a beginning and no end."""
    if whole:
        candidates: list[float] = [0, 1, 2, 3]
    elif any(isinstance(mark, Ge | Gt) for mark in marks) and not any(
        isinstance(mark, Le | Lt) for mark in marks
    ):
        known = isinstance(default, int | float) and default > 0
        candidates = [default / 2, default, default * 2] if known else [0.0, 0.1, 1.0]
    else:
        candidates = [-1.0, 0.0, 0.1, 0.3, 0.5, 1.0, 2.0]
    return [number for number in candidates if all(_within(number, mark) for mark in marks)]


_ENDS = ((Ge, operator.ge), (Gt, operator.gt), (Le, operator.le), (Lt, operator.lt))


def _within(number: float, mark: Any) -> bool:
    return all(
        keeps(number, getattr(mark, kind.__name__.lower())) for kind, keeps in _ENDS if isinstance(mark, kind)
    )
