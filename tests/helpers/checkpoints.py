"""Small checkpoints for tests, files with any header, what a refusal must look like, another process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping

import pytest
import torch
from places import REPOSITORY
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeline.merging.architecture import Keys, describe
from mergeline.merging.errors import UserError
from mergeline.merging.laws import gathered
from mergeline.merging.methods import get_method

State = dict[str, Tensor]

# Names as open_clip gives them: the last is no linear layer of a block.
SHAPES = {
    "blocks.0.attn.weight": (6, 4),
    "blocks.0.mlp.weight": (3, 5),
    "blocks.1.bias": (7,),
    "logit_scale": (),
}

# Of every dtype, with shapes and a name that are seldom.
ODD_TENSORS = {
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False]),
    "bytes": torch.tensor([1, 255], dtype=torch.uint8),
    "ids": torch.tensor([[1, -2]], dtype=torch.int64),
    "half": torch.tensor([1.5], dtype=torch.float16),
    "brain": torch.tensor([1.5], dtype=torch.bfloat16),
    "double": torch.tensor([1e-300], dtype=torch.float64),
    "unsigned": torch.tensor([2**63], dtype=torch.uint64),
    "a/b c\n\"'ä\\𝄞": torch.tensor([1.0]),
}


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """The block must raise a UserError of one line that contains every part."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@contextmanager
def another_process(code: str, path: Path) -> Iterator[None]:
    """During the block, another process is inside `with CODE:`, where `path` is known."""
    lines = [
        "import sys",
        "from pathlib import Path",
        "from filelock import FileLock",
        "from mergeline.merging.files import staged",
        "path = Path(sys.argv[1])",
        f"with {code}:",
        "    print(flush=True)",
        "    input()",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines), path],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b"\n"
        yield
    finally:
        process.communicate(b"\n")


def random_state(
    seed: int, dtype: torch.dtype = torch.float32, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def save_family(
    folder: Path,
    experts: int = 3,
    dtype: torch.dtype = torch.float32,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    **recipe: Any,
) -> dict[str, Any]:
    """A base and its experts as files in `folder`; returns the recipe that averages them, and `recipe`."""
    folder.mkdir(parents=True, exist_ok=True)
    base = random_state(0, dtype, shapes)
    paths = {"base": folder / "base.safetensors"}
    save_file(base, paths["base"])
    for t in range(experts):
        name = "abcdefgh"[t]
        paths[name] = folder / f"{name}.safetensors"
        tau = random_state(t + 1, shapes=shapes)
        save_file({k: (v.float() + 0.1 * tau[k]).to(dtype) for k, v in base.items()}, paths[name])
    return {"method": "average", "base": paths.pop("base"), "experts": paths, **recipe}


def is_matrix(name: str, shape: tuple[int, ...], keys: Keys) -> bool:
    """Whether a tensor is a matrix to methods with these `keys`."""
    return bool(describe({name: tuple(shape)}).tensors[name].matrices(keys))


def save_family_for(method: str, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """As many experts as the method takes, up to three, and the statistics that it reads; a recipe."""
    recipe = save_family(folder, get_method(method).experts[1] or 3, shapes=shapes, method=method)
    states = {name: load_file(path) for name, path in recipe["experts"].items()}
    recipe["statistics"] = {}
    for kind, held in gathered(method, states).items():
        held = held if isinstance(held, list) else [held]
        recipe["statistics"][kind] = [folder / f"{kind}-{t}.safetensors" for t in range(len(held))]
        for state, path in zip(held, recipe["statistics"][kind]):
            save_file(state, path)
    return recipe


def edit(path: Path, **changes: Tensor | None) -> None:
    """Replace (or, with None, remove) tensors of a safetensors file; `__` in a name stands for `.`."""
    state = load_file(path)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    save_file(state, path)


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file of `header` (bytes, or what JSON can say) and `data`; `length` lies about the header's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def shard(state: State, folder: Path, parts: int) -> Path:
    """The state dict as `parts` shards with their index."""
    folder.mkdir(parents=True)
    weight_map = {}
    for part in range(parts):
        file = f"part-{part}.safetensors"
        held = {name: t for i, (name, t) in enumerate(state.items()) if i % parts == part}
        save_file(held, folder / file)
        weight_map |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by relative path; of a file, its own."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Same names, dtypes, shapes and values."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )
