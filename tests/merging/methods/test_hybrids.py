"""Recipes that compose: chains of wrappers, references that are other merges, task vectors cut to low rank first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, random_state, refused, same_tensors
from golden_cases import ALL, loaded
from patched import patch_everywhere
from places import GOLDENS
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeline.flows.cli import main
from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.algebra import decompositions
from mergeline.merging.engine.cache import FolderStore
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.methods import get_method
from mergeline.merging.methods.bound import bind
from mergeline.merging.recipes.loading import load_recipe
from mergeline.merging.recipes.recipe import Recipe
from mergeline.tasks.params import Merge

F64 = torch.float64
MATRIX = "blocks.0.attn.weight"


def family(dtype: torch.dtype = F64, count: int = 3) -> tuple[State, dict[str, State]]:
    base, *taus = (random_state(seed, dtype) for seed in range(count + 1))
    return base, {
        f"e{t}": {name: value + 0.1 * tau[name] for name, value in base.items()} for t, tau in enumerate(taus)
    }


def apart(a: State, b: State) -> float:
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def truncated(tau_MN: Tensor, k: int) -> Tensor:
    u, s, vh = torch.linalg.svd(tau_MN.double(), full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


def cut(experts: dict[str, State], start: State, rank: float) -> dict[str, State]:
    """The experts with their block matrices' task vectors around `start` cut to low rank."""
    return {
        name: {
            key: start[key] + truncated(value - start[key], max(1, int(rank * min(value.shape))))
            if key.startswith("blocks.0")
            else value
            for key, value in state.items()
        }
        for name, state in experts.items()
    }


# --------------------------------------------------------------------------------------- AdaRank's five


@pytest.mark.parametrize(
    ("name", "method", "params"),
    [
        ("cart-r0.08-lam1.0", "around(truncate(task_arithmetic))", {"rank": 0.08, "scale": 1.0}),
        ("cart-energy0.8-lam1.0", "around(truncate(task_arithmetic))", {"energy": 0.8, "scale": 1.0}),
        (
            "ta_cart-c0.3-r0.12-lam1.0",
            "around(truncate(task_arithmetic))",
            {"origin": "task_arithmetic", "origin_scale": 0.3, "rank": 0.12, "scale": 1.0},
        ),
        ("cart_tsv-r0.25", "around(tsv_merge)", {"rank": 0.25, "keys": "block_linear"}),
        ("lowrank_ta-r0.12-lam0.3", "truncate(task_arithmetic)", {"rank": 0.12, "scale": 0.3}),
    ],
)
def test_the_composed_form_equals_the_reference_implementation(name, method, params):
    case = next(case for case in ALL if case["case"] == name)
    found = merge_state_dicts(**{**loaded(case), "method": method, "params": params})
    expected = load_file(GOLDENS / case["expected"])
    for key in case["expected_keys"]:
        a, b = found[key].double(), expected[key].double()
        assert bool(((a - b).abs() <= case["atol"] + case["rtol"] * b.abs()).all()), key


