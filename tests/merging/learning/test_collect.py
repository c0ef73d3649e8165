"""Statistics of experts on examples: what they are, by formulas written out here, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from checkpoints import refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.checkpoints.writer import CheckpointWriter
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.learning.collect import collect, provenance
from mergeline.merging.learning.gathering import Gathering
from mergeline.merging.learning.network import Examples, Network


class Tiny(nn.Module):
    """An embedding-free classifier with a packed attention, dropout, and logits of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.layers = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 3)])

    def forward(self, x_BTN: Tensor) -> Tensor:
        x_BTN = x_BTN + self.attention(x_BTN, x_BTN, x_BTN, need_weights=False)[0]
        return self.layers[1](self.drop(torch.tanh(self.layers[0](x_BTN)))).mean(1)


def network_of(module: nn.Module, key: str = "x") -> Network:
    return Network(module.eval().requires_grad_(False), lambda m, batch: m(batch[key]), lambda f, task: f)


def examples_of(x: Tensor, labels: Tensor | None = None, size: int = 4, **more: Any) -> Examples:
    def batches() -> Any:
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            yield {"task": "a", "x": x[part], **({} if labels is None else {"labels": labels[part]})}

    given: dict[str, Any] = {"digests": {"a": "x"}, "owners": {"a": "a"}, **more}
    return Examples({"a": batches}, {"a": len(x)}, split="fit", **given)


