"""Align models that were trained independently: each written with its units in the order of a reference.

Such models do alike things in units that lie in different places, so that their average is of unrelated units. Put in
the reference's order they compute what they did, and can be merged as experts of one base can. What may move is read
off names, shapes and configuration (`merging.architecture`); which unit goes where is found by weights (one model:
Git Re-Basin's weight matching; several: MergeMany), or by activations that were collected before.
"""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, Sequence

from mergeline.merging.architecture import Model, describe
from mergeline.merging.canonical import canonical_json
from mergeline.merging.checkpoints.adapters import is_adapter
from mergeline.merging.checkpoints.carried import carry
from mergeline.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeline.merging.checkpoints.companions import read_config
from mergeline.merging.checkpoints.components import component_folders
from mergeline.merging.checkpoints.quantised.formats import dequantised
from mergeline.merging.checkpoints.tied import without_tied_head
from mergeline.merging.checkpoints.writer import CheckpointWriter, TensorSpec
from mergeline.merging.engine.card import CARD
from mergeline.merging.engine.inputs import files_of, refuse_changed, stamps
from mergeline.merging.engine.machine import one_thread
from mergeline.merging.engine.manifest import (
    Manifest,
    described_output,
    is_single,
    origin_of,
    publish_files,
    versions,
)
from mergeline.merging.engine.places import refuse_place
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import read_object, staged
from mergeline.merging.permutations import matching, spectra
from mergeline.merging.permutations.groups import (
    Group,
    Orders,
    activation_keys,
    groups_of,
    kind_of,
    reordered,
)
from mergeline.merging.permutations.matching import Alike, Match

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, ACTIVATIONS, MANY = "weight_matching", "activation_matching", "merge_many"
REFERENCE = ""  # its name among those of the models
_OPEN_CLIP = "open_clip_config.json"


@dataclass(frozen=True)
class Family:
    """Models of one architecture, the reference first, and what of them may move.

    kept: tensors of two dimensions and more that no group holds, which stay as they are.
    """

    checkpoints: dict[str, Checkpoint]
    model: Model
    groups: list[Group]

    @property
    def kept(self) -> list[str]:
        moving = {name for group in self.groups for name in group.tensors}
        return [
            name
            for name, tensor in self.model.tensors.items()
            if len(tensor.shape) > 1 and name not in moving
        ]

    def state(self, name: str) -> dict[str, Tensor]:
        """All tensors of a model, in their stored dtypes."""
        checkpoint = self.checkpoints[name]
        return {tensor: checkpoint.read(tensor) for tensor in checkpoint.tensors}


