"""Compressed stores: what comes out is what the method merges; refusals; what a kill leaves; the command line."""

from __future__ import annotations

import json
import os
import shutil
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from checkpoints import SHAPES, State, edit, random_state, refused, same_tensors, save_family, shard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from uses import STORES, by_use

from mergeline.merging import compress as module
from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.algebra import slots
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.companions import INDEX
from mergeline.merging.compress import CompressedStore, compress, extract_expert, stores
from mergeline.merging.engine.manifest import manifest_path
from mergeline.merging.engine.places import replaced
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.methods import catalogue, get_method
from mergeline.merging.verify import verify

USES = [*STORES, ("cart_indexing", {"rank": 0.5}), *[(method, {"stored": "bfloat16"}) for method in stores()]]
# Besides the usual: shapes that masks do not fill bytes of, tensors that are no matrices, empty ones.
MANY_SHAPES = {
    **SHAPES,
    "blocks.0.conv.weight": (2, 3, 2, 2),
    "blocks.1.mlp.weight": (8, 16),
    "blocks.2.empty": (0, 3),
    "blocks.2.one.weight": (1, 1),
    "none": (0,),
    "odd": (13,),
}
every_use = by_use("method", USES)
every_store = pytest.mark.parametrize("method", stores())


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Three experts around a base, with integers that agree and a tensor that only the base has; files in `in/`."""
    made = save_family(tmp_path / "in", shapes=MANY_SHAPES)
    for path in (made["base"], *made["experts"].values()):
        edit(path, ids=torch.arange(3))
    edit(made["base"], text__only=torch.tensor([1.0, 2.0]))
    return made


def left_over(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != "in")


def plainly_merged(recipe: dict[str, Any], task: int, out: Path) -> State:
    merge({**recipe, "params": {**recipe.get("params", {}), "task": task}}, out)
    return load_file(out if out.suffix else out / "model.safetensors")


# --------------------------------------------------------------------------------------- the methods


def vectors(*rows: list[float]) -> dict[str, State]:
    return {f"e{t}": {"w": torch.tensor(row)} for t, row in enumerate(rows)}


def given_back(method: str, experts: dict[str, State], base: list[float], **params: Any) -> list[float]:
    return merge_state_dicts(method, experts, {"w": torch.tensor(base)}, params=params)["w"].tolist()


def test_tall_masks_keep_what_matters_to_a_task():
    experts, base = vectors([1.0, 4.0, -1.0, 0.0], [3.0, -3.0, 0.0, 2.0]), [0.0] * 4  # their sum: 4, 1, -1, 2
    # |1| is not more than |3|, |4| than |-3| is; where only one expert changed anything, it alone wants it.
    assert given_back("tall_mask", experts, base, threshold=1.0) == [0.0, 1.0, -1.0, 0.0]
    assert given_back("tall_mask", experts, base, threshold=1.0, task=1) == [4.0, 0.0, 0.0, 2.0]
    assert given_back("tall_mask", experts, base, threshold=1 / 3) == [0.0, 1.0, -1.0, 0.0]  # strictly more
    assert given_back("tall_mask", experts, base, threshold=0.3) == [4.0, 1.0, -1.0, 0.0]
    assert given_back("tall_mask", experts, base, threshold=0.0, scale=0.5) == [2.0, 0.5, -0.5, 0.0]
    # Halved, the sum is 2, 1/2, -1/2, 1.
    assert given_back("tall_mask", experts, base, threshold=1.0, inner_scale=0.5) == [0.0, 0.5, -0.5, 0.0]


def test_tall_masks_of_ties_take_the_sum_of_what_agrees():
    experts, base = vectors([1.0, 4.0, -1.0], [3.0, -3.0, 0.0]), [0.0] * 3
    assert given_back("tall_mask", experts, base, inner="ties", density=1.0, threshold=0.4) == [
        0.0,
        4.0,
        -1.0,
    ]
    resolved = get_method("tall_mask").resolve({"inner": "ties"})
    assert (resolved["reduce"], resolved["scale"], resolved["inner_scale"]) == ("sum", 1.0, 1.0)


def test_emr_masks_and_rescales_the_elected_vector():
    experts, base = vectors([1.0, 4.0, -1.0, 0.0], [3.0, -3.0, 0.0, 2.0]), [0.0] * 4
    # Elected: 3, 4, -1, 2. The first agrees in 3, 4, 1 of it and had 1 + 4 + 1, the second in 3, 2 and had 3 + 3 + 2.
    assert given_back("emr", experts, base) == pytest.approx([3 * 6 / 8, 4 * 6 / 8, -6 / 8, 0])
    assert given_back("emr", experts, base, task=1) == pytest.approx([3 * 8 / 5, 0, 0, 2 * 8 / 5])
    # A mean of zero elects the negative.
    assert given_back("emr", vectors([1.0], [-1.0]), [0.0], task=1) == [-1.0]
    assert given_back("emr", vectors([1.0], [-1.0]), [0.0]) == [0.0]


def test_emr_counts_every_tensor_the_same():
    base = {"long": torch.zeros(100), "short": torch.zeros(1)}
    experts = {
        "a": {"long": torch.full((100,), 1.0), "short": torch.tensor([1.0])},
        "b": {"long": torch.full((100,), 3.0), "short": torch.tensor([1.0])},
    }
    found = merge_state_dicts("emr", experts, base)  # means 1 and 1, elected 3 and 1: (1 + 1) / (3 + 1)
    assert found["long"].tolist() == pytest.approx([1.5] * 100) and found["short"].item() == pytest.approx(
        0.5
    )


@given(st.integers(0, 1000), st.integers(0, 2))
@pytest.mark.parametrize("method", ["tsv_compress", "twin", "cart_indexing", "rmm", "svd_compress"])
def test_full_rank_gives_an_expert_back(method, seed, task):
    base = random_state(seed)
    experts = {f"e{t}": random_state(seed + 1 + t) for t in range(3)}
    found = merge_state_dicts(method, experts, base, params={"rank": 1.0, "task": task})
    for name, expected in experts[f"e{task}"].items():
        assert torch.allclose(found[name], expected, atol=1e-5)
        if expected.ndim != 2:
            assert torch.equal(found[name], expected)


@given(st.integers(0, 1000), st.integers(0, 2))
def test_low_rank_stores_keep_the_leading_directions(seed, task):
    name = "blocks.0.attn.weight"  # (6, 4)
    base = random_state(seed)
    experts = {f"e{t}": random_state(seed + 1 + t) for t in range(3)}

    def truncated(a_MN: torch.Tensor, k: int) -> torch.Tensor:
        u, s, vh = torch.linalg.svd(a_MN, full_matrices=False)
        return (u[:, :k] * s[:k]) @ vh[:k]

    def found(method: str, **params: Any) -> torch.Tensor:
        return merge_state_dicts(method, experts, base, params={"task": task, **params})[name].double()

    start, expert = base[name].double(), experts[f"e{task}"][name].double()
    for rank, k in (("1/T", 1), (0.5, 2), (0.1, 1)):
        assert torch.allclose(
            found("tsv_compress", rank=rank), start + truncated(expert - start, k), atol=1e-5
        )
    shared = start + 0.3 * sum(e[name].double() - start for e in experts.values())
    for rank, k in ((0.5, 2), (0.2, 0)):  # int(0.2 * 4): nothing of one's own
        assert torch.allclose(found("twin", rank=rank), shared + truncated(expert - shared, k), atol=1e-5)
    by_ties = merge_state_dicts("ties", experts, base, params={"density": 0.5})[name].double()
    expected = by_ties + truncated(expert - by_ties, 2)
    assert torch.allclose(found("twin", rank=0.5, inner="ties", density=0.5), expected, atol=1e-5)


def test_rmm_without_components_is_the_square_of_the_mean_factor():
    name, base = "blocks.0.attn.weight", torch.tensor([[10.0]])
    experts = {f"e{t}": {name: base + tau} for t, tau in enumerate((1.0, 4.0, 9.0))}  # factors 1, 2, 3
    for task in range(3):
        params = {"rank": 1, "components": 0, "task": task}
        found = merge_state_dicts("rmm", experts, {name: base}, params=params)
        assert found[name].item() == pytest.approx(14.0)


def test_rmm_keeps_what_one_direction_holds():
    name, base = "blocks.0.attn.weight", torch.zeros(3, 2)
    direction = torch.tensor([[1.0], [2.0], [-1.0]]) @ torch.tensor([[1.0, 0.5]])
    experts = {f"e{t}": {name: scale * direction} for t, scale in enumerate((1.0, 4.0, 9.0, 2.25))}
    for task, expert in enumerate(experts.values()):  # every row of a factor moves along one line
        params = {"rank": 1, "components": 1, "task": task}
        found = merge_state_dicts("rmm", experts, {name: base}, params=params)
        assert torch.allclose(found[name], expert[name], atol=1e-5)


@given(st.integers(0, 1000))
def test_rmm_loses_nothing_with_all_components_but_what_rank_cuts(seed):
    name, base = "blocks.0.attn.weight", random_state(seed)
    experts = {f"e{t}": random_state(seed + 1 + t) for t in range(4)}

    def lost(components: int) -> float:
        square = 0.0
        for task in range(4):
            kept = merge_state_dicts("tsv_compress", experts, base, params={"rank": 0.5, "task": task})[name]
            params = {"rank": 2, "components": components, "task": task}
            square += float(
                (merge_state_dicts("rmm", experts, base, params=params)[name] - kept).square().sum()
            )
        return square

    assert lost(2) < 1e-8 < lost(1)  # two directions are all that rows of two columns have


def test_rmm_keeps_as_many_numbers_as_the_paper_counts():
    rows, columns, experts, r, p = 30, 20, 6, 5, 2
    once, own = get_method("rmm").store.parts((rows, columns), experts, rank=r, components=p, stored=None)
    numbers = sum(prod(part.shape) for part in once.values())
    numbers += experts * sum(prod(part.shape) for part in own.values())
    assert numbers == (rows + columns) * (p * (r + experts) + r)


@every_store
def test_a_task_that_is_none(method):
    experts = {f"e{t}": random_state(t) for t in range(3)}
    with refused(method, "task 3", "3 experts"):
        merge_state_dicts(method, experts, random_state(9), params={"task": 3})


# --------------------------------------------------------------------------------------- what comes out


def test_all_methods_with_a_task_are_stores():
    assert stores() == [id for id, entry in catalogue().items() if "task" in entry.parameters]
    assert {method for method, _ in USES} == set(stores())


@every_use
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_an_expert_of_a_store_is_what_the_method_merges(dtype, method, params, tmp_path):
    recipe = save_family(tmp_path / "in", dtype=getattr(torch, dtype), shapes=MANY_SHAPES)
    recipe |= {"method": method, "params": params}
    compress(recipe, tmp_path / "store.safetensors")
    for task, name in enumerate("abc"):
        manifest = extract_expert(tmp_path / "store.safetensors", name, tmp_path / f"{name}.safetensors")
        expected = plainly_merged(recipe, task, tmp_path / "merged.safetensors")
        assert same_tensors(load_file(tmp_path / f"{name}.safetensors"), expected)
        assert manifest["output"]["digest"] == open_checkpoint(tmp_path / f"{name}.safetensors").digest()
    experts = [load_file(tmp_path / f"{name}.safetensors") for name in "abc"]
    assert not same_tensors(experts[0], experts[1])


@settings(max_examples=4)
@given(st.integers(1, 90), st.integers(1, 90))
@every_store
def test_how_tensors_are_cut_into_blocks_changes_nothing(tmp_path_factory, method, size, other):
    """Neither of what is written nor of what is read; masks are cut inside of bytes."""
    folder = tmp_path_factory.mktemp("cut")
    recipe = save_family(folder / "in", shapes=MANY_SHAPES, method=method)
    with patch.object(slots, "_BLOCK", size):
        compress(recipe, folder / "cut.safetensors")
    compress(recipe, folder / "whole.safetensors")
    one, two = load_file(folder / "cut.safetensors"), load_file(folder / "whole.safetensors")
    for name in [name for name in two if name.endswith("/rescaler")]:  # sums over blocks
        assert torch.allclose(one.pop(name), two.pop(name), rtol=1e-12)
    assert same_tensors(one, two)
    extract_expert(folder / "whole.safetensors", "b", folder / "whole-b.safetensors")
    with patch.object(slots, "_BLOCK", other):
        extract_expert(folder / "whole.safetensors", "b", folder / "b.safetensors")
    assert (folder / "b.safetensors").read_bytes() == (folder / "whole-b.safetensors").read_bytes()


@every_store
def test_bytes_depend_on_the_recipe_alone(method, recipe, tmp_path):
    recipe = {**recipe, "method": method}
    sharded = {**recipe, "experts": dict(recipe["experts"])}
    sharded["experts"]["a"] = shard(load_file(recipe["experts"]["a"]), tmp_path / "in" / "shards", 3)
    files = []
    for number, (made_of, ways) in enumerate([
        (recipe, {"workers": 1}), (recipe, {"workers": 2, "memory": 1 << 30}), (sharded, {}),
        (recipe, {"factors": tmp_path / "factors"}), (recipe, {"factors": tmp_path / "factors"}),
    ]):  # fmt: skip
        out = tmp_path / f"{number}.safetensors"
        compress(made_of, out, **ways)
        files.append(out.read_bytes())
    assert len(set(files)) == 1


@every_store
def test_rules_and_filters_are_kept_too(method, recipe, tmp_path):
    rank = {"rank": 0.9} if "rank" in get_method(method).parameters else {}
    rules = [{"match": "*mlp*", "params": {"stored": "float16", **rank}}]
    for excluded in ("base", "average"):
        made_of = {
            **recipe, "method": method, "rules": rules, "dtype": "bfloat16", "exclude": "*attn*", "excluded": excluded,
        }  # fmt: skip
        compress(made_of, tmp_path / excluded)
        extract_expert(tmp_path / excluded, "c", tmp_path / "c.safetensors")
        expected = plainly_merged(made_of, 2, tmp_path / "merged.safetensors")
        assert same_tensors(load_file(tmp_path / "c.safetensors"), expected)
        assert expected["blocks.0.mlp.weight"].dtype == torch.bfloat16


def test_a_store_around_the_mean_needs_no_base(recipe, tmp_path):
    alone = {**recipe, "method": "cart_indexing", "base": None}
    compress(alone, tmp_path / "alone.safetensors")
    manifest = extract_expert(tmp_path / "alone.safetensors", "a", tmp_path / "a.safetensors", base="nowhere")
    assert manifest["extracted"]["base"] is None
    expected = plainly_merged(alone, 0, tmp_path / "m.safetensors")
    assert same_tensors(load_file(tmp_path / "a.safetensors"), expected)


def test_a_store_is_as_small_as_it_says(recipe, tmp_path):
    """Masks take a bit an element, factors what their rank says."""
    elements = sum(v.numel() for v in random_state(0, shapes=MANY_SHAPES).values())
    for method in ("tall_mask", "emr"):
        kept = compress({**recipe, "method": method}, tmp_path / "store.safetensors")["store"]
        padded = sum(-(-v.numel() // 8) for v in random_state(0, shapes=MANY_SHAPES).values())
        assert kept["once"] == 4 * elements
        assert set(kept["experts"].values()) == {padded + (8 if method == "emr" else 0)}
        assert kept["checkpoint"] == 4 * (elements + 2) + 3 * 8
    made_of = {**recipe, "method": "tsv_compress", "params": {"stored": "bfloat16"}}
    kept = compress(made_of, tmp_path / "tsv")["store"]
    matrices = {  # of a convolution, with the kernel among the columns
        name: (shape[0], prod(shape[1:])) for name, shape in MANY_SHAPES.items() if len(shape) in (2, 4)
    }
    others = sum(v.numel() for k, v in random_state(0, shapes=MANY_SHAPES).items() if k not in matrices)
    factors = sum(int(min(shape) / 3) * sum(shape) for shape in matrices.values())
    assert kept["once"] == 0 and set(kept["experts"].values()) == {2 * factors + 4 * others}
    total = kept["once"] + sum(kept["experts"].values())
    assert total == sum(info.nbytes for info in open_checkpoint(tmp_path / "tsv").tensors.values())


@every_use
def test_a_store_says_how_far_each_expert_is_from_what_it_gives_back(method, params, recipe, tmp_path):
    """In the manifest and the card; of what it adds to the base, or where the method needs none, of its weights."""
    recipe = {**recipe, "method": method, "params": params}
    told = compress(recipe, tmp_path / "store")["store"]["errors"]
    relative = "base" in get_method(method).needs_of(get_method(method).resolve(params))
    assert told["of"] == ("what an expert adds to the base" if relative else "an expert's weights")
    base = load_file(recipe["base"])
    for name, path in recipe["experts"].items():
        extract_expert(tmp_path / "store", name, tmp_path / "out.safetensors")
        expert, back = load_file(path), load_file(tmp_path / "out.safetensors")
        apart, size = {}, {}
        for key, tensor in expert.items():
            if tensor.is_floating_point() and tensor.numel():
                apart[key] = float((back[key].double() - tensor).square().sum())
                size[key] = float((tensor.double() - base[key] * relative).square().sum())
        each = {key: (apart[key] / size[key]) ** 0.5 for key in apart}
        found = told["experts"][name]
        # What comes out is rounded to float32 once more.
        assert found["all"] == pytest.approx((sum(apart.values()) / sum(size.values())) ** 0.5, abs=1e-6)
        assert found["tensors"] == pytest.approx(each, abs=1e-6)
        assert found["tensors"][found["worst_tensor"]] == max(found["tensors"].values())
        assert f"| {name} | " in (tmp_path / "store" / "README.md").read_text()


def test_an_expert_that_adds_nothing_has_no_error(recipe, tmp_path):
    shutil.copy(recipe["base"], recipe["experts"]["b"])
    edit(recipe["experts"]["b"], text__only=None)
    told = compress({**recipe, "method": "tsv_compress"}, tmp_path / "store")["store"]["errors"]["experts"]
    assert set(told) == {"a", "c"}


@every_use
def test_a_plan_says_the_bytes_of_the_store(method, params, recipe, tmp_path):
    recipe = {**recipe, "method": method, "params": params}
    told = compress(recipe, tmp_path / "store.safetensors")["store"]
    assert module.store_sizes(make_plan(recipe)) == {
        key: told[key] for key in ("checkpoint", "once", "experts")
    }


def test_a_plan_of_a_merge_says_none(recipe):
    assert module.store_sizes(make_plan({**recipe, "method": "ties"})) is None
    assert module.store_sizes(make_plan({**recipe, "method": "emr", "base": None})) is None


# --------------------------------------------------------------------------------------- one model in factors


def statistics_of(recipe: dict[str, Any], folder: Path) -> dict[str, list[Path]]:
    """Gram matrices of every expert's matrices, and Fisher information of all its tensors, drawn."""
    states = {name: load_file(path) for name, path in recipe["experts"].items()}
    found: dict[str, list[Path]] = {}
    for kind in ("gram", "fisher"):
        for name, held in zip(states, gathered(states, kind)):
            save_file(held, folder / f"{kind}-{name}.safetensors")
            found.setdefault(kind, []).append(folder / f"{kind}-{name}.safetensors")
    return found


