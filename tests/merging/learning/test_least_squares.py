"""Progressive least squares: what must come out where the answer is known; what is said of what cannot be solved."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from learned_families import KINDS, LearnedFamily, examples_of, learned_family
from places import GOLDENS
from safetensors.torch import load_file, save_file
from torch import nn

from mergeline.merging import merge
from mergeline.merging.learning import least_squares, spaces
from mergeline.merging.learning.fitting import fit
from mergeline.merging.learning.least_squares import metric_of, minimum
from mergeline.merging.learning.network import Examples, Network
from mergeline.merging.learning.shifting import shifted
from mergeline.merging.recipes.recipe import Recipe
from mergeline.merging.verify import verify

# Children are forked from a process that has imported what a fit needs, so that a kill costs little.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["test_least_squares", "torch", "open_clip.transformer", "scipy.linalg.blas", "blake3"]
)
PATIENCE = 1200  # seconds until a child that does nothing is a failure
METHOD = "progressive_least_squares"
DENSE = [kind for kind in KINDS if kind != "mixtral"]


def fitted(
    family: LearnedFamily, folder: Path, examples: Examples, method: str = METHOD, **params: Any
) -> Any:
    """Tensors that were solved for, and what was said of the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = fit(family.recipe(method, **params), family.network, examples, folder)
    return (
        recipe,
        load_file(folder / "solved.safetensors"),
        json.loads((folder / "fit.json").read_text())["notes"],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_with_one_expert_the_solution_is_the_expert(kind, tmp_path):
    """Targets and inputs of all maps belong together, or the expert would not fit itself."""
    family = learned_family(kind, tmp_path, experts=1)
    _, solved, notes = fitted(family, tmp_path / "fit", family.examples(40), inner="average", shifts=0)
    expert = load_file(tmp_path / "e0/model.safetensors")
    assert len(solved) > 8
    for name, value in solved.items():
        torch.testing.assert_close(value, expert[name], rtol=1e-3, atol=1e-4)
    assert notes["branch"] == []


@pytest.mark.parametrize("kind", DENSE)
def test_inputs_that_determine_everything_give_back_what_the_expert_computes(kind, tmp_path):
    family = learned_family(kind, tmp_path, experts=1, everything=False)
    start = {"inner": "task_arithmetic", "scale": 0.5}
    recipe, solved, notes = fitted(
        family, tmp_path / "fit", family.examples(160), ridge=0.0, shifts=0, **start
    )
    merge(recipe, tmp_path / "merged.safetensors")
    merge(family.recipe("task_arithmetic", scale=0.5), tmp_path / "start")
    new = family.inputs(7, 20)
    expert, begun, found = (
        family.features(tmp_path / name, new) for name in ("e0", "start", "merged.safetensors")
    )
    assert float((found - expert).norm()) < 5e-3 * float((begun - expert).norm())


def test_two_experts_have_their_way_on_inputs_of_their_own(tmp_path):
    """Inputs in two subspaces: one matrix does to each what its expert does."""
    network, state = _one_linear_map(
        tmp_path, {"a": torch.randn(4, 6), "b": torch.randn(4, 6)}, torch.randn(4)
    )
    x_a, x_b = torch.randn(30, 6), torch.randn(30, 6)
    x_a[:, 3:], x_b[:, :3] = 0, 0
    recipe = _recipe(tmp_path, ["a", "b"], METHOD, inner="average", ridge=0.0, shifts=0)
    fit(recipe, network, examples_of({"a": x_a, "b": x_b}), tmp_path / "fit")
    found = load_file(tmp_path / "fit/solved.safetensors")
    expected = torch.cat([state["a"]["layers.0.weight"][:, :3], state["b"]["layers.0.weight"][:, 3:]], 1)
    torch.testing.assert_close(found["layers.0.weight"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["layers.0.bias"], state["a"]["layers.0.bias"], rtol=1e-4, atol=1e-4)


def test_the_order_of_examples_changes_nothing_but_roundings(tmp_path):
    family = learned_family("open_clip", tmp_path)
    drawn = {name: family.inputs(t, 40) for t, name in enumerate(family.experts)}
    turned = {name: x.flip(0) for name, x in drawn.items()}
    first, second = (
        fitted(family, tmp_path / f"fit{i}", examples_of(x), shifts=0, inner="average")[1]
        for i, x in enumerate((drawn, turned))
    )
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["open_clip", "resnet"])
def test_targets_of_the_residual_stream_are_nearer_than_those_of_branches(kind, tmp_path):
    family = learned_family(kind, tmp_path)
    far = {}
    for target in ("residual", "branch"):
        recipe, *_ = fitted(
            family,
            tmp_path / target,
            family.examples(100),
            target=target,
            ridge=0.01,
            inner="average",
            shifts=0,
        )
        merge(recipe, tmp_path / f"{target}.safetensors")
        far[target] = sum(
            float(
                (
                    family.features(tmp_path / f"{target}.safetensors", x)
                    - family.features(tmp_path / name, x)
                ).norm()
            )
            for t, name in enumerate(family.experts)
            for x in [family.inputs(t, 100)]
        )
    assert far["residual"] < far["branch"]


def test_what_cannot_be_solved_is_said(tmp_path):
    family = learned_family("mixtral", tmp_path)
    with pytest.warns(UserWarning, match="stay as average makes them"):
        recipe = fit(
            family.recipe(METHOD, inner="average", shifts=0),
            family.network,
            family.examples(20),
            tmp_path / "fit",
        )
    kept = json.loads((tmp_path / "fit/fit.json").read_text())["notes"]["kept"]
    assert kept["model.embed_tokens.weight"] == "it has a row for each token of a vocabulary"
    packed = [name for name in kept if "experts" in name]
    assert packed and all("do not see the same tokens" in kept[name] for name in packed)
    merge(recipe, tmp_path / "merged.safetensors")
    merge(family.recipe("average"), tmp_path / "start.safetensors")
    start, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("start", "merged"))
    solved = load_file(tmp_path / "fit/solved.safetensors")
    assert all(torch.equal(found[name], solved.get(name, start[name])) for name in found)


