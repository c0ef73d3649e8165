"""`mergeline moe`, as one who has dense models and prompts runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import GOLDENS
from safetensors.torch import load_file, save_file
from small_language_model import TOKENS, save_model

from mergeline.flows.cli import main
from mergeline.merging.errors import UserError
from mergeline.tasks.language.moe import make_moe_of
from mergeline.tasks.language.routers import write_routers

FILE = """base_model: base
gate_mode: {mode}
experts:
- source_model: one
  positive_prompts: [w1 w2 w3, w4]
  negative_prompts: [w9]
- source_model: two
  positive_prompts: [w5 w6]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return folder, {name: save_model(folder / name, seed) for seed, name in enumerate(["base", "one", "two"])}


def ids(text: str) -> torch.Tensor:
    return torch.tensor([[TOKENS.index(word) for word in ["<s>", *text.split()]]])


def states(model: Any, text: str) -> torch.Tensor:
    """The inputs of all layers, (L, T, H)."""
    with torch.no_grad():
        found = model.eval()(input_ids=ids(text), output_hidden_states=True).hidden_states
    return torch.stack([state[0] for state in found[:-1]]).double()


def expected(model: Any, mode: str) -> torch.Tensor:
    """The rows of the first expert, (L, H), as mergekit-moe's formulas say."""
    if mode == "cheap_embed":
        embedding = model.get_input_embeddings().weight.detach().double()

        def of(*texts: str) -> torch.Tensor:
            total = sum(embedding[ids(text)[0]].sum(0) for text in texts)
            return (total / total.norm()).expand(2, -1)

    else:

        def of(*texts: str) -> torch.Tensor:
            each = [states(model, text) for text in texts]
            return sum(s.mean(1) if mode == "hidden_avg" else s[:, -1] for s in each) / len(each)

    row = of("w1 w2 w3", "w4") - of("w9")
    return row / row.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_prompts_make_the_router(mode, models, tmp_path, capsys):
    folder, made = models
    (folder / f"{mode}.yml").write_text(FILE.format(mode=mode))
    out = tmp_path / "out"
    assert main(["moe", str(folder / f"{mode}.yml"), "--out", str(out)]) == 0
    assert "mixtral: 2 experts, a token sent to 2" in capsys.readouterr().out
    found = load_file(out / "model.safetensors")
    rows = torch.stack([found[f"model.layers.{i}.block_sparse_moe.gate.weight"][0] for i in range(2)])
    torch.testing.assert_close(rows, expected(made["base"], mode).float(), atol=1e-5, rtol=1e-4)
    assert main(["verify", str(out)]) == 0
    assert "Experts are the MLPs of 0-one" in (out / "README.md").read_text()
    routers = [*(["--routers", f"{out}-routers.safetensors"])]
    again = tmp_path / "again"
    assert main(["moe", str(folder / f"{mode}.yml"), "--out", str(again), *routers]) == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert main(["moe", str(folder / f"{mode}.yml"), "--out", str(out)]) == 0  # replaces its own