def gathered(states: dict[str, State], kind: str) -> list[State]:
    draws = torch.Generator().manual_seed(5)
    found = []
    for state in states.values():
        held = {}
        for name, tensor in state.items():
            if kind == "fisher" and tensor.is_floating_point():
                held[name] = torch.rand(tensor.shape, generator=draws)
            elif tensor.ndim in (2, 4) and tensor.numel():
                rows = torch.rand(7, prod(tensor.shape[1:]), generator=draws)
                held[name] = rows.T @ rows
        found.append(held)
    return found


WEIGHTED = pytest.mark.parametrize(
    "params",
    [{}, {"weights": "gram"}, {"weights": "fisher"}, {"weights": "fisher", "side": "out"}],
    ids=["plain", "gram", "fisher of inputs", "fisher of outputs"],
)


@WEIGHTED
@pytest.mark.parametrize("of", ["task_vectors", "weights"])
def test_factors_are_those_of_the_best_part_in_the_norm(of, params, tmp_path):
    """One expert, in float64, beside `truncate` and `weighted_truncate`; weights are task vectors of a zero base."""
    base, expert = random_state(0, torch.float64), random_state(1, torch.float64)
    start = base if of == "task_vectors" else {name: torch.zeros_like(t) for name, t in base.items()}
    kind = params.get("weights")
    statistics = (
        {kind: [{k: v.double() for k, v in gathered({"e": expert}, kind)[0].items()}]} if kind else {}
    )
    given = {"statistics": statistics}
    settings = {**params, "rank": 0.4}
    found = merge_state_dicts(
        "svd_compress",
        {"e": expert},
        base if of == "task_vectors" else None,
        params={**settings, "of": of},
        **given,
    )
    wrapper = "weighted_truncate" if kind else "truncate"
    expected = merge_state_dicts(wrapper, {"e": expert}, start, params={**settings, "scale": 1.0}, **given)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-12), name
    assert not torch.allclose(found["blocks.0.attn.weight"], expert["blocks.0.attn.weight"], atol=1e-3)