def test_the_engine_merges_verifies_and_repeats_what_was_solved(tmp_path):
    family = learned_family("open_clip", tmp_path)
    recipe, solved, _ = fitted(family, tmp_path / "fit", family.examples(20), inner="average")
    merge(recipe, tmp_path / "merged")
    assert verify(tmp_path / "merged")
    again, *_ = fitted(family, tmp_path / "fit", family.examples(20), inner="average")
    assert again == recipe
    other, repeated, _ = fitted(family, tmp_path / "other", family.examples(20), inner="average")
    assert all(torch.equal(value, repeated[name]) for name, value in solved.items())


def test_examples_that_are_no_numbers_are_refused(tmp_path):
    family = learned_family("open_clip", tmp_path)
    drawn = {name: family.inputs(t, 10) for t, name in enumerate(family.experts)}
    drawn["e1"][3, 0, 5, 5] = float("nan")
    for method in (METHOD, "regmean_pp"):
        with refused("NaN or Inf"):
            fit(family.recipe(method, inner="average"), family.network, examples_of(drawn), tmp_path / method)
        assert not (tmp_path / method / "fit.json").exists()


def test_padding_has_no_say(tmp_path):
    family = learned_family("llama", tmp_path)
    drawn = {name: family.inputs(t, 40) for t, name in enumerate(family.experts)}
    plain = examples_of(drawn)

    def with_mask(junk: int) -> Examples:
        """Two tokens more, which are masked."""
        more = {n: torch.cat([x, torch.full((len(x), 2), junk)], 1) for n, x in drawn.items()}
        return Examples(
            {
                n: lambda n=n, x=x: [  # type: ignore[misc]
                    {"task": n, "images": x, "attention_mask": (torch.arange(8) < 6).long().expand(len(x), 8)}
                ]
                for n, x in more.items()
            },
            plain.counts, plain.owners, plain.digests, "fit",
        )  # fmt: skip

    first, second = (
        fitted(family, tmp_path / f"fit{junk}", with_mask(junk), inner="average", shifts=0)[1]
        for junk in (1, 2)
    )
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-4)