@pytest.mark.parametrize(
    ("named", "own", "params"),
    [
        ("cart", {"rank": 0.5, "scale": 1.7}, {}),
        ("lowrank_task_arithmetic", {"rank": 0.5, "scale": 1.7}, None),
        ("cart", {"rank": 0.5, "scale": 1.7, "origin": "task_arithmetic", "origin_scale": 0.2},
         {"origin": "task_arithmetic", "origin_scale": 0.2}),
        ("cart", {"rank": 0.5, "scale": 1.7, "origin": "tsv_merge"},
         {"origin": "tsv_merge", "origin_keys": "block_linear"}),
        ("cart", {"rank": 0.5, "scale": 1.7, "origin": "cart", "origin_scale": 0.2, "origin_rank": 0.3},
         {"origin": "cart", "origin_scale": 0.2, "origin_rank": 0.3}),
    ],
    ids=["cart", "pre_cart", "ta_cart", "tsv_cart", "cart_cart"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_composed_form_equals_the_method_of_its_own(dtype, named, own, params):
    base, experts = family(dtype)
    expected = merge_state_dicts(named, experts, base, params=own)
    chain = "truncate(task_arithmetic)" if params is None else "around(truncate(task_arithmetic))"
    found = merge_state_dicts(chain, experts, base, params={"rank": 0.5, "scale": 1.7, **(params or {})})
    assert apart(found, expected) < (1e-13 if dtype == F64 else 5e-7)


# --------------------------------------------------------------------------------------- around


@pytest.mark.parametrize("scale", [0.3, 1.7])
def test_centred_task_arithmetic_is_the_mean_and_with_weights_leaves_it(scale):
    base, experts = family()
    mean = merge_state_dicts("average", experts)
    found = merge_state_dicts("around(task_arithmetic)", experts, params={"scale": scale})
    assert apart(found, mean) < 1e-14  # centred task vectors cancel
    params = {"scale": scale, "weights": [2.0, 1.0, 0.0]}
    found = merge_state_dicts("around(task_arithmetic)", experts, base, params=params)
    for name, start in mean.items():
        update = 2 * (experts["e0"][name] - start) + experts["e1"][name] - start
        assert torch.allclose(found[name], start + scale * update, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("inner", "params"),
    [
        ("ties", {"density": 0.5}),
        ("ties", {"density": 0.5, "scope": "tensor"}),
        ("sce", {"density": 0.5}),
        ("della", {"density": 0.5}),
        ("breadcrumbs", {"density": 0.5, "outlier_rate": 0.2}),
        ("model_stock", {"scope": "row"}),
        ("karcher", {}),
        ("tsv_merge", {"rank": 0.5}),
        ("iso_c", {}),
        ("lowrank_task_arithmetic", {"rank": 0.5}),
        ("dare", {"inner_inner": "ties", "drop_rate": 0.5}),
        ("lines", {"inner_inner": "ties"}),
        ("truncate", {"inner_inner": "ties", "rank": 0.5, "density": 0.5}),
    ],
)
@pytest.mark.parametrize(
    ("origin", "at"),
    [
        ("mean", {}),
        ("task_arithmetic", {"scale": 0.2}),
        ("ties", {"density": 0.4}),
        ("sce", {"density": 0.4}),
        ("tsv_merge", {"rank": 0.5}),
        ("cart", {"rank": 0.5}),
    ],
)
def test_around_is_the_inner_method_with_another_base(origin, at, inner, params):
    """Whatever each of the two needs to know of the model, of a tensor, or of whole matrices."""
    base, experts = family()
    start = merge_state_dicts("average" if origin == "mean" else origin, experts, base, params=at)
    own = {key.removeprefix("inner_") if "inner_inner" in key else key: v for key, v in params.items()}
    expected = merge_state_dicts(inner, experts, start, params=own)
    chain = {"inner": inner, "origin": origin, **{f"origin_{key}": value for key, value in at.items()}}
    found = merge_state_dicts("around", experts, base, params={**params, **chain})
    assert apart(found, expected) < 1e-13


def test_around_may_be_wrapped_and_wrap_itself():
    base, experts = family()
    mean = merge_state_dicts("average", experts)
    once = merge_state_dicts("around(ties)", experts, params={"origin": "cart", "origin_rank": 0.5})
    # The outer one shows the inner one another base, which a mean does not depend on.
    params = {"origin": "task_arithmetic", "inner_origin": "cart", "origin_rank": 0.5}
    assert same_tensors(merge_state_dicts("around(around(ties))", experts, base, params=params), once)
    # Draws of DARE come first, so the mean is that of what they left.
    dropped = merge_state_dicts("dare(around(average))", experts, base, params={"drop_rate": 0.5})
    assert (
        apart(dropped, merge_state_dicts("dare(average)", experts, base, params={"drop_rate": 0.5})) < 1e-15
    )
    assert apart(dropped, mean) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "method", ["around(ties)", "around(truncate(task_arithmetic))", "around(dare(ties))"]
)
def test_copies_come_back_bit_for_bit(method, dtype):
    base = random_state(0, dtype)
    copy = random_state(1, dtype)
    assert same_tensors(merge_state_dicts(method, dict.fromkeys("abc", copy), base), copy)


def test_only_what_looks_at_the_base_needs_one():
    _, experts = family()
    for method in ("around(ties)", "around(truncate(dare))"):
        merge_state_dicts(method, experts)
    for method, params in (
        ("truncate(average)", {}),
        ("dare(around(ties))", {}),
        ("around(ties)", {"origin": "task_arithmetic"}),
        ("around(ties)", {"origin": "cart", "origin_origin": "tsv_merge"}),
    ):
        with refused("measures from the base"):
            merge_state_dicts(method, experts, params=params)
    with refused("sce needs at least 2 expert(s), got 1"):
        merge_state_dicts("around(average)", {"e": experts["e0"]}, experts["e1"], params={"origin": "sce"})


# --------------------------------------------------------------------------------------- truncate


@pytest.mark.parametrize("inner", ["task_arithmetic", "ties", "sce", "dare", "iso_c", "karcher"])
def test_truncate_of_full_rank_changes_nothing(inner):
    base, experts = family()
    found = merge_state_dicts(f"truncate({inner})", experts, base, params={"rank": 1.0})
    assert same_tensors(found, merge_state_dicts(inner, experts, base))


@pytest.mark.parametrize(
    "inner", ["average", "ties", "sce", "della", "model_stock", "dare(ties)", "lines(ties)"]
)
def test_truncate_is_the_inner_method_of_experts_of_low_rank(inner):
    base, experts = family()
    expected = merge_state_dicts(inner, cut(experts, base, 0.5), base)
    assert (
        apart(merge_state_dicts(f"truncate({inner})", experts, base, params={"rank": 0.5}), expected) < 1e-13
    )
    mean = merge_state_dicts("average", experts)
    expected = merge_state_dicts(inner, cut(experts, mean, 0.5), mean)
    found = merge_state_dicts(f"around(truncate({inner}))", experts, base, params={"rank": 0.5})
    assert apart(found, expected) < 1e-13


def test_energy_chooses_the_rank_of_each_expert():
    base, experts = family(count=1)
    [expert] = experts.values()
    energy = torch.linalg.svdvals(expert[MATRIX] - base[MATRIX]).square()
    for k in (1, 2, 3):
        share = (energy[:k].sum() / energy.sum()).item() * 0.9999
        found = merge_state_dicts("truncate(average)", experts, base, params={"energy": share})
        expected = base[MATRIX] + truncated(expert[MATRIX] - base[MATRIX], k)
        assert torch.allclose(found[MATRIX], expected, rtol=0, atol=1e-13)
    assert torch.equal(found["blocks.1.bias"], expert["blocks.1.bias"])  # no matrix passes whole


# --------------------------------------------------------------------------------------- the factor store

CHAINS = [
    "around(truncate(task_arithmetic))",
    "around(tsv_merge)",
    "truncate(tsv_merge)",
    "dare(truncate(ties))",
    "truncate(dare)",
    "around(dare(tsv_merge))",
]


@pytest.fixture
def decomposed(monkeypatch) -> list[int]:
    calls: list[int] = []
    leading = decompositions.leading
    patch_everywhere(monkeypatch, "leading", lambda gram, k: calls.append(k) or leading(gram, k))
    return calls


def test_centred_decompositions_are_those_of_cart(tmp_path, decomposed):
    _, experts = family()
    store = FolderStore(tmp_path)
    expected = merge_state_dicts("cart", experts, params={"rank": 0.5}, factors=store)
    assert len(decomposed) == 6
    params = {"rank": 0.5, "scale": 1.0}
    found = merge_state_dicts("around(truncate(task_arithmetic))", experts, params=params, factors=store)
    assert len(decomposed) == 6 and apart(found, expected) < 1e-13


def test_a_store_never_gives_the_decompositions_of_other_task_vectors(tmp_path, decomposed):
    base, experts = family()
    store = FolderStore(tmp_path)
    for seed in (0, 1):
        for method in CHAINS:
            for origin in ({}, {"origin": "task_arithmetic"}) if "around" in method else ({},):
                alone = merge_state_dicts(method, experts, base, params=origin, seed=seed)
                for _ in range(2):
                    given = {"params": origin, "seed": seed, "factors": store}
                    assert same_tensors(merge_state_dicts(method, experts, base, **given), alone)
    renamed = dict(zip(("x", "y", "z"), experts.values()))  # draws depend on names
    alone = merge_state_dicts("dare(truncate(ties))", renamed, base)
    assert same_tensors(merge_state_dicts("dare(truncate(ties))", renamed, base, factors=store), alone)


def test_what_depends_on_given_masks_is_not_stored(tmp_path, decomposed):
    base, experts = family()
    store, params = FolderStore(tmp_path), {"masks": "given", "drop_rate": 0.5}
    for kept in (0, 1):
        masks = [{name: torch.full(v.shape, kept, dtype=torch.uint8) for name, v in base.items()}] * 3
        given = {"params": params, "statistics": {"masks": masks}}
        alone = merge_state_dicts("dare(truncate(task_arithmetic))", experts, base, **given)
        again = merge_state_dicts("dare(truncate(task_arithmetic))", experts, base, **given, factors=store)
        assert same_tensors(again, alone)
    assert not list(tmp_path.rglob("*.factors"))


# --------------------------------------------------------------------------------------- chains by name

LONG = {"inner": "dare", "inner_inner": "ties"}


def test_parameters_of_a_chain_are_flat():
    found = get_method("lines").resolve({**LONG, "variant": "mergekit", "inner_variant": "mergelm"})
    assert (found["variant"], found["inner_variant"]) == ("mergekit", "mergelm")
    assert found["scale"] == 1.0  # which lines gives to whatever has one inside
    bound = bind(get_method("lines"), found)
    assert [level.method.id for level in bound.chain] == ["lines", "dare", "ties"] and bound.flat == found
    chain = {"inner": "around", "inner_inner": "truncate", "inner_inner_inner": "cart", "origin": "cart"}
    found = get_method("lines").resolve({**chain, "origin_rank": 0.1, "rank": 0.2, "inner_rank": 0.3})
    bound = bind(get_method("lines"), found)
    around, truncate, cart = list(bound.chain)[1:]
    assert (around.origin.params["rank"], truncate.params["rank"], cart.params["rank"]) == (0.1, 0.2, 0.3)
    assert get_method("lines").resolve(found) == bound.flat == found


def test_a_chain_in_one_word_is_the_same_recipe(tmp_path):
    folder = tmp_path / "family"
    folder.mkdir()
    base, experts = family(torch.float32)
    for name, state in {"base": base, **experts}.items():
        save_file(state, folder / f"{name}.safetensors")
    paths = {
        "base": folder / "base.safetensors",
        "experts": {e: folder / f"{e}.safetensors" for e in experts},
    }
    short = {**paths, "method": "lines(dare(ties))", "params": {"drop_rate": 0.5}}
    long = {**paths, "method": "lines", "params": {**LONG, "drop_rate": 0.5}}
    assert Recipe.of(short) == Recipe.of(long)
    manifests = [merge(r, tmp_path / f"{i}.safetensors") for i, r in enumerate((short, long))]
    assert manifests[0]["recipe_digest"] == manifests[1]["recipe_digest"]
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    in_memory = merge_state_dicts("lines( dare(ties) )", experts, base, params={"drop_rate": 0.5})
    assert same_tensors(in_memory, load_file(tmp_path / "0.safetensors"))
    written = "\n".join(
        ["method: lines(dare(ties))", "params: {drop_rate: 0.5}", f"base: {paths['base']}", "experts:"]
        + [f"  {name}: {path}" for name, path in paths["experts"].items()]
    )
    (tmp_path / "recipe.yaml").write_text(written)
    arguments = [f"--expert={name}={path}" for name, path in paths["experts"].items()]
    arguments += ["--method=lines(dare(ties))", "--set=drop_rate=0.5", f"--base={paths['base']}"]
    for i, given in enumerate((["--recipe", str(tmp_path / "recipe.yaml")], arguments)):
        assert main(["merge", *given, "--out", str(tmp_path / f"cli{i}.safetensors")]) == 0
        assert (tmp_path / f"cli{i}.safetensors").read_bytes() == (tmp_path / "0.safetensors").read_bytes()
    in_params = Merge.model_validate({"method": "lines(dare(ties))", "params": {"drop_rate": 0.5}})
    assert (in_params.method, in_params.params) == (long["method"], long["params"])


@pytest.mark.parametrize(
    ("method", "params", "parts"),
    [
        ("lines(dare(tie))", {}, ["unknown method 'tie'", "did you mean 'ties'?"]),
        ("line(ties)", {}, ["unknown method 'line'", "did you mean 'lines'?"]),
        ("lines(ties", {}, ["'lines(ties' is no chain"]),
        ("lines(ties))", {}, ["is no chain"]),
        ("lines()", {}, ["is no chain"]),
        ("lines(ties)(dare)", {}, ["is no chain"]),
        ("lines)", {}, ["is no chain"]),
        ("ties(lines)", {}, ["ties: unknown parameter 'inner'"]),
        ("lines(dare)", {"inner": "ties"}, ["names dare, inner names ties"]),
        ("lines(dare(ties))", {"drop_rat": 0.5}, ["'drop_rat'", "did you mean 'drop_rate'?"]),
        ("around(ties)", {"origin": "dare"}, ["origin 'dare'", "name a plain one"]),
    ],
)  # fmt: skip
def test_a_chain_that_is_wrong_is_refused(method, params, parts, tmp_path):
    base, experts = family()
    with refused(*parts):
        merge_state_dicts(method, experts, base, params=params)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"method: {method}\nexperts: {{a: a, b: b}}\nparams: {params}\n")
    with refused(str(file), *parts):
        load_recipe(file, Path)