def align(
    reference: str | os.PathLike,
    models: Mapping[str, str | os.PathLike],
    out: str | os.PathLike,
    *,
    statistics: str | os.PathLike | None = None,
    seed: int = 0,
    restarts: int = 1,
    heads: int | None = None,
    leave: Sequence[str] = (),
    singular_vectors: bool = False,
    only: str | None = None,
    shard_size: int | None = None,
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
) -> dict[str, Manifest]:
    """Write each of `models` (name -> checkpoint) in the order of the reference; returns their manifests, by name.

    One model is written to `out`, a folder or x.safetensors; several to folders in `out`, by their names, after each
    was matched to the mean of all others in turn.

    statistics: what `merging.learning.activation_matching` collected of the reference and one model, in place of the
        weights. seed: of the order in which groups are visited; restarts: how many descents, of which the best counts.
    heads: how many an attention has, where no configuration says it. leave: kinds of groups that stay, by the last
        part of their names (hidden, heads, residual, conv1 ...). singular_vectors: whether the manifest says how far
        leading singular vectors point the same way, before and after. only: write this model alone of all.

    Memory holds all models, and those that are matched once more. Values are moved, never changed: bytes of each
    tensor are those of its model in another order. The manifest's `aligned` says what moved, what stays, and the
    distance to the reference before and after.

    Raises:
        UserError: as `family_of`; a place that holds something else (`force` as with `merging.merge`); too little
            memory; files that change while they are read.
    """
    out = Path(out)
    if type(restarts) is not int or restarts < 1:
        raise UserError(f"restarts: {restarts} is no whole number above 0")
    if not models:
        raise UserError("name at least one model to align with the reference")
    if wrong := next((name for name in models if name in ("", ".", "..") or Path(name).name != name), None):
        raise UserError(f"'{wrong}': is no name of a folder; name the model, such as b=PATH")
    if len(models) > 1 and (statistics or is_single(out)):
        raise UserError(
            "statistics are of one model: align one after the other"
            if statistics
            else f"{out}: several models are written; name a folder"
        )
    family = family_of(reference, models, heads, leave)
    targets = {name: out if len(models) == 1 else out / name for name in models if only in (None, name)}
    collected = open_checkpoint(Path(statistics)) if statistics else None
    read = [*family.checkpoints.values(), *([collected] if collected else [])]
    before = stamps(file for checkpoint in read for file in files_of(checkpoint))
    for target in targets.values():
        refuse_place(target, [*(c.path for c in read), *before], "aligned", force)
    _refuse_memory(family, memory)
    with one_thread(lapack=True):
        states = {name: family.state(name) for name in family.checkpoints}
        matches = _matched(family, states, collected, seed, restarts, progress)
        asked = {
            "method": ACTIVATIONS if collected else WEIGHTS if len(models) == 1 else MANY,
            "seed": seed, "restarts": restarts, "heads": heads, "leave": sorted(leave),
            "singular_vectors": singular_vectors, "shard_size": shard_size,
        }  # fmt: skip
        made = {}
        with ExitStack() as stack:
            finished = []
            for name, target in targets.items():
                origins = {
                    n: origin_of(target, c.path, c.stored.digest()) for n, c in family.checkpoints.items()
                }
                moved = reordered(states[name], family.groups, matches[name].orders)
                told = {
                    "reference": origins.pop(REFERENCE), "models": origins, "model": name,
                    "statistics": origin_of(target, collected.path, collected.digest()) if collected else None,
                    **asked, **_told(family, states[REFERENCE], states[name], moved, matches[name], singular_vectors),
                }  # fmt: skip
                folder = stack.enter_context(staged(target))
                writer = _write(family.checkpoints[name], moved, folder, shard_size, asked)
                made[name] = _described(told, family, writer, is_single(target))
                finished.append((made[name], writer, target))
            refuse_changed(before)
            for manifest, writer, target in finished:
                publish_files(manifest, writer, target)
    return made


def family_of(
    reference: str | os.PathLike,
    models: Mapping[str, str | os.PathLike],
    heads: int | None = None,
    leave: Sequence[str] = (),
) -> Family:
    """Open a reference and models, and find what may move.

    Raises:
        UserError: quantised or of several components, or adapters; models of different tensors; nothing of which it is
            known that it may move; a kind of group to leave that there is none of.
    """
    paths = {REFERENCE: Path(reference), **{name: Path(path) for name, path in models.items()}}
    checkpoints = {name: _opened(path) for name, path in paths.items()}
    base = checkpoints[REFERENCE]
    for checkpoint in checkpoints.values():
        _refuse_other(base, checkpoint)
    config = config_of(base.path)
    if heads is not None:
        config = {**config, "num_attention_heads": heads}
    model = describe({name: info.shape for name, info in base.tensors.items()}, config)
    groups = groups_of(model)
    kinds = sorted({group.kind for group in groups})
    for kind in leave:
        if kind not in kinds:
            raise UserError(f"leave '{kind}': there are no such groups{did_you_mean(kind, kinds)}")
    groups = [group for group in groups if group.kind not in leave]
    if not groups:
        raise UserError(
            f"{base.path}: it is not known what may be permuted in a model of this kind ({model.architecture}); see "
            "docs/permutations.md for those that are known"
        )
    return Family(checkpoints, model, [_shared(group, checkpoints) for group in groups])


def config_of(path: Path) -> dict[str, Any]:
    """What a checkpoint's folder says of its model: config.json, or what open_clip has in its place."""
    folder = path if path.is_dir() else path.parent
    described = read_object(folder / _OPEN_CLIP).get("model_cfg")
    return read_config(folder) or (described if isinstance(described, dict) else {})