def test_a_minimum_is_where_the_slope_is_none():
    torch.manual_seed(0)
    x, y, start = torch.randn(9, 5).double(), torch.randn(9, 3).double(), torch.randn(3, 5).double()
    metric = metric_of(iter([torch.randn(3, 5).double()]), 5, 0.3)
    assert float(metric.diagonal().mean()) == pytest.approx(1)
    gram, ridge = x.T @ x, 0.7
    found = minimum(gram, y.T @ x, start, ridge, metric).requires_grad_(True)
    size = gram.diagonal().mean()
    apart = found - start
    loss = (x @ found.T - y).square().sum() + ridge * size * (apart @ metric * apart).sum()
    (slope,) = torch.autograd.grad(loss, found)
    assert float(slope.abs().max()) < 1e-9


@pytest.mark.parametrize("rows", [1, 5000])
def test_sums_are_those_of_all_rows_at_once(rows):
    torch.manual_seed(0)
    x, y, w = torch.randn(rows, 200), torch.randn(rows, 3), torch.rand(rows)
    for weights in (w, None):
        for exact, near in ((True, 1e-12), (False, 1e-5)):
            sums = least_squares._Sums(3, 200, exact, x.device)
            for part in range(0, rows, 1700):
                own = None if weights is None else weights[part : part + 1700]
                sums.add(x[part : part + 1700], y[part : part + 1700], own)
            given = torch.ones(rows).double() if weights is None else weights.double()
            one = torch.cat([x, torch.ones(rows, 1)], 1).double()
            gram, cross = sums.means()
            size = float(given.sum())
            torch.testing.assert_close(gram, one.T @ (one * given[:, None]) / size, atol=near, rtol=near)
            torch.testing.assert_close(
                cross, y.double().T @ (one * given[:, None]) / size, atol=near, rtol=near
            )


def test_how_many_tasks_are_summed_at_a_time_changes_nothing(tmp_path, monkeypatch):
    family = learned_family("open_clip", tmp_path, experts=3)
    found = []
    for workers in (1, 2, 3):
        monkeypatch.setattr(least_squares, "_WORKERS", workers)
        _, solved, _ = fitted(family, tmp_path / f"{workers}", family.examples(20), inner="average", shifts=0)
        found.append(solved)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_a_start_may_be_fitted_itself(tmp_path):
    """What it solved for, and the fit around it does not, is in the result."""
    family = learned_family("open_clip", tmp_path)
    alone, own, _ = fitted(family, tmp_path / "alone", family.examples(20), "regmean_pp", nondiagonal=0.9)
    start = {"inner": "regmean_pp", "nondiagonal": 0.9}
    near, solved, notes = fitted(family, tmp_path / "near", family.examples(20), ridge=1e9, shifts=0, **start)
    assert near.method == "solved" and near.params["inner"] == "average" and own.keys() <= solved.keys()
    assert not (tmp_path / "near/inner").exists()
    merge(alone, tmp_path / "a.safetensors")
    merge(near, tmp_path / "b.safetensors")
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5)


def test_a_fit_is_not_repeated_where_its_inputs_and_folder_are_only_moved(tmp_path, monkeypatch):
    family = learned_family("open_clip", tmp_path / "old")
    recipe, *_ = fitted(family, tmp_path / "old/fit", family.examples(8), inner="average", shifts=0)
    (tmp_path / "old").rename(tmp_path / "new")
    for file in (tmp_path / "new").rglob("model.safetensors"):
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    moved = replace(family, folder=tmp_path / "new")
    monkeypatch.setattr(least_squares, "merge", lambda *_, **__: pytest.fail("fitted again"))
    again, *_ = fitted(moved, tmp_path / "new/fit", family.examples(8), inner="average", shifts=0)
    assert again.experts == {name: tmp_path / "new" / name for name in family.experts}
    assert again.base == tmp_path / "new/base"
    assert again.statistics == {"solved": tmp_path / "new/fit/solved.safetensors"}
    assert again == Recipe.of(json.loads((tmp_path / "new/fit/fit.json").read_text())["recipe"])
    merge(again, tmp_path / "merged.safetensors")
    monkeypatch.undo()
    file = tmp_path / "new/e0/model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    other, *_ = fitted(moved, tmp_path / "new/fit", family.examples(8), inner="average", shifts=0)
    assert other.fitted == recipe.fitted
    assert verify(merge_of(other, tmp_path / "other"))


