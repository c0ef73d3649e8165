"""What the algebra of each method promises, on small random models; the catalogue itself."""

from __future__ import annotations

import pytest
import torch
from checkpoints import State, random_state, refused, same_tensors
from hypothesis import given
from hypothesis import strategies as st

from merging import merge_state_dicts
from merging.methods import catalogue, get_method
from merging.keys import is_matrix

SEEDS = st.integers(0, 1000)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SYMMETRIC = [
    ("average", {}),
    ("task_arithmetic", {"scale": 0.4}),
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "variant": "mergekit"}),
    ("cart", {"rank": 0.3}),
    ("cart", {"rank": 0.3, "origin": "task_arithmetic"}),
    ("cart", {"rank": 0.3, "origin": "cart"}),
]


def family(seed: int, experts: int = 3, dtype: torch.dtype = torch.float32) -> tuple[State, dict[str, State]]:
    base = random_state(seed, dtype)
    taus = [random_state(seed + 10_000 * (t + 1)) for t in range(experts)]
    return base, {
        f"e{t}": {k: (v + 0.1 * tau[k]).to(dtype) for k, v in base.items()} for t, tau in enumerate(taus)
    }


def close(a: State, b: State, atol: float = 1e-6) -> bool:
    return a.keys() == b.keys() and all(
        torch.allclose(a[k].double(), b[k].double(), rtol=0, atol=atol) for k in a
    )


# --------------------------------------------------------------------------------------- identities


@given(SEEDS, DTYPES, st.integers(1, 5))
@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("average", {}),
        ("task_arithmetic", {"scale": 0.7}),
        ("ties", {"density": 0.5}),
        ("ties", {"variant": "mergekit"}),
        ("cart", {"rank": 0.5, "scale": 1.7}),
        ("cart", {"rank_rule": "energy"}),
        ("cart", {"origin": "task_arithmetic"}),
        ("cart", {"origin": "cart", "scale": 0.5}),
        ("cart", {"reduce": "tsv"}),
    ],
)
def test_copies_of_one_checkpoint_come_back_bit_for_bit(method, params, seed, dtype, count):
    state = random_state(seed, dtype)
    merged = merge_state_dicts(method, {f"e{i}": state for i in range(count)}, state, params=params)
    assert same_tensors(merged, state)


@given(SEEDS, DTYPES)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_scale_zero_is_the_base(method, seed, dtype):
    base, experts = family(seed, dtype=dtype)
    assert same_tensors(merge_state_dicts(method, experts, base, params={"scale": 0.0}), base)


@given(SEEDS, st.permutations(range(3)))
@pytest.mark.parametrize(("method", "params"), SYMMETRIC)
def test_the_order_of_experts_does_not_matter(method, params, seed, order):
    base, experts = family(seed)
    shuffled = {f"e{i}": experts[f"e{i}"] for i in order}
    assert close(
        merge_state_dicts(method, experts, base, params=params),
        merge_state_dicts(method, shuffled, base, params=params),
    )


@given(SEEDS, st.integers(1, 5))
@pytest.mark.parametrize(
    "params", [{"rank": 1.0}, {"rank_rule": "energy", "energy": 1.0}, {"rank": 1.0, "keys": "matrices"}]
)
def test_cart_of_full_rank_is_the_average(params, seed, count):
    _, experts = family(seed, count)
    assert close(merge_state_dicts("cart", experts, params=params), merge_state_dicts("average", experts))


@given(SEEDS)
def test_cart_of_two_experts_is_their_average(seed):
    _, experts = family(seed, 2)
    assert close(
        merge_state_dicts("cart", experts, params={"rank": 0.3}), merge_state_dicts("average", experts)
    )


@given(SEEDS)
def test_task_arithmetic_of_scale_one_over_t_is_the_average(seed):
    base, experts = family(seed)
    merged = merge_state_dicts("task_arithmetic", experts, base, params={"scale": 1.0, "normalize": True})
    assert close(merged, merge_state_dicts("average", experts))


