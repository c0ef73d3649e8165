"""Merge checkpoints: file to file, tensor by tensor, or state dicts in memory; the same kernels serve both."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Protocol, Sequence

from merging.card import model_card
from merging.checkpoint import CONFIG_FILES, DTYPES, content_digest
from merging.errors import UserError
from merging.files import publish, staged, user_errors, write_json
from merging.lazy import torch
from merging.methods import Method, Slot, get_method
from merging.plan import Entry, Plan, make_plan
from merging.recipe import Recipe, canonical_json, text_digest
from merging.writer import CheckpointWriter

if TYPE_CHECKING:
    from torch import Tensor

Manifest = dict[str, Any]


class Factors(Protocol):
    """Stored spectra of the mean-centred task vectors: per expert (squared singular values, singular vectors)."""

    def get(self, tensor: str) -> Sequence[tuple[Tensor, Tensor]] | None: ...


def merge(
    recipe: Recipe | Mapping[str, Any],
    out: str | os.PathLike,
    *,
    device: str = "cpu",
    memory: int | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Merge checkpoints on disk into `out`: a `*.safetensors` file, or a folder with manifest, card and configs.

    One tensor a worker is in memory at a time; the bytes written do not depend on `workers`. `progress(done, all)`
    is called after each tensor. Returns the manifest.

    Raises:
        UserError: anything `plan` reports, NaN or Inf in an input, an overflow of the output dtype, a full disk,
            another process writing `out`, `memory` (bytes) below what one tensor needs, an `out` that holds
            anything but an earlier merge.
    """
    plan = make_plan(recipe)
    plan.check()
    _check_device(device)
    out = Path(out)
    with user_errors(out):
        _refuse_to_replace(plan, out)
    workers = _workers(plan, workers, memory)
    with staged(out) as partial, one_thread():
        source = FileInputs(plan, device)
        writer = CheckpointWriter(
            partial, [e.spec for e in plan.entries], _metadata(plan), plan.recipe.shard_size
        )
        try:
            facts = plan.method.prepass(source, **plan.params) if plan.method.prepass else None
            _write_all(plan, source, writer, facts, workers, progress)
            writer.finish()
        finally:
            writer.close()
        manifest = _manifest(plan, source, writer, out, device)
        if out.suffix == ".safetensors":
            _publish_file(partial, writer.files, out, manifest)
        else:
            _publish_folder(partial, plan, out, manifest)
    return manifest


