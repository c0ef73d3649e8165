"""Quantised checkpoints are read as the libraries that wrote them read them, whatever stretch is asked for."""

from __future__ import annotations

import json
import random
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDENS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from mergeline.merging.checkpoints.quantised.formats import dequantised
from mergeline.merging.engine.sources import Files
from mergeline.merging.errors import UserError

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
with safe_open(GOLDENS / "quantised.safetensors", "pt") as _file:
    CONFIGS: dict[str, dict[str, Any]] = json.loads(_file.metadata()["configs"])
ROUNDED = ("nf4", "nf4_nested", "fp4", "nvfp4")  # their libraries read bfloat16


def save(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    return folder


def golden(case: str, folder: Path) -> tuple[Path, Tensor]:
    """A case as a checkpoint, and what its library reads."""
    tensors = load_file(GOLDENS / "quantised.safetensors")
    stored = {n.removeprefix(f"{case}/"): t for n, t in tensors.items() if n.startswith(f"{case}/")}
    return save(folder, stored, CONFIGS[case]), tensors[f"{case}:X.weight"]


def read(checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Tensor:
    info = checkpoint.tensors[name]
    with Files() as files:
        return info.read(files.elements, start, prod(info.shape) if stop is None else stop)


def opened(folder: Path) -> Checkpoint:
    return dequantised(open_checkpoint(folder))[0]


def check(folder: Path, name: str, expected: Tensor, exact: bool = True) -> None:
    """A tensor is read as expected, as a whole and in stretches of any length, bit for bit."""
    checkpoint = opened(folder)
    assert list(checkpoint.tensors) == [name]
    info = checkpoint.tensors[name]
    assert info.shape == tuple(expected.shape) and info.dtype == "BF16"
    whole = read(checkpoint, name)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(
        whole.reshape(info.shape), expected, rtol=0.0 if exact else 1e-6, atol=0.0 if exact else 1e-8
    )
    at, draw = 0, random.Random(0)
    with Files() as files:
        while at < len(whole):
            stop = min(at + draw.randint(1, max(len(whole) // 7, 1)), len(whole))
            assert torch.equal(info.read(files.elements, at, stop), whole[at:stop])
            at = stop
        for _ in range(20):
            start, stop = sorted(draw.randint(0, len(whole)) for _ in range(2))
            assert torch.equal(info.read(files.elements, start, stop), whole[start:stop])


def fp8_blocks(shape: tuple[int, ...] = (40, 24), block: int = 16) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    scales = *shape[:-2], -(-shape[-2] // block), -(-shape[-1] // block)
    return {
        "X.weight": torch.randn(*shape, generator=draw).to(torch.float8_e4m3fn),
        "X.weight_scale_inv": torch.rand(*scales, generator=draw) + 0.5,
    }


# --------------------------------------------------------------------------------------- as others read it


@pytest.mark.parametrize("case", CONFIGS)
def test_weights_are_what_the_library_that_wrote_them_reads(case, tmp_path):
    folder, expected = golden(case, tmp_path / "in")
    if case in ROUNDED:
        found = read(opened(folder), "X.weight").reshape(expected.shape)
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0.0)
        expected = found
    check(folder, "X.weight", expected, exact=case != "llm_int8")


@pytest.mark.parametrize("shape", [(32, 48), (3, 32, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_blocks_of_fp8_are_what_transformers_reads(shape, dtype, tmp_path):
    conversion = pytest.importorskip("transformers.integrations.finegrained_fp8")
    tensors = fp8_blocks(shape)
    tensors["X.weight_scale_inv"] = tensors["X.weight_scale_inv"].to(dtype)
    reader = conversion.Fp8Dequantize(None)
    expected = reader._dequantize_one(*tensors.values(), output_dtype=torch.float32)
    check(save(tmp_path / "in", tensors, FP8), "X.weight", expected)


@pytest.mark.parametrize("shape", [(), (1,), (40, 1), (40,), (1, 24)])
def test_scales_of_a_tensor_of_rows_and_of_columns(shape, tmp_path):
    weight, scale = fp8_blocks()["X.weight"], torch.rand(shape) + 0.5
    of = scale[:, None] if shape == (40,) else scale
    for config in (None, {"quant_method": "fbgemm_fp8"}, {"quant_method": "compressed-tensors"}):
        folder = save(tmp_path / "in", {"X.weight": weight, "X.weight_scale": scale}, config)
        check(folder, "X.weight", weight.float() * of)


def test_groups_of_mxfp8_lie_beside_blocks_of_fp8(tmp_path):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 80, generator=draw).to(torch.float8_e4m3fn)
    powers = torch.randint(120, 130, (6, 3), dtype=torch.uint8, generator=draw)
    expected = weight.float() * (2.0 ** (powers.float() - 127)).repeat_interleave(32, 1)[:, :80]
    for name, scale in (("weight_scale_inv", powers), ("scale", powers.view(torch.float8_e8m0fnu))):
        folder = save(tmp_path / "in", {"X.weight": weight, f"X.{name}": scale}, FP8)
        check(folder, "X.weight", expected)


def test_packed_experts_are_those_of_transformers(tmp_path):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 40, 4, 16), dtype=torch.uint8, generator=draw)
    scales = torch.randint(1, 250, (3, 40, 4), dtype=torch.uint8, generator=draw)
    tensors = {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales}
    folder = save(tmp_path / "in", tensors, {"quant_method": "mxfp4"})
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    check(folder, "experts.gate_up_proj", expected)
    rounded = read(opened(folder), "experts.gate_up_proj").bfloat16().reshape(expected.shape)
    assert torch.equal(rounded, mxfp4.convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_bytes_of_mxfp4_lie_beside_blocks_of_fp8(dtype, tmp_path):
    conversion = pytest.importorskip("transformers.integrations.finegrained_fp8")
    draw = torch.Generator().manual_seed(0)
    packed = torch.randint(-128, 128, (6, 48), dtype=torch.int8, generator=draw)
    scale = torch.randint(110, 130, (6, 3), dtype=torch.uint8, generator=draw).view(dtype)
    expected = conversion.Fp8Dequantize(None)._dequantize_one(packed, scale, output_dtype=torch.float32)
    folder = save(tmp_path / "in", {"X.weight": packed, "X.weight_scale_inv": scale}, FP8)
    check(folder, "X.weight", expected)


def test_nvfp4_of_modelopt_multiplies_both_scales(tmp_path):
    draw = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (6, 16), dtype=torch.uint8, generator=draw)
    scale = torch.rand(6, 2, generator=draw).to(torch.float8_e4m3fn)
    tensors = {"X.weight": packed, "X.weight_scale": scale, "X.weight_scale_2": torch.tensor(0.25)}
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    numbers = torch.stack([codes[(packed & 15).long()], codes[(packed >> 4).long()]], 2).reshape(6, 32)
    expected = numbers * (scale.float() * 0.25).repeat_interleave(16, 1)
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    folder = save(tmp_path / "in", {**tensors, "X.input_scale": torch.ones(1)}, config)
    check(folder, "X.weight", expected)


def gptq(
    bits: int, order: bool, off: int, inputs: int = 64, outputs: int = 96
) -> tuple[dict[str, Tensor], Tensor]:
    """A weight as AutoGPTQ packs it, number by number, and what it stands for."""
    draw = random.Random(bits)
    per, groups = 32 // bits, inputs // 16
    code = [[draw.randrange(2**bits) for _ in range(outputs)] for _ in range(inputs)]
    zero = [[draw.randrange(2**bits) for _ in range(outputs)] for _ in range(groups)]
    index = [draw.randrange(groups) if order else i // 16 for i in range(inputs)]
    scale = torch.rand(groups, outputs).half()

    def word(numbers: list[int]) -> int:
        found = sum(number << (bits * i) for i, number in enumerate(numbers))
        return found - (1 << 32) if found >= 1 << 31 else found

    words = [
        [word([code[i * per + k][o] for k in range(per)]) for o in range(outputs)]
        for i in range(inputs // per)
    ]
    zeros = [[word(row[o * per : (o + 1) * per]) for o in range(outputs // per)] for row in zero]
    expected = (torch.tensor(code) - (torch.tensor(zero)[index] + off)) * scale.float()[index]
    tensors = {
        "X.qweight": torch.tensor(words, dtype=torch.int32),
        "X.qzeros": torch.tensor(zeros, dtype=torch.int32),
        "X.scales": scale,
        "X.g_idx": torch.tensor(index, dtype=torch.int32),
    }
    return tensors, expected.T.contiguous()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_is_unpacked_as_published(bits, order, version, tmp_path):
    tensors, expected = gptq(bits, order, off=version == "gptq")
    config = {"quant_method": "gptq", "bits": bits, "group_size": 16, "checkpoint_format": version}
    check(save(tmp_path / "in", tensors, config), "X.weight", expected)
    if not order:
        del tensors["X.g_idx"]
        check(save(tmp_path / "in", tensors, config), "X.weight", expected)


def test_matrices_that_lie_across_are_read_in_columns_where_they_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr("mergeline.merging.checkpoints.quantised.integers._KEPT", 0)
    tensors, expected = gptq(4, True, off=1)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    check(save(tmp_path / "gptq", tensors, config), "X.weight", expected)
    folder, expected = golden("awq", tmp_path / "awq")
    check(folder, "X.weight", expected)


def test_a_thread_keeps_little_of_tensors_that_it_does_not_read_to_their_ends(tmp_path, monkeypatch):
    tensors, expected = gptq(4, True, off=1)
    stored = {key.replace("X", f"layers.{i}"): tensor for i in range(5) for key, tensor in tensors.items()}
    view = opened(save(tmp_path / "in", stored, {"quant_method": "gptq", "bits": 4, "group_size": 16}))
    infos: list[Any] = [*view.tensors.values()]
    with Files() as files:
        for limit in (1 << 27, 0):
            monkeypatch.setattr("mergeline.merging.checkpoints.computed._MOST_KEPT", limit)
            for info in infos:
                assert torch.equal(info.read(files.elements, 70, 90), expected.flatten()[70:90])
            assert sum(info.kept_bytes > 0 for info in infos) == (5 if limit else 1)
    assert sum(info.kept_bytes for info in infos) == 0


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 20), st.data())
def test_any_stretch_of_any_shape_has_the_bits_of_the_whole(rows, columns, block, data):
    tensors = fp8_blocks((rows, columns), block)
    weight, scale = tensors.values()
    sizes = [part.numel() * part.element_size() for part in (weight, scale)]
    place = Path("nowhere")
    stored = {
        "w": TensorInfo("X.weight", "F8_E4M3", (rows, columns), place, 0, sizes[0]),
        "s": TensorInfo("X.weight_scale_inv", "F32", tuple(scale.shape), place, 0, sizes[1]),
    }
    from mergeline.merging.checkpoints.quantised.scaled import ScaledTensor, grid_of

    grid = grid_of(stored["w"], stored["s"], (rows, columns), (block, block))
    info = ScaledTensor("X.weight", "BF16", (rows, columns), place, 0, 0, tuple(stored.values()), grid)

    def elements(part: TensorInfo, start: int, stop: int) -> Tensor:
        assert 0 <= start <= stop <= prod(part.shape)
        return (weight if part.name == "X.weight" else scale).flatten()[start:stop]

    spread = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    start, stop = sorted(data.draw(st.integers(0, rows * columns)) for _ in range(2))
    assert torch.equal(info.read(elements, start, stop), (weight.float() * spread).flatten()[start:stop])


# --------------------------------------------------------------------------------------- what is refused


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


BLOCKS = fp8_blocks()
GPTQ, GPTQ_CONFIG = gptq(4, False, 1)[0], {"quant_method": "gptq", "bits": 4, "group_size": 16}
NF4 = {
    "X.weight": torch.zeros(32, 1, dtype=torch.uint8),
    "X.weight.absmax": torch.ones(1),
    "X.weight.quant_map": torch.ones(16),
    "X.weight.quant_state.bitsandbytes__nf4": torch.tensor(
        list(b'{"shape": [8, 8], "blocksize": 64, "dtype": "float32"}'), dtype=torch.uint8
    ),
}
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any] | None, list[str]]] = {
    "no scales": (without(BLOCKS, "X.weight_scale_inv"), FP8, ["'X.weight'", "F8_E4M3 without scales", "float16"]),
    "scales alone": (without(BLOCKS, "X.weight"), FP8, ["X.weight_scale_inv", "in a way that cannot be read"]),
    "scales of another shape": (
        {**BLOCKS, "X.weight_scale_inv": torch.ones(5, 5)}, FP8, ["[5, 5] does not fit", "[40, 24]", "[16, 16]"],
    ),
    "no block size": (BLOCKS, None, ["does not fit", "no weight_block_size"]),
    "another block size": (BLOCKS, {**FP8, "weight_block_size": [128, 128]}, ["does not fit", "[128, 128]"]),
    "a block size of junk": (BLOCKS, {**FP8, "weight_block_size": "x"}, ["'x'", "no pair of whole numbers"]),
    "integer scales": ({**BLOCKS, "X.weight_scale_inv": torch.ones(3, 2).long()}, FP8, ["dtype I64"]),
    "another method": (BLOCKS, {**FP8, "quant_method": "gptq"}, ["quantised by gptq", "is FP8", "belongs to"]),
    "an unknown method": (
        {"X.W_q": torch.ones(4, dtype=torch.uint8)}, {"quant_method": "hqq"}, ["hqq in config.json", "float16"],
    ),
    "an unknown method of known names": (
        BLOCKS, {**FP8, "quant_method": "quark"}, ["(quark in config.json), which cannot be read"],
    ),
    "sparse": (
        {"X.weight": BLOCKS["X.weight"], "X.weight_scale": torch.ones(1)},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        ["is sparse ('sparse-24-bitmask'"],
    ),
    "GPTQ of 3 bits": (GPTQ, {**GPTQ_CONFIG, "bits": 3}, ["names 3 bits", "2, 4 and 8"]),
    "GPTQ without configuration": (GPTQ, None, ["'X.qweight'", "no quantization_config"]),
    "GPTQ in another format": (GPTQ, {**GPTQ_CONFIG, "checkpoint_format": "marlin"}, ["'marlin'", "gptq_v2"]),
    "words of AutoRound": (GPTQ, {**GPTQ_CONFIG, "quant_method": "auto-round"}, ["in the format 'none'"]),
    "codes of no known format": (
        {**BLOCKS, "Y.weight": torch.ones(4, 4, dtype=torch.int8)}, FP8, ["('Y.weight' is I8) in a way"],
    ),
    "GPTQ of other groups": (GPTQ, {**GPTQ_CONFIG, "group_size": 32}, ["4 groups of 64 inputs", "[32]"]),
    "GPTQ without zeros": (without(GPTQ, "X.qzeros"), GPTQ_CONFIG, ["'X.qzeros' is not there"]),
    "GPTQ beside its weight": (
        {**GPTQ, "X.weight": torch.ones(96, 64)}, GPTQ_CONFIG, ["'X.weight' is there a second time"],
    ),
    "AWQ for gemv": (
        {
            "X.qweight": torch.ones(32, 5, dtype=torch.int32),
            "X.qzeros": torch.ones(2, 5, dtype=torch.int32),
            "X.scales": torch.ones(2, 40).half(),
        },
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemv"}, ["'gemv'", "'gemm' can be read"],
    ),
    "bitsandbytes without magnitudes": (without(NF4, "X.weight.absmax"), None, ["'X.weight.absmax' is not there"]),
    "bitsandbytes of another shape": (
        {**NF4, "X.weight": torch.zeros(31, 1, dtype=torch.uint8)}, None, ["do not make a tensor of shape [8, 8]"],
    ),
    "bitsandbytes without a state": (
        without(NF4, "X.weight.quant_state.bitsandbytes__nf4"), None, ["X.weight.absmax", "cannot be read"],
    ),
    "a state that is no JSON": (
        {**NF4, "X.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)},
        None, ["is no quantisation state"],
    ),
    "a state that is too long": (
        {**NF4, "X.weight.quant_state.bitsandbytes__nf4": torch.zeros(9999, dtype=torch.uint8)},
        None, ["9999 bytes, where a few"],
    ),
    "LLM.int8() in tiles": (
        {
            "X.weight": torch.ones(4, 4, dtype=torch.int8),
            "X.SCB": torch.ones(4),
            "X.weight_format": torch.tensor(1, dtype=torch.uint8),
        },
        None, ["lies in tiles"],
    ),
    "NVFP4 without its scale of all": (
        {"X.weight_packed": torch.zeros(4, 8, dtype=torch.uint8),
         "X.weight_scale": torch.ones(4, 1).to(torch.float8_e4m3fn)},
        None, ["'X.weight_global_scale' is not there"],
    ),
    "experts without their scales": (
        {"e.up_proj_blocks": torch.zeros(1, 2, 2, 16, dtype=torch.uint8),
         "e.up_proj_scales": torch.zeros(1, 2, 3, dtype=torch.uint8)},
        None, ["[1, 2, 3] does not fit that of the blocks"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(case, tmp_path):
    tensors, config, parts = REFUSED[case]
    folder = save(tmp_path / "in", tensors, config)
    with refused(str(folder), *parts):
        dequantised(open_checkpoint(folder))


def test_groups_that_are_not_there_are_refused_as_they_are_read(tmp_path):
    tensors, _ = gptq(4, True, 1)
    for wrong in (-1, 4):
        tensors["X.g_idx"][5] = wrong
        with refused("'X.g_idx'", "groups that are not there"):
            read(opened(save(tmp_path / "in", tensors, GPTQ_CONFIG)), "X.weight")


def hostile(tensors: dict[str, Tensor], config: dict[str, Any], draw: random.Random) -> dict[str, Tensor]:
    """Some tensors with another shape, dtype or name, or gone; some settings with another value."""
    found = dict(tensors)
    for _ in range(draw.randint(1, 3)):
        name = draw.choice([*tensors])
        tensor = found.get(name, tensors[name])
        kind = draw.choice(["shape", "dtype", "name", "gone", "numbers", "config", "config"])
        if kind == "shape":
            shape = [draw.choice([0, 1, 2, 3, 16, 40]) for _ in range(draw.randint(0, 4))]
            found[name] = torch.zeros(shape).to(tensor.dtype)
        elif kind == "dtype":
            dtypes = (torch.float32, torch.int32, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.bool)
            found[name] = tensor.float().to(draw.choice(dtypes))
        elif kind == "name":
            ends = (
                "X.weight",
                "X.weight_scale",
                "X.scales",
                "X.qweight",
                "X.weight_packed",
                "X.weight_blocks",
                "X.k_scale",
            )
            found[draw.choice(ends)] = found.pop(name, tensor)
        elif kind == "gone":
            found.pop(name, None)
        elif kind == "numbers" and tensor.numel():
            raw = tensor.contiguous().flatten().view(torch.uint8).clone()
            raw[draw.randrange(len(raw))] = draw.choice([0, 127, 128, 255])
            found[name] = raw.view(tensor.dtype).reshape(tensor.shape)
        else:
            keys = (
                "quant_method",
                "bits",
                "group_size",
                "weight_block_size",
                "config_groups",
                "version",
                "format",
            )
            config[draw.choice(keys)] = draw.choice(
                [
                    None,
                    -1,
                    0,
                    4,
                    10**30,
                    1e400,
                    "gptq",
                    "awq",
                    "fp8",
                    [],
                    [0, 0],
                    [1, 32],
                    {},
                    {"a": {"weights": {"num_bits": 4}}},
                ]
            )
    return found


def check_hostile(tmp_path: Path, cases: int) -> None:
    names = [*CONFIGS, "gptq", "blocks"]
    goldens, refusals = load_file(GOLDENS / "quantised.safetensors"), 0
    for seed in range(cases):
        draw = random.Random(seed)
        case = draw.choice(names)
        tensors = {"gptq": GPTQ, "blocks": BLOCKS}.get(case) or {
            n.removeprefix(f"{case}/"): t for n, t in goldens.items() if n.startswith(f"{case}/")
        }
        config = dict({"gptq": GPTQ_CONFIG, "blocks": FP8}.get(case) or CONFIGS[case])
        folder = save(tmp_path / "in", hostile(tensors, config, draw), config)
        try:
            checkpoint = opened(folder)
            for name in checkpoint.tensors:
                assert len(read(checkpoint, name)) == prod(checkpoint.tensors[name].shape)
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert cases / 4 < refusals < cases


def test_what_does_not_fit_together_is_refused_in_one_line(tmp_path):
    check_hostile(tmp_path, 200)


@pytest.mark.slow
def test_much_that_does_not_fit_together_is_refused_in_one_line(tmp_path):
    check_hostile(tmp_path, 1000)


def test_what_is_not_quantised_is_left_as_it_is(tmp_path):
    folder = save(
        tmp_path / "in", {"X.weight": torch.ones(2, 2), "X.k_scale": torch.ones(1)}, {"quant_method": "hqq"}
    )
    checkpoint = open_checkpoint(folder)
    view, notes = dequantised(checkpoint)
    assert view is checkpoint and notes == []


def test_codes_are_not_taken_for_weights_where_scales_are_not_known(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path / "in", BLOCKS, FP8))
    with refused("'X.weight' is F8_E4M3", "quantised weights are read by merging alone", "`passthrough`"):
        checkpoint.read("X.weight")
