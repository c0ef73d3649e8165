"""SVFit: other singular values in the base's own basis, as experts over the base and merged in the basis itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from checkpoints import State, refused
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.extract_lora import extract_lora
from mergeline.merging.verify import verify

RANK = 3
MODULES = {"layers.0.q_proj": (6, 5), "layers.1.up_proj": (4, 7)}
SEEDS = st.integers(0, 2**31)


def base_state(seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    torch.manual_seed(seed)
    weights = {f"{module}.weight": torch.randn(shape).to(dtype) for module, shape in MODULES.items()}
    return {**weights, "norm.weight": torch.ones(5, dtype=dtype)}


def digest(tensor: torch.Tensor) -> str:
    return f"blake3:{blake3(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()}"


def save_base(folder: Path, state: State) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    return folder


def save_svfit(folder: Path, base: State, values: State, **config: Any) -> Path:
    """An adapter as `merging/checkpoints/adapters/singular_values.py` describes it."""
    folder.mkdir(exist_ok=True)
    named = {f"base_model.model.{module}.svfit_values": vector for module, vector in values.items()}
    save_file(named, folder / "adapter_model.safetensors")
    digests = {module: digest(base[f"{module}.weight"]) for module in values}
    said = {"peft_type": "SVFIT", "base_model_name_or_path": None, "base_digests": digests, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def vectors(seed: int, rank: int = RANK) -> State:
    torch.manual_seed(seed)
    return {module: torch.randn(rank).mul(2).add(1) for module in MODULES}


def by_hand(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """W0 + U diag(values - s) V^T, of the leading triplets of NumPy's decomposition."""
    import numpy as np

    u, s, vt = np.linalg.svd(weight.double().numpy())
    new = values.double().numpy() - s[: len(values)]
    return weight.double() + torch.from_numpy(sum(d * np.outer(u[:, i], vt[i]) for i, d in enumerate(new)))


def merged(recipe: dict[str, Any], out: Path) -> State:
    merge(recipe, out)
    assert "bit-identical" in verify(out)
    return load_file(out / "model.safetensors")


