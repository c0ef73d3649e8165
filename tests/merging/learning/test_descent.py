"""Fits go where the objective leads, come out the same if they are killed, and end in recipes that are merged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_network import Family, make_family
from torch.func import functional_call

from mergeline.merging import merge
from mergeline.merging.errors import UserError
from mergeline.merging.learning import descent, network, teachers
from mergeline.merging.learning.contract import Job
from mergeline.merging.learning.directions import Inputs
from mergeline.merging.learning.fits import opened
from mergeline.merging.learning.fitting import fit
from mergeline.merging.learning.network import Examples, Network
from mergeline.merging.learning.objectives import objective_of
from mergeline.merging.learning.pool import Pool
from mergeline.merging.recipes.recipe import Recipe


@pytest.fixture
def family(tmp_path) -> Family:
    return make_family(tmp_path / "family", dtype=torch.float32)


def fitted(family: Family, folder: Path, method: str, **params: Any) -> Any:
    return fit({**family.recipe, "method": method, "params": params}, family.network, family.examples, folder)


def curve(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "curve.json").read_text())


FITS: list[tuple[str, dict[str, Any]]] = [
    ("adamerging", {"rate": 0.02}),
    ("adamerging", {"rate": 0.02, "scope": "expert", "clamp": False}),
    ("adamerging_pp", {"rate": 0.02}),
    ("adarank", {"rate": 0.003, "rank": 1.0, "initial": 1.0, "objective": "cosine"}),
    ("atlas", {}),
    ("atlas", {"parts": 3, "objective": "pseudo_labels"}),
    ("coefficients", {}),
    ("coefficients", {"directions": "cart", "over": "chunks", "count": 3, "objective": "l1"}),
    ("coefficients", {"directions": "task_vectors", "over": "partition", "count": 3, "objective": "kl"}),
    ("coefficients", {"directions": "tsv", "objective": "hidden"}),
    ("coefficients", {"directions": "task_vectors", "over": "whole", "squash": "softmax", "objective": "l2"}),
    ("expert_merging", {"rate": 0.05, "chunks": 3, "hidden_weight": 1.0, "regularisation": 0.1, "batch": 8}),
    ("concrete", {"rate": 0.3}),
    ("distill", {"inner": "task_arithmetic", "scale": 0.3, "shifts": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "params"), FITS, ids=lambda value: str(value))
def test_the_loss_falls_and_the_engine_merges_the_result(family, tmp_path, method, params):
    recipe = fitted(family, tmp_path / "job", method, **{"iterations": 30, **params})
    losses = [row["loss"] for row in curve(tmp_path / "job")]
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])
    merge(recipe, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, tensor in family.network.tensors().items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-5), name


@pytest.mark.parametrize("scope", ["tensor", "expert"])
def test_a_mask_comes_first_then_coefficients_under_it(family, tmp_path, scope):
    params = {
        "scope": scope,
        "rate": 0.3,
        "inner_rate": 0.01,
        "adaptation_rate": 0.02,
        "iterations": 20,
        "adaptation": 20,
    }
    recipe = fitted(family, tmp_path / "job", "concrete_adamerging", **params)
    rows = curve(tmp_path / "job")
    assert [row["part"] for row in rows] == ["mask"] * 40 + ["coefficients"] * 20
    assert [row["step"] for row in rows] == [*range(60)]
    losses = [row["loss"] for row in rows]
    assert sum(losses[30:40]) < sum(losses[:10]) and sum(losses[-5:]) < sum(losses[40:45])
    merge(recipe, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, tensor in family.network.tensors().items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-5), name


def test_lbfgs_goes_by_the_loss_of_all_examples_and_its_derivatives(tmp_path):
    """In float64, against autograd through the merge, however the examples are cut into batches."""
    family = make_family(tmp_path / "family")
    job = Job(
        Recipe.of({**family.recipe, "method": "coefficients"}),
        family.network,
        family.examples,
        tmp_path / "job",
    )
    objective, schedule = objective_of("entropy"), descent.Schedule(1, 7, 1.0, "lbfgs")
    job.folder.mkdir()
    with Inputs(job.recipe) as inputs:
        opening = opened(job, inputs, 0.4, objective, schedule, descent.pools_of(job, schedule))
        losses = opening.descent.loss(0)
    leaves = {n: number.detach().clone().requires_grad_() for n, number in opening.coefficients.items()}
    base = family.states["base"]
    merged = {
        n: base[n] + sum(c * (family.states[e][n] - base[n]) for c, e in zip(leaves[n], "abc")) for n in base
    }
    total = torch.zeros((), dtype=torch.float64)
    for task in family.examples.batches:
        x = torch.cat([batch["inputs"] for batch in family.examples.of(task)])
        logits = family.network.logits(functional_call(family.network.module, merged, (x,)), task)
        loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        assert losses[task] == pytest.approx(loss.item(), rel=1e-12)
        total = total + loss
    total.backward()
    for name, leaf in leaves.items():
        assert (opening.coefficients[name].grad - leaf.grad).abs().max() <= 1e-12, name


def test_the_same_fit_is_done_once_and_another_anew(family, tmp_path, monkeypatch):
    first = fitted(family, tmp_path / "job", "adamerging", iterations=3)
    monkeypatch.setattr(descent.Descent, "run", lambda self: pytest.fail("fitted again"))
    assert fitted(family, tmp_path / "job", "adamerging", iterations=3) == first


def test_a_pool_holds_no_second_copy_of_its_examples():
    whole = torch.randn(10, 3, 4, 4)
    batches = [{"images": whole[i : i + 4], "task": "a"} for i in (0, 4, 8)]
    pool = Pool("a", Examples({"a": lambda: batches}, {"a": 10}, {"a": "a"}, {"a": "x"}, "fit"), 0)
    assert torch.equal(pool.batch([3, 8, 0, 8])["images"], whole[[3, 8, 0, 8]])
    whole.zero_()
    assert not pool.batch(range(10))["images"].any()


class _Killed(BaseException):
    """As a process is that is killed: nothing is tidied up."""


LBFGS = {"optimiser": "lbfgs", "over": "whole", "iterations": 4}


@pytest.mark.parametrize(
    ("at", "params"),
    [
        *((at, {"iterations": 30, "held_out": held}) for at in (2, 7, 20, 21) for held in (0.0, 0.25)),
        *((2, {**LBFGS, "held_out": held}) for held in (0.0, 0.25)),
    ],
    ids=str,
)
def test_a_fit_that_was_stopped_goes_on_to_the_same_result(family, tmp_path, monkeypatch, at, params):
    fitted(family, tmp_path / "whole", "coefficients", **params)
    run, keep, seen = descent.Descent.loss, descent.Descent._keep, []

    def loss(self: Any, step: int) -> Any:
        seen.append(step)
        if step == at and seen.count(step) == 1 and not (tmp_path / "job" / "fit.json").exists():
            raise _Killed
        return run(self, step)

    original = descent.Schedule.__init__

    def often(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "keep": 0.0})

    monkeypatch.setattr(descent.Schedule, "__init__", often)
    monkeypatch.setattr(descent.Descent, "loss", loss)
    with pytest.raises(_Killed):
        fitted(family, tmp_path / "job", "coefficients", **params)
    assert (tmp_path / "job" / "fit.state").exists()
    fitted(family, tmp_path / "job", "coefficients", **params)
    assert seen.index(at) > 0 and 0 not in seen[seen.index(at) + 1 :], "it began anew"
    for file in ("coefficients.safetensors", "curve.json"):
        assert (tmp_path / "job" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert keep is descent.Descent._keep and not (tmp_path / "job" / "fit.state").exists()


def _linear_family(folder: Path) -> Family:
    """A family whose network is one linear map, so that features are linear in coefficients."""
    module = torch.nn.Linear(5, 6).double().eval()
    generator = torch.Generator().manual_seed(0)
    states = {
        name: {k: torch.randn(v.shape, generator=generator).double() for k, v in module.state_dict().items()}
        for name in ("base", "a", "b", "c")
    }
    files = {name: folder / f"{name}.safetensors" for name in states}
    for name, state in states.items():
        save_file(state, files[name])
    inputs = {n: torch.randn(24, 5, generator=generator).double() for n in "abc"}
    examples = Examples(
        {n: (lambda n=n: [{"inputs": inputs[n], "task": n}]) for n in inputs}, dict.fromkeys(inputs, 24),
        {n: n for n in inputs}, dict.fromkeys(inputs, "sha256:0"), "fit",
    )  # fmt: skip
    recipe = {"method": "average", "base": files.pop("base"), "experts": files}
    return Family(recipe, states, Network(module, lambda m, batch: m(batch["inputs"])), examples, {})


def test_lbfgs_reaches_the_minimum_of_a_convex_loss_in_a_few_steps(tmp_path):
    """The least squares of features, in closed form; Adam's loss after a thousand steps is no lower."""
    family = _linear_family(tmp_path)
    params = {"directions": "task_vectors", "over": "whole", "objective": "l2"}
    fitted(family, tmp_path / "few", "coefficients", optimiser="lbfgs", iterations=3, **params)
    found = _squares(family)
    fitted(family, tmp_path / "adam", "coefficients", iterations=1000, batch=24, **params)
    by_adam = _squares(family)
    base = family.states["base"]
    columns, wanted = [], []
    for task in family.recipe["experts"]:
        [batch] = family.examples.of(task)
        x, own = batch["inputs"], family.states[task]
        parts = [
            [
                x @ (family.states[n]["weight"] - base["weight"]).T,
                (family.states[n]["bias"] - base["bias"]).expand(24, 6),
            ]
            for n in "abc"
        ]
        columns.append(torch.stack([part.reshape(-1) for pair in parts for part in pair], 1))
        wanted.append((x @ (own["weight"] - base["weight"]).T + own["bias"] - base["bias"]).reshape(-1))
    a, y = torch.cat(columns), torch.cat(wanted)
    least = float((a @ torch.linalg.lstsq(a, y[:, None]).solution - y[:, None]).square().mean()) * 3
    assert found == pytest.approx(least, rel=1e-6) and found <= by_adam * (1 + 1e-9)


