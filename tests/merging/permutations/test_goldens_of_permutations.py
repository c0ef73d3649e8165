"""Weight matching and PLeaS as the official codes do them on small inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDENS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergeline.merging import merge
from mergeline.merging.learning.fitting import fit
from mergeline.merging.learning.network import Examples, Network
from mergeline.merging.permutations.groups import Group, Order, Place, reordered
from mergeline.merging.permutations.matching import Alike, assigned, match_weights
from mergeline.merging.permutations.partial import Blocks, blocks, partly_merged

# perm.P -> where it is, of the official permutation specifications; flax's kernels are (inputs, outputs).
PLANTED = {
    "Dense_0/kernel": [None, "P_0"], "Dense_1/kernel": ["P_0", "P_1"], "Dense_2/kernel": ["P_1", "P_2"],
    "Dense_0/bias": ["P_0"], "Dense_1/bias": ["P_1"], "Dense_2/bias": ["P_2"], "Dense_3/kernel": ["P_2", None],
    "Dense_3/bias": [None],
}  # fmt: skip
TRANSFORMER = {
    "embed": [None, "P_res"], "ln1/scale": ["P_res"], "ln1/bias": ["P_res"], "q/kernel": ["P_res", None],
    "k/kernel": ["P_res", None], "v/kernel": ["P_res", None], "o/kernel": [None, "P_res"], "o/bias": ["P_res"],
    "ln2/scale": ["P_res"], "ln2/bias": ["P_res"], "fc1/kernel": ["P_res", "P_ffn"], "fc1/bias": ["P_ffn"],
    "fc2/kernel": ["P_ffn", "P_res"], "fc2/bias": ["P_res"], "head/kernel": ["P_res", None],
}  # fmt: skip


def part(held: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in held.items() if key.startswith(prefix)}


@pytest.mark.parametrize(
    ("case", "axes", "similarity"),
    [("planted", PLANTED, 523.2076416015625), ("transformer", TRANSFORMER, 1478.7818603515625)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_official_permutations_are_found(case, axes, similarity, seed):
    held = load_file(GOLDENS / f"unit-weight_matching-{case}.safetensors")
    a, b = part(held, "A."), part(held, "B.")
    places: dict[str, list[Place]] = {}
    for name, labels in axes.items():
        for axis, label in enumerate(labels):
            if label:
                places.setdefault(label, []).append(Place(name, axis, 0, a[name].shape[axis]))
    groups = [Group(label, found[0].length, tuple(found)) for label, found in places.items()]
    found = match_weights(a, b, groups, seed=seed)
    for label, order in found.orders.items():
        assert torch.equal(order.units, held[f"perm.{label}"])
    moved = reordered(b, groups, found.orders)
    assert all(torch.equal(t, moved[name]) for name, t in part(held, "Bperm.").items())
    total = sum(float((a[name].double() * moved[name].double()).sum()) for name in axes)
    assert total == pytest.approx(similarity, abs=1e-3)


# ------------------------------------------------------------------------------------------ PLeaS


class Chain(nn.Module):
    """The network of the cases: three linear maps with ReLU between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def chain_groups(widths: tuple[int, int] = (10, 10)) -> list[Group]:
    names = ("a", "b", "c")
    return [
        Group(
            f"{first}.weight",
            width,
            (
                Place(f"{first}.weight", 0, 0, width),
                Place(f"{first}.bias", 0, 0, width),
                Place(f"{second}.weight", 1, 0, width),
            ),
        )
        for first, second, width in zip(names, names[1:], widths)
    ]


def matched(held: dict[str, Tensor]) -> dict[str, Order]:
    return {name: Order(order) for name, order in part(held, "perm.").items()}


def test_pleas_finds_the_official_permutations_and_its_average():
    held = load_file(GOLDENS / "unit-pleas-full_merge.safetensors")
    m1, m2, groups, orders = part(held, "m1."), part(held, "m2."), chain_groups(), matched(held)
    found = match_weights(m1, m2, groups, restarts=8)
    official = reordered(m2, groups, orders)
    similarity = sum(float((m1[n] * official[n]).sum()) for n in m1 if n != "c.bias")
    assert found.similarity >= similarity - 1e-4
    split = {name: blocks(order, held[f"costs.{name}"], 0.0) for name, order in orders.items()}
    for name, of in split.items():
        for model in (0, 1):
            assert torch.equal(of.merged[model], held[f"r0.0.block.{name}.m{model + 1}_merged"])
            assert torch.equal(of.apart[model], held[f"r0.0.block.{name}.m{model + 1}_sep"])
    merged = partly_merged(m1, m2, groups, split, {})
    for name in m1:
        if name != "c.bias":  # which the official code leaves the first model's
            torch.testing.assert_close(merged[name], held[f"r0.0.init.{name}"], rtol=1e-5, atol=1e-6)


def test_the_learned_method_is_the_closed_form_of_the_case(tmp_path):
    held = load_file(GOLDENS / "unit-pleas-full_merge.safetensors")
    m1, m2 = part(held, "m1."), reordered(part(held, "m2."), chain_groups(), matched(held))
    mean = {name: (m1[name] + m2[name]) / 2 for name in m1}
    for name, state in (("m1", m1), ("m2", m2), ("mean", mean)):
        save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / f"{name}.safetensors")
    x = held["X"]
    examples = Examples(
        batches={"task": lambda: [{"images": x[:40]}, {"images": x[40:]}]}, counts={"task": len(x)},
        owners={"task": "m1"}, digests={"task": "sha256:0"}, split="fit",
    )  # fmt: skip
    network = Network(Chain().eval(), lambda module, batch: module(batch["images"]))
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("m1", "m2")}
    recipe = {
        "method": "pleas",
        "params": {"ridge": 0.0},
        "experts": paths,
        "base": tmp_path / "mean.safetensors",
    }
    merge(fit(recipe, network, examples, tmp_path / "fit"), tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for name in m1:
        expected = held[f"r0.0.closed_form.{name}"]
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4)


@given(st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_nothing_merged_gives_the_mean_of_what_the_models_give(seed):
    torch.manual_seed(seed)
    models = [Chain().double().eval(), Chain().double().eval()]
    a, b = ({k: t.detach() for k, t in m.state_dict().items()} for m in models)
    groups = chain_groups()
    found = match_weights(a, b, groups)
    apart = {g.name: blocks(found.orders[g.name], torch.zeros(g.units, g.units), 1.0) for g in groups}
    wide = partly_merged(a, b, groups, apart, {})
    assert wide["b.weight"].shape == (20, 20)
    x = torch.randn(7, 6, dtype=torch.float64)
    h = torch.relu(x @ wide["a.weight"].T + wide["a.bias"])
    h = torch.relu(h @ wide["b.weight"].T + wide["b.bias"])
    given_ = h @ wide["c.weight"].T + wide["c.bias"]
    torch.testing.assert_close(given_, (models[0](x) + models[1](x)) / 2)


@given(st.floats(0, 1), st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_every_unit_is_in_one_block(ratio, units, seed):
    alike = torch.rand(units, units, generator=torch.Generator().manual_seed(seed))
    order = assigned(Group("g", units, ()), Alike(alike.double()))
    found: Blocks = blocks(order, alike, ratio)
    for model in (0, 1):
        everything = torch.cat([found.merged[model], found.apart[model]])
        assert torch.equal(everything.sort().values, torch.arange(units))
    assert found.width == units + len(found.apart[0])
    assert (len(found.apart[0]) == units) == (ratio == 1)
