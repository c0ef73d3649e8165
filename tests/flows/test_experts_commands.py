"""`collect-experts` and `merge-experts`, as one who has a mixture and some texts runs them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_zoo import build
from safetensors.torch import load_file
from small_language_model import TOKENS, save_tokenizer

from mergeline.flows.cli import main
from mergeline.merging.learning.network import Examples
from mergeline.tasks.collect import collect_all
from mergeline.tasks.language.learning import network
from mergeline.tasks.schema import Statistics

GROUPS = [[0, 2], [1, 3]]


def test_statistics_of_a_model_on_lines_of_text_and_its_experts_made_fewer_by_the_commands(tmp_path, capsys):
    save_tokenizer(tmp_path / "model", TOKENS[:40])
    build("mixtral").save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("w1 w2 w3 w4\n\nw5 w6\nw7\n")
    (tmp_path / "groups.json").write_text(json.dumps(GROUPS))
    model, held = str(tmp_path / "model"), tmp_path / "held.safetensors"
    collected = ["collect-experts", model, "--texts", str(tmp_path / "texts.txt"), "--out", str(held)]
    assert main(collected) == 0
    assert load_file(held)["model.layers.0.mlp/usage"].sum() == pytest.approx(1)
    assert main([*collected, "--force", "--outputs"]) == 0
    for i, options in enumerate(
        [
            ["--experts", "2", "--statistics", str(held)],
            ["--experts", "2", "--statistics", str(held), "--method", "sub_moe", "--rank", "0.5"],
            ["--groups", str(tmp_path / "groups.json"), "--no-align", "--dtype", "bfloat16"],
            ["--groups", str(tmp_path / "groups.json"), "--compress", "0.5", "--sparse", "0.2"],
        ]
    ):
        out = tmp_path / f"out{i}"
        assert main(["merge-experts", model, *options, "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert "2 layers of 4 experts: 2 are left" in said
        assert ("written dense, and no smaller" in said) is ("--compress" in options)
        assert main(["verify", str(out)]) == 0
        card = (out / "README.md").read_text()
        assert "The 4 experts of each of 2 layers" in card and "2 are left" in card
    for text, parts in (("[[0, 1]", "is no JSON"), ("{}", "says nothing of")):
        (tmp_path / "groups.json").write_text(text)
        wrong = ["--groups", str(tmp_path / "groups.json"), "--out", str(tmp_path / "no")]
        assert main(["merge-experts", model, *wrong]) == 2
        assert parts in capsys.readouterr().err
    (tmp_path / "texts.txt").write_text("\n \n")
    assert main([*collected, "--force"]) == 2
    assert "holds no text" in capsys.readouterr().err


def test_the_collect_step_gathers_statistics_of_the_experts_of_every_checkpoint(tmp_path):
    """As `statistics: {experts: {outputs: true}}` of params.yaml asks for."""
    folder = tmp_path / "checkpoints"
    for name in ("base", "a"):
        save_tokenizer(folder / name, TOKENS[:40])
        build("mixtral").save_pretrained(folder / name)
    ids = torch.arange(3, 11)[None]
    batch = {"task": "t", "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    examples = Examples({"t": lambda: iter([batch])}, {"t": 1}, {"t": "a"}, {"t": "x"}, "fit")
    params: Any = SimpleNamespace(
        statistics={"experts": Statistics(outputs=True)}, base="base", experts=["a"], seed=0, device="cpu"
    )
    modality: Any = SimpleNamespace(network=network, examples=lambda params, build: examples, models="models")
    collect_all(modality, params, "experts", tmp_path, tmp_path / "statistics")
    held = load_file(tmp_path / "statistics/a.safetensors")
    assert {"model.layers.0.mlp/usage", "model.layers.1.mlp/outputs"} <= held.keys()
    out, statistics = tmp_path / "out", str(tmp_path / "statistics/a.safetensors")
    command = ["merge-experts", str(folder / "a"), "--method", "sub_moe", "--experts", "3"]
    assert main([*command, "--statistics", statistics, "--out", str(out)]) == 0
