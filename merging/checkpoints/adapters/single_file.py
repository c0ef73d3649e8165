"""Adapters of diffusion models as one file, without a configuration: for all components of a pipeline at once.

sd-scripts and LyCORIS write `lora_unet_NAME.lora_down.weight` and a scalar `alpha`, diffusers
`unet.NAME.lora_A.weight`, and before that `unet.NAME.lora.down.weight`; LyCORIS also `lora_unet_NAME.hada_w1_a` (LoHa),
`.lokr_w1` (LoKr) and `.lora_mid.weight` (Tucker's form of a convolution). The base is one component's folder.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from math import prod
from typing import Any, Mapping, NamedTuple

from mergeline.merging.architecture.classes import classes_of
from mergeline.merging.architecture.diffusion import LayerNames
from mergeline.merging.checkpoints.adapters.config import AdapterConfig, checked_config
from mergeline.merging.checkpoints.adapters.names import BaseNames
from mergeline.merging.checkpoints.adapters.peft import loha, lokr
from mergeline.merging.checkpoints.adapters.tensor import Update, adapted
from mergeline.merging.checkpoints.adapters.updates import (
    Added,
    Factor,
    Hadamard,
    Kronecker,
    Part,
    Product,
    Tucker,
    WithMagnitude,
)
from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo
from mergeline.merging.errors import UserError
from mergeline.merging.reading import parsed_json

_METADATA = "lora_adapter_metadata"  # where diffusers writes what PEFT says of an adapter
# What keys of a component begin with, with `_` for `.` in the rest, or not.
_UNDERSCORED = {
    "lora_unet_": ("unet", "transformer"), "lora_transformer_": ("transformer",), "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",), "lora_te2_": ("text_encoder_2",), "lora_te3_": ("text_encoder_3",),
}  # fmt: skip
_DOTTED = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_PART = re.compile(
    r"(?P<module>.+?)(?:\.processor)?"
    r"(?:\.(?P<of>(?:to|add)_\w+?)_lora|\.lora_linear_layer|\.lora)?"
    r"\.(?:(?P<side>down|up|lora_down|lora_up|lora_A|lora_B)(?:\.default)?\.weight"
    r"|(?P<mid>lora_mid\.weight)|(?P<lycoris>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))"
    r"|(?P<alpha>alpha)|(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?))"
)
_SIDES = {"down": "A", "lora_down": "A", "lora_A": "A", "up": "B", "lora_up": "B", "lora_B": "B"}

# Layers of attention that older diffusers had in processors.
_OF_PROCESSORS = {"to_out": "to_out.0"}
_OF_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_SIDE_OF_LORA = re.compile(
    r"\.(lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up|hada_w1_a|lokr_w1(_a)?)\b|_lora\.(down|up)\."
)


class _Key(NamedTuple):
    """What a key says: whose components', the layer, and its part; underscored: with `_` for `.`."""

    components: tuple[str, ...]
    module: str
    part: str
    underscored: bool


def is_lora_file(checkpoint: Checkpoint) -> bool:
    """Whether it is LoRA of the components of a pipeline."""
    names = checkpoint.tensors
    return bool(names) and any(_SIDE_OF_LORA.search(name) for name in names) and all(map(_components, names))


def _components(name: str) -> tuple[tuple[str, ...], str, bool] | None:
    """Whose key it is, the rest of it, and whether that has `_` for `.`."""
    for start, components in _UNDERSCORED.items():
        if name.startswith(start):
            return components, name.removeprefix(start), True
    start, _, rest = name.partition(".")
    return ((start,), rest, False) if start in _DOTTED and rest else None


def components_in(file: Checkpoint) -> set[tuple[str, ...]]:
    """The components that keys of a file of LoRA are for: of some it is one or another."""
    return {whose[0] for whose in map(_components, file.tensors) if whose}


