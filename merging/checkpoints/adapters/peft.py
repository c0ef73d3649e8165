"""Adapters as PEFT saves them, and SVFit in the same form: what each makes of the base (PEFT 0.21)."""

from __future__ import annotations

from dataclasses import replace
from math import prod, sqrt
from pathlib import Path
from typing import Callable, Mapping, NamedTuple, Sequence

from mergeline.merging.architecture import CLASSIFIERS, Role, describe
from mergeline.merging.checkpoints.adapters.config import (
    AdapterConfig,
    read_adapter_config,
    refuse_another_base,
)
from mergeline.merging.checkpoints.adapters.names import PREFIX, BaseNames, Parts, parts_of
from mergeline.merging.checkpoints.adapters.packed import Packing, adapt_experts
from mergeline.merging.checkpoints.adapters.singular_values import SingularValues
from mergeline.merging.checkpoints.adapters.tensor import AdaptedTensor, Update, adapted
from mergeline.merging.checkpoints.adapters.updates import (
    Added,
    Factor,
    Hadamard,
    Kronecker,
    Nothing,
    Product,
    Reflected,
    Rotated,
    Scaled,
    Shifted,
    Tokens,
    Vera,
    WithMagnitude,
)
from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from mergeline.merging.checkpoints.companions import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mergeline.merging.checkpoints.tied import TiedHead, shares_embedding
from mergeline.merging.errors import UserError, did_you_mean

_MOST_TOKENS = 1 << 24
_Parts = Mapping[str, TensorInfo]


class Adapted(NamedTuple):
    """What an adapter makes of its base, and what is to be said of it."""

    checkpoint: Checkpoint
    notes: list[str]


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether it is what PEFT's `save_pretrained` writes."""
    files = {info.file.name for info in checkpoint.tensors.values()}
    return files == {ADAPTER_WEIGHTS} and (checkpoint.folder / ADAPTER_CONFIG).is_file()


def open_adapted(path: Path, base: Path | None) -> Checkpoint:
    """The checkpoint at `path`, and where that is an adapter, what it makes of the base, if one is named.

    Raises:
        UserError: as `open_checkpoint` and `adapt`.
    """
    found = open_checkpoint(path)
    return adapt(open_checkpoint(base), found).checkpoint if base and is_adapter(found) else found


def unties(adapter: Checkpoint, tied: TiedHead) -> bool:
    """Whether an adapter gives an embedding that is the output matrix, too, and that matrix different values.

    PEFT wraps one of the two: the other stays the base's, but for tokens' rows, and where both are kept tied.

    Raises:
        UserError: as `read_adapter_config`.
    """
    config = read_adapter_config(adapter.folder)
    parts = parts_of(adapter, config.kind)
    if _keeps_tied(parts, tied, config):
        return False
    changed = {f"{module}.weight" for module in parts.modules} | {
        key for key in parts.whole if not _is_base_layer(adapter, key)
    }
    tokens = {f"{module}.weight" for module in parts.tokens}
    return any(tied.is_either(name) for name in changed) or any(tied.is_head(name) for name in tokens)


def _keeps_tied(parts: Parts, tied: TiedHead, config: AdapterConfig) -> bool:
    """Whether there is the same of the embedding and of the output matrix; PEFT saves both where it has tied them."""
    names = {*(f"{module}.weight" for module in (*parts.modules, *parts.tokens)), *parts.whole}
    heads = {name for name in names if tied.is_head(name)}
    return config.flag("ensure_weight_tying") and bool(heads) and any(map(tied.is_either, names - heads))


def _is_base_layer(adapter: Checkpoint, key: str) -> bool:
    """Whether it is there as PEFT saves embeddings beside their factors: the base's own."""
    module, _, last = key.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{last}" in adapter.tensors


