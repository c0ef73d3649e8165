"""Step `fetch`: bring a checkpoint from wherever it is into a folder of one shape.

model.safetensors                     or shards, under their own names, + model.safetensors.index.json;
                                      the weights of a PEFT adapter keep their name
config.json, tokenizer.json, ...      what describes the weights and lies beside them
unet/..., 1_Pooling/..., ...          the same of each sub-folder that the model_index.json of diffusers, or the
                                      modules.json of sentence-transformers, names
provenance.json                       source, revision (commit), digest, size and SHA-256 of every file
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergeline.merging.checkpoints.adapters import ADAPTER_WEIGHTS
from mergeline.merging.checkpoints.checkpoint import DTYPES, is_pickle, open_checkpoint
from mergeline.merging.checkpoints.companions import (
    CONFIG,
    CONFIG_FILES,
    INDEX,
    PICKLE_SUFFIXES,
    PROVENANCE,
    STEMS,
    WEIGHTS,
    is_repository,
)
from mergeline.merging.checkpoints.components import PIPELINE, holds_safetensors, listed_parts
from mergeline.merging.checkpoints.modules import MODULES, parsed_modules, refuse_pickled
from mergeline.merging.checkpoints.quantised.formats import refuse_unsupported
from mergeline.merging.checkpoints.writer import CheckpointWriter, TensorSpec
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import publish, read_object, staged, sync, user_errors, write_json
from mergeline.merging.reading import safe_name, sha256_of
from mergeline.tasks.places import CACHED_CHECKPOINTS, CACHED_DOWNLOADS, user_cache
from mergeline.tasks.private import private_folder, private_umask
from mergeline.tasks.sources import LocalFile, Source, download, locate, pinned

if TYPE_CHECKING:
    from torch import Tensor

# Where a folder holds several: first by name (open_clip's config describes its own weights; model.safetensors
# beside them is for transformers; variants, as of fp16, come last), then the only one of a kind.
_SAFE_NAMES = (
    "open_clip_model.safetensors",
    *(f"{stem}.safetensors{index}" for stem in STEMS for index in ("", ".index.json")),
)
_SAFE_SUFFIXES = (".safetensors.index.json", ".safetensors")
_PICKLE_NAMES = (
    "open_clip_pytorch_model.bin",
    *(f"{stem}.bin{index}" for stem in ("pytorch_model", STEMS[1]) for index in ("", ".index.json")),
)
_PICKLE_SUFFIXES = (".bin.index.json", *PICKLE_SUFFIXES)

GGUF_SUFFIX = ".gguf"
_PREPROCESS_KEYS = ("size", "mean", "std", "interpolation", "resize_mode")


def fetch(
    source: str, out: Path, *, cache: Path, allow_pickle: bool = False, layout: str | None = None
) -> None:
    """Make `out` the checkpoint that `source` names, in place of what stood there.

    Args:
        source: a path, `file:...`, `hf://org/name[@revision][/file-or-folder]`, `org/name` where there is no such
            path, `open_clip://arch/tag`, http(s), or any other URL that fsspec knows.
        out: the folder; it appears whole or not at all, and is the same bytes for the same source.
        cache: a folder for unfinished downloads, which a later call goes on with.
        allow_pickle: convert weights that exist only as a pickle (read with `weights_only`).
        layout: `open_clip` renames and packs the tensors of transformers' CLIP classes; None keeps all names.

    Raises:
        UserError: not found, no access, interrupted too often, damaged, a pickle, disk full, quantised in a way that
            cannot be read.
    """
    downloads = cache / f"{out.name}-{hashlib.sha256(os.fsencode(out.absolute())).hexdigest()[:8]}"
    with staged(out) as staging:
        if source.startswith("open_clip://"):
            name, revision = source, None
            _from_open_clip(source, staging)
        else:
            found = locate(source)
            name, revision = found.name, found.revision
            _from_files(found, staging, downloads, allow_pickle)
        if layout == "open_clip":
            _convert_layout(staging, name)
        _write_provenance(staging, name, revision)
        publish(staging, out)
    shutil.rmtree(downloads, ignore_errors=True)


class Folder(NamedTuple):
    """A folder of a checkpoint. weights: the name of its file of them, or of their index; None where it has none."""

    source: Source
    weights: str | None


def folders_of(source: Source, downloads: Path, allow_pickle: bool) -> dict[str, Folder]:
    """The folder itself and those of its parts, by what stands before the names of files: "" and `unet/`.

    The files that list the parts are brought, and nothing else.

    Raises:
        UserError: as `choose_weights`; a list of parts that is damaged or names folders elsewhere.
    """
    parts: dict[str, Folder] = {}
    in_pipeline = False
    if source.below and not source.chosen and PIPELINE in source.files:
        shown = f"{source.name}: {PIPELINE}"
        for name in listed_parts(bring(source, PIPELINE, downloads), shown):
            inside = source.below(name)
            if inside.files:
                parts[f"{name}/"] = Folder(inside, _weights_of_part(inside, allow_pickle))
        in_pipeline = any(folder.weights for folder in parts.values())
    own = None if in_pipeline else choose_weights(source, allow_pickle)
    if source.below and MODULES in source.files:
        for module in parsed_modules(bring(source, MODULES, downloads), f"{source.name}: {MODULES}"):
            if module.folder:
                inside = source.below(module.folder)
                refuse_pickled([*inside.files], module, source.name)
                if inside.files:
                    parts[f"{module.folder}/"] = Folder(inside, _weights_of_part(inside, allow_pickle))
    return {"": Folder(source, own), **parts}


def _weights_of_part(source: Source, allow_pickle: bool) -> str | None:
    if not any(name.endswith((".safetensors", *PICKLE_SUFFIXES)) for name in source.files):
        holds_safetensors(source.files, source.name)
        return None
    return choose_weights(source, allow_pickle)


def _from_files(source: Source, staging: Path, downloads: Path, allow_pickle: bool) -> None:
    """Fill `staging` with weights and configuration files; all of them are here before the first is moved."""
    brought = {
        prefix: _bring_all(folder, downloads)
        for prefix, folder in folders_of(source, downloads, allow_pickle).items()
    }
    for prefix, (folder, configs, index, files) in brought.items():
        into, weights = staging / prefix, folder.weights
        into.mkdir(exist_ok=True)
        for name, path in configs.items():
            _place(path, into / name, downloads)
        if weights is None:
            continue
        if weights.endswith(_PICKLE_SUFFIXES):
            _convert_pickles(files, into, folder.source.name, placed_as(weights))
        elif index:
            for name, path in files.items():
                _place(path, into / name, downloads)
            _place(index, into / placed_as(weights), downloads)
        else:
            _place(files[weights], into / placed_as(weights), downloads)


class _Brought(NamedTuple):
    """Where the files of a folder are here, by their names there."""

    folder: Folder
    configs: dict[str, Path]
    index_file: Path | None
    weights: dict[str, Path]


def _bring_all(folder: Folder, downloads: Path) -> _Brought:
    source, weights = folder
    configs = {name: bring(source, name, downloads) for name in config_files(source)}
    if CONFIG in configs:
        config = read_object(configs[CONFIG], named=f"{source.name}: {CONFIG}")
        refuse_unsupported(config, source.name)
    if weights is None:
        return _Brought(folder, configs, None, {})
    is_pickle = weights.endswith(_PICKLE_SUFFIXES)
    index = bring(source, weights, downloads) if weights.endswith(".index.json") else None
    shards = shards_of(index, f"{source.name}: {weights}", is_pickle) if index else [weights]
    return _Brought(folder, configs, index, {name: bring(source, name, downloads) for name in shards})


def config_files(source: Source) -> list[str]:
    """The files that describe weights; beside a file that was named no list of a pipeline's parts."""
    return [n for n in source.files if n in CONFIG_FILES and not (source.chosen and n == PIPELINE)]


