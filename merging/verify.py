"""Re-derive a merged checkpoint from its manifest and say whether it is bit-identical, with all that lies beside it."""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mergeline.merging.align import align
from mergeline.merging.api import merge
from mergeline.merging.canonical import canonical_json
from mergeline.merging.checkpoints.adapters import ADAPTER_CONFIG
from mergeline.merging.checkpoints.checkpoint import (
    Checkpoint,
    header_digest,
    open_checkpoint,
    open_statistics,
)
from mergeline.merging.checkpoints.companions import hub_id
from mergeline.merging.checkpoints.heads import HEADS
from mergeline.merging.checkpoints.router import ROUTER
from mergeline.merging.checkpoints.task_adapters import ADAPTERS, adapter_path
from mergeline.merging.compress import compress, extract_expert
from mergeline.merging.engine.card import CARD
from mergeline.merging.engine.manifest import Manifest, manifest_path, signature_path, sub_folders
from mergeline.merging.errors import UserError
from mergeline.merging.export import export_task
from mergeline.merging.extract_lora import extract_lora
from mergeline.merging.files import read_object, user_errors
from mergeline.merging.make_moe import ROUTERS, Expert, make_moe
from mergeline.merging.merge_experts import STATISTICS, merge_experts
from mergeline.merging.methods.contract import catalogue
from mergeline.merging.reading import open_regular, parsed_json, sha256_of
from mergeline.merging.signature import check_signature
from mergeline.merging.transplant import transplant

Bring = Callable[[str], Path]  # makes of a URI a folder of headers whose data can be read

_FEW = 5  # names in a sentence
_COMMIT = re.compile(r"hf://[^/@]+/[^/@]+@[0-9a-f]{40,64}(/|$)")


class _Origin(BaseModel):
    path: str  # from where the manifest lies; or a URI
    digest: str
    source: str | None = None


class _Inputs:
    """Where what was read for a merge lies now."""

    def __init__(self, folder: Path, bring: Bring | None):
        self._folder, self._bring = folder, bring

    def remote(self, origin: _Origin) -> str | None:
        """The URI of what is read over the network: what was so before, and what is no longer here, of a commit."""
        if "://" in origin.path:
            return origin.path
        known = self._bring and origin.source and _COMMIT.match(origin.source)
        return origin.source if known and not (self._folder / origin.path).exists() else None

    def at(self, origin: _Origin) -> Path:
        """The path of a checkpoint, or of the folder of headers that stands for it."""
        source = self.remote(origin)
        if source is None:
            return self._folder / origin.path
        if self._bring is None:
            raise UserError(f"{source}: was read over the network; check the files alone (--no-merge)")
        return self._bring(source)


class _Lineage(BaseModel):
    model_config = ConfigDict(extra="allow")

    method: str
    params: dict[str, Any]
    base: _Origin | None
    experts: dict[str, _Origin]
    onto: dict[str, _Origin] = {}  # what adapters add to that is not the base
    statistics: dict[str, list[_Origin]] = {}
    methods: dict[str, str] = {}  # the digests of files that define methods from outside
    adapters: dict[str, str] = {}  # the digests of adapters of tasks
    router: str | None = None  # the digest of a store's router

    @property
    def origins(self) -> list[tuple[str, _Origin]]:
        """All that was read, each with what it was."""
        found = [*self.experts.items(), *([("base", self.base)] if self.base else []), *self.onto.items()]
        return found + [(kind, origin) for kind, files in self.statistics.items() for origin in files]


class _Output(BaseModel):
    digest: str
    files: list[str]
    tensors: dict[str, str]
    headers: dict[str, str] = {}  # of each of the files


class _Adapter(BaseModel):
    """How an adapter was made."""

    rank: int | float | Literal["cat"] | None
    modules_to_save: list[str]


class _Mixture(BaseModel):
    """How experts of a mixture were merged."""

    method: Literal["mc_smoe", "sub_moe", "prune"]
    experts: int | None
    groups: dict[str, Any] | list[Any] | None
    router: Literal["average", "dominant", "wide"]
    align: bool
    rank: int | float | None
    compress: float | None = None
    sparse: float | None = None


class _OfMoe(BaseModel):
    """A dense model that became an expert."""

    name: str
    of: str
    residual_scale: float | None
    noise_scale: float | None