@WEIGHTED
@pytest.mark.parametrize("of", ["task_vectors", "weights"])
def test_a_merged_model_in_factors_is_smaller_and_comes_back_as_the_method_merges_it(
    of, params, recipe, tmp_path
):
    merge({**recipe, "method": "task_arithmetic"}, tmp_path / "merged.safetensors")
    alone: dict[str, Any] = {"experts": {"m": tmp_path / "merged.safetensors"}, "method": "svd_compress"}
    alone["params"] = {"rank": 0.3, "of": of, **params}
    if of == "task_vectors":
        alone["base"] = recipe["base"]
    if kind := params.get("weights"):
        alone["statistics"] = {kind: statistics_of(alone, tmp_path / "in")[kind]}
    told = compress(alone, tmp_path / "store")["store"]
    stored = sum(info.nbytes for info in open_checkpoint(tmp_path / "store").tensors.values())
    assert stored == told["once"] + told["experts"]["m"] < told["checkpoint"]
    assert 0 < told["errors"]["experts"]["m"]["all"] < 1
    extract_expert(tmp_path / "store", "m", tmp_path / "m.safetensors")
    merge(alone, tmp_path / "again.safetensors")
    assert same_tensors(load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "again.safetensors"))
    assert "bit-identical" in verify(tmp_path / "store")


