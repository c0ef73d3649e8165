"""Matrices that lie in tensors in other ways than as (outputs, inputs), and BatchNorm: packed experts, convolutions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

import pytest
import torch
from checkpoints import State, random_state, same_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.architecture import describe
from mergeline.merging.compress import compress, extract_expert
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.laws import count_for, gathered
from mergeline.merging.methods import catalogue

EXPERTS, INNER, WIDTH = 3, 4, 6
PLACE = "model.layers.{}.mlp.experts."
OTHERS = {
    "model.embed_tokens.weight": (9, WIDTH),
    "model.layers.0.self_attn.o_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.input_layernorm.weight": (WIDTH,),
}
# How gate and up lie in one tensor: its shape beside that of down; with its configuration and what else it has.
QWEN: dict[str, Any] = {
    "both": (EXPERTS, 2 * INNER, WIDTH),
    "down": (EXPERTS, WIDTH, INNER),
    "model_type": "qwen3_moe",
}
GPT_OSS: dict[str, Any] = {
    "both": (EXPERTS, WIDTH, 2 * INNER), "down": (EXPERTS, INNER, WIDTH), "model_type": "gpt_oss"
}  # fmt: skip
every_layout = pytest.mark.parametrize("layout", [QWEN, GPT_OSS], ids=["qwen", "gpt-oss"])
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("cart", {"rank": 0.5}),
    ("tsv_merge", {}),
    ("iso_c", {}),
    ("wudi", {"iterations": 20}),
    ("regmean", {}),
    ("ties", {}),
    ("task_arithmetic", {}),
]
EXACT = ("ties", "task_arithmetic")


def shapes_of(layout: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    found = dict(OTHERS)
    for layer in range(2):
        found[PLACE.format(layer) + "gate_up_proj"] = layout["both"]
        found[PLACE.format(layer) + "down_proj"] = layout["down"]
        if layout is GPT_OSS:  # whose biases (E, N) are one tensor to every method
            found[PLACE.format(layer) + "gate_up_proj_bias"] = (EXPERTS, 2 * INNER)
    return found


def config_of(layout: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": layout["model_type"], "num_hidden_layers": 2}


def families(layout: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> tuple[State, dict[str, State]]:
    """A base and three experts near it."""
    shapes = shapes_of(layout)
    base = random_state(0, dtype, shapes)
    taus = [random_state(seed, dtype, shapes) for seed in (1, 2, 3)]
    return base, {f"e{t}": {k: v + 0.1 * tau[k] for k, v in base.items()} for t, tau in enumerate(taus)}


def split(state: State, layout: Mapping[str, Any]) -> State:
    """The same with a tensor for each matrix of the packed experts."""
    model = describe({name: tuple(tensor.shape) for name, tensor in state.items()}, config_of(layout))
    found: State = {}
    for name, tensor in state.items():
        packed = model.tensors[name].packed
        if name.endswith("proj_bias"):
            place, part = name.removesuffix("_bias").rsplit(".", 1)
            found |= {f"{place}.{expert}.{part}.bias": tensor[expert].clone() for expert in range(EXPERTS)}
        elif packed is None:
            found[name] = tensor
        for matrix in packed.matrices() if packed else ():
            flat = tensor.flatten()
            found[matrix.name] = matrix.read(lambda start, stop, of=flat: of[start:stop]).contiguous()
    return found


def agree(packed: State, single: State, exactly: bool) -> bool:
    if exactly:
        return same_tensors(packed, single)
    return packed.keys() == single.keys() and all(
        torch.allclose(packed[name], single[name], rtol=0, atol=1e-6) for name in single
    )


@every_layout
def test_every_expert_has_a_tensor_of_its_own_after_splitting(layout):
    """By hand: where gate, up and down lie."""
    state = families(layout)[0]
    found, place = split(state, layout), PLACE.format(1)
    both, down = state[place + "gate_up_proj"], state[place + "down_proj"]
    for expert in range(EXPERTS):
        if layout["model_type"] == "gpt_oss":  # (inputs, outputs), the columns of gate and up alternate
            gate, up, out = both[expert, :, ::2].T, both[expert, :, 1::2].T, down[expert].T
        else:
            gate, up, out = both[expert, :INNER], both[expert, INNER:], down[expert]
        for part, expected in (("gate", gate), ("up", up), ("down", out)):
            assert torch.equal(found[f"{place}{expert}.{part}_proj.weight"], expected)


@every_layout
@pytest.mark.parametrize(("method", "params"), METHODS, ids=[method for method, _ in METHODS])
def test_packed_experts_are_merged_as_single_ones_are(method, params, layout):
    base, experts = families(layout)
    single = {name: split(state, layout) for name, state in experts.items()}
    given = {"params": params, "statistics": gathered(method, single, params)}
    packed = merge_state_dicts(method, experts, base, **given)
    expected = merge_state_dicts(method, single, split(base, layout), **given)
    assert agree(split(packed, layout), expected, method in EXACT)
    assert not agree(split(packed, layout), split(base, layout), exactly=False)
    if method not in EXACT:  # packed experts are not left to what other tensors get
        rest = merge_state_dicts("average", experts)
        for name in (name for name in packed if name.endswith(("gate_up_proj", "down_proj"))):
            assert not torch.allclose(packed[name], rest[name], atol=1e-4)
            assert not torch.allclose(packed[name], base[name], atol=1e-4)


LLAMA4: dict[str, Any] = {**GPT_OSS, "model_type": "llama4"}  # without biases, gate before up


@pytest.mark.parametrize("layout", [QWEN, LLAMA4], ids=["qwen", "llama4"])
@pytest.mark.parametrize("method", sorted(catalogue()))
def test_every_method_of_the_catalogue_merges_packed_experts_as_single_ones(method, layout):
    base, experts = families(layout)
    experts = dict(list(experts.items())[: count_for(catalogue()[method])])
    single = {name: split(state, layout) for name, state in experts.items()}
    statistics = gathered(method, single)
    packed = merge_state_dicts(method, experts, base, statistics=statistics)
    expected = merge_state_dicts(method, single, split(base, layout), statistics=statistics)
    assert agree(split(packed, layout), expected, exactly=False)


def test_statistics_by_entry_may_lie_as_packed_experts_do():
    base, experts = families(QWEN)
    packed = {name: split(state, QWEN) for name, state in experts.items()}
    expected = merge_state_dicts("fisher", experts, base, statistics=gathered("fisher", packed))
    found = merge_state_dicts("fisher", experts, base, statistics=gathered("fisher", experts))
    assert same_tensors(found, expected)


def saved(state: State, folder: Path, config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def recipe_of(layout: Mapping[str, Any], folder: Path, is_split: bool, **recipe: Any) -> dict[str, Any]:
    """The family as files, with packed experts or single ones, and a recipe."""
    base, experts = families(layout)
    given = {
        name: split(state, layout) if is_split else state for name, state in {"base": base, **experts}.items()
    }
    config = config_of(layout)
    paths = {name: saved(state, folder / name, config) for name, state in given.items()}
    return {"base": paths.pop("base"), "experts": paths, **recipe}


@every_layout
@pytest.mark.parametrize(("method", "params"), METHODS, ids=[method for method, _ in METHODS])
def test_files_of_packed_experts_are_merged_as_those_of_single_ones_are(method, params, layout, tmp_path):
    experts = {name: split(state, layout) for name, state in families(layout)[1].items()}
    statistics = {
        kind: [saved(state, tmp_path / kind / str(t)) for t, state in enumerate(states)]
        for kind, states in gathered(method, experts, params).items()
    }
    found = {}
    for kind, is_split in (("packed", False), ("single", True)):
        own = {"method": method, "params": params, "statistics": statistics}
        merge(recipe_of(layout, tmp_path / kind, is_split, **own), tmp_path / f"{kind}-out")
        found[kind] = load_file(tmp_path / f"{kind}-out" / "model.safetensors")
    assert agree(split(found["packed"], layout), found["single"], method in EXACT)


@every_layout
def test_files_and_memory_give_packed_experts_the_same_bits(layout, tmp_path):
    base, experts = families(layout)
    recipe = recipe_of(layout, tmp_path / "in", False, method="cart", params={"rank": 0.5})
    merge(recipe, tmp_path / "out")
    expected = merge_state_dicts("cart", experts, base, params={"rank": 0.5})
    assert same_tensors(load_file(tmp_path / "out" / "model.safetensors"), expected)


@every_layout
def test_the_plan_says_how_packed_experts_are_treated(layout, mergeline, tmp_path):
    recipe = recipe_of(layout, tmp_path / "in", False, method="cart")
    rows = {row["tensor"]: row["treatment"] for row in make_plan(recipe).table()}
    for layer in range(2):
        assert rows[PLACE.format(layer) + "gate_up_proj"] == f"{2 * EXPERTS} matrices"
        assert rows[PLACE.format(layer) + "down_proj"] == f"{EXPERTS} matrices"
    assert rows["model.layers.0.self_attn.o_proj.weight"] == "matrix"
    assert rows["model.layers.0.input_layernorm.weight"] == rows["model.embed_tokens.weight"] == "mean"
    paths = [part for name, path in recipe["experts"].items() for part in ("--expert", f"{name}={path}")]
    printed = mergeline("plan", "--method", "cart", "--base", recipe["base"], *paths, "--table").out
    for name, treatment in rows.items():
        [line] = [line for line in printed.splitlines() if line.startswith(f"{name} ")]
        assert treatment in line


@every_layout
@pytest.mark.parametrize("method", ["cart_indexing", "tsv_compress", "tall_mask"])
def test_a_store_gives_packed_experts_back_as_the_merge_of_that_task(method, layout, tmp_path):
    recipe = recipe_of(layout, tmp_path / "in", False, method=method)
    compress(recipe, tmp_path / "store.safetensors")
    for task, name in enumerate(recipe["experts"]):
        merge({**recipe, "params": {"task": task}}, tmp_path / f"merged-{name}")
        extract_expert(tmp_path / "store.safetensors", name, tmp_path / f"{name}.safetensors")
        merged = load_file(tmp_path / f"merged-{name}" / "model.safetensors")
        assert same_tensors(load_file(tmp_path / f"{name}.safetensors"), merged)


# --------------------------------------------------------------------------------------- convolutions, Conv1D


def norm(prefix: str, channels: int) -> dict[str, tuple[int, ...]]:
    own = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.{part}": (channels,) for part in own}


RESNET = {
    "conv1.weight": (4, 3, 3, 3),
    **norm("bn1", 4),
    "layer1.0.conv1.weight": (4, 4, 3, 3),
    **norm("layer1.0.bn1", 4),
    "layer1.1.conv1.weight": (6, 4, 1, 1),
    **norm("layer1.1.bn1", 6),
    "layer2.0.depthwise.weight": (6, 1, 3, 3),
    "fc.weight": (5, 6),
}
IN_LAYERS = {"layer1.0.conv1.weight", "layer1.1.conv1.weight"}


def resnets(count: int = 3) -> tuple[State, dict[str, State]]:
    """A base and experts, each with a counter of its own."""
    states = [random_state(seed, torch.float64, RESNET) for seed in range(count + 1)]
    for seed, state in enumerate(states):
        for name in state:
            if name.endswith("running_var"):
                state[name] = state[name].abs() + 0.1
        state["bn1.num_batches_tracked"] = torch.tensor(100 + 7 * seed % 20)
    return states[0], {f"e{t}": state for t, state in enumerate(states[1:])}


def test_convolutions_in_numbered_layers_are_decomposed_as_matrices():
    base, experts = resnets()
    found = merge_state_dicts("cart", experts, base, params={"rank": 0.3})
    mean = merge_state_dicts("average", experts, base)
    assert {name for name in RESNET if not torch.allclose(found[name], mean[name])} == IN_LAYERS
    for name in IN_LAYERS:
        flat = {e: {"layers.0.weight": state[name].flatten(1)} for e, state in experts.items()}
        expected = merge_state_dicts("cart", flat, params={"rank": 0.3})["layers.0.weight"]
        assert torch.allclose(found[name].flatten(1), expected, rtol=0, atol=1e-12)
    without = merge_state_dicts("cart", experts, base, params={"rank": 0.3, "convolutions": False})
    assert all(torch.allclose(without[name], mean[name]) for name in RESNET)


def gpt2(seed: int) -> State:
    """Two layers whose weights are stored as (inputs, outputs), as of transformers' Conv1D."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (7, 6)}
    for layer in range(2):
        shapes[f"h.{layer}.attn.c_attn.weight"] = (6, 18)
        shapes[f"h.{layer}.attn.c_proj.weight"] = (6, 6)
        shapes[f"h.{layer}.mlp.c_fc.weight"] = (6, 8)
        shapes[f"h.{layer}.mlp.c_proj.weight"] = (8, 6)
        shapes[f"h.{layer}.ln_1.weight"] = (6,)
    return random_state(seed, torch.float64, shapes)


