"""`memory` bounds what a merge takes, whatever the size of the model; measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_state, refused, save_family, write_raw
from places import REPOSITORY
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.engine.planning import make_plan

MIB = 1 << 20
LAYERS, MATRIX, VECTOR = 64, (512, 8192), (1024,)  # 512 MiB in bfloat16

# The peak of the resident memory after the imports, which a tiny merge has done; both in bytes.
MEASURED = """
import json, sys
from mergeline.merging import merge

def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(key))

tiny, tiny_out, recipe, out, memory, workers = json.loads(sys.argv[1])
merge(tiny, tiny_out)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak
imports = resident("VmRSS")
merge(recipe, out, memory=memory, workers=workers)
print(json.dumps([imports, resident("VmHWM")]))
"""


def save_large(folder: Path) -> dict[str, Any]:
    """A base and three experts of 512 MiB each: windows of one stretch of random numbers, so that saving is all."""
    folder.mkdir()
    elements = MATRIX[0] * MATRIX[1]
    numbers = random_state(0, torch.bfloat16, {"all": (2 * elements,)})["all"]
    paths = {}
    for i, name in enumerate(("base", "a", "b", "c")):
        state = {}
        for layer in range(LAYERS):
            start = (i * LAYERS + layer) * 4099
            state[f"blocks.{layer}.weight"] = numbers[start : start + elements].reshape(MATRIX).clone()
            state[f"blocks.{layer}.bias"] = numbers[start : start + VECTOR[0]].clone()
        paths[name] = str(folder / f"{name}.safetensors")
        save_file(state, paths[name])
    return {"base": paths.pop("base"), "experts": paths}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("memory") / "in"
    yield save_large(folder)
    for path in folder.iterdir():
        path.unlink()


def hollow_family(folder: Path, name: str, **recipe: Any) -> dict[str, Any]:
    """Checkpoints of 12 GiB each, of one matrix: holes that take no space, for plans."""
    rows, columns = 1 << 20, 3 << 10
    entry = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]}
    paths = {}
    for origin in ("base", "a", "b", "c"):
        paths[origin] = write_raw(folder / f"{origin}.safetensors", {name: entry})
        os.truncate(paths[origin], paths[origin].stat().st_size + 4 * rows * columns)
    return {"base": paths.pop("base"), "experts": paths, **recipe}


@pytest.mark.parametrize(
    ("method", "name", "least"),
    [
        ("ties", "blocks.0.weight", 1),
        ("della", "blocks.0.weight", 1),
        ("cart", "blocks.0.weight", 1 << 10),
        ("cart", "embed_tokens.weight", 1),
        ("iso_c", "text_projection", 1),
    ],
)
def test_a_plan_knows_the_least_memory(method, name, least, tmp_path):
    """Blocks are of one size, however large a tensor is; what is decomposed must be whole."""
    recipe = hollow_family(tmp_path, name, method=method)
    need = make_plan(recipe).peak_bytes
    assert least * MIB < need < 200 * least * MIB
    with refused(f"needs {need} bytes", f"allowed are {need - 1}", "allow more"):
        merge(recipe, tmp_path / "out", memory=need - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{n}.safetensors" for n in ("a", "b", "base", "c")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", "cart"])
def test_a_large_family_in_half_a_gibibyte(method, large, tmp_path):
    check_half_a_gibibyte(method, large, tmp_path)


@pytest.mark.slow
def test_a_large_family_of_fp8_in_half_a_gibibyte(large, tmp_path):
    paths = {"base": large["base"], **large["experts"]}
    for name, path in paths.items():
        state = load_file(path)
        codes = {key: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for key, t in state.items()}
        scales = {f"{key}_scale": torch.ones(len(t), 1) for key, t in state.items() if t.ndim == 2}
        paths[name] = str(tmp_path / f"{name}.safetensors")
        save_file(codes | scales, paths[name])
    check_half_a_gibibyte("ties", {"base": paths.pop("base"), "experts": paths}, tmp_path)


def check_half_a_gibibyte(method: str, large: dict[str, Any], tmp_path: Path) -> None:
    """A merge of 512 MiB by eight workers takes no more than that above the imports."""
    tiny = save_family(tmp_path / "tiny")
    tiny = {"base": str(tiny["base"]), "experts": {name: str(path) for name, path in tiny["experts"].items()}}
    out = tmp_path / "out.safetensors"
    given = [
        {**tiny, "method": method}, str(tmp_path / "tiny.safetensors"),
        {**large, "method": method}, str(out), 512 * MIB, 8,
    ]  # fmt: skip
    command = [sys.executable, "-c", MEASURED, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    imports, peak = json.loads(done.stdout)
    assert out.stat().st_size > 512 * MIB
    out.unlink()
    assert peak - imports <= 512 * MIB, (
        f"{(peak - imports) / MIB:.0f} MiB above the imports' {imports / MIB:.0f}"
    )
