"""Folders of checkpoints whose matrices are FP8 in blocks, as transformers' `fp8` has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def quantise(folder: Path, block: int = 16) -> None:
    """The matrices of the layers as blocks of FP8, with a largest magnitude each."""
    state: dict[str, Tensor] = {}
    for name, weight in load_file(folder / WEIGHTS).items():
        state[name] = weight
        if "layers" in name and weight.ndim == 2:
            rows, columns = weight.shape
            padded = torch.zeros(-(-rows // block) * block, -(-columns // block) * block)
            padded[:rows, :columns] = weight
            blocks = padded.reshape(-1, block, padded.shape[1] // block, block)
            scale = blocks.abs().amax((1, 3)) / 448
            code = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            state[name] = code.reshape(padded.shape)[:rows, :columns].contiguous()
            state[f"{name}_scale_inv"] = scale
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    configure(folder, quantization_config=FP8)


def configure(folder: Path, **changes: Any) -> None:
    """Change config.json, which need not be there."""
    path = folder / "config.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **changes}))