def as_linear(state: State) -> State:
    """The same model with (outputs, inputs)."""
    return {name: tensor.T.contiguous() if ".c_" in name else tensor for name, tensor in state.items()}


@pytest.mark.parametrize("params", [{"iterations": 20}, {"solver": "direct"}])
def test_conv1d_is_merged_as_the_linear_layer_that_it_is(params):
    base, *others = map(gpt2, range(4))
    experts = {f"e{t}": state for t, state in enumerate(others)}

    def wudi(change: Any) -> State:
        return merge_state_dicts(
            "wudi", {e: change(s) for e, s in experts.items()}, change(base), params=params
        )

    found, expected = as_linear(wudi(dict)), wudi(as_linear)
    assert agree(found, expected, exactly=False)

    def unknown(state: State) -> State:  # names that say nothing: (outputs, inputs)
        return {name.replace("h.", "layers.").replace(".c_", ".w_"): tensor for name, tensor in state.items()}

    name = "h.0.mlp.c_fc.weight"
    assert not torch.allclose(found[name].T, wudi(unknown)["layers.0.mlp.w_fc.weight"], atol=1e-4)


# --------------------------------------------------------------------------------------- BatchNorm


def average_of(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0)


def test_running_statistics_are_averaged_and_counters_need_not_agree(tmp_path):
    base, experts = resnets()
    found = merge_state_dicts("ties", experts, base)
    paths = {"base": tmp_path / "base.safetensors", **{e: tmp_path / f"{e}.safetensors" for e in experts}}
    for name, state in {"base": base, **experts}.items():
        save_file(state, paths[name])
    recipe = {"method": "ties", "base": paths.pop("base"), "experts": paths}
    merge(recipe, tmp_path / "out.safetensors")
    running = [name for name in RESNET if "running" in name]
    for state in (found, load_file(tmp_path / "out.safetensors")):
        for name in running:
            assert torch.allclose(state[name], average_of([expert[name] for expert in experts.values()]))
        counters = [s["bn1.num_batches_tracked"] for s in (base, *experts.values())]
        assert len(set(map(int, counters))) > 1 and state["bn1.num_batches_tracked"] == max(counters)
    plan = make_plan(recipe)
    assert plan.problems == []
    assert any(f"{len(running)} running means and variances" in warning for warning in plan.warnings)
    assert any("counters need not agree" in w and "'bn1.num_batches_tracked'" in w for w in plan.warnings)
    rows = {row["tensor"]: row["treatment"] for row in plan.table()}
    assert rows["bn1.num_batches_tracked"] == "largest count"
    methods = {row["tensor"]: row.get("method") for row in plan.table()}
    assert {methods[name] for name in running} == {"average"} and methods["bn1.weight"] == "ties"