def placed_as(weights: str) -> str:
    """What a file of weights, or an index of them, is called here: as libraries open it, whatever variant it is."""
    name = Path(weights).name
    if name == ADAPTER_WEIGHTS or name.endswith(GGUF_SUFFIX):
        return name
    stem = next((stem for stem in STEMS if name.startswith((f"{stem}.", f"{stem}-"))), STEMS[0])
    return f"{stem}.safetensors" + (".index.json" if name.endswith(_SAFE_SUFFIXES[0]) else "")


def choose_weights(source: Source, allow_pickle: bool) -> str:
    """The name of the file of weights, or of an index of them (raises UserError: none, several, a pickle, GGUF)."""
    names = [source.chosen] if source.chosen else list(source.files)
    if safe := _pick(names, _SAFE_NAMES, _SAFE_SUFFIXES, source.name):
        return safe
    if pickle := _pick(names, _PICKLE_NAMES, _PICKLE_SUFFIXES, source.name):
        if allow_pickle:
            return pickle
        raise UserError(
            f"{source.name}: '{pickle}' is a pickle, which can run code when it is opened; convert it to "
            "safetensors, or allow it with --allow-pickle (in params.yaml: allow_pickle: true)"
        )
    if any(name.endswith(".distcp") for name in names):
        raise UserError(
            f"{source.name}: holds training shards, which are not fetched: merge the folder where it lies (by "
            "`passthrough` it becomes safetensors), and name the merge here"
        )
    if found := _pick(names, (), (GGUF_SUFFIX,), source.name):
        return found
    raise UserError(
        f"{source.name}: no checkpoint there; expected {WEIGHTS}, {INDEX} or one *.safetensors file, "
        f"found {', '.join(names[:5]) or 'no files'}"
    )