def test_weights_that_lack_their_statistics_or_side_are_refused(recipe, tmp_path):
    asked = {**recipe, "method": "svd_compress"}
    with refused("gram"):
        compress({**asked, "params": {"weights": "gram"}}, tmp_path / "store.safetensors")
    with refused("side: Gram matrices are of inputs"):
        compress({**asked, "params": {"weights": "gram", "side": "out"}}, tmp_path / "store.safetensors")
    with refused("base"):
        compress({**asked, "base": None}, tmp_path / "store.safetensors")


def test_low_rank_and_sparse_rows_take_what_they_say(recipe, tmp_path):
    params = {"parameter_ratio": 0.5, "sparse_ratio": 0.5}
    asked = {**recipe, "method": "losparse", "base": None, "params": params}
    asked |= {"include": "blocks.1.mlp.weight", "excluded": "average"}
    for path in recipe["experts"].values():
        edit(path, ids=None)
    told = compress(asked, tmp_path / "store.safetensors")["store"]
    # (8, 16) at rank ceil(0.5 * 128 / 24) = 3, four rows of 16, a byte for which they are.
    assert set(told["experts"].values()) == {4 * (3 * (8 + 16) + 4 * 16) + 1}
    state = load_file(tmp_path / "store.safetensors")
    kept = np.unpackbits(state["0/kept/blocks.1.mlp.weight"].numpy()).astype(bool)
    dense = state["0/left/blocks.1.mlp.weight"] @ state["0/right/blocks.1.mlp.weight"]
    dense[kept] += state["0/rows/blocks.1.mlp.weight"]
    extract_expert(tmp_path / "store.safetensors", "a", tmp_path / "a.safetensors")
    found, expert = (load_file(path) for path in (tmp_path / "a.safetensors", recipe["experts"]["a"]))
    assert torch.allclose(found["blocks.1.mlp.weight"], dense, atol=1e-6)
    assert torch.allclose(dense[kept], expert["blocks.1.mlp.weight"][kept], atol=1e-6) and kept.sum() == 4


