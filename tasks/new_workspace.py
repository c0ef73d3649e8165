"""A new workspace: a folder with params.yaml, dvc.yaml, and what `mergeline run` and `dvc repro` need beside them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, Iterable, Mapping

from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import user_errors, write_bytes
from mergeline.tasks.dvc_yaml import dvc_yaml
from mergeline.tasks.modalities import modality_of
from mergeline.tasks.modality import Modality
from mergeline.tasks.params import load_params
from mergeline.tasks.places import CODE_LINK, SOURCES
from mergeline.tasks.schema import Params
from mergeline.tasks.versioning import run_dvc
from mergeline.tasks.workspace import Workspace

DEFAULT_EXAMPLE = "clip"

_EXAMPLES = SOURCES / "examples"
_NO_GIT = "build/", ".mergeline/", f"/{CODE_LINK}"
_NO_DVC = "__pycache__", "*.pyc", ".*.partial", ".gitignore"
# Hard links, so that outputs take their space once.
_DVC_CONFIG = """\
[core]
    analytics = false
    check_update = false
{core}[cache]
    type = "hardlink,symlink,copy"
"""


def init_workspace(folder: Path, params: Path | None = None, example: str | None = None) -> list[str]:
    """Make `folder` a workspace; what was done, in lines.

    params.yaml is a copy of `params` or of an example (default: DEFAULT_EXAMPLE); paths that lead somewhere, seen from
    there, still do, and the suite comes along. A folder that has params.yaml keeps it, and is given what it lacks: so a
    clone of a workspace is made ready. DVC is initialised where no folder above has it, without git if there is none.

    Raises:
        UserError: there is no such file or example; `folder` has another params.yaml, suite or DVC pipeline already.
    """
    own = folder / "params.yaml"
    if own.exists() and (params or example):
        raise UserError(f"{own} exists; choose an empty folder, or leave out --params and --example")
    if not own.exists() and (folder / "dvc.yaml").exists():
        raise UserError(f"{folder / 'dvc.yaml'} is of another pipeline; choose an empty folder")
    source = own if own.exists() else params or _example(example or DEFAULT_EXAMPLE)
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    found = load_params(source)
    modality = modality_of(found)
    taken = {} if source == own else _taken_along(source.parent, folder, modality.files(found).values())
    with user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    done = [_init_dvc(folder)]
    if source != own:
        for target, content in taken.items():
            write_bytes(target, content)
        moved = _moved(source, folder, found, modality)
        write_bytes(own, _edited(source.read_text(encoding="utf-8"), moved).encode())
        done.insert(0, f"made {own} from {source if params else f'the example {source.stem}'}")
        if led := [
            f"{name} as {moved[place]}" for place, name in _paths(found, modality).items() if place in moved
        ]:
            done.insert(1, f"paths that lead somewhere from {source.parent}: {', '.join(led)}")
    if not (folder / "dvc.yaml").exists():
        write_bytes(folder / "dvc.yaml", dvc_yaml(modality, _code(folder)).encode())
        done.append(f"made {folder / 'dvc.yaml'}")
    _append(folder / ".gitignore", _NO_GIT)
    _append(folder / ".dvcignore", _NO_DVC)
    workspace = Workspace(own)
    _ = workspace.code  # makes the link
    if absent := _absent(folder, workspace.params, modality):
        done.append(f"not there yet: {', '.join(absent)}")
    return done


def _example(name: str) -> Path:
    known = {path.stem: path for path in sorted(_EXAMPLES.glob("*.yaml")) if not path.stem.endswith(".suite")}
    if name not in known:
        raise UserError(f"there is no example '{name}'{did_you_mean(name, known)}")
    return known[name]


def _taken_along(place: Path, folder: Path, names: Iterable[str]) -> dict[Path, bytes]:
    """The files that come along, by where they go (raises UserError if another one is there)."""
    taken = {}
    for name in names:
        source, target = place / name, folder / Path(name).name
        if source.is_file():
            taken[target] = source.read_bytes()
            if target.exists() and target.read_bytes() != taken[target]:
                raise UserError(f"{target} exists; choose an empty folder")
    return taken


def _code(folder: Path) -> str:
    """Where dvc.yaml looks for Mergeline's sources: in the repository where they are, or at the link."""
    if folder.resolve().is_relative_to(SOURCES) and _dvc_root(folder) == SOURCES:
        return Path(os.path.relpath(SOURCES, folder.resolve())).as_posix()
    return CODE_LINK


def _dvc_root(folder: Path) -> Path | None:
    folder = folder.resolve()
    return next((above for above in (folder, *folder.parents) if (above / ".dvc").is_dir()), None)


def _init_dvc(folder: Path) -> str:
    """Initialise DVC, unless a folder above has it; what was done."""
    if root := _dvc_root(folder):
        return f"DVC: that of {root}"
    git = _git_root(folder)
    how = "--no-scm" if git is None else "" if git == folder.resolve() else "--subdir"
    run_dvc(folder, "init", "--quiet", *([how] if how else []))
    core = "" if git else "    no_scm = true\n"
    write_bytes(folder / ".dvc" / "config", _DVC_CONFIG.format(core=core).encode())
    place = f"in the git repository {git}" if git else "without git, for there is no repository here"
    return f"DVC: initialised {place}"


def _git_root(folder: Path) -> Path | None:
    try:
        command = ["git", "-C", str(folder), "rev-parse", "--show-toplevel"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return Path(found.stdout.rstrip("\n")).resolve() if found.returncode == 0 else None


def _moved(source: Path, folder: Path, found: Params, modality: Modality) -> dict[tuple[Any, ...], str]:
    """What `source` has to say otherwise in `folder`, by where it stands: paths that lead somewhere still do."""
    changes: dict[tuple[Any, ...], str] = {}
    for place, name in _paths(found, modality).items():
        path = source.parent / name
        if not Path(name).is_absolute() and path.exists():
            changes[place] = Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    for key, name in modality.files(found).items():
        if (source.parent / name).is_file() and Path(name).name != name:
            changes[key,] = Path(name).name
    return changes


def _paths(found: Params, modality: Modality) -> Mapping[tuple[Any, ...], str]:
    """The paths that params.yaml names, by where they stand in it."""
    files = {("checkpoints", "files", name): where for name, where in found.checkpoints.files.items()}
    methods = {("methods", i): where for i, where in enumerate(found.methods)}
    return {**files, **methods, **modality.paths(found)}


def _edited(text: str, changes: Mapping[tuple[Any, ...], str]) -> str:
    """YAML with other values at some places; comments stay."""
    if not changes:
        return text
    from io import StringIO

    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    data = yaml.load(text)
    for place, value in changes.items():
        part = data
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = value
    out = StringIO()
    yaml.dump(data, out)
    return out.getvalue()


def _absent(folder: Path, found: Params, modality: Modality) -> list[str]:
    """What params.yaml names and is not there."""
    named = [*_paths(found, modality).values(), *modality.files(found).values()]
    return [name for name in dict.fromkeys(named) if not (folder / name).exists()]


def _append(path: Path, lines: Iterable[str]) -> None:
    """Add those lines to a file that it lacks."""
    there = path.read_text().splitlines() if path.exists() else []
    if new := [line for line in lines if line not in there]:
        write_bytes(path, ("\n".join([*there, *new]) + "\n").encode())
