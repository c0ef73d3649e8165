"""Evaluations that were made before: what a model answered, under the digest of all that its answers depend on.

These are the bytes of the model, the data and settings that it is measured with, the code that measures it, the
packages and the kind of machine that it runs on, splits and tasks. Answers are kept; how good they are is found anew.
All of it may be deleted at any time. An entry that is damaged counts as none.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib.metadata import distributions
from inspect import getfile
from pathlib import Path
from sysconfig import get_path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence, cast

from mergeline.merging.canonical import text_digest
from mergeline.merging.checkpoints.checkpoint import hasher
from mergeline.merging.files import write_bytes
from mergeline.tasks.digests import Digests
from mergeline.tasks.modality import Evaluation
from mergeline.tasks.places import SOURCES
from mergeline.tasks.private import private_folder
from mergeline.tasks.step import StageTemplate

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeline.tasks.modality import Evaluator, Modality, Model, PartialEvaluator
    from mergeline.tasks.schema import Params

FOLDER = Path(".mergeline/evaluations")  # of a workspace

# What measures models of all kinds, beside the `deps` of a modality.
_CODE = (
    "evaluation/pretrained.py",
    "evaluation/splits.py",
    "evaluation/state.py",
    "evaluation/tables.py",
    "merging/checkpoints",
    "merging/compress.py",
    "tasks/evaluations.py",
)
# What says which models there are, where they are computed and what becomes of them, not how one is measured.
_OF_MERGES = {
    "name",
    "executor",
    "checkpoints",
    "merges",
    "merges_of_merges",
    "statistics",
    "methods",
    "gates",
    "retention",
}
_CHUNK = 1 << 22
_WERE = ("were", "was")

_AFRESH: ContextVar[bool] = ContextVar("afresh", default=False)


@contextmanager
def afresh(wanted: bool = True) -> Iterator[None]:
    """In this block everything is measured again, and kept in place of what was measured before."""
    token = _AFRESH.set(wanted)
    try:
        yield
    finally:
        _AFRESH.reset(token)


def is_afresh() -> bool:
    """Whether everything is measured again here."""
    return _AFRESH.get()


class Evaluations:
    """An evaluator of a pipeline that measures what was not measured before. `before` counts what was.

    `like` is as of `Modality.evaluator`, which is asked for one only when something is to be measured.
    """

    def __init__(self, modality: Modality, params: Params, build: Path, like: Path):
        self.before = 0
        self._modality, self._params, self._build, self._like = modality, params, build, like
        root = build.parent
        self._folder = root / FOLDER
        memo = private_folder(root / ".mergeline") / "digests.sqlite"
        self._digests = Digests(memo)
        [stage] = StageTemplate("", modality.deps, (), ()).stages("", params, SOURCES.as_posix())
        kinds = [dep.startswith("${code}/") for dep in modality.deps]
        self._data = {dep: root / dep for dep, is_code in zip(stage.deps, kinds) if not is_code}
        code = [Path(dep) for dep, is_code in zip(stage.deps, kinds) if is_code]
        code += [*(SOURCES / name for name in _CODE), Path(getfile(type(modality)))]
        self._fixed = {
            "modality": modality.name,
            "params": params.model_dump(mode="json", exclude=_OF_MERGES),
            "code": _code((*code,), memo),
            "packages": _packages(),
            "machine": _machine(params.device),
        }
        self._evaluator: Evaluator | None = None

    def evaluate(self, model: Model, splits: Sequence[str], tasks: Sequence[str]) -> Evaluation:
        """As the modality's own evaluator; see `Evaluator`."""
        own = {"model": model_digest(model), "splits": [*splits], "tasks": [*tasks]}
        return self._known(own, model, lambda: self._opened.evaluate(model, splits, tasks))

    def count(self, split: str, task: str) -> int:
        """As the modality's own evaluator, which must be partial."""
        return cast("PartialEvaluator", self._opened).count(split, task)

    def evaluate_part(self, model: Model, split: str, part: Mapping[str, np.ndarray]) -> Evaluation:
        """As the modality's own evaluator, which must be partial."""
        numbers = {task: which_n.tolist() for task, which_n in part.items()}
        own = {"model": model_digest(model), "split": split, "part": text_digest(numbers)}
        opened = cast("PartialEvaluator", self._opened)
        return self._known(own, model, lambda: opened.evaluate_part(model, split, part))

    def digests(self, paths: Sequence[Path]) -> list[str | None]:
        """Of the contents of files and folders."""
        return [self._digests.of(path) for path in paths]

    def key_of(self, what: Mapping[str, Any]) -> str:
        """A digest of `what`, and of all that answers depend on besides a model."""
        return self._key(what, self._like)

    @property
    def _opened(self) -> Evaluator:
        if self._evaluator is None:
            self._evaluator = self._modality.evaluator(self._params, self._build, self._like)
        return self._evaluator

    def _known(self, own: Mapping[str, Any], model: Model, measure: Callable[[], Evaluation]) -> Evaluation:
        """What was measured before, under the digest of `own` and all else that it depends on; or is now."""
        key = self._key(own, model)
        file = self._folder / key[:2] / f"{key}.safetensors"
        if not _AFRESH.get() and (found := _read(file, key)):
            self.before += 1
            return found
        found = measure()
        if self._key(own, model) == key:  # nothing was changed meanwhile
            private_folder(self._folder)
            write_bytes(file, _entry(key, found), lasting=False, mode=0o600)
        return found

    def told(self, count: int, what: str) -> str:
        """How many of `count` were measured before, in words; "" if none was."""
        return (
            f"{self.before} of {count} {what} {_WERE[self.before == 1]} measured before"
            if self.before
            else ""
        )

    def _key(self, own: Mapping[str, Any], model: Model) -> str:
        """By the data as they are now."""
        base = self._build / "checkpoints" / self._params.base
        # Of the model that is measured its own digest tells more.
        like = {"like": self._digests.of(self._like)} if self._like not in (base, model) else {}
        data = {dep: self._digests.of(path) for dep, path in self._data.items()}
        whole = {**self._fixed, **own, **like, "base": self._digests.of(base), "data": data}
        return text_digest(whole).partition(":")[2]