def test_a_store_that_marks_other_rows_than_it_keeps_was_damaged(recipe, tmp_path):
    store = tmp_path / "store.safetensors"
    compress({**recipe, "method": "losparse", "params": {"sparse_ratio": 0.5}}, store)
    with safe_open(store, "pt") as file:
        metadata = file.metadata()
    marks = {"0/kept/blocks.1.mlp.weight": torch.full((1,), 255, dtype=torch.uint8)}
    save_file({**load_file(store), **marks}, store, metadata)
    with refused("damaged", "8 rows", "keeps 4"):
        extract_expert(store, "a", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_a_store_of_overflowing_numbers_is_refused(recipe, tmp_path):
    for path in recipe["experts"].values():
        edit(path, odd=load_file(path)["odd"] + 1e6)
    with refused("once/vector/odd", "float16", "wider"):
        compress({**recipe, "method": "emr", "params": {"stored": "float16"}}, tmp_path / "store.safetensors")
    assert left_over(tmp_path) == []


# --------------------------------------------------------------------------------------- folders


def test_folders_carry_configs_and_are_verified(recipe, tmp_path):
    for name in ("base", "a"):
        folder = tmp_path / "in" / name
        folder.mkdir()
        (tmp_path / "in" / f"{name}.safetensors").rename(folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"name": name, "torch_dtype": "float32"}))
    recipe["base"], recipe["experts"]["a"] = tmp_path / "in" / "base", tmp_path / "in" / "a"
    recipe = {**recipe, "method": "twin", "dtype": "bfloat16", "shard_size": 300}
    compress(recipe, tmp_path / "store")
    card = (tmp_path / "store" / "README.md").read_text()
    assert (
        (tmp_path / "store" / INDEX).exists() and "# Compressed by twin" in card and "extract-expert" in card
    )
    assert "bit-identical" in verify(tmp_path / "store")
    extract_expert(tmp_path / "store", "a", tmp_path / "out", shard_size=200)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"name": "base", "torch_dtype": "bfloat16"}
    assert (tmp_path / "out" / INDEX).exists()
    merge({**recipe, "params": {"task": 0}}, tmp_path / "merged")
    assert open_checkpoint(tmp_path / "out").digest() == open_checkpoint(tmp_path / "merged").digest()
    extract_expert(tmp_path / "store", "b", tmp_path / "out")  # takes the place of an earlier one
    assert not (tmp_path / "out" / INDEX).exists()
    assert left_over(tmp_path) == ["merged", "out", "store"]