def adapt(
    base: Checkpoint, adapter: Checkpoint, tied: TiedHead | None = None, packing: Packing = "peft"
) -> Adapted:
    """The checkpoint that an adapter makes of its base; reads `adapter_config.json`, but no tensor data.

    tied: of a base whose output matrix is the embedding. packing: how factors of packed experts lie.

    Raises:
        UserError: an adapter that cannot be merged, one that is not for this base, or a part of it is missing.
    """
    config = read_adapter_config(adapter.folder)
    refuse_another_base(base, config)
    parts, names, notes = parts_of(adapter, config.kind), BaseNames(base), list[str]()
    keeps_tied = tied is not None and _keeps_tied(parts, tied, config)
    if tied and keeps_tied:
        parts = _without_head(parts, tied)
    if not any(parts):
        raise UserError(f"{config.path}: the adapter holds no factors; download it again")
    if config.kind == "SVFIT":
        notes.append(
            "singular values are put into the base's own basis, whose digests are compared when it is read"
        )
    tensors, heads = dict(base.tensors), _own_heads(parts, names, config)
    for key, info in parts.whole.items():  # first, for factors may be added to what was saved whole
        if key in heads:
            continue
        name = _find(names, key, config)
        like = tensors[name]
        if info.shape != like.shape or info.is_float != like.is_float:
            raise config.misfit(f"'{key}' has shape {list(info.shape)}, there {list(like.shape)}")
        tensors[name] = info
    if tied is None:
        _refuse_shared(base, parts, names, config)
    shared = parts.modules.pop("base_model", {}) if config.kind == "VERA" else {}
    targets = config.values.get("target_parameters")
    for module, found in parts.modules.items():
        if targets and config.kind == "LORA" and names.find(f"{module}.weight") is None:
            tensors |= adapt_experts(tensors, names, module, found, config, packing, notes)
            continue
        name = _find(names, f"{module}.weight", config)
        _adapt_module(tensors, name, module, {**found, **shared}, config, names)
    for module, info in parts.tokens.items():
        name = _find(names, f"{module}.weight", config)
        update = _tokens(tensors[name], module, info, config)
        tensors[name] = adapted(name, tensors[name], tensors[name].shape, update, module, True)
    if (
        tied and tied.head in tensors and (keeps_tied or not unties(adapter, tied))
    ):  # another expert unties them
        if tensors[tied.embedding] is not base.tensors[tied.embedding]:
            tensors[tied.head] = replace(tensors[tied.embedding], name=tied.head)
    if heads:
        tensors = _under_head(tensors, heads, parts)
    return Adapted(adapter.view(tensors), notes)


