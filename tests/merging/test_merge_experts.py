"""Experts of a mixture that are merged in groups, or left out: transformers opens what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_zoo import TRANSFORMERS, build
from places import GOLDENS
from safetensors.torch import load_file, save_file

from mergeline.merging.compress import compress, extract_expert
from mergeline.merging.errors import UserError
from mergeline.merging.learning.collect import collect
from mergeline.merging.learning.gathering import Gathering
from mergeline.merging.learning.network import Examples, Network
from mergeline.merging.merge_experts import merge_experts
from mergeline.merging.verify import verify

GROUPS = [[0, 2], [1, 3]]
IDS = torch.randint(0, 40, (6, 8), generator=torch.Generator().manual_seed(1))
# Packed in files or not, gate and up side by side or not, a router with a bias or not.
KINDS = ["mixtral", "qwen3_moe", "qwen2_moe", "granitemoe", "llama4", "qwen3_5_moe"]


def saved(name: str, folder: Path, packed: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = build(name)
    model.save_pretrained(folder, save_original_format=not packed)
    return model


def opened(like: Any, folder: Path) -> Any:
    return type(like).from_pretrained(folder).eval()


def experts_of(model: Any) -> list[tuple[Any, torch.Tensor]]:
    """Of each layer, what holds its experts, and the router's weight."""
    parts = [part for part in model.modules() if isinstance(getattr(part, "experts", None), torch.nn.Module)]
    routers = [getattr(part, "gate", None) or part.router for part in parts]
    weights = [r.weight if hasattr(r, "weight") else r.layer.weight for r in routers]
    return [(part.experts, weight) for part, weight in zip(parts, weights)]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A tiny Mixtral in a folder, and statistics of it."""
    folder = tmp_path_factory.mktemp("moe") / "model"
    model = saved("mixtral", folder)
    return model, folder, statistics_of(model, folder)


def statistics_of(model: Any, folder: Path, outputs: bool = True) -> Path:
    def run(module: Any, batch: Any) -> torch.Tensor:
        return module.base_model(input_ids=batch["input_ids"])[0].flatten(0, 1)

    def batches() -> Any:
        return iter([{"task": "t", "input_ids": IDS}])

    examples = Examples({"t": batches}, {"t": len(IDS)}, {"t": folder.name}, {"t": "x"}, "fit")
    out = folder.with_name(f"{folder.name}-statistics.safetensors")
    return collect(
        "experts", folder, Network(model, run), examples, out, gathering=Gathering(outputs=outputs)
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("packed", [False, True], ids=["as published", "as in memory"])
def test_the_output_computes_what_the_groups_merged_by_hand_compute(name, packed, tmp_path):
    model = saved(name, tmp_path / "model", packed)
    merge_experts(tmp_path / "model", tmp_path / "out", groups=GROUPS, align=False, router="average")
    found = opened(model, tmp_path / "out")
    pairs = list(zip(experts_of(found), experts_of(model)))
    assert pairs
    for (few, router), (many, before) in pairs:
        assert len(router) == len(GROUPS)
        for (_, after), (_, tensor) in zip(few.named_parameters(), many.named_parameters()):
            expected = torch.stack([tensor[group].mean(0) for group in GROUPS])
            torch.testing.assert_close(after, expected)
        torch.testing.assert_close(router, torch.stack([before[group].mean(0) for group in GROUPS]))
    assert torch.isfinite(found(input_ids=IDS).logits).all()
    verify(tmp_path / "out")


def test_equal_experts_are_merged_without_loss(tmp_path):
    torch.manual_seed(0)
    model = build("mixtral")
    with torch.no_grad():
        for experts, router in experts_of(model):
            for tensor in [*experts.parameters(), router]:
                tensor[2:] = tensor[:2]
    model.save_pretrained(tmp_path / "model")
    merge_experts(tmp_path / "model", tmp_path / "out", groups=GROUPS, router="wide")
    torch.testing.assert_close(
        opened(model, tmp_path / "out")(input_ids=IDS).logits, model(input_ids=IDS).logits
    )


@pytest.mark.parametrize("router", ["dominant", "average"])
def test_groups_of_one_keep_every_bit(router, mixtral, tmp_path):
    _, folder, _ = mixtral
    merge_experts(folder, tmp_path / "out", groups=[[0], [1], [2], [3]], router=router)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_permuted_copies_are_merged_without_loss(tmp_path):
    """Hidden units in another order are the same function; matched, their average is that, too."""
    torch.manual_seed(0)
    model = build("mixtral")
    with torch.no_grad():
        for experts, router in experts_of(model):
            hidden = experts.down_proj.shape[2]
            order = torch.randperm(hidden)
            for copy, of in ((2, 0), (3, 1)):
                gate_up = experts.gate_up_proj[of]
                experts.gate_up_proj[copy] = torch.cat([gate_up[:hidden][order], gate_up[hidden:][order]])
                experts.down_proj[copy] = experts.down_proj[of][:, order]
                router[copy] = router[of]
    model.save_pretrained(tmp_path / "model")
    expected = model(input_ids=IDS).logits
    for align in (True, False):
        out = tmp_path / f"out-{align}"
        merge_experts(tmp_path / "model", out, groups=GROUPS, router="wide", align=align)
        found = opened(model, out)(input_ids=IDS).logits
        assert torch.allclose(found, expected, atol=1e-5) is align


def test_pruning_leaves_the_most_used_experts_as_they_are(mixtral, tmp_path):
    model, folder, statistics = mixtral
    made = merge_experts(folder, tmp_path / "out", method="prune", experts=2, statistics=statistics)
    found, held = opened(model, tmp_path / "out"), load_file(statistics)
    for i, ((few, router), (many, before)) in enumerate(zip(experts_of(found), experts_of(model))):
        usage = held[f"model.layers.{i}.mlp/usage"]
        kept = sorted(usage.argsort(descending=True, stable=True)[:2].tolist())
        assert torch.equal(few.down_proj, many.down_proj[kept])
        assert torch.equal(router, before[kept])
        assert made["mixture"]["left_out"][f"model.layers.{i}.mlp"] == sorted({0, 1, 2, 3} - set(kept))
    assert json.loads((tmp_path / "out/config.json").read_text())["num_local_experts"] == 2


@pytest.mark.parametrize("method", ["mc_smoe", "sub_moe"])
def test_usage_weighs_the_members_of_groups_found_by_statistics(method, mixtral, tmp_path):
    model, folder, statistics = mixtral
    settings = {"align": False} if method == "mc_smoe" else {}
    made = merge_experts(
        folder, tmp_path / "out", method=method, experts=3, statistics=statistics, **settings
    )
    held, found = load_file(statistics), opened(model, tmp_path / "out")
    for i, ((few, _), (many, _)) in enumerate(zip(experts_of(found), experts_of(model))):
        usage = held[f"model.layers.{i}.mlp/usage"]
        groups = made["mixture"]["merged"][f"model.layers.{i}.mlp"]
        assert len(groups) == 3 and sorted(sum(groups, [])) == [0, 1, 2, 3]
        for slot, group in enumerate(groups):
            share = usage[group] / usage[group].sum()
            expected = (share[:, None, None] * many.down_proj[group]).sum(0)
            torch.testing.assert_close(few.down_proj[slot], expected)
    assert "bit-identical" in verify(tmp_path / "out")


def test_a_rank_cuts_sub_moe_to_the_leading_directions_of_all_members(mixtral, tmp_path):
    model, folder, statistics = mixtral
    merge_experts(folder, tmp_path / "out", method="sub_moe", groups=GROUPS, rank=0.25, statistics=statistics)
    for few, _ in experts_of(opened(model, tmp_path / "out")):
        assert np.linalg.matrix_rank(few.down_proj[0].detach().numpy(), tol=1e-5) == 4


def test_compressed_experts_are_factors_and_rows_of_what_the_groups_became(mixtral, tmp_path):
    """MC-SMoE's form, written dense: transformers opens it, and each matrix is cut from the one without --compress."""
    model, folder, _ = mixtral
    merge_experts(folder, tmp_path / "whole", groups=GROUPS)
    made = merge_experts(folder, tmp_path / "out", groups=GROUPS, compress=0.5, sparse=0.25)
    whole, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    apart = size = 0.0
    for name, tensor in whole.items():
        if ".experts." not in name:
            assert torch.equal(found[name], tensor)
            continue
        rows, columns = tensor.shape
        rank = math.ceil(0.5 * (rows * columns) / (rows + columns))
        u, s, vt = torch.linalg.svd(tensor.double(), full_matrices=False)
        expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
        order = (tensor - expected).abs().mean(1).argsort(descending=True)[: rows // 4]
        expected[order] = tensor[order].double()
        torch.testing.assert_close(found[name], expected.float(), atol=1e-6, rtol=1e-5)
        apart += float((expected - tensor).square().sum())
        size += float(tensor.double().square().sum())
    told = made["mixture"]["compressed"]
    assert told["error"] == pytest.approx((apart / size) ** 0.5, rel=1e-4) and 0.1 < told["error"] < 1
    assert made["mixture"]["compress"] == 0.5 and made["mixture"]["sparse"] == 0.25
    assert torch.isfinite(opened(model, tmp_path / "out")(input_ids=IDS).logits).all()
    assert (tmp_path / "out/model.safetensors").stat().st_size == pytest.approx(
        (tmp_path / "whole/model.safetensors").stat().st_size, rel=0.01
    )
    card = (tmp_path / "out/README.md").read_text()
    assert f"{told['error']:.2%}" in card and "written dense" in card
    assert "bit-identical" in verify(tmp_path / "out")


def test_all_rows_of_the_rest_lose_nothing(mixtral, tmp_path):
    _, folder, _ = mixtral
    merge_experts(folder, tmp_path / "whole", groups=GROUPS)
    made = merge_experts(folder, tmp_path / "out", groups=GROUPS, compress=0.1, sparse=1.0)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-7, rtol=1e-6)
    assert made["mixture"]["compressed"]["error"] < 1e-12 and made["mixture"]["compressed"]["numbers"] > 1