def _opened(path: Path) -> Checkpoint:
    if path.is_dir() and component_folders(path):
        raise UserError(f"{path}: is of several components; name the folder of one model")
    checkpoint = open_checkpoint(path)
    if checkpoint.settings is not None or is_adapter(checkpoint) or dequantised(checkpoint)[1]:
        raise UserError(
            f"{path}: is quantised or an adapter; merge it with `passthrough`, and take what that writes"
        )
    return without_tied_head(checkpoint)


def _refuse_other(base: Checkpoint, other: Checkpoint) -> None:
    """Raises UserError for a model that is none of the reference's architecture."""
    for one, than in ((base, other), (other, base)):
        if missing := sorted(one.tensors.keys() - than.tensors.keys()):
            raise UserError(
                f"{than.path}: lacks the tensor '{missing[0]}' of {one.path}; models of one architecture can be aligned"
            )
    for name, info in base.tensors.items():
        if len(info.shape) != len(other.tensors[name].shape):
            raise UserError(
                f"{other.path}: '{name}' is {other.tensors[name].shape}, in {base.path} {info.shape}"
            )


def _shared(group: Group, checkpoints: Mapping[str, Checkpoint]) -> Group:
    """A group, in which tensors of different shapes (heads of different classes) move, but say nothing.

    Raises:
        UserError: models have different numbers of its units.
    """
    differ = set()
    for place, _, _ in group.counted:
        shapes = {checkpoint.tensors[place.name].shape for checkpoint in checkpoints.values()}
        if len(shapes) > 1:
            differ.add(place.name)
        if len({shape[place.axis] for shape in shapes}) > 1:
            raise UserError(
                f"'{place.name}' is {' and '.join(map(str, sorted(shapes)))}: models of one width can be aligned"
            )

    def seen(places: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(replace(place, weighs=place.weighs and place.name not in differ) for place in places)

    return replace(
        group,
        places=seen(group.places),
        splits=tuple(replace(split, places=seen(split.places)) for split in group.splits),
    )


def _refuse_memory(family: Family, memory: int | None) -> None:
    sizes = [checkpoint.nbytes for checkpoint in family.checkpoints.values()]
    need = sum(sizes) + 2 * max(sizes) if len(sizes) == 2 else 3 * sum(sizes)
    if memory is not None and need > memory:
        raise UserError(
            f"aligning holds all models in memory, some {need} bytes; allowed are {memory}: allow more"
        )


def _matched(
    family: Family,
    states: Mapping[str, Mapping[str, Tensor]],
    collected: Checkpoint | None,
    seed: int,
    restarts: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Match]:
    """What is found of each model, by name."""

    def told(sweep: int) -> None:
        if progress:
            progress(sweep, matching.SWEEPS)

    names, groups = list(states), family.groups
    if collected:
        orders = _by_activations(groups, collected)
        return {names[1]: Match(orders, 0.0, 1)}
    if len(names) == 2:
        found = matching.match_weights(
            states[names[0]], states[names[1]], groups, seed=seed, restarts=restarts, told=told
        )
        return {names[1]: found}
    many = matching.match_many(list(states.values()), groups, seed=seed, restarts=restarts, told=told)
    return dict(zip(names, many))


def _by_activations(groups: Sequence[Group], collected: Checkpoint) -> Orders:
    orders = {}
    for group in groups:
        keys = activation_keys(group)
        if missing := [key for key in keys if key not in collected.tensors]:
            raise UserError(
                f"{collected.path}: has nothing on '{missing[0]}'; collect the activations of these models"
            )
        units, *parts = (collected.read(key).double() for key in keys)
        if len(units) != group.units:
            raise UserError(
                f"{collected.path}: '{group.name}' has {len(units)} units there, here {group.units}"
            )
        orders[group.name] = matching.assigned(group, Alike(units, tuple(parts)))
    return orders


def _told(
    family: Family,
    reference: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    match: Match,
    with_vectors: bool,
) -> dict[str, Any]:
    """What the manifest says of one model: JSON values."""
    alike = {n: t for n, t in reference.items() if t.shape == before[n].shape}
    said: dict[str, Any] = {
        "sweeps": match.sweeps,
        "groups": {
            group.name: {"units": group.units, "moved": match.orders[group.name].moved}
            for group in family.groups
        },
        "kept": family.kept,
        "distance": {
            "before": matching.distance(alike, before),
            "after": matching.distance(alike, after),
        },
    }
    if with_vectors:
        said["overlap"] = {
            "before": _mean_overlap(family, alike, before),
            "after": _mean_overlap(family, alike, after),
        }
    return said


def _mean_overlap(family: Family, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The mean of `spectra.overlap` over the matrices and convolutions that move."""
    moving = {name for group in family.groups for name in group.tensors}
    names = [n for n in sorted(moving) if n in a and a[n].ndim > 1 and min(a[n].flatten(1).shape) > 1]
    found = [spectra.overlap(a[n].flatten(1), b[n].flatten(1)) for n in names]
    return sum(found) / len(found) if found else 0.0


def _write(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    folder: Path,
    shard_size: int | None,
    asked: Mapping[str, Any],
) -> CheckpointWriter:
    infos = checkpoint.tensors.values()
    specs = [TensorSpec(info.name, info.dtype, info.shape, info.nbytes) for info in infos]
    kept = {k: v for k, v in checkpoint.metadata.items() if not k.startswith("mergeline.")}
    metadata = {"format": "pt", **kept, "mergeline.align": canonical_json(asked)}
    writer = CheckpointWriter(folder, specs, metadata, shard_size)
    for spec in specs:
        writer.write(spec.name, tensors[spec.name])
    writer.finish()
    if checkpoint.path.is_dir():
        carry(checkpoint.path, specs, writer.folder)
    return writer


def _described(told: dict[str, Any], family: Family, writer: CheckpointWriter, single: bool) -> Manifest:
    manifest: Manifest = {
        "format": 1,
        "aligned": told,
        "output": described_output(writer),
        "versions": versions(),
    }
    if not single:
        (writer.folder / CARD).write_text(_card(manifest))
    return manifest


def summary(manifest: Manifest) -> list[str]:
    """What moved and what did not, in lines."""
    told = manifest["aligned"]
    by_kind: dict[str, list[dict[str, int]]] = defaultdict(list)
    for name, group in told["groups"].items():
        by_kind[kind_of(name)].append(group)
    far = told["distance"]
    lines = []
    for kind, groups in sorted(by_kind.items()):
        moved, units = (sum(group[key] for group in groups) for key in ("moved", "units"))
        lines.append(
            f"{kind}: {moved} of {units} units moved, in {len(groups)} group{'s'[: len(groups) > 1]}"
        )
    if told["kept"]:
        first = ", ".join(told["kept"][:3]) + (", ..." if len(told["kept"]) > 3 else "")
        lines.append(f"kept as they are: {len(told['kept'])} tensors ({first})")
    lines.append(f"distance to the reference: {far['before']:.6g} before, {far['after']:.6g} after")
    if "overlap" in told:
        of = told["overlap"]
        lines.append(f"leading singular vectors alike: {of['before']:.3f} before, {of['after']:.3f} after")
    return lines


def _card(manifest: Manifest) -> str:
    """Markdown with YAML front matter."""
    told = manifest["aligned"]
    lines = [
        "---",
        "tags:",
        "- mergeline",
        "- aligned",
        "---",
        "",
        f"# Aligned by {told['method']}",
        "",
        "The units of a model in the order of another one's, which was trained independently. It computes what it did",
        "before; weights that do alike things now lie in the same places, so that the two can be merged.",
        "",
        "| checkpoint | role | digest |",
        "|---|---|---|",
        f"| reference | whose order it has | `{told['reference']['digest']}` |",
        f"| model | what was reordered | `{told['models'][told['model']]['digest']}` |",
        f"| this | the same in that order | `{manifest['output']['digest']}` |",
        "",
        *(f"- {line}" for line in summary(manifest)),
        "",
        "Made with Mergeline; `mergeline verify` re-derives it bit for bit.",
        "",
    ]
    return "\n".join(lines)