def _pick(names: list[str], preferred: tuple[str, ...], suffixes: tuple[str, ...], source: str) -> str | None:
    for name in preferred:
        if name in names:
            return name
    for suffix in suffixes:
        matching = [name for name in names if name.endswith(suffix)]
        if len(matching) > 1:
            raise UserError(f"{source}: several checkpoints ({', '.join(matching[:5])}); name one of them")
        if matching:
            return matching[0]
    return None


def shards_of(index: Path, where: str, is_pickle: bool = False) -> list[str]:
    """The files that an index names (raises UserError: it is none, or names files elsewhere)."""
    weight_map = read_object(index, named=where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{where} is not a shard index: it has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        safe_name(index.parent, name, where)
        if not name.endswith(PICKLE_SUFFIXES if is_pickle else ".safetensors"):
            raise UserError(f"{where} names the shard '{name}', which is not a file of weights")
    return names


def bring(source: Source, name: str, downloads: Path) -> Path:
    """Where the file lies on this machine: as it is, or downloaded."""
    file = source.file(name)
    if not isinstance(file, LocalFile):
        return download(file, downloads)
    if not os.access(file.path, os.R_OK):
        raise UserError(f"{file.path}: cannot be read; check the permissions")
    return file.path


def _place(path: Path, target: Path, downloads: Path) -> None:
    """Move a download, copy a file of the user's: `target` never shares its bytes with another file."""
    if path.parent == downloads:
        shutil.move(path, target)
    else:
        shutil.copyfile(path, target)


def _convert_pickles(files: dict[str, Path], folder: Path, source: str, named: str) -> None:
    tensors: dict[str, Tensor] = {}
    for name, path in files.items():
        tensors |= _load_pickle(path, f"{source}: '{name}'")
    _write_tensors(tensors, folder, source, named)


def _load_pickle(path: Path, where: str) -> dict[str, Tensor]:
    """The state dict of a pickle checkpoint; the tensors stay in the file until they are read."""
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # A malformed pickle can raise anything. Torch's text is left out: it recommends weights_only=False.
        raise UserError(f"{where} holds more than tensors, or is damaged ({type(error).__name__})") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"{where} holds no state dict")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise UserError(f"{where}: entry '{name}' is not a dense tensor; save a plain state dict")
    return loaded


def _write_tensors(tensors: dict[str, Tensor], folder: Path, source: str, named: str = WEIGHTS) -> None:
    """Write one file of safetensors; tensors that shared memory share none in it."""
    stored_as = {f"torch.{name}": dtype for dtype, (name, _) in DTYPES.items()}
    specs = []
    for name, tensor in tensors.items():
        if str(tensor.dtype) not in stored_as:
            raise UserError(f"{source}: tensor '{name}' has the dtype {tensor.dtype}, which cannot be merged")
        specs.append(TensorSpec(name, stored_as[str(tensor.dtype)], tuple(tensor.shape), tensor.nbytes))
    writer = CheckpointWriter(folder, specs, {"format": "pt"}, None, file=named)
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    finally:
        writer.close()


