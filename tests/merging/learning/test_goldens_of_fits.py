"""Fits by gradients compute what the published code computes, on what it was run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from places import GOLDENS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from mergeline.merging import merge
from mergeline.merging.learning.directions import Directions, Inputs
from mergeline.merging.learning.frank_wolfe import cosines, selection, step_of
from mergeline.merging.learning.methods.expert_merging import deviation
from mergeline.merging.learning.network import Network
from mergeline.merging.learning.objectives import Outputs, Seen, entropy, hidden, kl, soft_cross_entropy
from mergeline.merging.learning.spaces import Bits, Coefficients, Numbers, concrete, fitted_tensors
from mergeline.merging.methods.parts import Part, owners, slopes, summed
from mergeline.merging.recipes.recipe import Recipe

SPECTRAL = GOLDENS / "inputs" / "spectral"


def golden(case: str) -> dict[str, Tensor]:
    return load_file(GOLDENS / f"{case}.safetensors")


def close(a: Tensor, b: Tensor, atol: float = 1e-6, rtol: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=atol, rtol=rtol)


def saved(folder: Path, states: dict[str, dict[str, Tensor]]) -> Recipe:
    """A recipe of a `base` and experts with these states."""
    files = {name: folder / f"{name}.safetensors" for name in states}
    for name, state in states.items():
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, files[name])
    return Recipe.of({"method": "average", "base": files.pop("base"), "experts": files})


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def test_adamerging_by_tensor_and_a_step_of_adam(tmp_path):
    held = golden("unit-adamerging-layerwise")
    names = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    base = {name: held[f"base.{j}"] for j, name in enumerate(names)}
    experts = {f"e{t}": {n: base[n] + held[f"tv.{t}.{j}"] for j, n in enumerate(names)} for t in range(3)}
    recipe = saved(tmp_path, {"base": base, **experts})
    network = Network(
        TwoLayers(), lambda module, batch: module(batch["x"]),
        lambda features, task: 10 * normalize(features, dim=-1) @ normalize(held["head"], dim=-1).T,
    )  # fmt: skip
    inputs = Inputs(recipe)
    fitted_tensors(network, inputs.names)
    directions = Directions(inputs, network, tmp_path / "job", {})
    space = Coefficients(directions, network, Numbers(lambda piece, d: 0.3, squash="clamp"), recipe)
    # The file has them after the step, which changed them in place: they were 0.3, but for two outside of [0, 1].
    after = held["lam_raw"]
    outside = (after < 0) | (after > 1)
    assert outside.sum() == 2
    for j, name in enumerate(names):
        space.numbers[name].data.copy_(torch.where(outside, after, 0.3)[j][:, None])
    optimiser = torch.optim.Adam(list(space.numbers.values()), lr=1e-3)
    space.put(0)
    seen = Seen(network, {"x": held["x"]}, "e0", Outputs(network.features({"x": held["x"]})))
    loss = entropy(seen)
    loss.backward()
    space.pull(0)
    for j, name in enumerate(names):
        assert close(network.tensors()[name].detach(), held[f"merged.{j}"])
        gradient = space.numbers[name].grad
        assert gradient is not None and close(gradient[:, 0], held["lam_grad"][j])
    assert close(seen.logits.detach(), held["logits"], rtol=1e-4) and close(loss.detach(), held["loss"])
    optimiser.step()
    for j, name in enumerate(names):
        assert close(space.numbers[name].detach()[:, 0], held["lam_after_1_adam_step"][j])


class Vector(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(size))


def test_adamerging_pp_selects_what_the_official_code_does(tmp_path):
    held = golden("unit-adamerging-ties_split")
    taus = held["ties.in"]
    states = {"base": {"v": torch.zeros(200)}} | {f"e{t}": {"v": tau} for t, tau in enumerate(taus)}
    inputs = Inputs(saved(tmp_path, states))
    network = Network(Vector(200), lambda module, batch: module.v)
    directions = Directions(inputs, network, tmp_path / "job", {"directions": "ties", "density": 0.2})
    _, parts = directions.read(0)
    assert torch.equal(torch.stack([part.full() for part in parts]), held["ties.selected_entries"])


def test_concrete_masks_and_the_derivative_through_their_means():
    held = golden("unit-concrete-mask")
    for name in "ab":
        logits = held[f"logits.{name}"].clone().requires_grad_()
        mask = concrete(logits, held[f"uniform.{name}"], 0.5)
        assert close(mask.detach(), held[f"mask_T0.5.{name}"], 1e-5, 1e-4)
        soft = logits.detach().sigmoid()
        assert close(soft, held[f"mask_prob.{name}"], 1e-5, 1e-4)
        multiplier, squares = mask / mask.mean(), torch.zeros(())
        for t in range(3):
            tau = held[f"tv.{t}.{name}"]
            assert close((tau * multiplier).detach(), held[f"masked_sample.{t}.{name}"], 1e-5, 1e-4)
            assert close(tau * soft / soft.mean(), held[f"masked_prob.{t}.{name}"], 1e-5, 1e-4)
            squares = squares + (tau * multiplier).square().sum()
        squares.backward()
        assert logits.grad is not None and close(logits.grad, held[f"grad.{name}"], 1e-5, 1e-4)


def test_atlas_multiplies_parts(tmp_path):
    """Of matrices; the official code leaves other tensors out."""
    held = golden("unit-atlas-partition")
    masks, coefficients = held["2d.mask"], held["coefs"]
    owner_X = masks.double().argmax(0).reshape(-1)
    assert torch.equal(masks.sum(0), torch.ones_like(masks[0]))
    parts = [Part(tau) for tau in held["2d.params"]]
    assert close(summed(parts, coefficients, "partition", owner_X), held["2d.out"], 1e-5)
    gradient = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.stack([(gradient * p.full() * m).sum() for m in masks]) for p in parts])
    assert close(slopes(parts, gradient, "partition", 4, owner_X), expected)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_expert_merging_multiplies_chunks(count):
    held = golden("unit-expert_merging-chunks")
    whole, coefficients = held["param"], held[f"coef.{count}"][None]
    owner_X = owners("chunks", count, whole.numel(), 0, whole.numel(), 0, "w")
    assert close(summed([Part(whole)], coefficients, "chunks", owner_X), held[f"scaled.{count}"])


def test_expert_merging_has_the_official_losses():
    held = golden("unit-expert_merging-losses")
    student, teacher = held["student_logits"].flatten(0, 1), held["teacher_logits"].flatten(0, 1)
    network = Network(nn.Identity(), lambda module, batch: batch["x"], lambda features, task: features)

    def outputs(who: str, features: Tensor) -> Outputs:
        return Outputs(features, {str(i): held[f"{who}_h.{i}"] for i in (0, 2)})

    seen = Seen(network, {}, "t", outputs("student", student), outputs("teacher", teacher))
    assert close(soft_cross_entropy(student, teacher, 2.0), held["ce"])
    assert close(0.7 * hidden(seen), held["hidden"])
    expected = 4 * nn.functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean"
    )
    assert close(kl(2.0)(seen), expected)
    initial = torch.tensor([[0.1], [0.3]])  # of either teacher
    found = sum(5 * deviation(held[raw].sigmoid(), initial, 6, 2) for raw in ("raw_w", "raw_v"))
    assert close(torch.as_tensor(found), held["reg"])


def test_fw_merging_selects_and_steps_as_the_official_code_does():
    held = golden("unit-fw-selection")
    names, pool = ["l.weight", "l.bias", "o.weight", "o.bias"], [f"m{i}" for i in range(4)]
    scores = [cosines(held[f"grad.{n}"], [held[f"ckpt.{m}.{n}"] for m in pool]) for n in names]
    sums = [sum(column) for column in zip(*scores)]
    assert sums == pytest.approx([0.97703981, 1.40797400, 0.74987590, 0.96256566], abs=1e-5)
    assert [pool[i] for i in selection(scores, "expert")] == ["m2"] * 4
    by_tensor = [pool[i] for i in selection(scores, "tensor")]
    assert dict(zip(names, by_tensor)) == {"l.weight": "m0", "l.bias": "m3", "o.weight": "m2", "o.bias": "m2"}
    for k, kind, picks in ((0, "task_step0", ["m2"] * 4), (3, "layer_step3", by_tensor)):
        for name, pick in zip(names, picks):
            base = held[f"base.{name}"]
            moved = base + step_of(k, 0.1) * 0.3 * (held[f"ckpt.{pick}.{name}"] - base)
            assert close(moved, held[f"after_{kind}.{name}"]), (kind, name)


class Named(nn.Module):
    """A model of nothing but parameters with a checkpoint's names."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]  # type: ignore[assignment]
            owner.register_parameter(last, nn.Parameter(tensor.clone()))