class _Moe(BaseModel):
    """How a mixture was made of dense models."""

    kind: Literal["mixtral", "qwen2", "qwen3", "deepseek"]
    experts: list[_OfMoe]
    shared: _OfMoe | None
    routers: Literal["random", "uniform_random", "file"]
    experts_per_token: int

    def make_again(self, read: dict[str, Any], place: Path, device: str) -> Manifest:
        """Make it into `place` of what was read."""
        models = {**read["experts"], **({"base": read["base"]} if read["base"] else {})}

        def expert(asked: _OfMoe) -> Expert:
            if asked.of not in models:
                raise UserError(f"the manifest was damaged: there is no model '{asked.of}'")
            scales = asked.model_dump(include={"residual_scale", "noise_scale"})
            return Expert(model=models[asked.of], **scales)

        given = next(iter(read["statistics"].get(ROUTERS, [])), None)
        return make_moe(
            read["base"] or next(iter(models.values())),
            {asked.name: expert(asked) for asked in self.experts},
            place,
            shared=expert(self.shared) if self.shared else None,
            kind=self.kind,
            routers=given or self.routers,
            experts_per_token=self.experts_per_token,
            dtype=read["dtype"],
            seed=read["seed"],
            shard_size=read["shard_size"],
            device=device,
        )


class _Extracted(BaseModel):
    """How an expert was given back by a store."""

    store: _Origin
    expert: str
    base: _Origin | None
    shard_size: int | None

    @property
    def origins(self) -> list[tuple[str, _Origin]]:
        return [("store", self.store), *([("base", self.base)] if self.base else [])]


class _Written(BaseModel):
    """What `verify` needs of any manifest."""

    output: _Output
    versions: dict[str, str]
    files: dict[str, str] | None = None  # what lies beside the weights; None: made before it was listed


class _Manifest(_Written):
    """Of a merge, and of what is made of one."""

    recipe: _Lineage
    device: str
    store: dict[str, Any] | None = None  # of a compressed store
    adapter: _Adapter | None = None
    mixture: _Mixture | None = None
    moe: _Moe | None = None

    def make_again(self, folder: Path, inputs: _Inputs, place: Path) -> Manifest:
        """Merge into `place`; the manifest lies in `folder`."""
        recipe = self.recipe
        read = {
            **recipe.model_dump(exclude={"methods"}),
            "base": recipe.base and inputs.at(recipe.base),
            "experts": {name: inputs.at(origin) for name, origin in recipe.experts.items()},
            "onto": {name: inputs.at(origin) for name, origin in recipe.onto.items()},
            "statistics": {kind: [*map(inputs.at, files)] for kind, files in recipe.statistics.items()},
            # Both lie in the folder itself, and are as the manifest says.
            "adapters": {task: adapter_path(folder, task) for task in recipe.adapters},
            "router": recipe.router and folder / ROUTER,
        }
        if self.moe:
            return self.moe.make_again(read, place, self.device)
        if self.mixture:
            statistics = next(iter(read.pop("statistics").get(STATISTICS, [])), None)
            asked = self.mixture.model_dump()
            return merge_experts(read, place, statistics=statistics, **asked, device=self.device)
        if self.adapter:
            return extract_lora(read, place, **self.adapter.model_dump(), device=self.device)
        return (compress if self.store else merge)(read, place, device=self.device)


class _Expert(_Written):
    """Of what a store gave back."""

    extracted: _Extracted

    def make_again(self, folder: Path, inputs: _Inputs, place: Path) -> Manifest:
        """Extract into `place`; the manifest lies in `folder`."""
        asked = self.extracted
        base = inputs.at(asked.base) if asked.base else None
        return extract_expert(
            inputs.at(asked.store), asked.expert, place, base=base, shard_size=asked.shard_size
        )


class _Exported(BaseModel):
    """How a task was exported from a merge."""

    merge: _Origin
    task: str
    shard_size: int | None

    @property
    def origins(self) -> list[tuple[str, _Origin]]:
        return [("merge", self.merge)]


class _Export(_Written):
    """Of a task of a merge."""

    exported: _Exported

    def make_again(self, folder: Path, inputs: _Inputs, place: Path) -> Manifest:
        """Export into `place`; the manifest lies in `folder`."""
        asked = self.exported
        return export_task(inputs.at(asked.merge), asked.task, place, shard_size=asked.shard_size)


class _Transplanted(BaseModel):
    """How a vocabulary was transplanted."""

    model: _Origin
    donor: _Origin
    neighbours: int
    shard_size: int | None

    @property
    def origins(self) -> list[tuple[str, _Origin]]:
        return [("model", self.model), ("donor", self.donor)]