def alone(adapters: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """What LoRA adapters add to a base that is not there: products of factors, under PEFT's names of the modules.

    An adapter that does not change a module which another changes adds nothing to it.

    Raises:
        UserError: another kind than LoRA, or what is no product of factors; the base is needed for it.
    """
    found = {name: _products(adapter) for name, adapter in adapters.items()}
    every = {name: info for tensors in found.values() for name, info in tensors.items()}
    for tensors in found.values():
        for name in every.keys() - tensors.keys():
            like, at = every[name], next(iter(tensors.values()))
            nothing = Nothing((like.shape[0], prod(like.shape[1:])), at.update.parts[0], like.transposed)
            tensors[name] = adapted(name, None, like.shape, nothing, like.module, like.is_embedding)
    return {name: adapters[name].view(tensors) for name, tensors in found.items()}


def _products(adapter: Checkpoint) -> dict[str, AdaptedTensor]:
    config = read_adapter_config(adapter.folder)
    parts = parts_of(adapter, config.kind)
    flags = [key for key in ("use_dora", "lora_bias", "target_parameters") if config.flag(key)]
    also = next(iter([*flags, *parts.whole, *(f"{module} (tokens)" for module in parts.tokens)]), None)
    if config.kind != "LORA" or also or not parts.modules:
        what = f"type {config.kind}" if config.kind != "LORA" else f"'{also}'" if also else "no factors"
        raise UserError(f"{config.path}: has {what}, which cannot be merged without a base; name the base")
    found = {}
    for module, sides in parts.modules.items():
        embedding = "embedding_A" in sides
        down, up = (sides.get(f"embedding_{side}" if embedding else side) for side in "AB")
        transposed = embedding or config.flag("fan_in_fan_out")
        if not down or not up or not up.shape or not down.shape:
            raise UserError(f"{config.path}: module '{module}' lacks one of its factors; download it again")
        shape = (*down.shape[1:], up.shape[0]) if transposed else (up.shape[0], *down.shape[1:])
        like = replace(up, name=f"{module}.weight", shape=shape)
        update = _lora(like, module, sides, config, transposed)
        found[like.name] = adapted(like.name, None, shape, update, module, embedding)
    return found


def _refuse_shared(base: Checkpoint, parts: Parts, names: BaseNames, config: AdapterConfig) -> None:
    """Raises UserError for a change of an embedding that modules share of which PEFT changes one alone."""
    for key in (*(f"{module}.weight" for module in parts.modules), *parts.whole):
        name = names.find(key)
        if name and names.role(name).role is Role.EMBEDDING and shares_embedding(base, name):
            raise config.unsupported(f"a change of '{name}', which several modules of the base share,")


def _without_head(parts: Parts, tied: TiedHead) -> Parts:
    """What is said of the head said of the embedding, of which there is one for both."""
    modules = {m: p for m, p in parts.modules.items() if not tied.is_head(f"{m}.weight")}
    whole = {key: info for key, info in parts.whole.items() if not tied.is_head(key)}
    tokens = {m: info for m, info in parts.tokens.items() if not tied.is_head(f"{m}.weight")}
    return Parts(modules, whole, tokens)


def _own_heads(parts: Parts, names: BaseNames, config: AdapterConfig) -> _Parts:
    """What PEFT keeps whole of a classifier, which came with the adapter; the base lacks it, or has other classes.

    With a classifier may come other modules that the base lacks, such as a pooler.
    """

    def is_classifier(key: str, info: TensorInfo) -> bool:
        name = names.find(key)
        tensor = names.role(name) if name else describe({key: info.shape}, names.config).tensors[key]
        return key.partition(".")[0] in CLASSIFIERS or Role.CLASSIFIER in (tensor.role, tensor.of)

    found = {key: info for key, info in parts.whole.items() if is_classifier(key, info)}
    new = {key: info for key, info in parts.whole.items() if names.find(key) is None and config.keeps(key)}
    return {**found, **new} if found else {}


def _under_head(
    tensors: Mapping[str, TensorInfo], heads: Mapping[str, TensorInfo], parts: Parts
) -> dict[str, TensorInfo]:
    """The base's trunk by the names that it has in the model with that head, and the head in place of the base's.

    The trunk is what lies in the module that all that was adapted lies in, `bert` of `bert.encoder.layer.0...`; a
    base without this prefix is the trunk as a whole.
    """
    changed = [*parts.modules, *parts.tokens, *(key for key in parts.whole if key not in heads)]
    outer = {name.partition(".")[0] for name in changed}
    trunk = f"{outer.pop()}." if len(outer) == 1 else ""
    inside = {name: info for name, info in tensors.items() if name.startswith(trunk)}
    if not inside:
        inside = {f"{trunk}{name}": replace(info, name=f"{trunk}{name}") for name, info in tensors.items()}
    return {**{name: info for name, info in inside.items() if name not in heads}, **heads}


def _find(names: BaseNames, name: str, config: AdapterConfig) -> str:
    found = names.find(name)
    if found is None:
        raise config.misfit(f"'{name}' is not there{did_you_mean(name, names.tensors)}")
    return found


def _adapt_module(
    tensors: dict[str, TensorInfo],
    name: str,
    module: str,
    parts: _Parts,
    config: AdapterConfig,
    names: BaseNames,
) -> None:
    """Put what a module's parts make of its weight, and of its bias, in place of them."""
    info = tensors[name]
    if not all(part.is_float for part in (info, *parts.values())) or not info.shape:
        raise config.misfit(f"'{name}' or what is added to it holds no floats")
    transposed = names.transposed(name, config.flag("fan_in_fan_out"))
    update = _OF_KIND[config.kind](info, module, parts, config, transposed)
    embedding = any("embedding" in part for part in parts)
    tensors[name] = adapted(name, info, info.shape, update, module, embedding)
    bias = _bias_update(info, parts, update, config)
    if bias is None:
        return
    beside = names.find(f"{module}.bias")
    if beside is None and isinstance(bias, Scaled):
        return  # IA3 scales a bias where there is one
    if beside is None or prod(bias.parts[0].shape) != prod(tensors[beside].shape):
        raise config.misfit(f"module '{module}' has no bias that is as long as what changes it")
    like = tensors[beside]
    tensors[beside] = adapted(beside, like, like.shape, bias, module)


def _bias_update(info: TensorInfo, parts: _Parts, update: Update, config: AdapterConfig) -> Update | None:
    """What becomes of the bias beside a weight."""
    if isinstance(update, Added) and "B.bias" in parts:
        return Shifted(parts["B.bias"], update.scaling)
    if config.kind == "IA3" and _scales_outputs(parts["l"]):
        return Scaled(parts["l"], by_row=True)
    return None


# ------------------------------------------------------------------------------------------------ kinds


def _lora(info: TensorInfo, module: str, parts: _Parts, config: AdapterConfig, transposed: bool) -> Update:
    embedding = "embedding_A" in parts
    down, up = (parts.get(f"embedding_{side}" if embedding else side) for side in "AB")
    known = {"magnitude_vector", "B.bias"} & parts.keys()
    if down is None or up is None or len(parts) != 2 + len(known):
        raise UserError(
            f"{config.path}: module '{module}' lacks one of its factors; download the adapter again"
        )
    if "B.bias" in parts and known != {"B.bias"}:
        raise config.unsupported("DoRA with lora_bias")
    magnitude = parts.get("magnitude_vector")
    transposed |= embedding
    rank, rows, columns = down.shape[0] if down.shape else 0, info.shape[0], prod(info.shape[1:])
    out, into = (columns, rows) if transposed else (rows, columns)
    fits = (
        len(info.shape) > 1
        and rank > 0
        and (prod(up.shape), prod(down.shape)) == (out * rank, rank * into)
        and up.shape[0] == out
        and (magnitude is None or prod(magnitude.shape) == out)
    )
    if not fits:
        shapes = (
            f"factors {list(down.shape)} and {list(up.shape)} for '{info.name}' of shape {list(info.shape)}"
        )
        raise config.misfit(shapes)
    left, right = (down, up) if transposed else (up, down)
    update = Added(
        Factor.of(left, transposed),
        Factor.of(right, transposed),
        config.lora_scaling(config.pattern_name(module), rank),
        transposed,
    )
    return WithMagnitude(update, info, magnitude) if magnitude else update


def loha(info: TensorInfo, module: str, parts: _Parts, config: AdapterConfig, transposed: bool) -> Hadamard:
    """LoHa of a weight (raises UserError for parts that do not fit)."""
    _refuse_transposed(module, config, transposed)
    rows, columns = info.shape[0], prod(info.shape[1:])
    needed = [f"w{i}_{side}" for i in "12" for side in "ab"]
    cores = [parts.get("t1"), parts.get("t2")]
    if set(parts) != {*needed, *(f"t{i}" for i in "12" if cores[0])}:
        raise UserError(f"{config.path}: module '{module}' lacks a part of LoHa; download the adapter again")
    products = []
    for i, core in zip("12", cores):
        found = product(parts[f"w{i}_a"], parts[f"w{i}_b"], core, (rows, columns), info, config)
        products.append(found)
    rank = parts["w1_b"].shape[0]
    alpha = config.of_module("alpha_pattern", module, config.number("alpha"))
    return Hadamard(products[0], products[1], alpha / rank)


def product(
    left: TensorInfo,
    right: TensorInfo,
    core: TensorInfo | None,
    shape: tuple[int, int],
    info: TensorInfo,
    config: AdapterConfig,
) -> Product:
    """Two factors of this shape, or three of a tensor (raises UserError)."""
    (rows, columns), kernel = shape, 1
    rank = right.shape[0] if len(right.shape) == 2 else 0
    if core:
        kernel = prod(core.shape[2:])
        fits = core.shape[:2] == (rank, rank) and left.shape == (rank, rows) and len(core.shape) > 2
    else:
        fits = left.shape == (rows, rank)
    if not fits or not rank or right.shape[1] * kernel != columns:
        shapes = [list(part.shape) for part in (left, right, *([core] if core else []))]
        raise config.misfit(f"factors {shapes} for '{info.name}' of shape {list(info.shape)}")
    return Product(Factor.of(left, transposed=core is not None), Factor.of(right), core)


def lokr(info: TensorInfo, module: str, parts: _Parts, config: AdapterConfig, transposed: bool) -> Kronecker:
    """LoKr of a weight (raises UserError for parts that do not fit)."""
    _refuse_transposed(module, config, transposed)
    rows, columns, kernel = info.shape[0], prod(info.shape[1:]), prod(info.shape[2:])
    misfit = config.misfit(
        f"factors {[list(p.shape) for p in parts.values()]} for '{info.name}' of shape {list(info.shape)}"
    )
    whole, one, two = parts.get("w1"), parts.get("w1_a"), parts.get("w1_b")
    if whole and len(whole.shape) == 2 and not one and not two:
        p, q = whole.shape
    elif one and two and not whole and len(one.shape) == len(two.shape) == 2:
        p, q = one.shape[0], two.shape[1]
    else:
        raise UserError(f"{config.path}: module '{module}' lacks a part of LoKr; download the adapter again")
    if len(info.shape) < 2 or not p or not q or rows % p or info.shape[1] % q:
        raise misfit
    outer = Factor.of(whole) if whole else product(one, two, None, (p, q), info, config)  # type: ignore[arg-type]
    size = rows // p, columns // q
    whole, one, two, core = (parts.get(part) for part in ("w2", "w2_a", "w2_b", "t2"))
    if whole and len(whole.shape) >= 2 and not (one or two or core):
        if whole.shape[0] != size[0] or prod(whole.shape[1:]) != size[1]:
            raise misfit
        inner: Factor | Product = Factor.of(whole)
    elif one and two and not whole:
        inner = product(one, two, core, size, info, config)
    else:
        raise UserError(f"{config.path}: module '{module}' lacks a part of LoKr; download the adapter again")
    rank = config.of_module("rank_pattern", module, config.number("r"))
    alpha = config.of_module("alpha_pattern", module, config.number("alpha"))
    if rank <= 0:
        raise UserError(f"{config.path}: rank_pattern of '{module}' is not above 0; download it again")
    return Kronecker(outer, inner, size[0], kernel, alpha / rank)


def _scales_outputs(scale: TensorInfo) -> bool:
    """Whether IA3 scales a module's outputs: a column (out, 1), or of its inputs a row (1, in)."""
    return len(scale.shape) == 2 and scale.shape[1] == 1


def _ia3(info: TensorInfo, module: str, parts: _Parts, config: AdapterConfig, transposed: bool) -> Update:
    scale = parts["l"]
    if len(info.shape) != 2:
        raise config.unsupported(f"IA3 on the convolution '{module}'")
    out, into = info.shape[::-1] if transposed else info.shape
    if scale.shape not in ((out, 1), (1, into)):
        raise config.misfit(f"'{scale.name}' has shape {list(scale.shape)}, the weight {list(info.shape)}")
    return Scaled(scale, by_row=_scales_outputs(scale) != transposed)


def _oft(info: TensorInfo, module: str, parts: _Parts, config: AdapterConfig, transposed: bool) -> Update:
    _refuse_transposed(module, config, transposed)
    angles, columns = next(iter(parts.values())), prod(info.shape[1:])
    embedding = "embedding_R" in parts
    blocks, above = angles.shape if len(angles.shape) == 2 else (0, 0)
    size = round((1 + sqrt(1 + 8 * above)) / 2)
    shared = config.flag("block_share")
    if (
        not blocks
        or size * (size - 1) // 2 != above
        or columns % size
        or blocks != (1 if shared else columns // size)
    ):
        raise config.misfit(f"'{angles.name}' has shape {list(angles.shape)}, the weight {list(info.shape)}")
    terms = (
        config.whole_number("num_cayley_neumann_terms", 5)
        if config.values.get("use_cayley_neumann", True)
        else None
    )
    if terms is not None and terms > 100:
        raise UserError(
            f"{config.path}: num_cayley_neumann_terms {terms} is more than 100; download it again"
        )
    limit = config.number("eps", 6e-5) if config.flag("coft") else None
    return Rotated(angles, size, terms, limit, embedding)


def _vera(info: TensorInfo, module: str, parts: _Parts, config: AdapterConfig, transposed: bool) -> Update:
    down, up, outer, inner = (parts.get(part) for part in ("A", "B", "lambda_b", "lambda_d"))
    if not down or not up:
        raise UserError(
            f"{config.path}: the random factors of VeRA are not in the adapter (save_projection: false); save it with "
            "save_projection=True"
        )
    if not outer or not inner:
        raise UserError(f"{config.path}: module '{module}' lacks a part of VeRA; download the adapter again")
    out, into = (*info.shape[::-1],) if transposed else (info.shape[0], prod(info.shape[1:]))
    rank = prod(inner.shape)
    fits = (
        len(info.shape) == len(down.shape) == len(up.shape) == 2
        and outer.shape == (out,)
        and inner.shape == (rank,)
        and rank > 0
        and down.shape[0] == up.shape[1] == rank
        and down.shape[1] >= into
        and up.shape[0] >= out
    )
    if not fits:
        shapes = [list(part.shape) for part in (down, up, outer, inner)]
        raise config.misfit(f"factors {shapes} for '{info.name}' of shape {list(info.shape)}")
    left, right = Factor(up, range(out), range(rank)), Factor(down, range(rank), range(into))
    return Vera(left, right, outer, inner, transposed)


def _hra(info: TensorInfo, module: str, parts: _Parts, config: AdapterConfig, transposed: bool) -> Update:
    _refuse_transposed(module, config, transposed)
    normals = parts["u"]
    if len(normals.shape) != 2 or normals.shape[0] != prod(info.shape[1:]) or not normals.shape[1]:
        raise config.misfit(
            f"'{normals.name}' has shape {list(normals.shape)}, the weight {list(info.shape)}"
        )
    return Reflected(normals, config.flag("apply_GS"))


def _svfit(info: TensorInfo, module: str, parts: _Parts, config: AdapterConfig, transposed: bool) -> Update:
    values, digest = parts["values"], config.digest_of(module)
    most = min(info.shape[0], prod(info.shape[1:])) if len(info.shape) > 1 else 0
    if len(values.shape) != 1 or not 0 < values.shape[0] <= most:
        raise config.misfit(f"'{values.name}' has shape {list(values.shape)}, the weight {list(info.shape)}")
    return SingularValues(values, info, digest, config.path, transposed)


def _refuse_transposed(module: str, config: AdapterConfig, transposed: bool) -> None:
    if transposed:
        raise config.unsupported(f"{config.kind} on '{module}', whose weight is transposed,")


_OF_KIND: Mapping[str, Callable[[TensorInfo, str, _Parts, AdapterConfig, bool], Update]] = {
    "LORA": _lora, "LOHA": loha, "LOKR": lokr, "IA3": _ia3, "OFT": _oft, "VERA": _vera, "HRA": _hra,
    "SVFIT": _svfit,
}  # fmt: skip


def _tokens(info: TensorInfo, module: str, values: TensorInfo, config: AdapterConfig) -> Update:
    """Rows of the tokens that the configuration lists, for all embeddings or by the end of a module's name."""
    key = "token_indices" if config.kind == "TRAINABLE_TOKENS" else "trainable_token_indices"
    listed = config.values.get(key)
    if isinstance(listed, dict):
        ends = [end for end in listed if isinstance(end, str) and f".{module}".endswith(f".{end}")]
        listed = listed[ends[0]] if ends else None
    indices: Sequence[int] = listed if isinstance(listed, list) else []
    rows, shape = info.shape[0], (len(indices), *info.shape[1:])
    if (
        not indices
        or len(indices) > _MOST_TOKENS
        or values.shape != shape
        or not (info.is_float and values.is_float)
    ):
        raise config.misfit(
            f"'{values.name}' has shape {list(values.shape)}, for {len(indices)} tokens of {key} and the embedding "
            f"'{info.name}' {list(info.shape)}"
        )
    if not all(type(i) is int and 0 <= i < rows for i in indices):
        raise config.misfit(f"{key} names tokens that '{info.name}' with {rows} rows does not have")
    return Tokens(values, tuple(indices))