def adapt_component(base: Checkpoint, file: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """What a file makes of one component, and what is to be said of it; reads headers alone.

    Raises:
        UserError: nothing of it is for this component, it does not fit, or is of another kind than LoRA.
    """
    names = BaseNames(base)
    component = _component_of(base, names.config, file)
    config = _config(file, component)
    parts: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
    others = Counter[str]()
    for name, info in file.tensors.items():
        found = _read_key(name, file)
        if component in found.components:
            parts.setdefault((found.module, found.underscored), {})[found.part] = info
        else:
            others[found.components[0]] += 1
    if not parts:
        raise UserError(
            f"{file.path}: holds nothing for {component}, but for {', '.join(sorted(others))}: name that folder as base"
        )
    per_block = names.config.get("layers_per_block")
    modules = [n.removesuffix(".weight") for n in (*base.tensors, *names.in_memory) if n.endswith(".weight")]
    if component.startswith("text_encoder"):  # which files of transformers 5 lack
        modules += [f"text_model.{module}" for module in modules]
    layers = LayerNames(modules, per_block if type(per_block) is int and 0 < per_block < 100 else 2)
    tensors = dict(base.tensors)
    for (module, underscored), sides in parts.items():
        targets = layers.find(module) if underscored else (module,)
        disk = [names.find(f"{target}.weight") for target in targets]
        known = [name for name in disk if name is not None]
        if not known or len(known) != len(disk):
            raise UserError(
                f"{file.path}: '{module}' is no layer of {component}; name the base that it is for"
            )
        tensors |= _layers(tensors, known, module, sides, config, file)
    notes = [
        f"{n} tensors of {file.path.name} are for {other}, not merged here"
        for other, n in sorted(others.items())
    ]
    return file.view(tensors), notes


def _component_of(base: Checkpoint, config: Mapping[str, Any], file: Checkpoint) -> str:
    """Which component of a pipeline a folder is."""
    kind = str(config.get("_class_name") or "")
    name = base.folder.resolve().name
    if "UNet" in kind:
        return "unet"
    if "Transformer" in kind:
        return "transformer"
    if name in _DOTTED:
        return name
    classes = classes_of(config)
    if "CLIPTextModelWithProjection" in classes:
        return "text_encoder_2"
    if "CLIPTextModel" in classes:
        return "text_encoder"
    raise UserError(
        f"{file.path}: is LoRA of a pipeline's components, and {base.path} does not say which it is: name a folder "
        "such as unet, transformer or text_encoder, with its config.json"
    )


def _config(file: Checkpoint, component: str) -> AdapterConfig | None:
    """What diffusers wrote of the adapter's configuration; None where there is nothing."""
    text = file.metadata.get(_METADATA)
    if text is None:
        return None
    try:
        said = parsed_json(text)
        if not isinstance(said, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise UserError(f"{file.path}: {_METADATA} is not valid JSON ({error}); download it again") from None
    values = {
        key.removeprefix(f"{component}."): v for key, v in said.items() if key.startswith(f"{component}.")
    }
    return checked_config(file.path, {**values, "peft_type": "LORA"}) if values else None


def _read_key(name: str, file: Checkpoint) -> _Key:
    whose = _components(name)
    assert whose is not None, "all keys are of components"
    components, rest, underscored = whose
    found = _PART.fullmatch(rest)
    if found is None:
        raise UserError(
            f"{file.path}: '{name}' is no part of LoRA, DoRA, LoHa or LoKr, which are read of single files; merge it "
            "with the program that made it"
        )
    module = found["module"]
    if found["of"]:
        is_text = components[0].startswith("text_encoder")
        module += "." + (_OF_TEXT if is_text else _OF_PROCESSORS).get(found["of"], found["of"])
    part = "alpha" if found["alpha"] else "magnitude" if found["magnitude"] else "mid" if found["mid"] else ""
    part = part or found["lycoris"] or _SIDES[found["side"]]
    return _Key(components, module, part, underscored)


def _layers(
    tensors: Mapping[str, TensorInfo],
    names: list[str],
    module: str,
    parts: Mapping[str, TensorInfo],
    config: AdapterConfig | None,
    file: Checkpoint,
) -> dict[str, TensorInfo]:
    """What one pair of factors makes of a layer, or of several whose outputs are one after the other."""
    if "mid" in parts or any(part.startswith(("hada_", "lokr_")) for part in parts):
        return _lycoris_layers(tensors, names, module, parts, file)
    down, up, alpha, magnitude = (parts.get(part) for part in ("A", "B", "alpha", "magnitude"))
    if down is None or up is None or not down.shape or not up.shape or not down.shape[0]:
        raise UserError(f"{file.path}: '{module}' lacks one of its factors; download the file again")
    rank = down.shape[0]
    infos = [tensors[name] for name in names]
    heights = [info.shape[0] if info.shape else 0 for info in infos]
    fits = (
        all(part.is_float for part in (*parts.values(), *infos))
        and all(len(info.shape) > 1 and prod(info.shape[1:]) * rank == prod(down.shape) for info in infos)
        and up.shape[0] == sum(heights)
        and prod(up.shape) == sum(heights) * rank
        and (alpha is None or prod(alpha.shape) == 1)
        and (
            magnitude is None
            or len(names) == 1
            and magnitude.shape[:1] != (1,)
            and prod(magnitude.shape) == heights[0]
        )
    )
    if not fits:
        shapes = [list(part.shape) for part in (down, up)]
        raise UserError(
            f"{file.path}: factors {shapes} do not fit '{names[0]}' of shape {list(infos[0].shape)}; name the base "
            "that they were trained on"
        )
    found: dict[str, TensorInfo] = {}
    start = 0
    for name, info, height in zip(names, infos, heights):
        left = Factor(up, range(start, start + height), range(rank))
        scaling = 1 / rank if alpha else config.lora_scaling(module, rank) if config else 1.0
        added = Added(left, Factor.of(down), scaling, alpha=alpha)
        update: Update = WithMagnitude(added, info, magnitude) if magnitude else added
        found[name] = adapted(name, info, info.shape, update, name.removesuffix(".weight"))
        start += height
    return found


def _lycoris_layers(
    tensors: Mapping[str, TensorInfo],
    names: list[str],
    module: str,
    parts: Mapping[str, TensorInfo],
    file: Checkpoint,
) -> dict[str, TensorInfo]:
    """The same of LoHa, LoKr and three factors, times alpha over their rank, if there is an alpha.

    Where LoKr has two whole matrices there is no rank, and alpha says nothing.
    """
    infos = [tensors[name] for name in names]
    own = {part: info for part, info in parts.items() if part != "alpha"}
    alpha, one = parts.get("alpha"), infos[0]
    if "magnitude" in own:
        raise UserError(f"{file.path}: '{module}' has norms of its own (DoRA), which are read of LoRA alone")
    kinds = {part.partition("_")[0] if "_" in part else "lora" for part in own}
    numbers = all(info.is_float for info in (*parts.values(), *infos))
    if len(kinds) != 1 or not numbers or (alpha and prod(alpha.shape) != 1):
        raise UserError(f"{file.path}: the parts of '{module}' are not of one kind; download the file again")
    if not all(info.shape and info.shape[1:] == one.shape[1:] for info in infos):
        raise UserError(
            f"{file.path}: '{module}' is for layers of other shapes; name the base that it is for"
        )
    whole = replace(one, name=module, shape=(sum(info.shape[0] for info in infos), *one.shape[1:]))
    [kind] = kinds
    update, rank = (_tucker if kind == "lora" else _lycoris)(whole, module, own, file)
    scaling, alpha = (1 / rank, alpha) if alpha and rank else (1.0, None)
    found: dict[str, TensorInfo] = {}
    start = 0
    for name, info in zip(names, infos):
        part = Part(update, start, scaling, alpha)
        found[name] = adapted(name, info, info.shape, part, name.removesuffix(".weight"))
        start += info.shape[0]
    return found


def _lycoris(
    whole: TensorInfo, module: str, parts: Mapping[str, TensorInfo], file: Checkpoint
) -> tuple[Hadamard | Kronecker, int]:
    """LoHa or LoKr, without a scaling, and its rank; 0 if there is none."""
    own = {part.partition("_")[2]: info for part, info in parts.items()}
    if any(part.startswith("hada_") for part in parts):
        config = AdapterConfig(file.path, {"alpha": 1}, "LOHA")
        product = loha(whole, module, own, config, False)
        return replace(product, scaling=1.0), product.one.left.width
    found = lokr(whole, module, own, AdapterConfig(file.path, {"alpha": 1, "r": 1}, "LOKR"), False)
    products = [side for side in (found.inner, found.outer) if isinstance(side, Product)]
    return found, products[0].left.width if products else 0


def _tucker(
    whole: TensorInfo, module: str, parts: Mapping[str, TensorInfo], file: Checkpoint
) -> tuple[Tucker, int]:
    """LoRA of three factors, and its rank."""
    down, up, mid = (parts.get(part) for part in ("A", "B", "mid"))
    if down is None or up is None or mid is None or not down.shape or not up.shape:
        raise UserError(f"{file.path}: '{module}' lacks one of its factors; download the file again")
    rank, inputs = down.shape[0], prod(whole.shape[1:2])
    fits = (
        (prod(down.shape), prod(up.shape)) == (rank * inputs, whole.shape[0] * rank)
        and rank > 0
        and up.shape[0] == whole.shape[0]
        and mid.shape == (rank, rank, *whole.shape[2:])
        and len(mid.shape) > 2
    )
    if not fits:
        shapes = [list(part.shape) for part in (down, up, mid)]
        raise AdapterConfig(file.path, {}, "LORA").misfit(
            f"factors {shapes} for '{module}' of shape {list(whole.shape)}"
        )
    return Tucker(Product(Factor.of(up), Factor.of(down), mid)), rank