def test_a_store_of_losparse_keeps_the_factors_of_experts_alone(mixtral, tmp_path):
    """What `--compress` writes dense takes less in a store, which gives it back for transformers to open."""
    model, folder, _ = mixtral
    merge_experts(folder, tmp_path / "whole", groups=GROUPS)
    made = merge_experts(folder, tmp_path / "dense", groups=GROUPS, compress=0.3)
    recipe = {
        "method": "losparse", "params": {"parameter_ratio": 0.3}, "experts": {"m": tmp_path / "whole"},
        "include": "*experts*", "excluded": "average",
    }  # fmt: skip
    told = compress(recipe, tmp_path / "store")["store"]
    extract_expert(tmp_path / "store", "m", tmp_path / "out")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "out"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-5)
    experts = sum(4 * tensor.numel() for name, tensor in one.items() if ".experts." in name)
    bits = sum(-(-len(tensor) // 8) for name, tensor in one.items() if ".experts." in name)
    share = made["mixture"]["compressed"]["numbers"]
    assert told["experts"]["m"] == round(share * experts) + bits < experts
    assert told["once"] == sum(4 * tensor.numel() for tensor in one.values()) - experts
    error = told["errors"]["experts"]["m"]["all"]
    assert error == pytest.approx(made["mixture"]["compressed"]["error"], rel=1e-4)
    assert torch.isfinite(opened(model, tmp_path / "out")(input_ids=IDS).logits).all()


def test_statistics_are_what_the_model_shows(mixtral):
    model, _, statistics = mixtral
    seen: list[torch.Tensor] = []
    [experts, *_] = [part for part, _ in experts_of(model)]
    hook = experts.register_forward_pre_hook(lambda m, args: seen.extend(args[:2]))
    with torch.no_grad():
        model(input_ids=IDS)
    hook.remove()
    hidden, chosen = seen
    held = load_file(statistics)
    counts = torch.bincount(chosen.flatten(), minlength=4)
    torch.testing.assert_close(held["model.layers.0.mlp/usage"], counts / counts.sum())
    router = model.model.layers[0].mlp.gate.weight
    logits = hidden @ router.T
    torch.testing.assert_close(held["model.layers.0.mlp/logits"], logits.T @ logits / len(hidden))
    outs = []
    for e in range(4):
        gate, up = (hidden @ experts.gate_up_proj[e].T).chunk(2, -1)
        outs.append((torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].T)
    cos = torch.stack([torch.stack([torch.cosine_similarity(a, b, -1).mean() for b in outs]) for a in outs])
    torch.testing.assert_close(held["model.layers.0.mlp/outputs"], cos, atol=1e-5, rtol=1e-4)


def test_files_of_the_official_case_give_its_outputs(tmp_path):
    """Groups of different numbers over layers, in the form that the official code has: every place stays."""
    held = load_file(GOLDENS / "unit-mcsmoe-group_and_merge.safetensors")
    model = {name.removeprefix("in."): tensor for name, tensor in held.items() if name.startswith("in.")}
    statistics = {}
    for layer in range(3):
        x_TE = held["router_logits"][:, layer].reshape(-1, 6)
        counts = torch.bincount(x_TE.topk(2).indices.flatten(), minlength=6).float()
        name = f"model.layers.{layer}.mlp"
        statistics |= {f"{name}/usage": counts / counts.sum(), f"{name}/logits": x_TE.T @ x_TE}
    (tmp_path / "model").mkdir()
    save_file(model, tmp_path / "model/model.safetensors", {"format": "pt"})
    save_file(statistics, tmp_path / "statistics.safetensors")
    config = {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    merge_experts(
        tmp_path / "model", tmp_path / "out", experts=3, router="wide", align=False,
        statistics=tmp_path / "statistics.safetensors",
    )  # fmt: skip
    found = load_file(tmp_path / "out/model.safetensors")
    for layer in range(3):
        block = f"model.layers.{layer}.block_sparse_moe"
        assert torch.equal(found[f"{block}.gate.weight"], model[f"{block}.gate.weight"])
        for expert in range(6):
            for part in ("w1", "w2", "w3"):
                torch.testing.assert_close(
                    found[f"{block}.experts.{expert}.{part}.weight"],
                    held[f"out.{layer}.{expert}.{part}"], atol=1e-6, rtol=2e-5,
                )  # fmt: skip


def test_workers_shards_and_layouts_change_no_weight(tmp_path):
    model = saved("mixtral", tmp_path / "model")
    saved("mixtral", tmp_path / "packed", packed=True)
    recipe = {"method": "passthrough", "experts": {"model": tmp_path / "model"}}
    outs = {
        "one": (tmp_path / "model", {"workers": 1}),
        "two": ({**recipe, "shard_size": 4000}, {"workers": 2}),
        "packed": (tmp_path / "packed", {}),
        "asked": ({**recipe, "layout": "packed"}, {}),
    }
    found = []
    for name, (read, options) in outs.items():
        merge_experts(read, tmp_path / "out" / name, groups=GROUPS, **options)
        found.append(opened(model, tmp_path / "out" / name).state_dict())
    assert all(torch.equal(state[key], found[0][key]) for state in found for key in found[0])


def test_half_precision_is_rounded_once(tmp_path):
    torch.manual_seed(0)
    model = build("qwen3_moe").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    merge_experts(tmp_path / "model", tmp_path / "out", groups=GROUPS, align=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    [(few, _), *_], [(many, _), *_] = experts_of(opened(model, tmp_path / "out")), experts_of(model)
    assert torch.equal(few.down_proj[0], many.down_proj[[0, 2]].double().mean(0).bfloat16())


def test_a_merge_that_was_stopped_goes_on_after_the_last_layer(mixtral, tmp_path):
    _, folder, _ = mixtral
    merge_experts(folder, tmp_path / "whole", groups=GROUPS)
    done = 0

    def stop(now: int, of: int) -> None:
        nonlocal done
        done = now
        if now == of - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_experts(folder, tmp_path / "out", groups=GROUPS, workers=1, progress=stop)
    seen: list[int] = []
    merge_experts(folder, tmp_path / "out", groups=GROUPS, progress=lambda now, of: seen.append(now))
    assert seen[0] > 1
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == two


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["--experts", "--groups"]),
    ({"experts": 2, "groups": GROUPS}, ["--experts", "--groups"]),
    ({"experts": 2}, ["--statistics"]),
    ({"experts": 0}, ["from 1 on"]),
    ({"groups": [[0, 1, 2, 3]]}, ["sent to 2", "keep 2 or more"]),
    ({"groups": [[0, 1], [1, 2]]}, ["0 to 3", "one list at most"]),
    ({"groups": [[0, 9], [1]]}, ["0 to 3"]),
    ({"groups": [[0], []]}, ["give lists"]),
    ({"groups": {"model.layers.0.mlp": GROUPS}}, ["says nothing of 'model.layers.1.mlp'"]),
    ({"groups": {"model.layer.0.mlp": GROUPS}}, ["did you mean 'model.layers.0.mlp'"]),
    (
        {"groups": {"model.layers.0.mlp": GROUPS, "model.layers.1.mlp": [[0], [1], [2, 3]]}},
        ["[2, 3] groups", "one number"],
    ),
    ({"groups": GROUPS, "method": "prune"}, ["as they are"]),
    ({"groups": GROUPS, "method": "submoe"}, ["did you mean 'sub_moe'"]),
    ({"groups": GROUPS, "rank": 2}, ["sub_moe"]),
    ({"groups": GROUPS, "router": "narrow"}, ["average, dominant or wide"]),
    ({"groups": [[0], [1]], "router": "wide"}, ["every expert"]),
    ({"groups": GROUPS, "compress": 0.0}, ["--compress 0.0", "up to 1.0"]),
    ({"groups": GROUPS, "compress": float("nan")}, ["--compress nan"]),
    ({"groups": GROUPS, "compress": 0.1, "method": "sub_moe"}, ["of mc_smoe"]),
    ({"groups": GROUPS, "sparse": 0.1}, ["--sparse 0.1", "beside --compress"]),
    ({"groups": GROUPS, "compress": 0.1, "sparse": 1.5}, ["--sparse 1.5", "to 1.0"]),
]


# ------------------------------------------------------------------------- routers that choose in groups

SCATTERED = [[0, 2], [1, 3], [4, 6], [5, 7]]  # two of each of the router's groups of four


def deepseek(experts: int, topk_group: int = 1) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    changed = {"n_routed_experts": experts, "topk_group": topk_group}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**TRANSFORMERS["deepseek_v3"][2], **changed})).eval()


