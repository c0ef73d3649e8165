"""What the tensors of real models are, the matrices in them, and what may be permuted."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from itertools import product
from typing import Any, Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import NAMES, TRANSFORMERS, build, config_of, described, shaken_state, shapes_of
from places import REPOSITORY
from safetensors.torch import load_file

from mergeline.merging.architecture import Model, Pattern, Role, Row, describe, kind_of, register, rows
from mergeline.merging.architecture.tensors import Keys

KEYS: tuple[Keys, ...] = ("block_linear", "matrices", "block_linear+proj")


# ------------------------------------------------------------------------------------------ names alone


def official_is_matrix(name: str, keys: Keys) -> bool:
    """The rule for 2-D tensors with which all reported results were made: it must not change for any name."""
    if keys == "matrices":
        return "text_projection" not in name
    if keys == "block_linear+proj" and re.search(r"(^|[._])proj(ection)?(\.weight)?$", name):
        return True
    outside = re.search(r"(^|[._])(ln|norm|layernorm|bias|embed\w*)([._\d]|$)", name, re.IGNORECASE)
    return bool(re.search(r"(^|\.)\d+\.", name)) and not outside


def layer_by_first_number(name: str) -> tuple[str | None, int | None]:
    """What recipes, stacks and LiNeS call tower and layer: it must not change for any name."""
    found = re.match(r"^(.*?(?:^|\.))(\d+)\.", name)
    return (found.group(1), int(found.group(2))) if found else (None, None)


PARTS = [
    *(
        "model",
        "layers",
        "h",
        "0",
        "1",
        "12",
        "blocks",
        "attn",
        "mlp",
        "c_attn",
        "c_proj",
        "q_proj",
        "gate_up_proj",
    ),
    *(
        "experts",
        "expert_3",
        "norm",
        "ln_1",
        "embed_tokens",
        "patch_embed",
        "proj",
        "projection",
        "text_projection",
    ),
    *(
        "visual",
        "bias",
        "weight",
        "in_proj_weight",
        "conv1",
        "features",
        "layer1",
        "downsample",
        "token_embedding",
    ),
    *("mlp_bias", "", "LayerNorm", "embeddings", "query", "w1", "ffn", "running_mean", "router", "gamma"),
]
NAME = st.lists(st.sampled_from(PARTS), min_size=1, max_size=7).map(".".join) | st.text(max_size=20)


@given(NAME, st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_two_dimensional_tensors_are_matrices_as_they_were(name, shape):
    tensor = describe({name: shape}).tensors[name]
    if tensor.of is Role.EXPERTS:
        return
    for keys in KEYS:
        found = tensor.matrices(keys)
        assert bool(found) == official_is_matrix(name, keys)
        if found:
            [matrix] = found
            assert (matrix.name, matrix.start, matrix.slab, matrix.shape) == (name, 0, shape, shape)


SHAPE = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8]), max_size=5).map(tuple)


@given(
    st.dictionaries(NAME, SHAPE, max_size=9),
    st.sampled_from([None, "gpt2", "gpt_oss", "dbrx", "llama", "resnet"]),
)
def test_towers_and_layers_are_as_they_were(shapes, model_type):
    model = describe(shapes, {"model_type": model_type, "num_attention_heads": 2})
    places = {name: layer_by_first_number(name) for name in shapes}
    assert {n: (t.tower, t.layer) for n, t in model.tensors.items()} == places
    counts: dict[str, int] = {}
    for tower, layer in places.values():
        if tower is not None:
            counts[tower] = max(counts.get(tower, 0), layer + 1)
    assert model.layers == counts
    for name, (tower, layer) in places.items():
        assert model.depth(name) == (None if tower is None else layer / max(1, counts[tower] - 1))
    for tensor, keys in product(model.tensors.values(), KEYS):  # whatever they are, matrices lie inside
        for matrix in tensor.matrices(keys):
            assert matrix.start + matrix.slab[0] * matrix.slab[1] <= torch.Size(tensor.shape).numel()


def test_a_kind_has_no_numbers_of_layers_and_experts():
    assert kind_of("model.layers.3.mlp.experts.12.w1.weight") == "model.layers.*.mlp.experts.*.w1.weight"
    assert kind_of("layer1.0.conv2.weight") == "layer1.*.conv2.weight"
    assert kind_of("visual.proj") == "visual.proj"


# ------------------------------------------------------------------------------------------ real models

TENSORS = st.sampled_from(NAMES).flatmap(lambda name: st.sampled_from(list(described(name)[0].items())))


@given(
    st.lists(TENSORS, max_size=20),
    st.lists(SHAPE, max_size=4),
    st.sampled_from([None, *(row.model_types[0] for row in rows.ROWS if row.model_types)]),
    st.sampled_from([None, 0, 2, 4]),
)
def test_any_mixture_of_names_and_shapes_is_described(tensors, others, model_type, heads):
    shapes = dict(tensors)
    shapes.update(zip(shapes, others))
    model = describe(shapes, {"model_type": model_type, "num_attention_heads": heads})
    for tensor in model.tensors.values():
        assert tensor.shape == shapes[tensor.name] and len(tensor.axes) == len(tensor.shape)
        for axis, label in enumerate(tensor.axes):
            if label and model.units[label]:
                order = list(reversed(range(model.units[label])))
                assert sorted(tensor.moved(axis, order)) == list(range(tensor.shape[axis]))
        for part in tensor.attention_parts():
            assert part.start + part.slab[0] * part.slab[1] <= torch.Size(tensor.shape).numel()


# What has no role of its own: attention sinks, and parameters of state-space layers.
NO_ROLE = {"model.layers.*.self_attn.sinks", "model.layers.*.linear_attn.A_log"}
MIXTRAL = ("mixtral", "phimoe")  # packed, names do not tell them from others


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_real_model_has_a_role(name):
    shapes, config = described(name)
    model = describe(shapes, config)
    assert {t.kind for t in model.tensors.values() if t.role is Role.OTHER} <= NO_ROLE
    assert list(model.tensors) == list(shapes)
    for tensor in model.tensors.values():
        assert len(tensor.axes) == len(tensor.shape)
        assert tensor.role is not Role.EXPERTS or tensor.unsplit is None
        if len(tensor.shape) == 2 and tensor.of is not Role.EXPERTS:
            for keys in KEYS:
                assert bool(tensor.matrices(keys)) == official_is_matrix(tensor.name, keys)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_names_tell_as_much_as_a_configuration(name):
    shapes, config = described(name)
    told, named = describe(shapes), describe(shapes, config)
    assert named.architecture != "unknown" or name == "gptj"
    for tensor in named.tensors.values():
        other = told.tensors[tensor.name]
        assert (other.role, other.of, other.module, other.transposed) == (
            tensor.role, tensor.of, tensor.module, tensor.transposed,
        )  # fmt: skip
        if name not in MIXTRAL:
            assert other.matrices("matrices") == tensor.matrices("matrices")


def roles(name: str) -> dict[str, Role]:
    shapes, config = described(name)
    return {tensor: found.role for tensor, found in describe(shapes, config).tensors.items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama",
            {
                "model.embed_tokens.weight": Role.EMBEDDING,
                "model.layers.1.self_attn.q_proj.weight": Role.QUERY,
                "model.layers.1.self_attn.o_proj.weight": Role.ATTENTION_OUTPUT,
                "model.layers.1.mlp.gate_proj.weight": Role.MLP_GATE,
                "model.layers.1.mlp.up_proj.weight": Role.MLP_UP,
                "model.layers.1.mlp.down_proj.weight": Role.MLP_DOWN,
                "model.layers.1.input_layernorm.weight": Role.NORM,
                "lm_head.weight": Role.HEAD,
            },
        ),
        (
            "phi3",
            {
                "model.layers.0.self_attn.qkv_proj.weight": Role.QKV_GROUPED,
                "model.layers.0.mlp.gate_up_proj.weight": Role.MLP_GATE_UP,
            },
        ),
        ("gpt_neox", {"gpt_neox.layers.0.attention.query_key_value.weight": Role.QKV_INTERLEAVED}),
        ("bloom", {"transformer.h.0.self_attention.query_key_value.weight": Role.QKV_INTERLEAVED}),
        (
            "bert",
            {
                "bert.encoder.layer.0.attention.output.dense.weight": Role.ATTENTION_OUTPUT,
                "bert.encoder.layer.0.output.dense.weight": Role.MLP_DOWN,
                "bert.encoder.layer.0.attention.self.query.bias": Role.BIAS,
                "bert.embeddings.position_embeddings.weight": Role.POSITION,
                "classifier.weight": Role.CLASSIFIER,
            },
        ),
        (
            "open_clip_vit",
            {
                "visual.conv1.weight": Role.PATCH_EMBEDDING,
                "visual.proj": Role.PROJECTION,
                "text_projection": Role.PROJECTION,
                "visual.class_embedding": Role.TOKEN,
                "positional_embedding": Role.POSITION,
                "token_embedding.weight": Role.EMBEDDING,
                "logit_scale": Role.SCALE,
                "transformer.resblocks.0.attn.in_proj_weight": Role.QKV_THIRDS,
                "transformer.resblocks.0.mlp.c_fc.weight": Role.MLP_UP,
            },
        ),
        (
            "torchvision/resnet18",
            {
                "conv1.weight": Role.STEM,
                "layer1.0.conv1.weight": Role.CONVOLUTION,
                "layer1.0.bn1.weight": Role.NORM,
                "layer1.0.bn1.bias": Role.NORM,
                "layer1.0.bn1.running_mean": Role.RUNNING_MEAN,
                "layer1.0.bn1.running_var": Role.RUNNING_VARIANCE,
                "layer1.0.bn1.num_batches_tracked": Role.COUNTER,
                "layer2.0.downsample.0.weight": Role.CONVOLUTION,
                "layer2.0.downsample.1.bias": Role.NORM,
                "fc.weight": Role.CLASSIFIER,
            },
        ),
        ("unet", {"down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": Role.MLP_GATE_UP}),
        ("flux", {"transformer_blocks.0.ff.net.0.proj.weight": Role.MLP_UP, "x_embedder.weight": Role.PATCH_EMBEDDING}),
        ("mixtral", {"model.layers.0.mlp.gate.weight": Role.ROUTER}),
        (
            "gpt_oss",
            {
                "model.layers.0.mlp.router.bias": Role.BIAS,
                "model.layers.0.mlp.experts.gate_up_proj_bias": Role.BIAS,
            },
        ),
        ("llava", {"model.multi_modal_projector.linear_1.weight": Role.PROJECTION}),
    ],
)  # fmt: skip
def test_roles(name, expected):
    found = roles(name)
    assert {tensor: found[tensor] for tensor in expected} == expected


@pytest.mark.parametrize("name", NAMES)
def test_what_has_a_row_for_every_token(name):
    shapes, config = described(name)
    model = describe(shapes, config)
    as_it_was = re.compile(
        r"(^|\.)(embed_tokens|word_embeddings|tok_embeddings|wte|shared|lm_head|embed_out)\.(weight|bias)"
    )
    found = {tensor.name for tensor in model.tensors.values() if tensor.by_token}
    assert {n for n in shapes if as_it_was.search(n)} <= found
    assert len({shapes[n][0] for n in found}) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_before_the_layers(name):
    shapes, config = described(name)
    for tensor in describe(shapes, config).tensors.values():
        as_it_was = tensor.layer is None and any(part in tensor.name for part in ("embed", "wte", "wpe"))
        assert tensor.before_layers or not as_it_was or Role.HEAD in (tensor.role, tensor.of)
        assert not tensor.before_layers or tensor.layer is None


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight", "model.language_model.embed_tokens.weight", "model.tok_embeddings.weight",
        "transformer.wte.weight", "transformer.wpe.weight", "transformer.word_embeddings.weight",
        "transformer.embd.wte.weight", "transformer.embedding.word_embeddings.weight", "gpt_neox.embed_in.weight",
        "backbone.embeddings.weight",
    ],
)  # fmt: skip
def test_mergekits_names_of_what_stands_before_the_layers(name):
    assert describe({name: (4, 4)}).tensors[name].before_layers


def test_the_output_matrix_of_gpt_neox_is_not_before_the_layers():
    tensor = describe({"embed_out.weight": (4, 4)}).tensors["embed_out.weight"]
    assert tensor.by_token and not tensor.before_layers


# ------------------------------------------------------------------------------------------ fused attention


@pytest.mark.parametrize(
    ("name", "weight", "width"),
    [
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", (16, 8, 8)),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", (16, 16, 16)),
        ("open_clip_vit", "transformer.resblocks.0.attn.in_proj_weight", (16, 16, 16)),
        ("timm/vit_tiny_patch16_224", "blocks.0.attn.qkv.weight", (192, 192, 192)),
    ],
)
def test_queries_keys_and_values_of_a_fused_weight(name, weight, width):
    tensor = describe(*described(name)).tensors[weight]
    stored = torch.randn(tensor.shape)
    parts = tensor.attention_parts()
    assert [part.shape[0] for part in parts] == list(width)
    taken = [part.take(slab_of(stored, part)) for part in parts]
    assert torch.equal(torch.cat(taken), stored.T if tensor.transposed else stored)
    assert len(tensor.matrices("block_linear")) == 1  # one matrix for spectral methods


def test_interleaved_heads_are_not_parts():
    tensor = describe(*described("gpt_neox")).tensors["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert tensor.attention_parts() == ()


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "distilbert", "vit", "clip", "dit"])
def test_the_weights_of_an_attention_have_one_module(name):
    modules = describe(*described(name)).modules().values()
    found = [module for module in modules if Role.QUERY in module]
    assert found
    assert all(set(module) >= {Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUTPUT} for module in found)


# ------------------------------------------------------------------------------------------ Conv1D


def test_the_weights_of_conv1d_are_transposed():
    model = describe(*described("gpt2"))
    transposed = {t.kind for t in model.tensors.values() if t.transposed}
    assert transposed == {
        "transformer.h.*.attn.c_attn.weight", "transformer.h.*.attn.c_proj.weight",
        "transformer.h.*.mlp.c_fc.weight", "transformer.h.*.mlp.c_proj.weight",
    }  # fmt: skip
    [matrix] = model.tensors["transformer.h.0.mlp.c_fc.weight"].matrices("block_linear")
    assert (matrix.slab, matrix.shape, matrix.transposed) == ((16, 64), (64, 16), True)
    stored = torch.randn(16, 64)
    assert torch.equal(matrix.take(stored), stored.T)


@pytest.mark.parametrize(
    "shapes",
    [
        {"transformer.h.0.attn.c_attn.weight": (48, 16), "transformer.h.0.mlp.c_fc.weight": (64, 16)},  # nanoGPT
        {"transformer.resblocks.0.mlp.c_fc.weight": (64, 16), "transformer.resblocks.0.mlp.c_proj.weight": (16, 64)},
    ],
)  # fmt: skip
def test_other_weights_of_these_names_are_not(shapes):
    assert not any(tensor.transposed for tensor in describe(shapes).tensors.values())


# ------------------------------------------------------------------------------------------ convolutions


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("torchvision/resnet18", "layer2.0.downsample.0.weight", "conv1.weight"),
        ("timm/resnet26d", "layer1.0.conv2.weight", "conv1.3.weight"),
        ("open_clip_resnet", "visual.layer1.0.conv1.weight", "visual.conv2.weight"),
        ("unet", "down_blocks.0.resnets.0.conv1.weight", "conv_out.weight"),
        ("timm/convnext_atto", "stages.0.blocks.0.mlp.fc1.weight", "stages.0.blocks.0.conv_dw.weight"),
        ("torchvision/convnext_tiny", "features.2.1.weight", "features.0.0.weight"),
        ("torchvision/vgg11_bn", "features.4.weight", None),
        ("resnet_hf", "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight",
         "resnet.embedder.embedder.convolution.weight"),
        ("vit", None, "vit.embeddings.patch_embeddings.projection.weight"),
        ("timm/vit_tiny_patch16_224", None, "patch_embed.proj.weight"),
        ("dit", None, "pos_embed.proj.weight"),
        ("clip", None, "vision_model.embeddings.patch_embedding.weight"),
        ("qwen3_vl_moe", None, "model.visual.patch_embed.proj.weight"),
    ],
)  # fmt: skip
def test_convolutions_inside_of_layers_are_matrices(name, inside, outside, keys):
    tensors = describe(*described(name)).tensors
    if inside:
        tensor = tensors[inside]
        [matrix] = tensor.matrices(keys)
        assert matrix.shape == (tensor.shape[0], torch.Size(tensor.shape[1:]).numel())
        assert tensor.matrices(keys, convolutions=False) == ()
    if outside:
        assert tensors[outside].matrices(keys) == ()


# ------------------------------------------------------------------------------------------ packed experts


def slab_of(stored: torch.Tensor, matrix: Any) -> torch.Tensor:
    """The stretch of a stored tensor in which a matrix lies."""
    rows, columns = matrix.slab
    return stored.view(-1)[matrix.start : matrix.start + rows * columns].view(rows, columns)


def expert_matrices(tensors: dict[str, torch.Tensor], model: Model) -> dict[str, torch.Tensor]:
    """The matrices of experts, by name, whether they are packed or not."""
    found = {}
    for tensor in model.tensors.values():
        if tensor.role is Role.EXPERTS or tensor.expert is not None and len(tensor.shape) == 2:
            for matrix in tensor.matrices("block_linear"):
                assert matrix.name not in found
                found[matrix.name] = matrix.take(slab_of(tensors[tensor.name], matrix))
    return found


@pytest.mark.parametrize(
    ("name", "packed_on_disk"),
    [
        *((name, False) for name in ("mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2")),
        *((name, False) for name in ("deepseek_v3", "qwen3_5_moe")),
        *(
            (name, True)
            for name in ("gpt_oss", "llama4", "qwen3_vl_moe", "granitemoe", "openai_privacy_filter")
        ),
    ],
)
def test_packed_experts_equal_those_of_the_checkpoint_that_transformers_saves(name, packed_on_disk, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    config = config_of(model)
    in_memory, on_disk = (
        describe(shapes_of(model), config),
        describe({n: t.shape for n, t in saved.items()}, config),
    )
    assert any(t.role is Role.EXPERTS for t in in_memory.tensors.values())
    assert any(t.role is Role.EXPERTS for t in on_disk.tensors.values()) == packed_on_disk
    expected, found = expert_matrices(saved, on_disk), expert_matrices(state, in_memory)
    assert expected and found.keys() == expected.keys()
    assert all(torch.equal(found[matrix], expected[matrix]) for matrix in expected)


@pytest.mark.parametrize("name", ["gpt_oss", "openai_privacy_filter", "llama4", "qwen3_moe", "dbrx"])
def test_the_matrices_of_packed_experts_compute_what_the_model_does(name):
    model = build(name)
    state, described_model = model.state_dict(), describe(shapes_of(model), config_of(model))
    layer = 1 if name == "llama4" else 0
    block = next(
        m for n, m in model.named_modules() if re.search(rf"\.{layer}\.(mlp|feed_forward|ffn)\.experts$", n)
    )
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_BN = torch.randn(3, 16)
    matrices = expert_matrices(state, described_model)
    ours = {
        n: m
        for n, m in matrices.items()
        if f".{layer}." in n and re.search(r"\.2\.", n.partition("experts")[2])
    }
    gate, up, down = (
        next(m for n, m in ours.items() if re.search(rf"\.({part})(\.|$)", n))
        for part in ("gate_proj|w1", "up_proj|v1", "down_proj|w2")
    )
    biases = {
        n.rpartition(".")[2]: b[2]
        for n, b in state.items()
        if n.endswith("_bias") and f".{layer}.mlp.experts" in n
    }
    hidden = [x_BN @ part.T for part in (gate, up)]
    if biases:
        both = biases["gate_up_proj_bias"]
        halves = (both[::2], both[1::2]) if name == "gpt_oss" else both.chunk(2)
        hidden = [part + bias for part, bias in zip(hidden, halves)]
    if name in ("gpt_oss", "openai_privacy_filter"):
        gate_BI, up_BI = hidden[0].clamp(max=block.limit), hidden[1].clamp(-block.limit, block.limit)
        expected = (up_BI + 1) * gate_BI * torch.sigmoid(gate_BI * block.alpha) @ down.T + biases[
            "down_proj_bias"
        ]
    else:
        expected = torch.nn.functional.silu(hidden[0]) * hidden[1] @ down.T
    chosen, weight = torch.full((3, 1), 2), torch.ones(3, 1)
    with torch.no_grad():
        if name == "llama4":
            found = block(x_BN.repeat(4, 1)).view(4, 3, 16)[2]
        elif name == "dbrx":
            found = block(x_BN[None], chosen, weight)[0]
        else:
            found = block(x_BN, chosen, weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("outputs_first", [False, True])
@given(experts=st.integers(1, 3), inner=st.integers(1, 4), width=st.integers(1, 5))
def test_packed_experts_are_taken_and_put_back_exactly(interleaved, outputs_first, experts, inner, width):
    prefix = "model.layers.0.mlp.experts."
    both, one = (experts, 2 * inner, width), (experts, width, inner)
    if not outputs_first:
        both, one = ((e, b, a) for e, a, b in (both, one))
    shapes = {f"{prefix}gate_up_proj": both, f"{prefix}down_proj": one}
    config = {"model_type": "gpt_oss"} if interleaved else None
    for tensor in describe(shapes, config).tensors.values():
        stored = torch.arange(1.0, 1 + torch.Size(tensor.shape).numel()).view(tensor.shape)
        copied = torch.zeros_like(stored)
        matrices = tensor.matrices("block_linear")
        assert len(matrices) == experts * (2 if "gate_up" in tensor.name else 1)
        for matrix in matrices:
            taken = matrix.take(slab_of(stored, matrix))
            assert tuple(taken.shape) == matrix.shape
            assert matrix.shape == ((width, inner) if "down" in matrix.name else (inner, width))
            assert taken.data_ptr() in range(stored.data_ptr(), stored.data_ptr() + stored.numel() * 4)
            matrix.put(slab_of(copied, matrix), taken)
        assert torch.equal(copied, stored)


def test_experts_without_a_known_orientation_have_no_matrices_and_say_why():
    model = describe({"a.layers.0.experts.up_proj": (4, 8, 16), "a.layers.0.experts.down_proj": (4, 16, 8)})
    for tensor in model.tensors.values():
        assert tensor.role is Role.EXPERTS and tensor.unsplit
        assert all(tensor.matrices(keys) == () for keys in KEYS)
    known = describe({name: t.shape for name, t in model.tensors.items()}, {"model_type": "nemotron_h"})
    assert [len(t.matrices("block_linear")) for t in known.tensors.values()] == [4, 4]


def test_biases_of_packed_experts_are_no_matrices():
    tensors = describe(*described("gpt_oss")).tensors
    for end, keys in product(("gate_up_proj_bias", "down_proj_bias"), KEYS):
        assert tensors[f"model.layers.0.mlp.experts.{end}"].matrices(keys) == ()


def test_experts_of_their_own_have_numbers():
    model = describe(
        {"model.layers.0.mlp.experts.12.gate_proj.weight": (4, 4), "model.layers.0.mlp.gate.weight": (2, 4)}
    )
    assert [tensor.expert for tensor in model.tensors.values()] == [12, None]


# ------------------------------------------------------------------------------------------ permutations


def tokens(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 9)[None] % 40).logits


def pictures(size: int) -> Callable[[Any], torch.Tensor]:
    def run(model: Any) -> torch.Tensor:
        found = model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
        return found if isinstance(found, torch.Tensor) else found.logits

    return run


def both_towers(model: Any) -> torch.Tensor:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens_BL = torch.arange(3, 19).reshape(2, 8)
    if not hasattr(model, "config"):
        image_BD, text_BD, _ = model(images, tokens_BL)
        return image_BD @ text_BD.T
    found = model(input_ids=tokens_BL, pixel_values=images)
    return found.logits_per_image


def noise(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_BCHW, text_BTD = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
    return model(x_BCHW, 5, encoder_hidden_states=text_BTD).sample


PERMUTED: dict[str, tuple[Callable[[Any], torch.Tensor], set[str]]] = {
    "llama": (tokens, {"hidden", "heads", "residual"}),
    "qwen2": (tokens, {"hidden", "heads", "residual"}),
    "qwen3": (tokens, {"hidden", "heads", "residual"}),
    "gemma3": (tokens, {"hidden", "heads", "residual"}),
    "phi3": (tokens, {"hidden", "residual"}),
    "gpt_neox": (tokens, {"hidden", "heads", "residual"}),
    "bloom": (tokens, {"hidden", "residual"}),
    "falcon": (tokens, {"hidden", "residual"}),
    "gpt2": (tokens, {"hidden", "heads", "residual"}),
    "opt": (tokens, {"hidden", "heads", "residual"}),
    "bert": (tokens, {"hidden", "heads"}),
    "roberta": (tokens, {"hidden", "heads"}),
    "distilbert": (tokens, {"hidden", "heads"}),
    "deepseek_v3": (tokens, {"hidden"}),
    "vit": (pictures(8), {"hidden", "heads", "residual"}),
    "dinov2": (pictures(8), {"hidden", "heads"}),
    "clip": (both_towers, {"hidden", "heads", "residual"}),
    "siglip": (both_towers, {"hidden", "heads", "residual"}),
    "open_clip_vit": (both_towers, {"hidden", "heads", "residual"}),
    "timm/vit_tiny_patch16_224": (pictures(224), {"hidden", "heads", "residual"}),
    "timm/swin_tiny_patch4_window7_224": (pictures(224), {"hidden"}),
    "timm/resnet18": (pictures(64), {"conv1", "residual"}),
    "torchvision/resnet18": (pictures(64), {"conv1", "residual"}),
    "torchvision/resnet50": (pictures(64), {"conv1", "conv2", "residual"}),
    "torchvision/resnext50_32x4d": (pictures(64), {"residual"}),
    "resnet_hf": (pictures(32), {"convolution", "residual"}),
    "unet": (noise, {"hidden"}),
}


# What a folder's configuration says of models whose library has none in the model.
CONFIGS: dict[str, dict[str, Any]] = {
    "open_clip_vit": {
        "vision_cfg": {"layers": 2, "width": 16, "head_width": 4},
        "text_cfg": {"width": 16, "heads": 4, "layers": 2},
    },
    "timm/vit_tiny_patch16_224": {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 3}},
}


@pytest.mark.parametrize("name", PERMUTED)
def test_what_has_one_label_moves_together(name):
    run, expected = PERMUTED[name]
    torch.manual_seed(0)
    model = build(name)
    state = shaken_state(model)
    model.load_state_dict(state)
    shapes = {tensor_name: tuple(tensor.shape) for tensor_name, tensor in state.items()}
    found = describe(shapes, CONFIGS.get(name) or config_of(model))
    labels = [label for label in found.units if label != "vocabulary"]
    assert {label.rpartition(".")[2] for label in labels} == expected
    with torch.no_grad():
        before = run(model)
        for kind in sorted(expected):
            moved = dict(state)
            for label in labels:
                if label.rpartition(".")[2] != kind:
                    continue
                order = torch.randperm(found.units[label]).tolist()
                order = order[1:] + order[:1] if order == sorted(order) else order
                for tensor in found.tensors.values():
                    for axis, own in enumerate(tensor.axes):
                        if own == label:
                            indices = torch.tensor(tensor.moved(axis, order))
                            moved[tensor.name] = moved[tensor.name].index_select(axis, indices)
            assert any(not torch.equal(moved[n], state[n]) for n in state)
            model.load_state_dict(moved)
            torch.testing.assert_close(run(model), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


def test_an_mlp_of_numbered_layers_is_a_chain():
    shapes = {"net.0.weight": (5, 3), "net.0.bias": (5,), "net.2.weight": (7, 5), "net.4.weight": (2, 7)}
    model = describe(shapes)
    assert model.units == {"net.0.hidden": 5, "net.2.hidden": 7}
    assert model.tensors["net.2.weight"].axes == ("net.2.hidden", "net.0.hidden")
    assert model.tensors["net.4.weight"].axes == (None, "net.2.hidden")
    for other in ({"net.4.weight": (2, 6)}, {"tail.weight": (4, 2)}, {"net.3.running_mean": (7,)}):
        assert not describe(shapes | other).units


def test_what_no_tensor_reads_keeps_its_order():
    siglip = describe(*described("siglip")).units
    assert "text.residual" in siglip and "vision.residual" not in siglip
    shapes, config = described("llama")
    headless = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    assert "residual" not in describe(headless, config).units
    assert "residual" in describe(headless, {**config, "architectures": ["LlamaForCausalLM"]}).units


def test_a_norm_inside_of_an_mlp_takes_its_label():
    plain = {"blocks.0.mlp.fc1.weight": (24, 16), "blocks.0.mlp.fc2.weight": (16, 24)}
    assert describe(plain).units == {"blocks.0.mlp.hidden": 24}
    assert describe({**plain, "blocks.0.mlp.dwconv.weight": (24, 1, 3, 3)}).units == {}


def test_norms_before_convolutions_leave_channels_alone():
    shapes: dict[str, tuple[int, ...]] = {}
    for block, (inputs, outputs) in enumerate([(8, 8), (8, 16)]):
        for number, (a, b) in enumerate([(inputs, outputs), (outputs, outputs)], start=1):
            shapes[f"layer1.{block}.conv{number}.weight"] = (b, a, 3, 3)
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"layer1.{block}.bn{number}.{part}"] = (a,)
    shapes["layer1.1.downsample.1.running_mean"] = (16,)
    model = describe(shapes)
    assert model.architecture == "resnet" and model.units == {}


# ------------------------------------------------------------------------------------------ rows


def test_a_row_is_all_that_an_architecture_needs(monkeypatch):
    monkeypatch.setattr(rows, "ROWS", list(rows.ROWS))
    shapes = {"net.0.mixer.wi_fused.weight": (12, 4), "net.0.mixer.experts.w13": (2, 4, 6)}
    assert describe(shapes).tensors["net.0.mixer.wi_fused.weight"].role is Role.LINEAR
    register(
        Row(
            "mymodel",
            model_types=("mymodel",),
            patterns=(
                Pattern("wi_fused", Role.MLP_GATE_UP),
                Pattern(
                    r"experts\.w13",
                    Role.EXPERTS,
                    experts=("experts.{}.w1", "experts.{}.w3"),
                    outputs_first=False,
                ),
            ),
        )
    )
    model = describe(shapes, {"model_type": "wrapper", "text_config": {"model_type": "mymodel"}})
    assert model.architecture == "mymodel"
    assert model.tensors["net.0.mixer.wi_fused.weight"].role is Role.MLP_GATE_UP
    assert [m.name for m in model.tensors["net.0.mixer.experts.w13"].matrices("block_linear")] == [
        "net.0.mixer.experts.0.w1", "net.0.mixer.experts.0.w3", "net.0.mixer.experts.1.w1", "net.0.mixer.experts.1.w3",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="mymodel"):
        register(Row("mymodel"))


def test_no_two_rows_have_one_name_or_model_type():
    ids = [row.id for row in rows.ROWS]
    types = [model_type for row in rows.ROWS for model_type in row.model_types]
    assert len(set(ids)) == len(ids) and len(set(types)) == len(types)


def test_causal_language_models_are_told_by_the_configuration():
    assert describe({}, {"architectures": ["LlamaForCausalLM"]}).causal
    assert describe({}, {"architectures": ["GPT2LMHeadModel"]}).causal
    assert not describe({}, {"architectures": ["BertForMaskedLM"]}).causal
    assert not describe({}).causal


# ------------------------------------------------------------------------------------------ cost


def test_nothing_heavy_is_imported():
    heavy = {"torch", "numpy", "pydantic", "transformers"}
    code = f"import sys, mergeline.merging.architecture; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_ten_thousand_tensors_are_described_in_a_moment():
    parts = [(f"{part}_proj.weight", (8, 8)) for part in ("gate", "up", "down")]
    shapes = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}": shape
        for layer, expert, (part, shape) in product(range(40), range(84), parts)
    }
    assert len(shapes) > 10_000
    taken = []
    for _ in range(3):
        start = time.process_time()
        describe(shapes, {"model_type": "qwen3_moe"})
        taken.append(time.process_time() - start)
    assert min(taken) < 1