@pytest.mark.parametrize("objective", ["entropy", "cosine", "hidden"])
@pytest.mark.parametrize("small", [0, 2 * 8 * 5, 1 << 19], ids=["each alone", "in pairs", "all"])
def test_small_images_of_several_tasks_are_run_at_once_to_the_same_result(
    tmp_path, monkeypatch, small, objective
):
    family = make_family(tmp_path / "family")
    sizes: list[int] = []

    def run(module: Any, batch: Any) -> Any:
        sizes.append(len(batch["images"]))
        return module(batch["images"].flatten(1))

    def images(task: str) -> Any:
        return lambda: (
            {"images": batch["inputs"][:, :, None, None], "labels": batch["labels"], "task": task}
            for batch in family.examples.of(task)
        )

    seen = replace(family.examples, batches={task: images(task) for task in family.examples.batches})
    recipe = {
        **family.recipe, "method": "coefficients", "params": {"objective": objective, "iterations": 6, "batch": 8}
    }  # fmt: skip
    monkeypatch.setattr(network, "_SMALL", 0)
    fit(recipe, replace(family.network, run=run), seen, tmp_path / "alone")
    monkeypatch.setattr(network, "_SMALL", small)
    sizes.clear()
    fit(recipe, replace(family.network, run=run), seen, tmp_path / "job")
    wanted = {0: [8, 8, 8], 2 * 8 * 5: [16, 8], 1 << 19: [24]}[0 if objective == "hidden" else small]
    assert sorted(sizes[-6 * len(wanted) :]) == sorted(wanted * 6)
    for row, alone in zip(curve(tmp_path / "job"), curve(tmp_path / "alone"), strict=True):
        assert row["tasks"] == pytest.approx(alone["tasks"], rel=1e-10)
    monkeypatch.setattr(descent, "SIDE_BY_SIDE", 1)
    monkeypatch.setattr(teachers, "SIDE_BY_SIDE", 1)
    fit(recipe, replace(family.network, run=run), seen, tmp_path / "in turn")
    assert curve(tmp_path / "in turn") == curve(
        tmp_path / "job"
    )  # not a bit depends on what runs side by side


