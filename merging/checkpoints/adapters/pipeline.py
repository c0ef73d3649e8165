"""Adapters of a pipeline: what one file of LoRA makes of all components at once, and PEFT's adapters of one or some."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Mapping, NamedTuple

from mergeline.merging.architecture import classes_of
from mergeline.merging.checkpoints.adapters.config import (
    AdapterConfig,
    read_adapter_config,
    refuse_another_base,
)
from mergeline.merging.checkpoints.adapters.packed import Packing
from mergeline.merging.checkpoints.adapters.peft import adapt, unties
from mergeline.merging.checkpoints.adapters.single_file import adapt_component, components_in
from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo
from mergeline.merging.checkpoints.companions import ADAPTER_WEIGHTS, adapted_class, read_config
from mergeline.merging.checkpoints.components import adapters_in, by_component, component_folders
from mergeline.merging.checkpoints.tied import tied_head
from mergeline.merging.errors import UserError


class AdaptedPipeline(NamedTuple):
    """What adapters make of a pipeline, and what is to be said of it."""

    checkpoint: Checkpoint
    notes: list[str]


def adapt_pipeline(base: Checkpoint, file: Checkpoint) -> AdaptedPipeline:
    """What a file of LoRA makes of each component that it has factors for; of one component what it makes of that.

    Raises:
        UserError: as `adapt_component`; no component of the base is one that the file is for.
    """
    components = _components(base)
    if not components:
        return AdaptedPipeline(*adapt_component(base, file))
    wanted = components_in(file)
    known = {name: own for name, own in components.items() if any(name in of for of in wanted)}
    left = sorted(" or ".join(of) for of in wanted if not known.keys() & {*of})
    if not known:
        raise UserError(
            f"{file.path}: is LoRA of {', '.join(left)}, and the base has {', '.join(components)}; "
            "name the base that it was trained on"
        )
    tensors = dict(base.tensors)
    for name, component in known.items():
        adapted, _ = adapt_component(component, file)
        tensors |= _changed(name, component, adapted)
    notes = [f"{file.path.name} changes {', '.join(known)}"]
    if left:
        notes.append(f"what {file.path.name} holds for {', '.join(left)} is not merged: the base has none")
    return AdaptedPipeline(file.view(tensors), notes)


def holds_adapters(checkpoint: Checkpoint) -> bool:
    """Whether it is a folder of PEFT's adapters, in sub-folders called as the components that they are for."""
    files = {info.file.name for info in checkpoint.tensors.values()}
    return files == {ADAPTER_WEIGHTS} and checkpoint.path.is_dir() and bool(adapters_in(checkpoint.path))


def adapt_in_pipeline(base: Checkpoint, expert: Checkpoint, packing: Packing) -> AdaptedPipeline | None:
    """What PEFT's adapter of one component, or a folder of several, makes of a pipeline; None of any other base.

    An adapter is for the component that its folder is called as; or for the one whose class it names, or else that it
    fits.

    Raises:
        UserError: as `adapt`; no component of the base is one that an adapter is for, or several are.
    """
    components = _components(base)
    if not components:
        return None
    tensors, notes = dict(base.tensors), list[str]()
    adapters = _components(expert) if holds_adapters(expert) else {expert.folder.name: expert}
    for folder, adapter in adapters.items():
        if folder not in components and adapter is not expert:
            raise UserError(
                f"{adapter.path}: is an adapter of {folder}, and the base has {', '.join(components)}; name the base "
                "that it was trained on"
            )
        config = read_adapter_config(adapter.folder)
        refuse_another_base(base, config)
        name, found, said = _fitting(components, folder, adapter, config, packing)
        tensors |= _changed(name, components[name], found)
        notes += [f"the adapter {folder} changes {name}", *said]
    return AdaptedPipeline(expert.view(tensors), notes)


def _fitting(
    components: Mapping[str, Checkpoint],
    folder: str,
    adapter: Checkpoint,
    config: AdapterConfig,
    packing: Packing,
) -> tuple[str, Checkpoint, list[str]]:
    """The component that an adapter is for, what it makes of it, and what is to be said."""
    kind = adapted_class(config.values)
    named = [folder] if folder in components else []
    of_kind = [name for name, component in components.items() if kind in _classes(component)]
    wanted = named or of_kind or [*components]
    found: dict[str, tuple[Checkpoint, list[str]]] = {}
    misfits: dict[str, UserError] = {}
    for name in wanted:
        try:
            found[name] = _adapted(components[name], adapter, packing)
        except UserError as error:
            misfits[name] = error
    if len(found) == 1:
        [(name, (checkpoint, notes))] = found.items()
        return name, checkpoint, notes
    if found:
        raise UserError(
            f"{adapter.path}: the adapter fits {' and '.join(found)} of the base; call its folder as the one that it "
            "is for"
        )
    if len(wanted) == 1:
        raise misfits[wanted[0]]
    raise UserError(
        f"{adapter.path}: the adapter fits none of {', '.join(wanted)}; name the base that it was trained on"
    )


def _adapted(component: Checkpoint, adapter: Checkpoint, packing: Packing) -> tuple[Checkpoint, list[str]]:
    tied = tied_head(component)
    if tied and unties(adapter, tied):
        raise UserError(
            f"{adapter.path}: gives the embedding or the output matrix of {component.path.name} values of its own, and "
            f"they are one there: within a pipeline that is not supported; name {component.path} as base"
        )
    return adapt(component, adapter, tied, packing)


def _components(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """The components of a folder whose tensors are all in one, with their own names for them; none of any other."""
    folder = checkpoint.path
    groups = by_component(checkpoint.tensors, component_folders(folder) if folder.is_dir() else [])
    if "" in groups:
        return {}
    return {
        prefix.rstrip("/"): Checkpoint(
            folder / prefix,
            {
                (own := name.removeprefix(prefix)): replace(checkpoint.tensors[name], name=own)
                for name in names
            },
        )
        for prefix, names in groups.items()
    }


def _changed(name: str, component: Checkpoint, adapted: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors of a component that an adapter changes, under their names in the pipeline."""
    return {
        (full := f"{name}/{own}"): replace(info, name=full)
        for own, info in adapted.tensors.items()
        if info is not component.tensors.get(own)
    }


def _classes(component: Checkpoint) -> list[str]:
    """The classes that the configuration of a component names."""
    config: dict[str, Any] = read_config(component.folder)
    named = [config.get("_class_name"), *classes_of(config)]
    return [kind for kind in named if isinstance(kind, str)]