@pytest.fixture
def expert(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_file(Tiny().state_dict(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def inputs(count: int = 10) -> Tensor:
    return torch.randn(count, 5, 8, generator=torch.Generator().manual_seed(3))


def loaded(expert: Path) -> Tiny:
    model = Tiny()
    model.load_state_dict(load_file(expert))
    return model.eval()


# ---------------------------------------------------------------------------------------------- gram


def test_gram_matrices_are_means_over_tokens_of_the_experts_own_inputs(expert, tmp_path):
    x = inputs()
    file = collect("gram", expert, network_of(Tiny()), examples_of(x), tmp_path / "g.safetensors")
    found = load_file(file)
    model, seen = loaded(expert), {}
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(
            lambda _, args, out, i=i: seen.__setitem__(f"layers.{i}.weight", args[0].detach())
        )
    model(x)
    seen["attention.in_proj_weight"] = x
    for name, rows in seen.items():
        rows_RN = rows.reshape(-1, rows.shape[-1]).double()
        assert torch.allclose(found[name].double(), rows_RN.T @ rows_RN / len(rows_RN), rtol=1e-6, atol=1e-7)
    assert set(found) == {*seen, "attention.out_proj.weight"}
    told = provenance(file)
    assert told["rows"]["layers.0.weight"] == 50 and told["made_from"]["examples"] == {"a": 10}


def test_gram_matrices_of_wide_inputs_and_many_rows_are_as_good_as_float32(tmp_path):
    """Products are float32 of some thousand rows, of the upper triangle in strips; sums are float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(450, 3, bias=False))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    x = torch.randn(1000, 9, 450).exp()
    examples = examples_of(x, size=900)
    file = collect(
        "gram", tmp_path / "a.safetensors", network_of(model), examples, tmp_path / "g.safetensors"
    )
    [found_NN] = load_file(file).values()
    x_RN = x.reshape(-1, 450).double()
    exact_NN = x_RN.T @ x_RN / len(x_RN)
    assert torch.equal(found_NN, found_NN.T)
    assert (found_NN - exact_NN).norm() <= 1e-6 * exact_NN.norm()
    assert ((found_NN - exact_NN).abs() / exact_NN).max() <= 3e-6


@pytest.mark.parametrize("memory", ["layer", 1, 8 * 8 * 8 * 2])
def test_one_layer_or_so_many_bytes_at_a_time_give_the_same_file(memory, expert, tmp_path):
    network, examples = network_of(Tiny()), examples_of(inputs())
    whole = collect("gram", expert, network, examples, tmp_path / "whole.safetensors")
    parts = tmp_path / "parts.safetensors"
    collect("gram", expert, network, examples, parts, gathering=Gathering(memory=memory))
    assert whole.read_bytes() == parts.read_bytes()


def test_padding_is_no_input(tmp_path):
    """Whatever stands in padded places, and whichever side they are on."""
    import transformers as t

    torch.manual_seed(0)
    size = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = t.LlamaModel(
        t.LlamaConfig(num_attention_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0, **size)
    )
    save_file(model.state_dict(), tmp_path / "a.safetensors")

    def run(module: Any, batch: Any) -> Tensor:
        out = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return out[batch["attention_mask"].bool()]

    def file(name: str, batches: list[dict[str, Tensor]], kind: Any) -> dict[str, Tensor]:
        count = sum(len(batch["input_ids"]) for batch in batches)
        examples = Examples(
            {"a": lambda: iter([{"task": "a", **b} for b in batches])},
            {"a": count},
            {"a": "a"},
            {"a": name},
            "fit",
        )
        network = Network(model.eval(), run)
        return load_file(
            collect(kind, tmp_path / "a.safetensors", network, examples, tmp_path / f"{name}.safetensors")
        )

    def batch(ids: list[list[int]], mask: list[list[int]]) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    alone = [batch([[3, 4, 5]], [[1, 1, 1]]), batch([[6, 7]], [[1, 1]])]
    padded = [batch([[3, 4, 5], [6, 7, 9]], [[1, 1, 1], [1, 1, 0]])]
    expected, found = file("alone", alone, "gram"), file("padded", padded, "gram")
    assert expected.keys() == found.keys() and len(found) == 7
    assert all(torch.allclose(expected[k], found[k], atol=1e-6) for k in expected)
    [counts] = file("usage", padded, "usage").values()
    assert counts.tolist() == [0, 0, 0, 1, 1, 1, 1, 1] + [0] * 11


# ---------------------------------------------------------------------------------------------- fisher


def exact(
    model: Tiny, x: Tensor, labels: Callable[[int, Tensor], list[tuple[int, float]]]
) -> dict[str, Tensor]:
    """The mean over examples of weighted squares of gradients of log p, one backward a label."""
    model = model.double()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(x)):
        log_C = model(x[i : i + 1].double()).log_softmax(1)[0]
        for label, weight in labels(i, log_C.exp().detach()):
            grads = torch.autograd.grad(log_C[label], list(model.parameters()), retain_graph=True)
            for name, grad in zip(sums, grads):
                sums[name] += weight * grad**2 / len(x)
    return sums


def test_the_true_fisher_is_that_of_single_examples_and_all_classes(expert, tmp_path):
    x = inputs()
    found = load_file(
        collect("fisher", expert, network_of(Tiny()), examples_of(x), tmp_path / "f.safetensors")
    )
    expected = exact(loaded(expert), x, lambda i, p: list(enumerate(p.tolist())))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=1e-7 * float(value.max()))


def test_the_empirical_fisher_squares_no_gradient_of_a_batch(expert, tmp_path):
    x, labels = inputs(), torch.arange(10) % 3
    gathering = Gathering(labels="empirical")
    examples = examples_of(x, labels, labelled=True)
    file = collect(
        "fisher", expert, network_of(Tiny()), examples, tmp_path / "f.safetensors", gathering=gathering
    )
    found = load_file(file)
    expected = exact(loaded(expert), x, lambda i, p: [(int(labels[i]), 1.0)])
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=1e-7 * float(value.max()))


def test_drawn_labels_depend_on_seed_and_example_alone_and_come_to_the_true_fisher(expert, tmp_path):
    x = inputs()

    def file(name: str, size: int, draws: int = 1, seed: int = 0) -> dict[str, Tensor]:
        gathering = Gathering(labels="sampled", draws=draws)
        where = tmp_path / f"{name}.safetensors"
        examples = examples_of(x, size=size)
        collect("fisher", expert, network_of(Tiny()), examples, where, gathering=gathering, seed=seed)
        return load_file(where)

    one, other, seeded, many = (
        file("one", 4),
        file("other", 3),
        file("seeded", 4, 1, 1),
        file("many", 10, 300),
    )
    name = "layers.1.weight"
    assert torch.allclose(one[name], other[name], rtol=1e-4)
    assert not torch.allclose(one[name], seeded[name], rtol=1e-2)
    true = exact(loaded(expert), x, lambda i, p: list(enumerate(p.tolist())))
    assert abs(float(many[name].sum()) / float(true[name].sum()) - 1) < 0.05


@pytest.mark.parametrize("how", ["global", "trace"])
def test_a_fisher_is_divided_by_its_norm_or_its_sum(how, expert, tmp_path):
    examples, network = examples_of(inputs()), network_of(Tiny())
    found = load_file(
        collect(
            "fisher",
            expert,
            network,
            examples,
            tmp_path / "f.safetensors",
            gathering=Gathering(normalise=how),
        )
    )
    total = sum(float((t**2 if how == "global" else t).double().sum()) for t in found.values())
    assert total == pytest.approx(1, rel=1e-5)


def test_models_that_choose_by_their_inputs_values_are_done_one_by_one(expert, tmp_path):
    class Choosing(Tiny):
        def forward(self, x_BTN: Tensor) -> Tensor:
            found = super().forward(x_BTN)
            return found if bool((found.sum() < 1e9).item()) else found * 2

    x = inputs(4)
    plain = collect("fisher", expert, network_of(Tiny()), examples_of(x), tmp_path / "p.safetensors")
    chosen = collect("fisher", expert, network_of(Choosing()), examples_of(x), tmp_path / "c.safetensors")
    assert [provenance(f)["gradients"] for f in (plain, chosen)] == ["vmap", "one by one"]
    for name, value in load_file(plain).items():
        torch.testing.assert_close(load_file(chosen)[name], value, rtol=1e-3, atol=1e-9)


# ---------------------------------------------------------------------------------------------- traps


def test_few_examples_are_drawn_from_all_and_not_the_first_of_sorted_ones(expert, tmp_path):
    x = torch.arange(40.0)[:, None, None].expand(40, 5, 8).contiguous()
    gathering = Gathering(examples=8)

    def drawn(seed: int) -> Tensor:
        where = tmp_path / f"g{seed}.safetensors"
        collect("gram", expert, network_of(Tiny()), examples_of(x), where, gathering=gathering, seed=seed)
        return load_file(where)["attention.in_proj_weight"]

    assert float(drawn(0)[0, 0]) > 7**2 and not torch.equal(drawn(0), drawn(1))
    assert provenance(tmp_path / "g0.safetensors")["rows"]["attention.in_proj_weight"] == 8 * 5


def test_a_model_in_train_mode_is_not_collected_in_it(expert, tmp_path):
    network = network_of(Tiny())
    first = collect("gram", expert, network, examples_of(inputs()), tmp_path / "a1.safetensors", expert="a")
    network.module.train()
    second = collect("gram", expert, network, examples_of(inputs()), tmp_path / "a2.safetensors", expert="a")
    assert first.read_bytes() == second.read_bytes()


def test_nothing_is_left_of_the_expert_that_the_network_had_before(expert, tmp_path):
    """Weights are the file's in any order of experts; what an expert lacks is the base's, not the last one's."""
    network, examples = network_of(Tiny()), examples_of(inputs())
    torch.manual_seed(7)
    base, part = tmp_path / "base.safetensors", tmp_path / "part.safetensors"
    save_file(Tiny().state_dict(), base)
    save_file({k: v for k, v in load_file(base).items() if "layers.1" not in k}, part)
    for kind in ("gram", "fisher"):
        before = collect(kind, part, network, examples, tmp_path / "1.safetensors", expert="a", base=base)
        collect(kind, expert, network, examples, tmp_path / "2.safetensors")
        after = collect(kind, part, network, examples, tmp_path / "3.safetensors", expert="a", base=base)
        assert before.read_bytes() == after.read_bytes()
        assert all("layers.1" not in name for name in load_file(before))
        assert all(torch.equal(network.tensors()[k], v) for k, v in load_file(base).items())
    with refused("lacks the tensor 'layers.1", "name the base"):
        collect("gram", part, network, examples, tmp_path / "4.safetensors", expert="a")


def test_the_same_is_collected_once(expert, tmp_path):
    runs = []

    def run(module: Any, batch: Any) -> Tensor:
        runs.append(len(batch["x"]))
        return module(batch["x"])

    network, out = Network(Tiny().eval(), run, lambda f, task: f), tmp_path / "g.safetensors"
    told: list[tuple[int, int]] = []
    collect("gram", expert, network, examples_of(inputs()), out, progress=lambda *n: told.append(n))
    assert sum(runs) == 10 and told[-1] == (10, 10)
    collect("gram", expert, network, examples_of(inputs()), out)
    assert sum(runs) == 10
    collect("gram", expert, network, examples_of(inputs(), digests={"a": "other"}), out)
    collect("gram", expert, network, examples_of(inputs()), out, gathering=Gathering(examples=3))
    assert sum(runs) == 23


# ---------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused_in_a_line(expert, tmp_path):
    network, out = network_of(Tiny()), tmp_path / "g.safetensors"
    x = inputs()
    with refused("'moments'", "not collected"):
        collect("moments", expert, network, examples_of(x), out)
    with refused("'b' has no task"):
        collect("gram", expert, network, examples_of(x), out, expert="b")
    with refused("'a' has no examples"):
        collect("gram", expert, network, examples_of(x[:0]), out)
    with refused("1 example"):
        collect("gram", expert, network, examples_of(x), out, gathering=Gathering(examples=0))
    with refused("have no labels", "sampled"):
        collect("fisher", expert, network, examples_of(x), out, gathering=Gathering(labels="empirical"))
    with refused("usage", "leave them out"):
        collect("usage", expert, network, examples_of(x), out)
    with refused("no logits"):
        collect("fisher", expert, Network(Tiny().eval(), lambda m, b: m(b["x"])), examples_of(x), out)
    spoilt = x.clone()
    spoilt[7, 2, 1] = float("nan")
    for kind in ("gram", "fisher"):
        with refused("not finite", "'a'"):
            collect(kind, expert, network, examples_of(spoilt), out)
    state = load_file(expert)
    state["layers.0.bias"][0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with refused("NaN", "layers.0.bias"):
        collect("gram", tmp_path / "nan.safetensors", network, examples_of(x), out, expert="a")
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with refused("lacks the tensor"):
        collect("gram", tmp_path / "other.safetensors", network, examples_of(x), out, expert="a")
    assert not out.exists() and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------------------------------- whole models


def model_of(kind: str) -> tuple[Any, dict[str, Tensor], Callable[[Any, Any], Tensor], dict[str, Any]]:
    """A model, a batch of it, how it is run, and its configuration."""
    import transformers as t

    torch.manual_seed(0)
    ids = {"ids": torch.randint(0, 19, (6, 5), generator=torch.Generator().manual_seed(2))}
    size = {"vocab_size": 19, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "open_clip":
        from open_clip.transformer import VisionTransformer

        tower = VisionTransformer(16, 8, 16, 2, 2, 2.0, output_dim=4)
        return tower, {"x": torch.randn(4, 3, 16, 16)}, lambda m, b: m(b["x"]), {}
    if kind == "resnet":
        from torchvision.models import ResNet
        from torchvision.models.resnet import BasicBlock

        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
        return model, {"x": torch.randn(3, 3, 32, 32)}, lambda m, b: m(b["x"]), {}
    if kind == "gpt2":
        config: Any = t.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, **size)
        found: Any = t.GPT2LMHeadModel(config)
    else:
        size |= {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        if kind == "llama":
            config = t.LlamaConfig(num_key_value_heads=1, **size)
            found = t.LlamaForCausalLM(config)
        else:
            config = t.MixtralConfig(num_key_value_heads=1, num_local_experts=3, **size)
            config._experts_implementation = "eager"
            found = t.MixtralForCausalLM(config)
    return found, ids, lambda m, b: m(input_ids=b["ids"]).logits.flatten(0, 1), config.to_dict()


@pytest.mark.parametrize("kind", ["open_clip", "resnet", "gpt2", "llama", "mixtral"])
def test_methods_merge_what_was_collected(kind, tmp_path):
    """Every matrix of a layer has a Gram matrix, of packed experts each part; every parameter a Fisher."""
    module, batch, run, config = model_of(kind)
    network = Network(module.eval().requires_grad_(False), run, lambda f, task: f)
    prefix = "visual." if kind == "open_clip" else ""
    network = Network(network.module, network.run, network.score, prefix)
    files, first = {}, module.state_dict()
    tied = {"lm_head.weight"} if kind == "gpt2" else set()
    for t, name in enumerate(("base", "a", "b")):
        folder = tmp_path / name
        folder.mkdir()
        state = {
            prefix + key: (value + 0.02 * t * torch.randn_like(value) if value.is_floating_point() else value)
            for key, value in first.items()
            if key not in tied and "running_var" not in key
        } | {prefix + key: value for key, value in first.items() if "running_var" in key}
        save_file(
            {key: value.contiguous().clone() for key, value in state.items()}, folder / "model.safetensors"
        )
        if config:
            (folder / "config.json").write_text(json.dumps(config, default=str))
        files[name] = folder
    count = len(next(iter(batch.values())))
    examples = Examples(
        {"t": lambda: iter([{"task": "t", **batch}])}, {"t": count}, {"t": "a"}, {"t": "x"}, "fit"
    )
    statistics: dict[str, list[Path]] = {}
    for wanted in ("gram", "fisher") + (("usage",) if config else ()):
        for expert in "ab":
            out = tmp_path / f"{wanted}-{expert}.safetensors"
            examples = Examples(examples.batches, examples.counts, {"t": expert}, examples.digests, "fit")
            gathering = Gathering(labels="sampled", examples=3)
            collect(wanted, files[expert], network, examples, out, gathering=gathering, expert=expert)
            statistics.setdefault(wanted, []).append(out)
    recipe = {"base": files["base"], "experts": {e: files[e] for e in "ab"}}
    for method, kinds, params in (
        ("regmean", ["gram"], {}),
        ("esm", ["gram"], {}),
        ("fisher", ["fisher"], {}),
        ("regmean", ["gram", "usage"], {"embeddings": "usage"}),
    ):
        if "usage" in kinds and not config:
            continue
        given = {k: statistics[k] for k in kinds}
        plan = make_plan({**recipe, "method": method, "params": params, "statistics": given})
        assert not plan.problems, plan.problems
        lacking = [e.name for e in plan.merged if e.lacks]
        if method == "regmean":
            assert not lacking
        assert all("embed" in name or "wte" in name or "wpe" in name for name in lacking), lacking
        merge({**recipe, "method": method, "params": params, "statistics": given}, tmp_path / "out")
    one = {
        "base": files["base"],
        "experts": {"a": files["a"]},
        "statistics": {"fisher": statistics["fisher"][0]},
    }
    merge({**one, "method": "ffg"}, tmp_path / "ffg")


def test_esm_of_what_was_collected_is_esm_of_the_inputs_themselves(expert, tmp_path):
    """Of every matrix, the packed attention and what follows it among them; and not what it is without inputs."""
    first, files, collected, by_hand = loaded(expert).state_dict(), {}, [], []
    save_file({name: value - 0.1 for name, value in first.items()}, tmp_path / "base.safetensors")
    for t, name in enumerate("ab"):
        files[name] = tmp_path / f"{name}.safetensors"
        torch.manual_seed(t)
        save_file({k: v + 0.1 * torch.randn_like(v) for k, v in first.items()}, files[name])
        x = inputs(6 + t) * torch.linspace(0.1, 2, 8).roll(4 * t)
        out = tmp_path / f"gram-{name}.safetensors"
        examples = examples_of(x, owners={"a": name})
        collected.append(collect("gram", files[name], network_of(Tiny()), examples, out, expert=name))
        by_hand.append({n: rows.T @ rows for n, rows in inputs_of_matrices(loaded(files[name]), x).items()})
    states = {name: load_file(file) for name, file in files.items()}
    base = load_file(tmp_path / "base.safetensors")
    written_out = merge_state_dicts("esm", states, base, statistics={"gram": by_hand})
    recipe = {"base": tmp_path / "base.safetensors", "experts": files, "statistics": {"gram": collected}}
    merge({**recipe, "method": "esm"}, tmp_path / "esm")
    found = load_file(tmp_path / "esm" / "model.safetensors")
    without = merge_state_dicts("tsv_merge", states, base)
    for name in by_hand[0]:
        assert torch.allclose(found[name], written_out[name], atol=1e-4), name
        assert not torch.allclose(found[name], without[name], atol=1e-2), name


def inputs_of_matrices(model: Tiny, x_BTN: Tensor) -> dict[str, Tensor]:
    """The rows that each matrix multiplies: (R, N)."""
    attention = model.attention
    q, k, v = (
        part.unflatten(-1, (2, 4)).transpose(1, 2)
        for part in nn.functional.linear(x_BTN, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    )
    heads_BTN = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    after_BTN = x_BTN + attention.out_proj(heads_BTN)
    rows = {
        "attention.in_proj_weight": x_BTN,
        "attention.out_proj.weight": heads_BTN,
        "layers.0.weight": after_BTN,
        "layers.1.weight": torch.tanh(model.layers[0](after_BTN)),
    }
    return {name: value.flatten(0, 1).detach() for name, value in rows.items()}


# ---------------------------------------------------------------------------------------------- kills


@pytest.mark.slow
def test_a_kill_leaves_nothing_half_written_and_the_next_run_the_same_file(expert, tmp_path):
    examples, folder = examples_of(inputs(400)), tmp_path / "out"
    out, whole = folder / "g.safetensors", tmp_path / "whole.safetensors"

    def run(where: Path) -> None:
        collect("gram", expert, network_of(Tiny()), examples, where, expert="a")

    def child() -> int:
        """Another process, which has this one's modules."""
        pid = os.fork()
        if not pid:
            try:
                run(out)
            finally:
                os._exit(0)
        return pid

    folder.mkdir()
    run(whole)
    before = time.monotonic()
    os.waitpid(child(), 0)
    undisturbed = time.monotonic() - before
    assert out.read_bytes() == whole.read_bytes()
    killed = 0
    for kill in range(20):
        out.unlink(missing_ok=True)
        pid = child()
        time.sleep(undisturbed * (kill + 1) / 20)
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        assert not out.exists() or out.read_bytes() == whole.read_bytes()
        run(out)
        assert [file.name for file in folder.iterdir()] == ["g.safetensors"]
        assert out.read_bytes() == whole.read_bytes()
    assert killed


@pytest.mark.slow
def test_a_kill_while_the_file_is_written_leaves_none_of_it(expert, tmp_path, monkeypatch):
    examples, out = examples_of(inputs()), tmp_path / "out" / "g.safetensors"
    out.parent.mkdir()
    pid = os.fork()
    if not pid:
        monkeypatch.setattr(CheckpointWriter, "finish", lambda self: os.kill(os.getpid(), signal.SIGKILL))
        try:
            collect("gram", expert, network_of(Tiny()), examples, out, expert="a")
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert [file.name for file in out.parent.iterdir()] == [".g.safetensors.partial"]
    collect("gram", expert, network_of(Tiny()), examples, out, expert="a")
    assert [file.name for file in out.parent.iterdir()] == ["g.safetensors"]