@given(SEEDS)
def test_cart_keeps_the_leading_directions_of_centred_task_vectors(seed):
    _, experts = family(seed)
    merged = merge_state_dicts("cart", experts, params={"rank": 0.5, "scale": 2.0})
    name = "blocks.0.attn.weight"
    stack_TMN = torch.stack([e[name] for e in experts.values()]).double()
    mean_MN = stack_TMN.mean(0)
    u, s, vh = torch.linalg.svd(stack_TMN - mean_MN, full_matrices=False)
    expected = mean_MN + 2 * ((u[..., :2] * s[:, None, :2]) @ vh[:, :2]).sum(0)
    assert torch.allclose(merged[name].double(), expected, atol=1e-5)
    assert torch.allclose(
        merged["blocks.1.bias"], torch.stack([e["blocks.1.bias"] for e in experts.values()]).mean(0)
    )


@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_ties_that_trims_nothing_is_the_mean_of_what_agrees_with_the_elected_sign(rows):
    base = {"w": torch.arange(6, dtype=torch.float32)}
    experts = {
        f"e{i}": {"w": base["w"] + torch.tensor(row, dtype=torch.float32)} for i, row in enumerate(rows)
    }
    sums = [sum(column) for column in zip(*rows)]
    # Where a sum is zero, the official code takes the majority of all signs, or else negative.
    undecided = sum((s > 0) - (s < 0) for s in sums)
    expected = []
    for start, total, column in zip(base["w"].tolist(), sums, zip(*rows)):
        positive = total > 0 or (total == 0 and undecided > 0)
        agreeing = [x for x in column if (x > 0 if positive else x < 0)]
        expected.append(start + (sum(agreeing) / len(agreeing) if agreeing else 0))
    merged = merge_state_dicts("ties", experts, base, params={"density": 1.0})
    assert torch.allclose(merged["w"], torch.tensor(expected))


def test_ties_trims_over_the_whole_model():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    expert = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([10.0, 20, 30, 40])}
    # The threshold of the official code is the largest entry that it ought to drop, so one more is kept.
    whole = merge_state_dicts("ties", {"e": expert}, base, params={"density": 0.5})
    assert whole["a"].tolist() == [0, 0, 0, 4] and whole["b"].tolist() == [10, 20, 30, 40]
    each = merge_state_dicts("ties", {"e": expert}, base, params={"density": 0.5, "scope": "tensor"})
    assert each["a"].tolist() == [0, 2, 3, 4] and each["b"].tolist() == [0, 20, 30, 40]


# --------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("visual.transformer.resblocks.0.attn.in_proj_weight", True),
        ("visual.transformer.resblocks.0.attn.out_proj.weight", True),
        ("visual.transformer.resblocks.11.mlp.c_fc.weight", True),
        ("visual.transformer.resblocks.0.ln_1.weight", False),
        ("visual.transformer.resblocks.0.mlp.c_fc.bias", False),
        ("visual.proj", False),
        ("visual.positional_embedding", False),
        ("token_embedding.weight", False),
        ("model.layers.3.self_attn.q_proj.weight", True),
        ("model.layers.3.input_layernorm.weight", False),
        ("model.embed_tokens.weight", False),
    ],
)
def test_which_tensors_are_block_linear(name, linear):
    assert is_matrix(name, 2, "block_linear") is linear
    assert is_matrix(name, 2, "matrices") is True
    assert not is_matrix(name, 1, "block_linear") and not is_matrix(name, 1, "matrices")


@pytest.mark.parametrize(("method", "params"), SYMMETRIC)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_keeps_its_dtype_and_shape(method, params, dtype):
    shapes = {"blocks.0.w": (4, 6), "empty": (0, 3), "scalar": (), "conv": (2, 3, 1, 1)}
    base, expert = random_state(0, dtype, shapes), random_state(1, dtype, shapes)
    merged = merge_state_dicts(method, {"a": expert, "b": base, "c": expert}, base, params=params)
    assert {k: (v.dtype, v.shape) for k, v in merged.items()} == {
        k: (v.dtype, v.shape) for k, v in base.items()
    }
    assert all(torch.isfinite(v).all() for v in merged.values())