class _Transplant(_Written):
    """Of a model with the vocabulary of another."""

    transplanted: _Transplanted

    def make_again(self, folder: Path, inputs: _Inputs, place: Path) -> Manifest:
        """Transplant into `place`; the manifest lies in `folder`."""
        asked = self.transplanted
        return transplant(
            inputs.at(asked.model),
            inputs.at(asked.donor),
            place,
            neighbours=asked.neighbours,
            shard_size=asked.shard_size,
        )


class _Aligned(BaseModel):
    """How a model was aligned with a reference."""

    reference: _Origin
    models: dict[str, _Origin]
    model: str
    statistics: _Origin | None
    seed: int
    restarts: int
    heads: int | None
    leave: list[str]
    singular_vectors: bool
    shard_size: int | None

    @property
    def origins(self) -> list[tuple[str, _Origin]]:
        statistics = [("statistics", self.statistics)] if self.statistics else []
        return [("reference", self.reference), *self.models.items(), *statistics]


class _Align(_Written):
    """Of a model in the order of another."""

    aligned: _Aligned

    def make_again(self, folder: Path, inputs: _Inputs, place: Path) -> Manifest:
        """Align into `place`; the manifest lies in `folder`."""
        asked = self.aligned
        several = len(asked.models) > 1
        made = align(
            inputs.at(asked.reference),
            {name: inputs.at(origin) for name, origin in asked.models.items()},
            place.parent / "several" if several else place,
            only=asked.model if several else None,
            statistics=inputs.at(asked.statistics) if asked.statistics else None,
            seed=asked.seed,
            restarts=asked.restarts,
            heads=asked.heads,
            leave=asked.leave,
            singular_vectors=asked.singular_vectors,
            shard_size=asked.shard_size,
        )
        if several:
            os.replace(place.parent / "several" / asked.model, place)
        return made[asked.model]


def verify(out: Path, public_key: Path | None = None, again: bool = True, bring: Bring | None = None) -> str:
    """Check the files of `out` against its manifest, its inputs against their digests, and merge once more; or, for an
    expert of a store, extract it once more.

    Everything that the new merge says is compared: weights, the headers of their files, the files beside them, and
    every value of the manifest but versions and paths, which nothing can prove. Returns a sentence, which names
    what was not covered: files that the manifest does not list, versions that are not those of the new merge.

    public_key: who must have signed the manifest. again: whether to merge once more, for which the inputs must be here,
    or be read over the network: what a merge read there, and commits of the Hub that are no longer here. `bring` does.

    Raises:
        UserError: no manifest, a signature that is missing or another's, files, inputs or methods that changed, or a
            merge that comes out differently.
    """
    written, manifest = _read(manifest_path(out))
    signed = []
    if public_key:
        check_signature(out, public_key)
        signed = [f"signed by the owner of {public_key}"]
    elif signature_path(out).exists():
        signed = ["its signature was not checked: name the key (--public-key)"]
    if not again:
        _check_output(out, manifest)
        said = f"{out}: its files are as its manifest says ({manifest.output.digest})"
        return "; ".join([said, *signed, *_uncovered(out, manifest)])
    if isinstance(manifest, _Manifest):
        _check_methods(out, manifest.recipe)
        origins, what = manifest.recipe.origins, "a new merge of its inputs"
    elif isinstance(manifest, _Export):
        origins, what = manifest.exported.origins, "what its merge exports"
    elif isinstance(manifest, _Transplant):
        origins, what = manifest.transplanted.origins, "a new transplant of its inputs"
    elif isinstance(manifest, _Align):
        origins, what = manifest.aligned.origins, "a new alignment of its inputs"
    else:
        origins, what = manifest.extracted.origins, "what its store gives back"
    _check_output(out, manifest)
    folder = out if out.is_dir() else out.parent
    inputs = _Inputs(folder, bring)
    statistics = manifest.recipe.statistics if isinstance(manifest, _Manifest) else {}

    def opened(name: str, origin: _Origin) -> Checkpoint:
        of_kind = any(origin is known for known in statistics.get(name, []))
        return open_statistics(name, inputs.at(origin)) if of_kind else open_checkpoint(inputs.at(origin))

    for name, origin in origins:
        # What is remote is read once, by the new merge.
        if not inputs.remote(origin) and opened(name, origin).digest() != origin.digest:
            raise _other_input(str(folder / origin.path), name, origin)
    with _scratch(out) as scratch:
        place = scratch / f"again{out.suffix if out.is_file() else ''}"
        made = manifest.make_again(folder, inputs, place)
        read = _Lineage.model_validate(made["recipe"]).origins if isinstance(manifest, _Manifest) else []
        for (name, origin), (_, now) in zip(origins, read):
            if now.digest != origin.digest:
                raise _other_input(inputs.remote(origin) or origin.path, name, origin)
        notes = [*signed, *_compared(out, manifest, written, place, made), *_uncovered(out, manifest)]
    over = [f"{source} was read over the network" for _, o in origins if (source := inputs.remote(o))]
    return "; ".join([f"{out}: bit-identical to {what} ({manifest.output.digest})", *over, *notes])