@given(seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_an_expert_is_its_base_with_other_singular_values(tmp_path_factory, seed, dtype):
    place, base, values = tmp_path_factory.mktemp("svfit"), base_state(seed, dtype), vectors(seed + 1)
    recipe = {
        "method": "average",
        "base": save_base(place / "base", base),
        "experts": {"a": save_svfit(place / "a", base, values)},
        "dtype": "float64",
    }
    merge(recipe, place / "out")
    found = load_file(place / "out" / "model.safetensors")
    for module, vector in values.items():
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        expected = by_hand(base[f"{module}.weight"], vector)
        assert torch.allclose(found[f"{module}.weight"], expected, rtol=0, atol=tolerance * 10), module
    assert torch.equal(found["norm.weight"], base["norm.weight"].double())


@pytest.mark.parametrize("params", [("average", {}), ("task_arithmetic", {"scale": 0.4})])
def test_merging_what_they_add_is_merging_in_the_basis(tmp_path, params):
    base = base_state()
    save_base(tmp_path / "base", base)
    experts = {name: save_svfit(tmp_path / name, base, vectors(i)) for i, name in enumerate("ab", 1)}
    method = {"method": params[0], "params": params[1], "experts": experts}
    dense = merged({**method, "base": tmp_path / "base"}, tmp_path / "dense")
    own = {m: torch.linalg.svdvals(base[f"{m}.weight"].double())[:RANK].float() for m in MODULES}
    save_svfit(tmp_path / "start", base, own)
    start = {"base": tmp_path / "start"} if params[0] != "average" else {}
    merge({**method, **start}, tmp_path / "kept")
    assert "bit-identical" in verify(tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    alone = {"method": "average", "base": tmp_path / "base", "experts": {"kept": tmp_path / "kept"}}
    again = merged(alone, tmp_path / "again")
    assert all(torch.allclose(again[name], value, atol=2e-6) for name, value in dense.items())


def test_the_plan_says_that_the_basis_is_the_bases(tmp_path):
    base = base_state()
    experts = {"a": save_svfit(tmp_path / "a", base, vectors(1))}
    plan = make_plan({"method": "average", "base": save_base(tmp_path / "base", base), "experts": experts})
    said = (
        "'a': singular values are put into the base's own basis, whose digests are compared when it is read"
    )
    assert said in plan.warnings and said in plan.read_as


def test_any_method_merges_vectors_and_the_plan_says_so(tmp_path):
    base = base_state()
    experts = {name: save_svfit(tmp_path / name, base, vectors(i)) for i, name in enumerate("ab", 1)}
    recipe = {"method": "ties", "base": save_svfit(tmp_path / "start", base, vectors(0)), "experts": experts}
    said = "singular values are merged in the basis of their base, and stay an adapter"
    assert said in make_plan(recipe).warnings
    merge(recipe, tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tuple(value.shape) for value in found.values()} == {(RANK,)}


def test_factors_of_what_is_added_become_a_lora(tmp_path):
    base = base_state()
    save_base(tmp_path / "base", base)
    experts = {name: save_svfit(tmp_path / name, base, vectors(i)) for i, name in enumerate("ab", 1)}
    recipe = {"method": "average", "base": tmp_path / "base", "experts": experts}
    dense = merged(recipe, tmp_path / "dense")
    extract_lora(recipe, tmp_path / "lora", rank=RANK)  # of both, for they share the basis
    again = merged({**recipe, "experts": {"lora": tmp_path / "lora"}}, tmp_path / "again")
    assert all(torch.allclose(again[name], value, atol=1e-5) for name, value in dense.items())


def test_another_base_is_refused_before_anything_is_published(tmp_path):
    base = base_state()
    recipe = {"method": "average", "experts": {"a": save_svfit(tmp_path / "a", base, vectors(1))}}
    merge(
        {**recipe, "base": save_base(tmp_path / "base", base)}, tmp_path / "right"
    )  # and its basis is known
    for name, other in {"other": base_state(9), "cast": base_state(0, torch.float64)}.items():
        with refused("the adapter was not trained on this base, whose '", "is another (base_digests)"):
            merge({**recipe, "base": save_base(tmp_path / name, other)}, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_vectors_of_different_bases_are_not_merged(tmp_path):
    experts = {name: save_svfit(tmp_path / name, base_state(i), vectors(i)) for i, name in enumerate("ab")}
    with refused("'b' has singular values of another base than 'a' (base_digests)"):
        merge({"method": "average", "experts": experts}, tmp_path / "out")
    bases = {name: save_base(tmp_path / f"base-{name}", base_state(i)) for i, name in enumerate("ab")}
    found = merged(
        {"method": "linear", "experts": experts, "onto": bases, "params": {"weights": [0.5, 0.5]}},
        tmp_path / "out",
    )
    weight = "layers.0.q_proj.weight"
    each = [by_hand(base_state(i)[weight], vectors(i)["layers.0.q_proj"]) for i in range(2)]
    assert torch.allclose(found[weight].double(), sum(each) / 2, atol=1e-5)


def test_adapters_of_different_ranks_share_a_base(tmp_path):
    base, weight = base_state(), "layers.0.q_proj.weight"
    sizes = {"a": 1, "b": 4, "c": 2}
    experts = {
        n: save_svfit(tmp_path / n, base, vectors(i, rank)) for i, (n, rank) in enumerate(sizes.items())
    }
    recipe = {"method": "average", "base": save_base(tmp_path / "base", base), "experts": experts}
    found = merged(recipe, tmp_path / "out")[weight]
    each = [
        by_hand(base[weight], vectors(i, rank)["layers.0.q_proj"]) for i, rank in enumerate(sizes.values())
    ]
    assert torch.allclose(found.double(), sum(each) / 3, atol=1e-6)


@pytest.mark.parametrize("lengths", [(3.0, 3.0, 1.0, 0.5), (3.0, 2.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0)])
def test_values_of_equal_size_have_no_certain_vectors_and_are_refused(tmp_path, lengths):
    left, right = (torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0] for _ in range(2))
    base = {"layers.0.q_proj.weight": (left * torch.tensor(lengths, dtype=torch.float64)) @ right}
    experts = {"a": save_svfit(tmp_path / "a", base, {"layers.0.q_proj": torch.ones(3)})}
    with refused("of the base's 'layers.0.q_proj.weight' are equal", "belong to no certain vectors"):
        merge(
            {"method": "average", "base": save_base(tmp_path / "base", base), "experts": experts},
            tmp_path / "out",
        )


def test_all_values_of_a_matrix_may_be_there(tmp_path):
    base = base_state()
    experts = {"a": save_svfit(tmp_path / "a", base, vectors(1, rank=4) | {"layers.0.q_proj": torch.ones(5)})}
    found = merged(
        {"method": "average", "base": save_base(tmp_path / "base", base), "experts": experts},
        tmp_path / "out",
    )
    assert torch.allclose(torch.linalg.svdvals(found["layers.0.q_proj.weight"]), torch.ones(5), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "config", "message"),
    [
        ({"layers.0.q_proj": torch.ones(6)}, {}, "does not fit the base"),
        ({"layers.0.q_proj": torch.ones(0)}, {}, "does not fit the base"),
        ({"layers.0.q_proj": torch.ones(2, 2)}, {}, "does not fit the base"),
        ({"layers.0.q_proj": torch.ones(2)}, {"base_digests": None}, "base_digests does not say the digest"),
        ({"layers.0.q_proj": torch.ones(2)}, {"base_digests": {"layers.0.q_proj": "md5:0"}}, "does not say the digest"),
        ({"layers.0.q_proj": torch.tensor([1.0, torch.nan])}, {}, "'a': tensor 'layers.0.q_proj.weight' holds NaN"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_of_the_base_is_refused(tmp_path, values, config, message):
    base = base_state()
    experts = {"a": save_svfit(tmp_path / "a", base, values, **config)}
    with refused(message):
        merge(
            {"method": "average", "base": save_base(tmp_path / "base", base), "experts": experts},
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_memory_for_the_decomposition_is_counted(tmp_path):
    torch.manual_seed(0)
    base = {"layers.0.q_proj.weight": torch.randn(300, 200)}
    save_svfit(tmp_path / "a", base, {"layers.0.q_proj": torch.ones(2)})
    torch.manual_seed(1)
    save_base(tmp_path / "full", {"layers.0.q_proj.weight": torch.randn(300, 200)})
    recipe = {"method": "average", "base": save_base(tmp_path / "base", base)}
    adapted, full = (make_plan({**recipe, "experts": {n: tmp_path / n}}).peak_bytes for n in ("a", "full"))
    assert adapted - full == 8 * 8 * 300 * 200


def test_any_pieces_of_any_adapter_give_the_same_bits(tmp_path):
    """Adapters of more and fewer values are read in turns, so that what the thread keeps is not always the same."""
    torch.manual_seed(0)
    name, base = "layers.0.q_proj", {"layers.0.q_proj.weight": torch.randn(400, 300)}
    sizes = {"a": 7, "b": 40}
    experts = {n: save_svfit(tmp_path / n, base, {name: torch.rand(rank)}) for n, rank in sizes.items()}
    recipe = {"method": "average", "base": save_base(tmp_path / "base", base), "experts": experts}
    plan = make_plan(recipe)
    plan.check()
    with FileInputs(plan) as source:
        length, entry = 400 * 300, f"{name}.weight"
        alone = source.stored("a", entry, 0, length)
        for step in (97_000, 31_111, 60_000):
            pieces = []
            for start in range(0, length, step):
                source.stored("b", entry, start, min(start + step, length))
                pieces.append(source.stored("a", entry, start, min(start + step, length)))
            assert torch.equal(torch.cat(pieces), alone)