@pytest.fixture
def adarank(tmp_path) -> tuple[Coefficients, Network]:
    files = {f"expert{t}": SPECTRAL / f"expert{t}.safetensors" for t in range(4)}
    recipe = Recipe.of({"method": "average", "base": SPECTRAL / "base.safetensors", "experts": files})
    network = Network(Named(load_file(SPECTRAL / "base.safetensors")), lambda module, batch: batch["x"])
    inputs = Inputs(recipe)
    fitted_tensors(network, inputs.names)
    params = {"directions": "cart", "over": "singular"}
    directions = Directions(inputs, network, tmp_path / "job", params)
    return Coefficients(directions, network, Bits(2.3, lambda side: int(0.16 * side)), recipe), network


def test_adarank_begins_where_the_official_code_does(adarank, tmp_path):
    space, _ = adarank
    held = golden("adarank-init-cart-r0.16-prior2.3")
    merge(space.recipe(tmp_path), tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, tensor in held.items():
        assert close(merged[name], tensor, 5e-6, 5e-5), name


def test_adarank_has_the_official_gradients_of_gates_and_weights(adarank):
    space, network = adarank
    held = golden("adarank-grad-cart-r0.16-prior2.3")
    space.put(0)
    functional = sum(
        float((tensor.detach().double() * held[f"C.{name}"].double()).sum())
        for name, tensor in network.tensors().items()
    )
    assert functional == pytest.approx(float(held["functional_loss"]), rel=1e-3)
    for name, tensor in network.tensors().items():
        tensor.grad = held[f"C.{name}"].clone()
    space.pull(0)
    for key, expected in held.items():
        if key.startswith("grad_mask."):
            gradient = space.numbers[f"bits/{key.removeprefix('grad_mask.')}"].grad
            assert gradient is not None and close(gradient, expected, 2e-5, 2e-3), key
    for name in network.tensors():
        gradient = space.numbers[f"weight/{name}"].grad
        assert gradient is not None
        order = KEY_ORDER.index(name)
        assert close(gradient[:, 0], held["grad_merge_weight"][:, order], 2e-5, 2e-3), name


def _key_order() -> list[str]:
    """The tensors in the order of the golden's columns: as open_clip's towers have them."""
    first = [
        "class_embedding",
        "positional_embedding",
        "proj",
        "conv1.weight",
        "ln_pre.weight",
        "ln_pre.bias",
    ]
    block = [
        "ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight",
        "attn.out_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
        "mlp.c_proj.bias",
    ]  # fmt: skip
    blocks = [f"transformer.resblocks.{i}.{name}" for i in range(4) for name in block]
    return [f"visual.{name}" for name in [*first, *blocks, "ln_post.weight", "ln_post.bias"]]


KEY_ORDER = _key_order()