def merge_state_dicts(
    method: str,
    experts: Mapping[str, Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    statistics: Mapping[str, Any] | None = None,
    seed: int = 0,
    factors: Factors | None = None,
) -> dict[str, Tensor]:
    """Merge state dicts in memory; inputs are not modified, each output tensor has the dtype of its input.

    Tensors that only `base` has are returned as they are; integer and bool tensors must agree.

    Raises:
        UserError: unknown method or parameter, missing base, tensors that do not match, NaN or Inf.
    """
    entry = get_method(method)
    resolved = entry.resolve(params or {})
    if statistics:
        raise UserError(f"{method} takes no statistics")
    for misuse in entry.misuses(resolved, len(experts), base is not None):
        raise UserError(misuse)
    source = _Memory(experts, base, factors)
    with one_thread():
        facts = entry.prepass(source, **resolved) if entry.prepass else None
        merged = {}
        for name in source.names:
            like = source.first[name]
            if like.is_floating_point():
                value = _apply(entry, resolved, source.slot(name), facts)
                merged[name] = value.reshape(like.shape).to(like.dtype)
            else:
                merged[name] = source.agreed(name)
    return {**{k: v for k, v in (base or {}).items() if k not in merged}, **merged}


@contextmanager
def one_thread() -> Iterator[None]:
    """One BLAS thread: results that do not depend on the machine's load, and no spinning."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------- inputs


class FileInputs:
    """The float tensors of a plan as slots, and the hashes of everything that was read."""

    def __init__(self, plan: Plan, device: str):
        self.plan = plan
        self.device = device
        self.merged = [e for e in plan.entries if e.action == "merge"]
        self.hashes: dict[tuple[str, str], str] = {}
        wide = any(t.dtype == "F64" for e in self.merged for t in e.sources.values())
        self.dtype = torch.float64 if wide else torch.float32

    @property
    def elements(self) -> int:
        return sum(e.spec.nbytes // DTYPES[e.spec.dtype][1] for e in self.merged)

    def slots(self) -> Iterator[Slot]:
        for entry in self.merged:
            yield self.slot(entry)

    def slot(self, entry: Entry, facts: Any = None) -> Slot:
        base = None if self.plan.base is None else self._float("base", entry.name)
        experts = torch.stack([self._float(expert, entry.name) for expert in self.plan.experts])
        return Slot(entry.name, base, experts, facts)

    def _float(self, source: str, name: str) -> Tensor:
        tensor = self.read(source, name).to(self.device, self.dtype)
        _refuse_nonfinite(source, name, tensor)
        return tensor.reshape(-1) if tensor.ndim == 0 else tensor

    def read(self, source: str, name: str) -> Tensor:
        checkpoint = self.plan.base if source == "base" else self.plan.experts[source]
        tensor = checkpoint.read(name)
        if (source, name) not in self.hashes:
            data = tensor.reshape(-1).view(torch.uint8).numpy()
            self.hashes[source, name] = hashlib.sha256(memoryview(data)).hexdigest()
        return tensor

    def digest(self, source: str) -> str:
        checkpoint = self.plan.base if source == "base" else self.plan.experts[source]
        return content_digest(
            (t.name, t.dtype, t.shape, self.hashes[source, t.name]) for t in checkpoint.tensors.values()
        )


class _Memory:
    """State dicts as slots."""

    def __init__(
        self,
        experts: Mapping[str, Mapping[str, Tensor]],
        base: Mapping[str, Tensor] | None,
        factors: Factors | None,
    ):
        self.experts, self.base, self.factors = experts, base, factors
        self.first = next(iter(experts.values()))
        self.names = sorted(self.first)
        for source, state in experts.items():
            self._match(source, state)
        if base is not None:
            self._match("base", {k: base[k] for k in base if k in self.first})
        floats = [self.first[n] for n in self.names if self.first[n].is_floating_point()]
        self.elements = sum(t.numel() for t in floats)
        self.dtype = torch.float64 if any(t.dtype == torch.float64 for t in floats) else torch.float32

    def _match(self, source: str, state: Mapping[str, Tensor]) -> None:
        odd = sorted(set(state) ^ set(self.first))
        if odd:
            raise UserError(f"'{source}': tensor '{odd[0]}' is not in every state dict")
        for name, tensor in state.items():
            if tensor.shape != self.first[name].shape:
                raise UserError(
                    f"tensor '{name}': shape {list(tensor.shape)} in '{source}', {list(self.first[name].shape)} elsewhere"
                )

    def slots(self) -> Iterator[Slot]:
        for name in self.names:
            if self.first[name].is_floating_point():
                yield self.slot(name)

    def slot(self, name: str) -> Slot:
        base = None if self.base is None else self._float("base", self.base[name], name)
        experts = torch.stack([self._float(e, state[name], name) for e, state in self.experts.items()])
        return Slot(name, base, experts, factors=self.factors.get(name) if self.factors else None)

    def _float(self, source: str, tensor: Tensor, name: str) -> Tensor:
        tensor = tensor.detach().to(self.dtype)
        _refuse_nonfinite(source, name, tensor)
        return tensor.reshape(-1) if tensor.ndim == 0 else tensor

    def agreed(self, name: str) -> Tensor:
        value = self.first[name] if self.base is None else self.base[name]
        for source, state in self.experts.items():
            _refuse_disagreement(source, name, state[name], value)
        return value


def _refuse_nonfinite(source: str, name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        kind = "NaN" if torch.isnan(tensor).any() else "Inf"
        raise UserError(f"'{source}': tensor '{name}' holds {kind}; leave this checkpoint out or repair it")


def _refuse_disagreement(source: str, name: str, tensor: Tensor, value: Tensor) -> None:
    if not torch.equal(tensor, value):
        raise UserError(
            f"'{source}': the integer tensor '{name}' differs from the others; only floats can be merged"
        )


# ---------------------------------------------------------------------------------------------- merging


def _apply(method: Method, params: Mapping[str, Any], slot: Slot, facts: Any) -> Tensor:
    if slot.experts[0].numel() == 0:
        return slot.experts[0]
    return method.function(Slot(slot.name, slot.base, slot.experts, facts, slot.factors), **params)


def _write_all(
    plan: Plan,
    source: FileInputs,
    writer: CheckpointWriter,
    facts: Any,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    def one(entry: Entry) -> None:
        writer.write(entry.name, _output(plan, source, entry, facts))

    if workers == 1:
        for done, entry in enumerate(plan.entries, 1):
            one(entry)
            if progress:
                progress(done, len(plan.entries))
        return
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, entry) for entry in plan.entries]
        try:
            for done, future in enumerate(futures, 1):
                future.result()
                if progress:
                    progress(done, len(futures))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _output(plan: Plan, source: FileInputs, entry: Entry, facts: Any) -> Tensor:
    dtype = getattr(torch, DTYPES[entry.spec.dtype][0])
    if entry.action == "merge":
        value = _apply(plan.method, plan.params, source.slot(entry), facts).reshape(entry.spec.shape)
    else:
        origin = "base" if entry.base else next(iter(entry.sources))
        value = source.read(origin, entry.name)
        for expert in entry.sources:
            _refuse_disagreement(expert, entry.name, source.read(expert, entry.name), value)
    result = value.to(dtype)
    if result.is_floating_point() and not torch.isfinite(result).all():
        raise UserError(f"tensor '{entry.name}' overflows {dtype}; choose a wider dtype or a smaller scale")
    return result


def _check_device(device: str) -> None:
    """Raises UserError unless it is `cpu`, or a `cuda` or `cuda:N` of this machine."""
    kind, _, index = device.partition(":")
    if device == "cpu":
        return
    if kind != "cuda" or not (index or "0").isdecimal():
        raise UserError(f"device '{device}' is not known; choose cpu, cuda or cuda:N")
    if int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{device}' is not in this machine; choose cpu")


def _workers(plan: Plan, workers: int | None, memory: int | None) -> int:
    workers = workers if workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise UserError(f"{workers} workers: give one or more")
    if memory is None:
        return workers
    if plan.peak_bytes > memory:
        raise UserError(
            f"the largest tensor needs {plan.peak_bytes} bytes of memory, allowed are {memory}; allow more"
        )
    return max(1, min(workers, memory // max(plan.peak_bytes, 1)))


# ---------------------------------------------------------------------------------------------- lineage


def _metadata(plan: Plan) -> dict[str, str]:
    recipe = {
        "method": plan.recipe.method,
        "params": plan.params,
        "experts": list(plan.experts),
        "seed": plan.recipe.seed,
    }
    return {"format": "pt", "mergeline.recipe": canonical_json(recipe)}


def _manifest(plan: Plan, source: FileInputs, writer: CheckpointWriter, out: Path, device: str) -> Manifest:
    recipe = plan.recipe
    folder = out.parent if out.suffix == ".safetensors" else out

    def origin(path: Path, name: str) -> dict[str, str]:
        return {"path": Path(os.path.relpath(path, folder)).as_posix(), "digest": source.digest(name)}

    lineage = {
        "method": recipe.method,
        "params": plan.params,
        "dtype": recipe.dtype,
        "seed": recipe.seed,
        "shard_size": recipe.shard_size,
        "base": origin(recipe.base, "base") if recipe.base else None,
        "experts": {name: origin(path, name) for name, path in recipe.experts.items()},
    }
    by_content = {
        **lineage,
        "base": lineage["base"] and lineage["base"]["digest"],
        "experts": {name: e["digest"] for name, e in lineage["experts"].items()},
    }
    specs = writer.specs.values()
    return {
        "format": 1,
        "recipe": lineage,
        "recipe_digest": text_digest(by_content),
        "output": {
            "digest": content_digest((t.name, t.dtype, t.shape, writer.hashes[t.name]) for t in specs),
            "files": writer.files,
            "bytes": sum(t.nbytes for t in specs),
            "tensors": dict(sorted(writer.hashes.items())),
        },
        "device": device.split(":")[0],
        "versions": {name: version(name) for name in ("mergeline", "torch", "numpy", "safetensors")},
    }


def manifest_path(out: Path) -> Path:
    """Where the manifest of a merged file or folder lies."""
    return (
        out.with_name(out.name + ".manifest.json") if out.suffix == ".safetensors" else out / "manifest.json"
    )


def _refuse_to_replace(plan: Plan, out: Path) -> None:
    """Only a merge gives way to a merge: no input, and no folder of something else."""
    for path in filter(None, (*plan.recipe.experts.values(), plan.recipe.base)):
        if path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out}: holds the input {path}; choose another place")
    if out.suffix == ".safetensors":
        fits = not out.is_dir()
    elif out.is_dir():
        fits = bool(out.name) and (manifest_path(out).exists() or not any(out.iterdir()))
    else:
        fits = not out.exists()
    if not fits:
        raise UserError(f"{out}: is there already and is no earlier merge; choose another place")


def _publish_file(partial: Path, files: list[str], out: Path, manifest: Manifest) -> None:
    if len(files) != 1:
        raise UserError(f"{out}: --shard-size makes several files; name a folder instead")
    write_json(manifest_path(out), manifest)
    publish(partial / files[0], out)


def _publish_folder(partial: Path, plan: Plan, out: Path, manifest: Manifest) -> None:
    donor = plan.recipe.base
    for name in CONFIG_FILES if donor and donor.is_dir() else ():
        if (donor / name).is_file():
            shutil.copyfile(donor / name, partial / name)
    (partial / "README.md").write_text(model_card(manifest))
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    publish(partial, out)