def test_integer_tensors_are_copied_and_must_agree():
    buffer = torch.tensor([1, 2, 3])
    experts = {name: {"w": torch.ones(2), "ids": buffer.clone()} for name in "abc"}
    assert torch.equal(merge_state_dicts("average", experts)["ids"], buffer)
    experts["b"]["ids"][1] = 9
    with refused("'b'", "'ids'"):
        merge_state_dicts("average", experts)


def test_tensors_that_only_the_base_has_are_returned():
    base = {"w": torch.zeros(2), "extra": torch.ones(3)}
    merged = merge_state_dicts("task_arithmetic", {"a": {"w": torch.ones(2)}}, base)
    assert torch.equal(merged["extra"], base["extra"])


# --------------------------------------------------------------------------------------- refusals


def test_state_dicts_that_do_not_match_are_refused():
    one = {"w": torch.ones(2)}
    with refused("'b'", "'v'"):
        merge_state_dicts("average", {"a": one, "b": {**one, "v": torch.ones(1)}})
    with refused("'base'", "'w'"):
        merge_state_dicts("task_arithmetic", {"a": one}, {"v": torch.ones(1)})
    with refused("'w'", "[2]", "[3]", "'b'"):
        merge_state_dicts("average", {"a": one, "b": {"w": torch.ones(3)}})


@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (-float("inf"), "Inf")]
)
def test_nan_and_inf_are_named(value, kind):
    bad = {"w": torch.tensor([1.0, value])}
    with refused("'b'", "'w'", kind):
        merge_state_dicts("average", {"a": {"w": torch.ones(2)}, "b": bad})


def test_a_call_that_cannot_work_is_refused():
    one = {"a": {"w": torch.ones(2)}}
    with refused("unknown method 'tie'", "did you mean 'ties'?"):
        merge_state_dicts("tie", one)
    with refused("unknown parameter 'scael'", "did you mean 'scale'?"):
        merge_state_dicts("cart", one, params={"scael": 1})
    with refused("ties", "base"):
        merge_state_dicts("ties", one)
    with refused("cart", "base"):
        merge_state_dicts("cart", one, params={"origin": "task_arithmetic"})
    with refused("at least 1"):
        merge_state_dicts("average", {})
    with refused("statistics"):
        merge_state_dicts("average", one, statistics={"fisher": []})
    with refused("weights"):
        merge_state_dicts("task_arithmetic", {**one, "b": one["a"]}, one["a"], params={"weights": [1.0]})


@pytest.mark.parametrize(
    ("method", "params", "name"),
    [
        ("ties", {"density": 0}, "density"),
        ("ties", {"density": 1.1}, "density"),
        ("ties", {"variant": "other"}, "variant"),
        ("cart", {"rank": "much"}, "rank"),
        ("cart", {"scale": float("nan")}, "scale"),
        ("cart", {"scale": float("inf")}, "scale"),
        ("task_arithmetic", {"weights": [1, "x"]}, "weights"),
        ("task_arithmetic", {"weights": [float("nan")]}, "weights"),
    ],
)
def test_values_out_of_range_are_refused(method, params, name):
    with refused(f"{method}: {name}"):
        get_method(method).resolve(params)


# --------------------------------------------------------------------------------------- the catalogue


@pytest.mark.parametrize("entry", catalogue().values(), ids=list(catalogue()))
def test_every_method_documents_itself_and_has_legal_defaults(entry):
    assert entry.summary.endswith(".") and entry.paper and entry.reference in ("pretrained", "mean", "none")
    assert entry.resolve({}) == entry.parameters