def _squares(family: Family) -> float:
    """The loss of the weights that the network has."""
    total = 0.0
    for task in family.recipe["experts"]:
        [batch] = family.examples.of(task)
        own = family.states[task]
        with torch.no_grad():
            difference = family.network.features(batch) - (batch["inputs"] @ own["weight"].T + own["bias"])
        total += float(difference.square().mean())
    return total


def test_a_loss_that_is_not_finite_stops_the_fit_and_says_the_step(family, tmp_path, monkeypatch):
    from mergeline.merging.learning import objectives

    calls = []

    def breaks(seen: Any) -> Any:
        calls.append(1)
        loss = objectives.cosine(seen)
        return loss * float("nan") if len(calls) > 3 * 4 else loss

    monkeypatch.setitem(objectives.NAMED, "cosine", objectives.Objective(breaks))
    with pytest.raises(UserError, match="loss of 'a' at step 4 is nan"):
        fitted(family, tmp_path / "job", "coefficients", iterations=10)
    state = load_file(tmp_path / "job" / "fit.state")
    assert state and all(torch.isfinite(tensor).all() for tensor in state.values())
    assert not (tmp_path / "job" / "fit.json").exists()


def test_a_fit_stops_early_where_agreement_is_best(family, tmp_path):
    fitted(family, tmp_path / "job", "coefficients", held_out=0.25, iterations=2000, rate=3.0)
    rows = [row for row in curve(tmp_path / "job") if "agreement" in row]
    best = max(rows, key=lambda row: row["agreement"])
    assert len(rows) < 100 and rows.index(best) == len(rows) - 1 - descent.Schedule(1, 1, 1.0).patience - 1