def grouped(folder: Path, topk_group: int = 1) -> Any:
    """A tiny DeepSeek-V3 of eight experts in two groups, with corrections that count."""
    torch.manual_seed(0)
    model = deepseek(8, topk_group)
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn(8) / 4)
    model.save_pretrained(folder)
    return model


def routers_of(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    gates = [
        part.gate
        for part in model.modules()
        if hasattr(getattr(part, "gate", None), "e_score_correction_bias")
    ]
    return [(gate.weight, gate.e_score_correction_bias) for gate in gates]


@pytest.mark.parametrize("router", ["average", "dominant"])
def test_groups_of_a_router_keep_as_many_experts_each(router, tmp_path):
    """What transformers computes with the output is what it computes with a smaller model that was filled by hand."""
    model = grouped(tmp_path / "model")
    merge_experts(tmp_path / "model", tmp_path / "out", groups=SCATTERED, align=False, router=router)
    found = opened(model, tmp_path / "out")
    assert found.config.n_routed_experts == 4 and found.config.n_group == 2
    by_hand = deepseek(4)
    state = model.state_dict()
    for name, tensor in state.items():
        if ".mlp.experts." in name:
            state[name] = torch.stack([tensor[group].mean(0) for group in SCATTERED])
        elif ".mlp.gate." in name and "gate_proj" not in name:
            rows = [tensor[group].mean(0) if router == "average" else tensor[group[0]] for group in SCATTERED]
            state[name] = torch.stack(rows)
    by_hand.load_state_dict(state)
    [(weight, bias)], [(_, before)] = routers_of(found), routers_of(model)
    assert weight.shape[0] == 4 and not torch.equal(before, torch.zeros(8)) and bias.shape == (4,)
    torch.testing.assert_close(found(input_ids=IDS).logits, by_hand(input_ids=IDS).logits)
    verify(tmp_path / "out")


@pytest.mark.parametrize("method", ["mc_smoe", "sub_moe", "prune"])
def test_statistics_find_groups_inside_of_the_groups_of_a_router(method, tmp_path):
    model = grouped(tmp_path / "model", topk_group=2)
    held = statistics_of(model, tmp_path / "model")
    made = merge_experts(tmp_path / "model", tmp_path / "out", method=method, experts=4, statistics=held)
    for groups in made["mixture"]["merged"].values():
        assert [{e // 4 for e in group} for group in groups] == [{0}, {0}, {1}, {1}]
        if method == "prune":
            [usage] = [tensor for name, tensor in load_file(held).items() if name.endswith("/usage")]
            halves = [usage[:4], usage[4:]]
            kept = [sorted(half.argsort(descending=True, stable=True)[:2].tolist()) for half in halves]
            assert groups == [[e] for e in kept[0]] + [[4 + e] for e in kept[1]]
    assert torch.isfinite(opened(model, tmp_path / "out")(input_ids=IDS).logits).all()


@pytest.mark.parametrize(
    "changes, options, parts",
    [
        ({}, {"groups": [[0, 4], [1, 2, 3], [5], [6, 7]]}, ["2 groups of 4", "of one of them"]),
        ({}, {"groups": [[0], [1], [2], [4, 5, 6, 7]]}, ["as many lists of each"]),
        ({}, {"groups": [[0, 1, 2, 3], [4, 5, 6, 7]]}, ["best 2", "keep 4 or more"]),
        ({}, {"experts": 5, "statistics": "none.safetensors"}, ["a multiple of 2"]),
        ({"num_experts_per_tok": 3}, {"groups": SCATTERED}, ["sent to 3 in 1 groups", "keep 6 or more"]),
        ({"num_experts_per_tok": 3, "topk_group": 0}, {"groups": SCATTERED}, ["sent to 3 in 1 groups"]),
        ({"n_group": 3}, {"groups": SCATTERED}, ["8 experts are not 3 equal groups"]),
    ],
)
def test_groups_that_would_tear_those_of_a_router_are_refused(changes, options, parts, tmp_path):
    grouped(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, **changes}))
    if "statistics" in options:
        save_file({"a": torch.ones(1)}, tmp_path / "none.safetensors")
        options = {**options, "statistics": tmp_path / "none.safetensors"}
    with refused(*parts):
        merge_experts(tmp_path / "model", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_wide_router_in_groups_stays_as_it_is(tmp_path):
    model = grouped(tmp_path / "model")
    merge_experts(tmp_path / "model", tmp_path / "out", groups=[[0, 7], [1, 2, 3, 4, 5, 6]], router="wide")
    for (weight, bias), (before, of) in zip(routers_of(opened(model, tmp_path / "out")), routers_of(model)):
        assert torch.equal(weight, before) and torch.equal(bias, of)


@pytest.mark.parametrize("options, parts", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_is_refused_before_anything_is_written(options, parts, mixtral, tmp_path):
    with refused(*parts):
        merge_experts(mixtral[1], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, parts",
    [
        ("llama", ["no experts"]),
        ("gpt_oss", ["biases"]),
        ("dbrx", ["not known"]),
    ],
)
def test_models_whose_experts_are_not_fully_known_are_refused(name, parts, tmp_path):
    saved(name, tmp_path / "model")
    with refused(*parts):
        merge_experts(tmp_path / "model", tmp_path / "out", groups=GROUPS)


def test_more_than_one_model_is_merged_before(tmp_path, mixtral):
    with refused("merge models before"):
        recipe = {"method": "average", "experts": {"a": mixtral[1]}}
        merge_experts(recipe, tmp_path / "out", groups=GROUPS)


def test_statistics_of_another_model_are_refused(mixtral, tmp_path):
    held = load_file(mixtral[2])
    for change, parts in (
        ({"model.layers.1.mlp/usage": None}, ["'model.layers.1.mlp/usage' is missing"]),
        ({"model.layers.0.mlp/usage": torch.ones(3)}, ["shape [3], not [4]"]),
        ({"model.layers.0.mlp/usage": torch.tensor([1.0, -1, 0, 0])}, ["holds what is no usage"]),
        ({"model.layers.0.mlp/logits": torch.full((4, 4), float("nan"))}, ["holds what is no logits"]),
    ):
        changed = {name: tensor for name, tensor in {**held, **change}.items() if tensor is not None}
        save_file(changed, tmp_path / "other.safetensors")
        with refused(*parts):
            merge_experts(mixtral[1], tmp_path / "out", experts=2, statistics=tmp_path / "other.safetensors")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    groups=st.recursive(
        st.none() | st.booleans() | st.integers(-2, 6) | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["model.layers.0.mlp", "model.layers.1.mlp", "x"]), inner)
        ),
        max_leaves=8,
    )
)
def test_groups_of_any_kind_are_carried_out_or_refused(groups, mixtral, tmp_path):
    try:
        merge_experts(mixtral[1], tmp_path / "out", groups=groups)
    except UserError as error:
        assert "\n" not in str(error)
