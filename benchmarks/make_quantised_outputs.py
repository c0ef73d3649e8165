"""`python benchmarks/make_quantised_outputs.py AUTOAWQ` writes tests/goldens/quantised.safetensors.

Small weights as bitsandbytes 0.50, compressed-tensors 0.20 and AutoAWQ 0.2.9 quantise them, and what the same code
reads from them: `CASE/TENSOR` is stored, `CASE:X.weight` is read; the metadata has each case's quantization_config. It
needs these packages; AUTOAWQ is an unpacked source distribution of the last, which is archived.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens"
E4M3, E2M1, INT8 = 448.0, 6.0, 127  # the largest numbers


class Cases:
    """What is written."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.configs: dict[str, dict[str, Any]] = {}

    def add(self, case: str, stored: dict[str, Tensor], read: Tensor, config: dict[str, Any]) -> None:
        self.tensors |= {
            f"{case}/X.{name}": tensor.detach().clone().contiguous() for name, tensor in stored.items()
        }
        self.tensors[f"{case}:X.weight"] = read.float().contiguous()
        self.configs[case] = config


def bitsandbytes(cases: Cases) -> None:
    from bitsandbytes import functional

    config = {"quant_method": "bitsandbytes"}
    for kind, nested, shape, block in (
        ("nf4", False, (24, 40), 64),
        ("nf4", True, (300, 64), 64),
        ("fp4", False, (7, 36), 32),
    ):
        weight = (torch.randn(*shape) * 0.05).bfloat16()
        code, state = functional.quantize_4bit(
            weight, blocksize=block, quant_type=kind, compress_statistics=nested
        )
        parts = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        read = functional.dequantize_4bit(code, state)
        case = f"{kind}_nested" if nested else kind
        cases.add(case, {"weight": code, **parts}, read, config | {"load_in_4bit": True})
    code, largest, _ = functional.int8_vectorwise_quant(torch.randn(12, 20).half())
    stored = {"weight": code, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    read = functional.int8_vectorwise_dequant(code, largest)
    cases.add("llm_int8", stored, read, config | {"load_in_8bit": True})


def compressed_tensors(cases: Cases) -> None:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def add(case: str, format: str, weight: Tensor, settings: dict[str, Any], **state: Tensor) -> None:
        weights = QuantizationArgs(**settings)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=format)
        compressor = BaseCompressor.get_value_from_registry(format)
        stored = compressor.compress({"weight": weight.clone(), **state}, scheme)
        read = compressor.decompress(stored, scheme)["weight"]
        group = {"targets": ["Linear"], "weights": json.loads(weights.model_dump_json())}
        config = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}
        cases.add(case, {name: torch.as_tensor(part) for name, part in stored.items()}, read, config)

    weight = torch.randn(24, 64) * 0.1
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    of_rows = weight.abs().amax(1, keepdim=True) / E4M3
    add(
        "fp8_tensor",
        "float-quantized",
        weight,
        fp8 | {"strategy": "tensor"},
        weight_scale=of_rows.max().reshape(1),
    )
    add("fp8_channel", "float-quantized", weight, fp8 | {"strategy": "channel"}, weight_scale=of_rows)
    ragged = torch.randn(40, 24) * 0.1
    padded = torch.nn.functional.pad(ragged, (0, 8, 0, 8)).reshape(3, 16, 2, 16)
    block = fp8 | {"strategy": "block", "block_structure": [16, 16]}
    add("fp8_block", "float-quantized", ragged, block, weight_scale=padded.abs().amax((1, 3)) / E4M3)

    def with_zeros(low: Tensor, high: Tensor, bits: int) -> dict[str, Tensor]:
        scale, least = (high - low) / (2**bits - 1), -(2 ** (bits - 1))
        zero = (least - low / scale).round().clamp(least, -least - 1)
        return {"weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}

    rows = with_zeros(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), 8)
    channel = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}
    add("int8_zeros", "int-quantized", weight, channel, **rows)
    grouped = weight.reshape(24, 4, 16)
    for bits in (4, 8):
        settings = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 16}
        scale = grouped.abs().amax(2) / (2 ** (bits - 1) - 1)
        add(f"int{bits}_packed", "pack-quantized", weight, settings | {"symmetric": True}, weight_scale=scale)
        zeros = with_zeros(grouped.amin(2), grouped.amax(2), bits)
        add(f"int{bits}_packed_zeros", "pack-quantized", weight, settings | {"symmetric": False}, **zeros)
    whole = (E4M3 * E2M1 / weight.abs().max()).reshape(1)
    scale = (grouped.abs().amax(2) / E2M1 * whole).to(torch.float8_e4m3fn).float()
    nvfp4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    add("nvfp4", "nvfp4-pack-quantized", weight, nvfp4, weight_scale=scale, weight_global_scale=whole)
    largest = weight.reshape(24, 2, 32).abs().amax(2)
    for case, format, bits, most in (
        ("mxfp4", "mxfp4-pack-quantized", 4, E2M1),
        ("mxfp8", "mxfp8-quantized", 8, E4M3),
    ):
        settings = {
            "num_bits": bits,
            "type": "float",
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": torch.uint8,
        }
        scale = 2.0 ** torch.ceil(torch.log2(largest / most))
        add(case, format, weight, settings | {"symmetric": True}, weight_scale=scale)


def autoawq(cases: Cases, source: Path) -> None:
    path = source / "awq" / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("packing_utils", path)
    assert spec and spec.loader
    packing: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)
    words = torch.randint(-(2**31), 2**31 - 1, (32, 5), dtype=torch.int32)
    zeros = torch.randint(-(2**31), 2**31 - 1, (2, 5), dtype=torch.int32)
    scales = (torch.rand(2, 40) * 0.01).half()
    read = packing.dequantize_gemm(words, zeros, scales.float(), 4, 16)
    config = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    cases.add("awq", {"qweight": words, "qzeros": zeros, "scales": scales}, read.T, config)


def main() -> None:
    torch.manual_seed(0)
    cases = Cases()
    bitsandbytes(cases)
    compressed_tensors(cases)
    autoawq(cases, Path(sys.argv[1]))
    save_file(cases.tensors, GOLDENS / "quantised.safetensors", {"configs": json.dumps(cases.configs)})


if __name__ == "__main__":
    main()