def _other_input(where: str, name: str, origin: _Origin) -> UserError:
    return UserError(f"{where}: is no longer the '{name}' that was read for it ({origin.digest})")


def _read(path: Path) -> tuple[Manifest, _Manifest | _Expert | _Export | _Transplant | _Align]:
    """A manifest as it is written, and what is needed of it, checked."""
    try:
        with open_regular(path) as file:
            text = file.read().decode()
        written = parsed_json(text)
        kinds: dict[str, type[_Manifest | _Expert | _Export | _Transplant | _Align]] = {
            "extracted": _Expert,
            "exported": _Export,
            "transplanted": _Transplant,
            "aligned": _Align,
        }
        kind = next((key for key in kinds if isinstance(written, dict) and key in written), "")
        manifest = kinds.get(kind, _Manifest).model_validate(written)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no manifest; only what Mergeline merged can be verified") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        if kind == "extracted" and "versions" not in written:
            raise UserError(
                f"{path}: is of an earlier Mergeline, and has no digest of the store; extract the expert again"
            ) from None
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: the manifest was damaged: {where}: {first['msg']}") from None
    except ValueError as error:
        raise UserError(f"{path}: the manifest was damaged: {error}") from None
    if "".join(text.split()) != "".join(json.dumps(written, ensure_ascii=False).split()):
        raise UserError(f"{path}: the manifest was changed: a value is not written as Mergeline writes it")
    return written, manifest


def _check_methods(out: Path, recipe: _Lineage) -> None:
    for id, defined in recipe.methods.items():
        known = catalogue().get(id)
        if known is None:
            raise UserError(
                f"{out}: was made with the method '{id}' of a file; name that file with --methods"
            )
        if known.digest != defined:
            raise UserError(f"{known.file}: is no longer the file that defined '{id}' ({defined})")


def _check_output(out: Path, manifest: _Written) -> None:
    """What was written must be what the manifest says of it (raises UserError if it is not)."""
    found = open_checkpoint(out).digest()
    if found != manifest.output.digest:
        raise UserError(
            f"{out}: its content is {found}, its manifest says {manifest.output.digest}: "
            "it was changed after the merge"
        )
    for name, digest in manifest.output.headers.items():
        if name not in manifest.output.files or header_digest(_listed(out, name)) != digest:
            raise UserError(f"{_listed(out, name)}: its header is not what the manifest says: it was changed")
    for name, digest in (manifest.files or {}).items():
        path = _listed(out, name)
        if (found := f"sha256:{sha256_of(path)}") != digest:
            raise UserError(f"{path}: is {found}, the manifest says {digest}: it was changed after the merge")


