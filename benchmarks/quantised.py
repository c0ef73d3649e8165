"""`python quantised.py WORK` merges a base and two experts of each quantised format, and the bfloat16 they are of.

It prints a table for docs/formats.md: bits an element; the relative Frobenius error of two merges, by `average` and by
`ties`, against those of the bfloat16 originals; of `ties` the peak memory of the process and its CPU-seconds, but for
its start, for a GB that is read; and the error of `average` that is written in the same format. Weights are random:
normal, and an expert's differ from the base's by a tenth of their size. They are rounded as each format does it
plainly, with scales from the largest magnitude; calibrated quantisation is better than that. Needs 1 GB, and `gguf`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Callable

import torch
from measure import Cost, run
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS, ROWS, COLUMNS = 12, 2048, 2048
CODES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
Made = tuple[dict[str, Tensor], dict[str, Any]]  # parts of a weight by their endings, and quantization_config


def largest(weight: Tensor, group: int) -> Tensor:
    return weight.unflatten(1, (-1, group)).abs().amax(2)


def spread(scale: Tensor, group: int) -> Tensor:
    return scale.repeat_interleave(group, 1)


def fp4(values: Tensor) -> Tensor:
    """Nearest codes, two in a byte."""
    code = torch.bucketize(values.abs(), (CODES[1:] + CODES[:-1]) / 2).byte() + 8 * (values < 0).byte()
    return code[:, ::2] | code[:, 1::2] << 4


def fp8_blocks(weight: Tensor) -> Made:
    blocks = weight.reshape(ROWS // 128, 128, COLUMNS // 128, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    code = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
    return {"weight": code, "weight_scale_inv": scale}, {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def fp8_rows(weight: Tensor) -> Made:
    scale = weight.abs().amax(1, keepdim=True) / 448
    code = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": code, "weight_scale": scale}, {"quant_method": "compressed-tensors"}


def mxfp8(weight: Tensor) -> Made:
    power = torch.ceil(torch.log2(largest(weight, 32) / 448))
    code = (weight / spread(2.0**power, 32)).to(torch.float8_e4m3fn)
    return {"weight": code, "weight_scale": (power + 127).byte()}, {"quant_method": "compressed-tensors"}


def mxfp4(weight: Tensor) -> Made:
    power = torch.ceil(torch.log2(largest(weight, 32) / 6))
    parts = {"weight_packed": fp4(weight / spread(2.0**power, 32)), "weight_scale": (power + 127).byte()}
    return parts, {"quant_method": "compressed-tensors"}


def mxfp4_experts(weight: Tensor) -> Made:
    """The weight as 4 experts of gpt-oss, which lie across."""
    parts, _ = mxfp4(weight)
    blocks = parts["weight_packed"].reshape(4, ROWS // 4, COLUMNS // 32, 16)
    return {"weight_blocks": blocks, "weight_scales": parts["weight_scale"].reshape(blocks.shape[:3])}, {
        "quant_method": "mxfp4"
    }


def nvfp4(weight: Tensor) -> Made:
    whole = 448 * 6 / weight.abs().max().reshape(1)
    scale = (largest(weight, 16) / 6 * whole).to(torch.float8_e4m3fn)
    code = fp4(weight / spread(scale.float() / whole, 16))
    parts = {"weight_packed": code, "weight_scale": scale, "weight_global_scale": whole}
    return parts, {"quant_method": "compressed-tensors"}


def nf4(weight: Tensor) -> Made:
    scale = largest(weight.reshape(-1, 64), 64)
    code = torch.bucketize(weight.reshape(-1, 64) / scale, (NF4[1:] + NF4[:-1]) / 2).byte().flatten()
    state = json.dumps(
        {"shape": list(weight.shape), "blocksize": 64, "dtype": "bfloat16", "quant_type": "nf4"}
    )
    parts = {
        "weight": (code[::2] << 4 | code[1::2])[:, None],
        "weight.absmax": scale.flatten(),
        "weight.quant_map": NF4,
    }
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state.encode()), dtype=torch.uint8)
    return parts, {"quant_method": "bitsandbytes"}


def int8(weight: Tensor) -> Made:
    scale = weight.abs().amax(1)
    code = (weight / scale[:, None] * 127).round().to(torch.int8)
    return {"weight": code, "SCB": scale}, {"quant_method": "bitsandbytes"}


def words(code: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Rows of 4-bit codes in int32 words of 8."""
    groups = code.long().unflatten(-1, (-1, 8))
    packed = sum(groups[..., i] << 4 * place for i, place in enumerate(order))
    return torch.as_tensor(packed).to(torch.int32)