def test_the_blame_of_a_recipe_finds_its_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("experts: {a: a, b: b}\nmethod: around(truncate(ties))\nparams:\n  rank: 0.1\n  rnk: 1\n")
    with refused(f"{file}:5:", "'rnk'", "did you mean 'rank'?"):
        load_recipe(file, Path)
    file.write_text("experts: {a: a, b: b}\nmethod: around(truncate(tie))\n")
    with refused(f"{file}:2:", "unknown method 'tie'"):
        load_recipe(file, Path)
    file.write_text(
        "experts: {a: a, b: b}\nmethod: around(lines)\nparams:\n  origin: cart\n  inner_inner: tie\n"
    )
    with refused(f"{file}:5:", "unknown method 'tie'"):
        load_recipe(file, Path)


# --------------------------------------------------------------------------------------- plans


def test_what_a_chain_needs_is_planned(tmp_path):
    base, experts = family(torch.float32)
    for name, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = {
        "base": tmp_path / "base.safetensors",
        "experts": {e: tmp_path / f"{e}.safetensors" for e in experts},
    }

    def planned(method: str, **params: Any) -> Any:
        return make_plan({**paths, "method": method, "params": params})

    def units(plan: Any) -> list[str]:
        return [entry.unit for entry in plan.entries]

    assert units(planned("around(ties)")) == ["element"] * 4
    assert units(planned("around(ties)", origin="tsv_merge"))[:2] == ["tensor"] * 2
    assert units(planned("truncate(della)")) == ["tensor", "tensor", "row", "row"]
    one, three = planned("lowrank_task_arithmetic"), planned("truncate(ties)")
    # The cut experts are held, three of 24 numbers of 8 bytes.
    assert three.entries[0].peak_bytes - one.entries[0].peak_bytes >= 8 * 24 * 3 and three.is_spectral
    assert planned("around(ties)", origin="cart").is_spectral and not planned("around(ties)").is_spectral
    rules = [{"match": MATRIX, "params": {"rank": 0.5}}]
    plan = make_plan({**paths, "method": "truncate(ties)", "rules": rules})
    assert any("'rank'" in problem and "cannot change" in problem for problem in plan.problems)
    plan = make_plan({**paths, "method": "truncate(ties)", "params": {"scope": "tensor"}, "rules": rules})
    assert not plan.problems
