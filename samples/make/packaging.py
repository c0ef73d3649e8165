"""The folder of a family, from the work folder."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Sequence

import numpy as np

from make.catalogue import CLASSNAMES, TASKS, TEMPLATES
from make.drawing import IMAGE_SIZE
from make.model import CONFIG, MEAN, STD

ARRAYS = ("val_x", "val_y", "test_x", "test_y")  # train stays in the work folder
_TIME = (2020, 1, 1, 0, 0, 0)  # of archive members, so that equal arrays give equal files
_NUMBERS = {4: "four", 8: "eight"}
_YAML_WORDS = ("y", "n", "no")  # truth values to many readers of YAML, unless quoted


def package(work: Path, out: Path) -> None:
    """Write base/, experts/, data/ and suite.yaml of the first family into the folder `out`."""
    write_family(TASKS, ARRAYS, work, out)
    shutil.copyfile(work / "font_split.json", out / "data" / "font_split.json")


def write_family(tasks: Sequence[str], arrays: Sequence[str], work: Path, out: Path) -> None:
    """Write base/, experts/, data/ with these arrays, and suite.yaml into the folder `out`."""
    for name in ("base", "experts", "data"):
        (out / name).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / "base.safetensors", out / "base" / "model.safetensors")
    (out / "base" / "open_clip_config.json").write_text(json.dumps(_config(), indent=1))
    for task in tasks:
        shutil.copyfile(work / f"expert_{task}.safetensors", out / "experts" / f"{task}.safetensors")
        with np.load(work / f"{task}.npz") as file:
            write_npz({name: file[name] for name in arrays}, out / "data" / f"{task}.npz")
    (out / "suite.yaml").write_text(_suite(tasks))


def _config() -> dict:
    """What open_clip reads from open_clip_config.json. Pictures have the model's size, so none is resized."""
    preprocess = {
        "size": IMAGE_SIZE,
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    return {"model_cfg": CONFIG, "preprocess_cfg": preprocess}


def write_npz(arrays: dict[str, np.ndarray], path: Path) -> None:
    """An .npz whose members are packed with LZMA, which np.load reads too: half the size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _TIME), member.getvalue(), zipfile.ZIP_LZMA)


def _suite(tasks: Sequence[str]) -> str:
    """suite.yaml: class names and templates of each task."""
    lines = [
        f"# The {_NUMBERS[len(tasks)]} tasks of the family: class names and prompt templates of each zero-shot head.",
        "tasks:",
    ]
    for task in tasks:
        classnames = ", ".join(f'"{name}"' if name in _YAML_WORDS else name for name in CLASSNAMES[task])
        templates = json.dumps(TEMPLATES[task])
        lines += [f"  {task}:", f"    templates: {templates}", f"    classnames: [{classnames}]"]
    return "\n".join(lines) + "\n"