def groups_of_128(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, in) around 8, and scales (out, groups)."""
    scale = largest(weight, 128) / 7
    return ((weight / spread(scale, 128)).round() + 8).clamp(0, 15), scale


def gptq(weight: Tensor) -> Made:
    code, scale = groups_of_128(weight)
    zeros = torch.full((COLUMNS // 128, ROWS), 7)
    parts = {"qweight": words(code).T, "qzeros": words(zeros), "scales": scale.T.half()}
    return parts, {"quant_method": "gptq", "bits": 4, "group_size": 128}


def awq(weight: Tensor) -> Made:
    code, scale = groups_of_128(weight)
    order, zeros = (0, 4, 1, 5, 2, 6, 3, 7), torch.full((COLUMNS // 128, ROWS), 8)
    parts = {"qweight": words(code.T, order), "qzeros": words(zeros, order), "scales": scale.T.half()}
    return parts, {"quant_method": "awq", "bits": 4, "group_size": 128}


FORMATS: dict[str, Callable[[Tensor], Made]] = {
    "FP8, blocks of 128 x 128": fp8_blocks,
    "FP8, scales of rows": fp8_rows,
    "MXFP8": mxfp8,
    "MXFP4": mxfp4,
    "MXFP4, packed experts": mxfp4_experts,
    "NVFP4": nvfp4,
    "bitsandbytes NF4": nf4,
    "bitsandbytes INT8": int8,
    "GPTQ, 4 bits, groups of 128": gptq,
    "AWQ, groups of 128": awq,
}
GGUF = ("Q8_0", "Q4_0")
REQUANTISED = ("FP8, blocks of 128 x 128", "FP8, scales of rows", "MXFP8", "MXFP4", "MXFP4, packed experts")
OWN = {  # transformers' names, so that GGUF has its own of them
    i: (f"model.layers.{i}.mlp.up_proj", f"blk.{i}.ffn_up") for i in range(LAYERS)
}


def weights(seed: int) -> dict[int, Tensor]:
    """The originals, in what bfloat16 holds: the base of seed 0, or an expert near it."""
    found = {}
    for i in range(LAYERS):
        base = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(i))
        own = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1000 * seed + i))
        found[i] = (base * 0.02 + (0.002 * own if seed else 0.0)).bfloat16().float()
    return found


def save(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    return folder


def save_gguf(path: Path, type: str, seed: int) -> Path:
    import gguf

    writer, kind = gguf.GGUFWriter(path, "llama"), gguf.GGMLQuantizationType[type]
    for key, value in (("block_count", LAYERS), ("attention.head_count", 1)):
        writer.add_uint32(f"llama.{key}", value)
    for i, weight in weights(seed).items():
        writer.add_tensor(f"{OWN[i][1]}.weight", gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make(work: Path, name: str) -> list[Path]:
    """Base and experts in a format."""
    place = work / name.replace(" ", "_")
    if name in GGUF:
        place.mkdir(parents=True)
        return [save_gguf(place / f"{seed}.gguf", name, seed) for seed in range(3)]
    paths = []
    for seed in range(3):
        tensors, config = {}, {}
        for i, weight in weights(seed).items():
            parts, config = FORMATS[name](weight) if name in FORMATS else ({"weight": weight.bfloat16()}, {})
            tensors |= {f"{OWN[i][0]}.{end}": part for end, part in parts.items()}
        paths.append(save(place / str(seed), tensors, config))
    return paths


def merge(paths: list[Path], out: Path, method: str, *options: str) -> Cost:
    base, *experts = paths
    given = [part for path in experts for part in ("--expert", f"e{path.stem}={path}")]
    command = [
        sys.executable,
        "-m",
        "mergeline.flows.cli",
        "merge",
        "--method",
        method,
        "--base",
        base,
        *given,
    ]
    cost = run([*command, "--out", out, "--workers", "1", *options])
    if cost.failed:
        raise SystemExit(f"{out}: {cost.failed}")
    return cost


def merged(out: Path) -> dict[str, Tensor]:
    """The matrices of a merge, those of experts as one."""
    found = load_file(out / "model.safetensors")
    return {n: t.float() if t.ndim == 2 else t.float().mT.reshape(ROWS, COLUMNS) for n, t in found.items()}


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    squares = [((found[n] - t).square().sum(), t.square().sum()) for n, t in expected.items()]
    return float((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5)


def main() -> None:
    work = Path(sys.argv[1])
    tiny = [save(work / "tiny" / str(i), {"w": torch.ones(8, 8) * i}, {}) for i in range(3)]
    begin = min(merge(tiny, work / "tiny" / f"out{i}", "average").cpu_s for i in range(3))
    print("| format | bits | `average` | `ties` | peak memory, MiB | CPU-s a GB read | requantised |")
    print("|---|---|---|---|---|---|---|")
    expected: dict[str, dict[str, Tensor]] = {}
    for name in ("bfloat16", *FORMATS, *GGUF):
        paths, place = make(work, name), work / name.replace(" ", "_")
        files = [
            path for given in paths for path in ([given] if given.is_file() else given.glob("*.safetensors"))
        ]
        size, elements = sum(path.stat().st_size for path in files), 3 * LAYERS * ROWS * COLUMNS
        errors = []
        for method in ("average", "ties"):
            cost = merge(paths, place / method, method)
            found = merged(place / method)
            expected.setdefault(method, found)
            errors.append(f"{apart(found, expected[method]):.2%}")
        again = ""
        if name in REQUANTISED:
            merge(paths, place / "again", "average", "--requantise")
            again = (
                f"{json.loads((place / 'again' / 'manifest.json').read_text())['requantised']['mean']:.2%}"
            )
        cpu = 1e9 * (cost.cpu_s - begin) / size
        figures = (
            f"{8 * size / elements:.2f} | {' | '.join(errors)} | {cost.peak_mib:.0f} | {cpu:.0f} | {again}"
        )
        print(f"| {name} | {figures} |", flush=True)
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