def merge_of(recipe: Any, out: Path) -> Path:
    merge(recipe, out)
    return out


def test_shifted_copies_are_the_images_themselves_moved():
    image = torch.arange(2 * 8 * 8.0).reshape(1, 2, 8, 8)
    examples = shifted(examples_of({"a": image}), 3)
    batches = list(examples.of("a"))
    assert examples.count("a") == 4 and len(batches) == 4 and torch.equal(batches[0]["images"], image)
    for batch in batches[1:]:
        inside = batch["images"][0, :, 3:5, 3:5]
        places = [(top, left) for top in range(7) for left in range(7)]
        assert any(torch.equal(inside, image[0, :, top : top + 2, left : left + 2]) for top, left in places)
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(batches, examples.of("a")))


# --------------------------------------------------------------------------------------- RegMean++


def _one_linear_map(folder: Path, weights: dict[str, torch.Tensor], bias: Any) -> tuple[Network, Any]:
    """A model of one block, a linear map: its network and the experts' states."""
    biases = bias if isinstance(bias, dict) else dict.fromkeys(weights, bias)
    states = {n: {"layers.0.weight": w, "layers.0.bias": biases[n].clone()} for n, w in weights.items()}
    states["base"] = {name: torch.zeros_like(value) for name, value in next(iter(states.values())).items()}
    for name, state in states.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in state.items()}, folder / name / "model.safetensors")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            outputs, inputs = next(iter(weights.values())).shape
            self.layers = nn.ModuleList([nn.Linear(inputs, outputs)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x)

    model = Model().eval().requires_grad_(False)
    return Network(model, lambda module, batch: module(batch["images"])), states


def _recipe(folder: Path, experts: list[str], method: str, **params: Any) -> dict[str, Any]:
    named = {name: str(folder / name) for name in experts}
    return {"method": method, "params": params, "base": str(folder / "base"), "experts": named}


def test_regmean_pp_of_one_map_is_the_golden_toy(tmp_path):
    """Of tanganke/fusion_bench@54c9e8c9: RegMean++ on the first block is RegMean; means over rows for sums."""
    held = load_file(GOLDENS / "unit-regmean-toy.safetensors")
    names = ["e0", "e1", "e2"]
    weights, biases, inputs = ({n: held[f"{k}.{t}"] for t, n in enumerate(names)} for k in "WbX")
    network, _ = _one_linear_map(tmp_path, weights, biases)
    for nondiagonal in (1.0, 0.9):
        folder = tmp_path / str(nondiagonal)
        recipe = _recipe(tmp_path, names, "regmean_pp", nondiagonal=nondiagonal)
        merge(fit(recipe, network, examples_of(inputs), folder), folder / "merged.safetensors")
        found = load_file(folder / "merged.safetensors")
        for part in ("weight", "bias"):
            expected = held[f"out.{nondiagonal}.{part}"]
            torch.testing.assert_close(found[f"layers.0.{part}"], expected, atol=1e-4, rtol=1e-4)


def test_regmean_pp_says_that_it_solves_for_what_is_in_blocks_alone(tmp_path):
    family = learned_family("open_clip", tmp_path)
    with pytest.warns(UserWarning, match="stay as average makes them: it is outside of the blocks"):
        fit(family.recipe("regmean_pp"), family.network, family.examples(8), tmp_path / "fit")
    kept = json.loads((tmp_path / "fit/fit.json").read_text())["notes"]["kept"]
    assert {"visual.conv1.weight", "visual.proj"} <= kept.keys()
    assert all("outside of the blocks" in why for why in kept.values())


def test_regmean_pp_is_the_official_loop_on_an_image_tower(tmp_path):
    """Block by block: Gram matrices in the expert's block, of the stream that came through the merged blocks before."""
    family = learned_family("timm", tmp_path)
    examples = family.examples(12)
    _, solved, _ = fitted(family, tmp_path / "fit", examples, "regmean_pp", nondiagonal=0.9)
    module, states = (
        family.network.module,
        [load_file(tmp_path / n / "model.safetensors") for n in family.experts],
    )
    merged = {k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]}
    module.load_state_dict(merged)
    with torch.no_grad():
        streams = []
        for t in range(2):
            x = module.patch_embed(family.inputs(t, 12))
            streams.append(module.norm_pre(module.pos_drop(module._pos_embed(x))))
        for i, block in enumerate(module.blocks):
            maps = [n for n, m in block.named_modules() if isinstance(m, nn.Linear)]
            grams: dict[str, Any] = {n: [] for n in maps}
            for t in range(2):
                block.load_state_dict(
                    {k[9:]: v for k, v in states[t].items() if k.startswith(f"blocks.{i}.")}
                )
                handles = [
                    block.get_submodule(n).register_forward_pre_hook(
                        lambda _, x, n=n, grams=grams: grams[n].append(x[0].flatten(0, -2).double())
                    )
                    for n in maps
                ]
                block(streams[t])
                for handle in handles:
                    handle.remove()
            for n in maps:
                own = [x.T @ x / len(x) for x in grams[n]]
                own = [0.9 * g + 0.1 * g.diag().diag() for g in own]
                left = sum(g @ s[f"blocks.{i}.{n}.weight"].double().T for g, s in zip(own, states))
                merged[f"blocks.{i}.{n}.weight"] = (torch.inverse(sum(own)) @ left).T.float()
                torch.testing.assert_close(
                    solved[f"blocks.{i}.{n}.weight"], merged[f"blocks.{i}.{n}.weight"], rtol=1e-3, atol=1e-4
                )
            block.load_state_dict({k[9:]: v for k, v in merged.items() if k.startswith(f"blocks.{i}.")})
            streams = [block(stream) for stream in streams]
    assert set(solved) == {k for k in merged if k.startswith("blocks.") and merged[k].ndim == 2}


