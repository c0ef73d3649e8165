"""`collect-experts` and `merge-experts`, as one who has a mixture and some texts runs them."""

from __future__ import annotations

import json

import pytest
from model_zoo import build
from safetensors.torch import load_file
from small_language_model import TOKENS, save_tokenizer

from mergeline.flows.cli import main

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
        ]
    ):
        out = tmp_path / f"out{i}"
        assert main(["merge-experts", model, *options, "--out", str(out)]) == 0
        assert "2 layers of 4 experts: 2 are left" in capsys.readouterr().out
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