def _listed(out: Path, name: str) -> Path:
    """A file of a merge, by its name in the manifest; a single file has a name of its own (raises UserError)."""
    path = out / name if out.is_dir() else out
    parts = name.split("/")
    if len(parts) > 2 or not {"", ".", ".."}.isdisjoint(parts) or not path.is_file():
        raise UserError(f"{path}: is named by the manifest, and is not there")
    return path


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder to merge into: beside the output, whose disk held it before, or in the temporary one."""
    try:
        made = tempfile.TemporaryDirectory(dir=out.parent, prefix=".verify-", suffix=".partial")
    except OSError:
        with user_errors(Path(tempfile.gettempdir())):
            made = tempfile.TemporaryDirectory(prefix="mergeline-verify-")
    with made as folder:
        yield Path(folder)


def _compared(out: Path, manifest: _Written, written: Manifest, place: Path, made: Manifest) -> Iterator[str]:
    """Raises UserError where the new merge differs; yields what it could not say, a note each."""
    versions = {
        name: manifest.versions.get(name, "of no version")
        for name in {**made["versions"], **manifest.versions}
        if made["versions"].get(name) != manifest.versions.get(name)
    }
    if made["output"]["digest"] != manifest.output.digest:
        differ = [n for n, h in made["output"]["tensors"].items() if manifest.output.tensors.get(n) != h]
        raise UserError(
            f"{out}: made again, {len(differ)} tensor(s) differ, first '{[*differ, None][0]}'; "
            f"made with {versions or 'the same versions'}"
        )
    left, right = _derivable(written), _derivable(made)
    other_card = bool(versions)
    for told, derived in zip(_origins(left), _origins(right)):
        if "source" in told and "source" not in derived:
            yield f"its source {told.pop('source')} is not proved: {CARD} and the manifest name it alone"
            other_card = True
        elif (
            told.get("source") != derived.get("source")
            and (model := hub_id(told.get("source")))
            and not _COMMIT.match(told["source"])
            and model == hub_id(derived.get("source"))
        ):
            yield f"its source {told.pop('source')} is, as a later Mergeline says it, {derived.pop('source')}"
            other_card = True
    if manifest.files is None:
        right.pop("files")
        right["output"].pop("headers")
    else:
        yield from _uncertain_files(out, place, left["files"], right["files"], other_card)
    for where in _differences(left, right):
        raise UserError(
            f"{manifest_path(out)}: {'.'.join(map(str, where))} is not that of a new merge: the manifest was changed, "
            f"or made with {manifest.versions}"
        )
    for name in manifest.output.files:
        if header_digest(_listed(out, name)) != header_digest(_listed(place, name)):
            raise UserError(f"{_listed(out, name)}: its header is not that of a new merge: it was changed")
    if versions:
        yield f"made, as it says, with {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _uncertain_files(
    out: Path, place: Path, told: dict[str, str], derived: dict[str, str], other_card: bool
) -> Iterator[str]:
    """Take out of both, with a note, the files that differ by what a new merge cannot know.

    other_card: whether the card may be another one, by other versions or for want of a source.
    """
    differ = {name for name in told.keys() & derived.keys() if told[name] != derived[name]}
    if other_card and CARD in differ:
        del told[CARD], derived[CARD]
        yield f"{CARD} is as the manifest says, but a new merge writes another"
    if ADAPTER_CONFIG in differ:
        configs = [read_object(folder / ADAPTER_CONFIG) for folder in (out, place)]
        name, _ = (config.pop("base_model_name_or_path", None) for config in configs)
        if configs[0] == configs[1]:
            del told[ADAPTER_CONFIG], derived[ADAPTER_CONFIG]
            yield f"{ADAPTER_CONFIG} is as the manifest says, but the name of its base, {name}, is not proved"


def _uncovered(out: Path, manifest: _Written) -> Iterator[str]:
    """What lies in the folder and is not in the manifest, a note each."""
    if not out.is_dir():
        return
    if manifest.files is None:
        yield "its manifest is of an earlier Mergeline, and does not cover the files beside the weights"
        return
    known = {*manifest.output.files, *manifest.files, manifest_path(out).name, signature_path(out).name}
    parts = {ADAPTERS, HEADS, *sub_folders([*manifest.files, *manifest.output.files])}
    inside = [f"{part}/{path.name}" for part in parts for path in (out / part).glob("*")]
    found = [path.name for path in out.iterdir() if path.name not in parts or not path.is_dir()]
    if more := sorted({*found, *inside} - known):
        rest = f" and {len(more) - _FEW} more" if len(more) > _FEW else ""
        yield f"beside it lies what the manifest does not list: {', '.join(more[:_FEW])}{rest}"


def _derivable(manifest: Manifest) -> Manifest:
    """A copy of a manifest without what a new merge cannot say: versions, and where the inputs lie."""
    found = copy.deepcopy(manifest)
    found.pop("versions", None)
    for origin in _origins(found):
        origin.pop("path", None)
    return found


def _origins(manifest: Manifest) -> list[dict[str, Any]]:
    """What a manifest says of all that was read."""
    if "extracted" in manifest:
        asked = manifest["extracted"]
        return [asked["store"], *([asked["base"]] if asked["base"] else [])]
    if "exported" in manifest:
        return [manifest["exported"]["merge"]]
    if "transplanted" in manifest:
        return [manifest["transplanted"][key] for key in ("model", "donor")]
    if "aligned" in manifest:
        asked = manifest["aligned"]
        statistics = [asked["statistics"]] if asked["statistics"] else []
        return [asked["reference"], *asked["models"].values(), *statistics]
    recipe = manifest["recipe"]
    statistics = [origin for files in recipe["statistics"].values() for origin in files]
    models = [*recipe["experts"].values(), *recipe.get("onto", {}).values()]
    return [*([recipe["base"]] if recipe["base"] else []), *models, *statistics]


def _differences(a: Any, b: Any, where: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            if key in a and key in b:
                yield from _differences(a[key], b[key], (*where, key))
            else:
                yield (*where, key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b)):
            yield from _differences(one, other, (*where, i))
    elif canonical_json(a) != canonical_json(b):
        yield where