@pytest.mark.parametrize("inner", ["average", "tsv_merge", "cart"])
def test_what_is_solved_for_transposed_layers_is_what_is_merged(tmp_path, inner):
    family = learned_family("gpt2", tmp_path / "family", experts=3)
    recipe = family.recipe("progressive_least_squares", inner=inner)
    fitted = fit(recipe, family.network, family.examples(16), tmp_path / "fit")
    merge(fitted, tmp_path / "out")
    solved, merged = (
        load_file(tmp_path / "fit/solved.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    square = "h.0.attn.c_proj.weight"  # which would fit either way
    assert {"h.0.attn.c_attn.weight", square} <= solved.keys() and solved[square].shape == (16, 16)
    assert all(torch.equal(merged[name], tensor) for name, tensor in solved.items())


# --------------------------------------------------------------------------------------- killed


def _killed_at(event: int, folder: Path, out: Path) -> None:
    """A fit that is killed when it has solved for so many maps, or written so many stages."""
    family, left = learned_family("open_clip", folder), event

    def counted(real: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal left
            found = real(*args)
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call

    least_squares.minimum = counted(least_squares.minimum)
    least_squares.write_tensors = spaces.write_tensors = counted(spaces.write_tensors)
    fitted(family, out, family.examples(20), inner="average", shifts=0)


@pytest.mark.slow
def test_a_fit_that_is_killed_twenty_times_ends_as_if_it_had_not_been(tmp_path):
    family = learned_family("open_clip", tmp_path / "family")
    _, expected, _ = fitted(family, tmp_path / "expected", family.examples(20), inner="average", shifts=0)
    out, stages = tmp_path / "fit", []
    # Within each of the four stages and right after each; the last two when all is solved, and fit.json is not there.
    for event in (0, 0, 1, *range(5), *range(6), 0, 0, 0, 1, 0, 0):
        child = FORK.Process(target=_killed_at, args=(event, tmp_path / "family", out))
        child.start()
        child.join(PATIENCE)
        assert child.exitcode == -signal.SIGKILL
        stages.append(len(list((out / "stages").glob("*.safetensors"))))
    assert len(stages) == 20 and stages == sorted(stages) and stages[-1] == 4
    fitted(family, out, family.examples(20), inner="average", shifts=0)
    found = (out / "solved.safetensors").read_bytes()
    assert found == (tmp_path / "expected/solved.safetensors").read_bytes()
    assert load_file(out / "solved.safetensors").keys() == expected.keys()
