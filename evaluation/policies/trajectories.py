"""Trajectories that policies are run on to learn from them, as files hold them.

A file is an .npz with the arrays, of N trajectories of up to T steps,

    observations     (N, T, s)
    actions          integers (N, T) from 0 on where they are discrete, else (N, T, A)
    returns_to_go    (N, T)
    timesteps        integers (N, T), from 0 on
    mask             (N, T), 1 or true where a step counts
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Mapping

import numpy as np

from mergeline.evaluation.policies.environments import Facts
from mergeline.merging.canonical import text_digest
from mergeline.merging.errors import UserError

NAMES = ("observations", "actions", "returns_to_go", "timesteps", "mask")
_BYTES = 1 << 32  # of the arrays of a file


def read_trajectories(file: Path, facts: Facts) -> dict[str, np.ndarray]:
    """The arrays of a file, as models take them: float32, actions (N, T, A) one-hot where they are discrete.

    timesteps are int64 and mask is bool. Nothing is unpickled.

    Raises:
        UserError: the file is missing or damaged, or its arrays do not fit one another or the environment.
    """
    arrays = _arrays(file)
    if absent := [name for name in NAMES if name not in arrays]:
        raise UserError(f"{file}: has no array '{absent[0]}'; trajectories have {', '.join(NAMES)}")
    shape, states = arrays["observations"].shape[:2], arrays["observations"].shape[2:]
    if len(shape) < 2 or not all(shape) or states != (facts.states,):
        raise UserError(
            f"{file}: observations are {arrays['observations'].shape}; N trajectories of T steps have (N, T, "
            f"{facts.states})"
        )
    wanted = {name: shape for name in NAMES[2:]}
    wanted |= {"actions": shape if facts.discrete else (*shape, facts.actions)}
    for name, own in wanted.items():
        if arrays[name].shape != own:
            raise UserError(f"{file}: {name} are {arrays[name].shape}, and must be {own}")
    mask = arrays["mask"].astype(bool)
    for name in ("actions", "timesteps") if facts.discrete else ("timesteps",):
        limit = facts.actions if name == "actions" else facts.steps
        found = arrays[name][mask]
        if found.dtype.kind not in "iu" or found.size and not 0 <= found.min() <= found.max() < limit:
            raise UserError(f"{file}: {name} must be whole numbers from 0 to {limit - 1}")
    actions = arrays["actions"]
    kept = {
        "observations": arrays["observations"],
        "actions": np.eye(facts.actions)[np.where(mask, actions, 0)] if facts.discrete else actions,
        "returns_to_go": arrays["returns_to_go"],
    }
    found_all = {name: array.astype(np.float32) for name, array in kept.items()}
    for name, array in found_all.items():
        if not np.isfinite(array[mask]).all():
            raise UserError(f"{file}: {name} have NaN or Inf")
        array[~mask] = 0
    return {**found_all, "timesteps": np.where(mask, arrays["timesteps"], 0).astype(np.int64), "mask": mask}


def _arrays(file: Path) -> Mapping[str, np.ndarray]:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        with zipfile.ZipFile(file) as held:
            if sum(part.file_size for part in held.infolist()) > _BYTES:
                raise UserError(f"{file}: holds more than {_BYTES >> 30} GiB; bring fewer trajectories")
        with np.load(file, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in NAMES if name in opened}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: no file of trajectories ({' '.join(str(error).split())[:200]})") from None
    if odd := [name for name, array in arrays.items() if array.dtype.kind not in "fiub"]:
        raise UserError(f"{file}: {odd[0]} are no numbers")
    return arrays


def windows(arrays: Mapping[str, np.ndarray], context: int) -> dict[str, np.ndarray]:
    """The same arrays in windows (W, context, ...) of so many steps or fewer that follow one another.

    Those in which no step counts are left out; a trajectory's last one is filled up with zeros.
    """
    count, steps = arrays["mask"].shape
    more = -steps % context
    found = {}
    for name in NAMES:
        own = arrays[name]
        wide = np.pad(own, [(0, 0), (0, more), *[(0, 0)] * (own.ndim - 2)])
        found[name] = wide.reshape(-1, context, *own.shape[2:])
    counting = found["mask"].any(1)
    return {name: array[counting] for name, array in found.items()}


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Of their content."""
    from hashlib import sha256

    return text_digest(
        [
            [name, [*array.shape], sha256(np.ascontiguousarray(array)).hexdigest()]
            for name, array in arrays.items()
        ]
    )