def model_digest(model: Model) -> str:
    """A digest of a state dict by names, types, shapes and bytes, or of a folder or file by all its files."""
    if isinstance(model, Path):
        files = sorted(file for file in model.rglob("*") if file.is_file()) if model.is_dir() else [model]
        return text_digest([[file.relative_to(model).as_posix(), _file_hash(file)] for file in files])
    return text_digest([_tensor_row(name, tensor) for name, tensor in sorted(model.items())])


def _file_hash(file: Path) -> str:
    hash = hasher()
    with open(file, "rb") as opened:
        while chunk := opened.read(_CHUNK):
            hash.update(chunk)
    return hash.hexdigest()


def _tensor_row(name: str, tensor: Tensor) -> list[Any]:
    import torch

    hash = hasher()
    hash.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return ["tensor", name, str(tensor.dtype), [*tensor.shape], hash.hexdigest()]


# ---------------------------------------------------------------------------------------------- what measures


@cache
def _code(paths: tuple[Path, ...], memo: Path) -> list[str | None]:
    """Digests of the code, as this process found it first: it runs on with that, whatever becomes of the files."""
    digests = Digests(memo)
    return [digests.of(path) for path in paths]


@cache
def _packages() -> list[str]:
    """What is installed, and its versions: of two of one name that which is imported.

    Not what a package has inside, and shows once imported, as Ray does.
    """
    sites = {Path(get_path("purelib")), Path(get_path("platlib"))}
    versions: dict[str, str] = {}
    for found in distributions():  # in the order in which places are searched
        if sites.isdisjoint(Path(str(found.locate_file(""))).parents):
            versions.setdefault(found.name, found.version)
    return sorted(f"{name} {version}" for name, version in versions.items())


def _machine(device: str) -> list[str]:
    """Of which the last bits of numbers may depend."""
    import torch

    kind = [platform.python_version(), platform.machine(), torch.backends.cpu.get_cpu_capability()]
    return [*kind, device if device == "cpu" else torch.cuda.get_device_name(device)]


# ---------------------------------------------------------------------------------------------- entries


def _entry(key: str, found: Evaluation) -> bytes:
    from safetensors.numpy import save

    about = {"answers": [*found.answers], "scores": found.scores}
    text = json.dumps(about, ensure_ascii=False)
    return save(dict(found.answers), {"about": text, "seal": _seal(key, text, found)})


def _read(file: Path, key: str) -> Evaluation | None:
    """What an entry holds, the answers in their order; None where there is none that can be believed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as opened:
            about = opened.metadata() or {}
            answers = {name: opened.get_tensor(name) for name in opened.keys()}
        told = json.loads(about["about"])
        found = Evaluation({name: answers[name] for name in told["answers"]}, told["scores"])
        if about["seal"] != _seal(key, about["about"], found):
            return None
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    with suppress(OSError):
        os.utime(file)  # what is not used for long may be removed
    return found


def _seal(key: str, about: str, found: Evaluation) -> str:
    """The hash of an entry and its key."""
    import numpy as np

    sealed = hasher()
    sealed.update(f"{key}\0{about}\0".encode())
    for name, answers in found.answers.items():
        sealed.update(f"{name}\0{answers.dtype}\0{answers.shape}\0".encode())
        sealed.update(np.ascontiguousarray(answers).tobytes())
    return sealed.hexdigest()