@pytest.mark.parametrize("out", ["out", "x.safetensors"])
def test_an_expert_is_verified_against_its_store(out, recipe, mergeline, tmp_path):
    out, store = tmp_path / out, tmp_path / "store"
    made = compress({**recipe, "method": "tall_mask", "dtype": "bfloat16"}, store)
    sharded = 200 if out.suffix == "" else None
    manifest = extract_expert(store, "b", out, shard_size=sharded)
    assert manifest["extracted"]["store"] == {
        "path": os.path.relpath(store, out if sharded else tmp_path), "digest": made["output"]["digest"],
    }  # fmt: skip
    said = f"{out}: bit-identical to what its store gives back ({manifest['output']['digest']})"
    assert verify(out) == said
    assert mergeline("verify", out, "--no-merge").code == 0
    shutil.move(tmp_path / "in", tmp_path / "elsewhere")
    with refused("in/base.safetensors"):
        verify(out)
    shutil.move(tmp_path / "elsewhere", tmp_path / "in")
    assert verify(out) == said


def forged(manifest: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**manifest, "extracted": {**manifest["extracted"], **changes}}, indent=1) + "\n"


def test_an_expert_that_was_changed_or_comes_of_another_store(store, recipe, tmp_path):
    out = tmp_path / "x.safetensors"
    manifest = extract_expert(store, "b", out)
    other = extract_expert(store, "a", tmp_path / "a.safetensors")
    for changes, part in [
        ({"expert": "c"}, "made again"),
        ({"expert": "d"}, "no expert 'd'"),
        ({"shard_size": 100}, "--shard-size"),
        ({"base": None}, "is not"),
        ({"store": "store.safetensors"}, "was damaged: extracted.store"),
    ]:
        manifest_path(out).write_text(forged(manifest, **changes))
        with refused(part):
            verify(out)
    manifest_path(out).write_text(json.dumps({**other, "files": {}}, indent=1) + "\n")
    with refused("it was changed after the merge"):
        verify(out)
    manifest_path(out).write_text(forged({k: v for k, v in manifest.items() if k != "versions"}, store="s"))
    with refused("is of an earlier Mergeline", "extract the expert again"):
        verify(out)
    manifest_path(out).write_text(forged(manifest))
    compress({**recipe, "method": "emr"}, store)
    with refused("is no longer the 'store' that was read for it"):
        verify(out)


def test_the_store_of_an_earlier_manifest_is_still_named_where_it_is_replaced(store, tmp_path):
    out = tmp_path / "x.safetensors"
    manifest = extract_expert(store, "b", out)
    assert replaced(out) == "the expert b of store.safetensors"
    manifest_path(out).write_text(forged(manifest, store=str(store), base=None))
    assert replaced(out) == "the expert b of store.safetensors"
    extract_expert(store, "a", out)


def test_a_store_names_no_place_of_this_machine(recipe, tmp_path):
    recipe = {**recipe, "method": "twin", "dtype": "bfloat16"}


def test_a_store_is_not_taken_for_what_it_was_made_from(recipe, tmp_path):
    compress({**recipe, "method": "emr"}, tmp_path / "store.safetensors")
    with safe_open(tmp_path / "store.safetensors", "pt") as file:
        header = json.loads(file.metadata()["mergeline.store"])
    assert (
        header["method"] == "emr" and header["experts"] == ["a", "b", "c"] and "task" not in header["params"]
    )
    assert header["base"] == open_checkpoint(recipe["base"]).digest()
    assert str(tmp_path) not in json.dumps(header)


# --------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def store(recipe: dict[str, Any], tmp_path: Path) -> Path:
    compress({**recipe, "method": "tall_mask"}, tmp_path / "store.safetensors")
    return tmp_path / "store.safetensors"