def test_a_shared_expert_gets_a_gate_of_its_prompts(models, tmp_path):
    folder, made = models
    text = FILE.format(mode="hidden") + "architecture: qwen\nshared_experts: [{source_model: base, "
    (folder / "shared.yml").write_text(text + "positive_prompts: [w7]}]\n")
    assert main(["moe", str(folder / "shared.yml"), "--out", str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out/model.safetensors")
    row = states(made["base"], "w7")[1, -1]
    gate = found["model.layers.1.mlp.shared_expert_gate.weight"][0]
    torch.testing.assert_close(gate, (row / row.norm()).float(), atol=1e-5, rtol=1e-4)
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    "change, parts",
    [
        (("base_model: base", "base_modl: base"), [":1:", "base_modl", "base_model"]),
        (("gate_mode: hidden", "gate_mode: hiden"), [":2:", "gate_mode"]),
        (("  positive_prompts: [w5 w6]\n", ""), ["expert 1 has no positive_prompts"]),
        (("source_model: two", "source_model: none/at/all"), ["none/at/all"]),
        (("- source_model: two\n  positive_prompts: [w5 w6]\n", ""), ["1 experts", "sent to 2"]),
        (("  negative_prompts: [w9]", "  noise_scale: -1"), [":6:", "noise_scale"]),
        (
            ("experts:", "shared_experts: [{source_model: two}, {source_model: one}]\nexperts:"),
            ["shared_experts"],
        ),
    ],
)
def test_a_file_that_says_something_wrong_is_refused_and_nothing_written(change, parts, models, tmp_path):
    folder, _ = models
    text = FILE.format(mode="hidden")
    assert change[0] in text
    file = folder / f"wrong-{tmp_path.name}.yml"
    file.write_text(text.replace(*change))

    def bring(where: str) -> Path:
        if not Path(where).exists():
            raise UserError(f"{where}: is not there")
        return Path(where)

    with pytest.raises(UserError) as caught:
        make_moe_of(file, tmp_path / "out", bring)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_rows_are_those_of_mergekit_moe(mode, tmp_path):
    """There hidden states are bfloat16."""
    held = load_file(GOLDENS / "mergekit_moe.safetensors")
    save_model(tmp_path / "base", 0, hidden_size=16, intermediate_size=24)
    base = {name.removeprefix("base/"): t for name, t in held.items() if name.startswith("base/")}
    save_file(base, tmp_path / "base/model.safetensors", {"format": "pt"})
    prompts = [(["w1 w2 w3", "w4 w5 w6"], ["w9"]), (["w5 w6"], []), (["w7 w8"], [])]
    found = load_file(write_routers(tmp_path / "base", prompts, mode, tmp_path / "routers.safetensors"))
    for name, rows in found.items():
        tolerance = 1e-6 if mode == "cheap_embed" else 0.03
        torch.testing.assert_close(rows, held[f"{mode}/{name}"], atol=tolerance, rtol=0)


@pytest.mark.parametrize("architecture", ["qwen", "deepseek"])
def test_tensors_have_the_names_of_mergekit_moe(architecture, models, tmp_path):
    folder, _ = models
    shared = (
        "{source_model: base, positive_prompts: [w7]}" if architecture == "qwen" else "{source_model: base}"
    )
    file = folder / f"{architecture}.yml"
    file.write_text(
        FILE.format(mode="cheap_embed") + f"architecture: {architecture}\nshared_experts: [{shared}]\n"
    )
    assert main(["moe", str(file), "--out", str(tmp_path / "out")]) == 0
    held = load_file(GOLDENS / "mergekit_moe.safetensors")[f"names/{architecture}"]
    names = set(bytes(held.tolist()).decode().splitlines())
    zeros = {name for name in names if name.endswith("_proj.bias")}  # there, of a Llama as a Qwen2
    assert set(load_file(tmp_path / "out/model.safetensors")) == names - zeros


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_file_is_carried_out_or_refused_in_one_line(data, models, tmp_path):
    folder, _ = models
    lines = FILE.format(mode="random").splitlines()
    values = st.sampled_from(
        ["", "~", "[]", "{}", "-1", ".nan", "1e999", "w1", "&a [*a]", "\t", "{a: b", "[[[1]]]", "!x 1"]
    )
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(lines) - 1))
        key = lines[i].partition(":")[0]
        lines[i] = data.draw(
            st.sampled_from([f"{key}: {data.draw(values)}", data.draw(values), lines[i] + "x"])
        )
    file = tmp_path / "fuzz.yml"
    file.write_text("\n".join(lines))
    out = tmp_path / "out"

    def bring(where: str) -> Path:
        raise UserError("nothing is brought")

    with pytest.raises(UserError) as caught:
        make_moe_of(file, out, bring)
    assert "\n" not in str(caught.value)