def test_distillation_begins_with_what_a_learned_method_gives(family, tmp_path):
    inner = {"inner": "progressive_least_squares", "shifts": 0}
    recipe = fitted(family, tmp_path / "job", "distill", iterations=0, **inner)
    started = fitted(family, tmp_path / "start", "progressive_least_squares", shifts=0)
    for name, found in (("out", recipe), ("expected", started)):
        merge(found, tmp_path / f"{name}.safetensors")
    merged, expected = (load_file(tmp_path / f"{name}.safetensors") for name in ("out", "expected"))
    for name, tensor in expected.items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-6), name
    recipe = fitted(family, tmp_path / "job", "distill", iterations=20, **inner)
    losses = [row["loss"] for row in curve(tmp_path / "job")]
    assert sum(losses[-5:]) < sum(losses[:5])
    merge(recipe, tmp_path / "trained.safetensors")
    merged = load_file(tmp_path / "trained.safetensors")
    for name, tensor in family.network.tensors().items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-5), name
    with pytest.raises(UserError, match="set held_out to 0"):
        fitted(family, tmp_path / "held", "distill", held_out=0.25, **inner)


def test_labels_are_refused_where_there_are_none(family, tmp_path):
    examples = family.examples
    unlabelled = Examples(examples.batches, examples.counts, examples.owners, examples.digests, "fit")
    recipe = {**family.recipe, "method": "coefficients", "params": {"objective": "cross_entropy"}}
    with pytest.raises(UserError, match="labels"):
        fit(recipe, family.network, unlabelled, tmp_path / "job")


@pytest.mark.parametrize(("method", "expected"), [("atlas", "are of class 2"), ("adamerging", "for class")])
def test_examples_of_one_class_are_refused_where_a_fit_would_learn_to_say_that_alone(
    family, tmp_path, method, expected
):
    """By their labels, where it is fitted to labels, or else by what their own expert makes of them."""

    def batches(task: str) -> Any:
        first = next(iter(family.examples.batches[task]()))
        same = {k: v[:1].repeat(20, *[1] * (v.ndim - 1)) for k, v in first.items() if torch.is_tensor(v)}
        return lambda: [{"task": task, **same, "labels": torch.full((20,), 2)}]

    tasks = family.examples.batches
    alike = replace(
        family.examples, batches={t: batches(t) for t in tasks}, counts=dict.fromkeys(tasks, 20), first=None
    )
    recipe = {**family.recipe, "method": method}
    with pytest.raises(UserError, match=f"all 20 examples of 'a' .*{expected}"):
        fit(recipe, family.network, alike, tmp_path / "job")
    few = replace(alike, first=1)  # which cannot be of several
    fit({**recipe, "params": {"iterations": 1}}, family.network, few, tmp_path / "few")
    features = {"method": "coefficients", "params": {"iterations": 1}}
    fit({**family.recipe, **features}, family.network, alike, tmp_path / "features")


def test_labels_are_not_shown_to_an_objective_that_does_not_ask_for_them(family, tmp_path, monkeypatch):
    """For the merge would pass for one that has seen none."""
    text = "def sly(seen):\n    return seen.merged.features[seen.labels == 0].sum()\n"
    (tmp_path / "sly_objective.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="does not say that it looks at them"):
        fitted(family, tmp_path / "job", "coefficients", objective="sly_objective:sly")


@pytest.mark.parametrize("method", ["adamerging", "distill", "progressive_least_squares", "regmean_pp"])
def test_an_expert_without_examples_or_a_task_is_refused_before_anything_is_written(family, tmp_path, method):
    none = replace(family.examples, counts={**family.examples.counts, "b": 0})
    strangers = replace(family.examples, owners={"a": "a", "c": "c"})
    for examples in (none, strangers):
        with pytest.raises(UserError, match="'b' has no examples of its own task; leave the expert out"):
            fit({**family.recipe, "method": method}, family.network, examples, tmp_path / "job")
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("name", ["entrpy", "no_such_module:f", "math:no_such"])
def test_an_objective_that_is_none_is_refused(family, tmp_path, name):
    with pytest.raises(UserError, match=name.partition(":")[0]):
        fitted(family, tmp_path / "job", "coefficients", objective=name)


def test_an_objective_of_ones_own_is_taken_by_its_name(family, tmp_path, monkeypatch):
    (tmp_path / "my_objective.py").write_text(
        "def far(seen):\n    return (seen.merged.features - seen.teacher.features).abs().max()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fitted(family, tmp_path / "job", "coefficients", objective="my_objective:far", iterations=3)
    assert len(curve(tmp_path / "job")) == 3