def relabel(path: Path, **changes: Any) -> None:
    """Change what the metadata of a store says."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["mergeline.store"])
    save_file(load_file(path), path, {"mergeline.store": json.dumps({**header, **changes})})


def test_unknown_experts(store, tmp_path):
    with refused("no expert 'd'"):
        extract_expert(store, "d", tmp_path / "d.safetensors")
    for name in ("", "../a", "0", "once"):
        with refused("holds no expert"):
            extract_expert(store, name, tmp_path / "d.safetensors")
    assert left_over(tmp_path) == ["store.safetensors", "store.safetensors.manifest.json"]


def test_truncated_and_damaged_stores(store, tmp_path):
    whole = store.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        store.write_bytes(whole[:length])
        with refused(store.name):
            extract_expert(store, "a", tmp_path / "a.safetensors")
    store.write_bytes(whole)
    state = load_file(store)
    with safe_open(store, "pt") as file:
        metadata = file.metadata()
    for name, tensor in {
        "1/mask/odd": None, "once/vector/odd": torch.ones(12), "0/mask/odd": torch.ones(2),
        "once/vector/blocks.1.bias": torch.ones(7, dtype=torch.int32),
    }.items():  # fmt: skip
        changed = {k: v for k, v in {**state, name: tensor}.items() if v is not None}
        save_file(changed, store, metadata)
        with refused("damaged", name):
            extract_expert(store, "a", tmp_path / "a.safetensors")
    save_file({**state, "once/vector/odd": torch.full((13,), float("nan"))}, store, metadata)
    with refused("'odd'"):
        extract_expert(store, "a", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"format": 2}, ["format 2", "update"]),
        ({"format": "1"}, ["format '1'"]),
        ({"format": None}, ["format None"]),
        ({"method": "average"}, ["average"]),
        ({"method": "unheard_of"}, ["unknown method 'unheard_of'"]),
        ({"params": {"unheard_of": 1}}, ["unknown parameter"]),
        ({"params": {"threshold": -1}}, ["threshold"]),
        ({"experts": "abc"}, ["damaged", "experts"]),
        ({"experts": ["a", "b", "c", "d"]}, ["damaged", "3/mask/"]),
        ({"more": 1}, ["damaged", "more"]),
        (
            {"tensors": {"odd": {"dtype": "F32", "shape": [13], "how": "elsewhere"}}},
            ["damaged", "tensors.odd.how"],
        ),
        ({"tensors": {"odd": {"dtype": "F33", "shape": [13], "how": "parts"}}}, ["damaged", "F33"]),
        ({"tensors": {"odd": {"dtype": "F32", "shape": [-13], "how": "base"}}}, ["damaged", "[-13]"]),
        (
            {"tensors": {"odd": {"dtype": "F32", "shape": [14], "how": "base"}}},
            ["damaged", "does not fit the base"],
        ),
        ({"tensors": {"gone": {"dtype": "F32", "shape": [13], "how": "base"}}}, ["damaged", "'gone'"]),
    ],
)
def test_descriptions_that_are_not_believed(changes, parts, store, tmp_path):
    relabel(store, **changes)
    with refused(*parts):
        extract_expert(store, "a", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_what_is_no_store(recipe, tmp_path):
    for text in ("", "{", "[]", "[" * 10_000):
        save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors", {"mergeline.store": text})
        with refused("damaged"):
            CompressedStore(tmp_path / "x.safetensors")
    with refused("is no compressed store", "mergeline compress"):
        extract_expert(recipe["base"], "a", tmp_path / "a.safetensors")
    with refused("nowhere"):
        extract_expert(tmp_path / "nowhere", "a", tmp_path / "a.safetensors")


def test_names_that_leave_the_folder(recipe, tmp_path):
    compress({**recipe, "method": "emr", "shard_size": 300}, tmp_path / "store")
    index = json.loads((tmp_path / "store" / INDEX).read_text())
    first, file = next(iter(index["weight_map"].items()))
    shutil.copy(tmp_path / "store" / file, tmp_path / "outside.safetensors")
    index["weight_map"][first] = "../outside.safetensors"
    (tmp_path / "store" / INDEX).write_text(json.dumps(index))
    with refused("../outside.safetensors"):
        extract_expert(tmp_path / "store", "a", tmp_path / "a.safetensors")


def test_another_base(store, recipe, tmp_path):
    path = recipe["base"]
    moved = tmp_path / "in" / "moved.safetensors"
    shutil.copy(path, moved)
    edit(path, odd=load_file(path)["odd"] + 1e-3)
    with refused(path.name, "is not the base"):
        extract_expert(store, "a", tmp_path / "a.safetensors")
    with refused("is not the base"):
        extract_expert(store, "a", tmp_path / "a.safetensors", base=recipe["experts"]["a"])
    extract_expert(store, "a", tmp_path / "a.safetensors", base=moved)
    path.unlink()
    with refused("no such file"):
        extract_expert(store, "a", tmp_path / "a.safetensors")
    manifest_path(store).unlink()
    with refused("--base"):
        extract_expert(store, "a", tmp_path / "a.safetensors")
    again = tmp_path / "again.safetensors"
    extract_expert(store, "a", again, base=moved)
    assert again.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_places_that_are_taken(store, recipe, tmp_path):
    with refused("holds the input"):
        extract_expert(store, "a", store)
    with refused("holds the input"):
        extract_expert(store, "a", recipe["base"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with refused("is there already"):
        extract_expert(store, "a", tmp_path / "full")
    with refused("is there already"):
        compress({**recipe, "method": "emr"}, tmp_path / "full")
    with refused("name a folder"):
        extract_expert(store, "a", tmp_path / "a.safetensors", shard_size=100)
    assert left_over(tmp_path) == ["full", "store.safetensors", "store.safetensors.manifest.json"]


def test_what_cannot_be_compressed(recipe, tmp_path):
    with refused("task_arithmetic", "choose one of", "tall_mask"):
        compress({**recipe, "method": "task_arithmetic"}, tmp_path / "store.safetensors")
    with refused("base"):
        compress({**recipe, "method": "emr", "base": None}, tmp_path / "store.safetensors")
    edit(recipe["experts"]["b"], odd=torch.full((13,), float("nan")))
    with refused("'b'", "'odd'", "NaN"):
        compress({**recipe, "method": "emr"}, tmp_path / "store.safetensors")
    edit(recipe["experts"]["b"], odd=torch.ones(13), ids=torch.ones(3, dtype=torch.int64))
    with refused("'b'", "'ids'"):
        compress({**recipe, "method": "emr"}, tmp_path / "store.safetensors")
    assert left_over(tmp_path) == []


# --------------------------------------------------------------------------------------- kills


class Killed(BaseException):
    pass


@every_store
@pytest.mark.parametrize("survived", [0, 3, 7])
def test_a_killed_compression_goes_on_where_it_was(survived, method, recipe, tmp_path):
    recipe = {**recipe, "method": method}
    compress(recipe, tmp_path / "whole.safetensors")
    expected = (tmp_path / "whole.safetensors").read_bytes()
    encode = module._encode
    calls = iter(range(100))

    def killed(*args: Any) -> Any:
        if next(calls) >= survived:  # once killed, no other thread goes on
            raise Killed
        return encode(*args)

    with patch.object(module, "_encode", killed), pytest.raises(Killed):
        compress(recipe, tmp_path / "store.safetensors", workers=1)
    assert not (tmp_path / "store.safetensors").exists()
    done = []
    with patch.object(module, "_encode", lambda *args: done.append(args[1].name) or encode(*args)):
        compress(recipe, tmp_path / "store.safetensors", workers=1)
    assert (tmp_path / "store.safetensors").read_bytes() == expected
    # What nothing is kept of, the base's and what is empty, is not in the journal.
    assert len(done) <= len(MANY_SHAPES) + 2 - survived + 4
    whole = json.loads(manifest_path(tmp_path / "whole.safetensors").read_text())
    assert json.loads(manifest_path(tmp_path / "store.safetensors").read_text()) == whole


# --------------------------------------------------------------------------------------- the command line


def arguments(recipe: dict[str, Any]) -> list[Any]:
    experts = [part for name, path in recipe["experts"].items() for part in ("--expert", f"{name}={path}")]
    return ["--base", recipe["base"], *experts]


def test_the_command_line_compresses_and_extracts(recipe, tmp_path, mergeline):
    store, out = tmp_path / "store", tmp_path / "b.safetensors"
    words = ["--method", "tall_mask", *arguments(recipe), "--set", "threshold=0.3"]
    outcome = mergeline("compress", *words, "--out", store)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].split() == [str(store), open_checkpoint(store).digest()]
    assert [line.split()[0] for line in lines[1:5]] == ["once", "a", "b", "c"]
    assert all("% of a checkpoint" in line for line in lines[1:5]) and lines[5].startswith("3 experts in")
    assert all("error" in line and "at most" in line for line in lines[2:5])
    assert lines[6] == "errors are relative to what an expert adds to the base, in the Frobenius norm"
    planned = mergeline("plan", *words)
    [line] = [line for line in planned.out.splitlines() if line.startswith("store ")]
    assert planned.code == 0 and lines[1].split()[1] in line and "by `mergeline compress`" in line
    outcome = mergeline("extract-expert", store, "b", "--out", out)
    assert outcome.code == 0 and outcome.out.split() == [str(out), open_checkpoint(out).digest()]
    states = {name: load_file(path) for name, path in recipe["experts"].items()}
    params = {"threshold": 0.3, "task": 1}
    expected = merge_state_dicts("tall_mask", states, load_file(recipe["base"]), params=params)
    assert same_tensors(load_file(out), expected)
    assert mergeline("verify", store).code == 0


def test_the_command_line_refuses_in_one_line(recipe, tmp_path, mergeline):
    store = tmp_path / "store.safetensors"
    assert mergeline("compress", "--method", "emr", *arguments(recipe), "--out", store).code == 0
    for words, part in [
        (["compress", "--method", "ties", *arguments(recipe), "--out", store], "choose one of"),
        (["extract-expert", store, "x", "--out", tmp_path / "x.safetensors"], "no expert 'x'"),
        (
            ["extract-expert", store, "a", "--base", recipe["experts"]["a"], "--out", tmp_path / "x"],
            "not the base",
        ),
        (["extract-expert", recipe["base"], "a", "--out", tmp_path / "x"], "no compressed store"),
        (["extract-expert", store, "a"], "--out"),
    ]:
        outcome = mergeline(*words)
        lines = [line for line in outcome.err.splitlines() if not line.startswith("note: ")]
        assert outcome.code == 2 and len(lines) == 1 and part in lines[0]
    assert not (tmp_path / "x").exists()