def _from_open_clip(source: str, staging: Path) -> None:
    """Weights of open_clip's own list, in float32; open_clip downloads them into its cache.

    The activation is the one the weights were trained with: QuickGELU for `ViT-B-32/openai`, where open_clip
    itself takes it only for `ViT-B-32-quickgelu`. https://github.com/mlfoundations/open_clip#pretrained-models
    """
    import open_clip

    arch, _, tag = source.removeprefix("open_clip://").partition("/")
    if arch not in open_clip.list_models():
        raise UserError(f"{source}: unknown architecture{did_you_mean(arch, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if not open_clip.is_pretrained_cfg(arch, tag):
        known = f"known are {', '.join(tags)}" if tags else "open_clip has none for it"
        raise UserError(f"{source}: unknown weights{did_you_mean(tag, tags)}; {known}")
    quick_gelu = open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu", False)
    try:
        model = open_clip.create_model(arch, tag, require_pretrained=True, force_quick_gelu=quick_gelu)
    except Exception as error:  # of the network, the file, the unpickler or the model
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{source}: open_clip could not load it ({reason})") from error
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    _write_tensors(tensors, staging, source)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    config = {
        "model_cfg": open_clip.get_model_config(arch) | ({"quick_gelu": True} if quick_gelu else {}),
        "preprocess_cfg": {key: preprocess[key] for key in _PREPROCESS_KEYS},
    }
    write_json(staging / "open_clip_config.json", config)


def _convert_layout(staging: Path, source: str) -> None:
    from mergeline.evaluation.clip.layouts import is_transformers, open_clip_config, to_open_clip

    checkpoint = open_checkpoint(staging)
    if not is_transformers(checkpoint.tensors):
        return
    tensors = to_open_clip({name: checkpoint.read(name) for name in checkpoint.tensors})
    for file in {info.file for info in checkpoint.tensors.values()} | {staging / INDEX}:
        file.unlink(missing_ok=True)
    _write_tensors(tensors, staging, source)
    if (staging / "config.json").exists() and "visual.proj" in tensors:
        configs = [staging / "config.json", staging / "preprocessor_config.json"]
        read = [read_object(path, named=f"{source}: {path.name}") for path in configs if path.exists()]
        write_json(staging / "open_clip_config.json", open_clip_config(*read))


def _write_provenance(staging: Path, source: str, revision: str | None) -> None:
    """Check the checkpoint and write down what it is."""
    try:
        digest = open_checkpoint(staging).digest()
    except UserError as error:
        raise UserError(f"{source}: {str(error).replace(f'{staging}/', '')}") from None
    files = {}
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        sync(path)
        name = path.relative_to(staging).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    provenance = {"source": source, "revision": revision, "digest": digest, "files": files}
    write_json(staging / PROVENANCE, provenance)


def local_checkpoint(where: str, *, allow_pickle: bool = False) -> Path:
    """A path as it is; what a URI or `org/name` names, or a pickle that is allowed, as a folder in the user's cache.

    A commit of the Hub is fetched once, a pickle converted once while its file stays as it is. The cache is its owner's
    alone; what this process was told of there, `mergeline gc` keeps until it ends.

    Raises:
        UserError: as `fetch`.
    """
    if is_here(where):
        path = Path(where)
        return _converted(path) if allow_pickle and _is_pickle(path) else path
    where = pinned(where)
    out = cached(where)
    if not is_fetched(where):
        _fetch_into_cache(where, out, allow_pickle)
    return held(out)


def is_here(where: str) -> bool:
    """Whether a name is a path, and nothing that has to be brought."""
    return "://" not in where and not where.startswith("file:") and not is_repository(where, Path(where))


def is_fetched(where: str) -> bool:
    """Whether the user's cache has what a pinned URI names, whole."""
    return (read_object(cached(where) / PROVENANCE).get("revision") or "\0") in where


def cached(key: str) -> Path:
    """The folder of a checkpoint in the user's cache."""
    return user_cache() / CACHED_CHECKPOINTS / hashlib.sha256(os.fsencode(key)).hexdigest()[:16]


def _fetch_into_cache(source: str, out: Path, allow_pickle: bool) -> None:
    with private_umask():
        with user_errors(out):
            private_folder(user_cache())
        fetch(source, out, cache=user_cache() / CACHED_DOWNLOADS, allow_pickle=allow_pickle)


_HANDLES: list[int] = []  # of folders that are in use until the process ends


def held(out: Path) -> Path:
    """A folder of the user's cache, locked against its removal, and marked as used now."""
    with user_errors(out):
        _HANDLES.append(os.open(out, os.O_RDONLY))
        fcntl.flock(_HANDLES[-1], fcntl.LOCK_SH)
    with suppress(OSError):  # where nothing can be written, nothing is removed either
        os.utime(out / PROVENANCE)
    return out


def _is_pickle(path: Path) -> bool:
    try:
        return path.exists() and is_pickle(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _converted(path: Path) -> Path:
    """A pickle, or a folder of them, as safetensors: where it was put."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    stats = [(file.name, s.st_size, s.st_mtime_ns, s.st_ino) for file in files for s in [file.stat()]]
    out = cached(f"{path.resolve()} {stats}")
    if not (out / PROVENANCE).exists():
        _fetch_into_cache(str(path.resolve()), out, allow_pickle=True)
    return held(out)
