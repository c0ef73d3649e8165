"""Chat templates: what the named ones write, which one most checkpoints have, and where the recipe's goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import refused
from small_language_model import save_model

from mergeline.merging import merge
from mergeline.merging.checkpoints.chat_templates import NAMED, most_common, template_of
from mergeline.merging.verify import verify

TALK = [
    {"role": role, "content": text} for role, text in (("system", "s"), ("user", "u"), ("assistant", "a"))
]
# chatml and mistral: as mergekit 0.1.5's write it; the others as the models' own tokenizers do.
WRITTEN = {
    "alpaca": "s\n\n### Instruction:\nu\n\n### Response:\na\n\n### Instruction:\nv\n\n### Response:\n",
    "chatml": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    "<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]s[|endofturn|]\n[|user|]u\n[|assistant|]a[|endofturn|]\n[|user|]v\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nu<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nv<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] s\n\nu [/INST] a</s> [INST] v [/INST]",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, 0)
    return folder


@pytest.mark.parametrize("name", NAMED)
def test_a_named_template_writes_the_format_of_its_models_with_transformers(name, model, tmp_path):
    from transformers import AutoTokenizer

    merge({"method": "passthrough", "experts": {"a": model}, "chat_template": NAMED[name]}, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [*TALK, {"role": "user", "content": "v"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == WRITTEN[name]
    assert "bit-identical" in verify(tmp_path / "out")


def test_the_template_that_most_have_wherever_it_is_written(tmp_path):
    def saved(name: str, file: str | None, config: object) -> Path:
        (tmp_path / name).mkdir()
        if file:
            (tmp_path / name / "chat_template.jinja").write_text(file)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
        return tmp_path / name

    listed = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "y "}]
    folders = [saved("a", "x", None), saved("b", None, "y"), saved("c", None, listed), saved("d", None, 3)]
    assert [template_of(folder) for folder in folders] == ["x", "y", "y", None]
    assert most_common(folders) == "y" and most_common(folders[3:]) is None
    (tmp_path / "a" / "chat_template.jinja").write_bytes(b"\xff")
    with refused("chat_template.jinja", "no text"):
        template_of(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_bytes(b"x" * (1 << 21))
    with refused("chat_template.jinja", "is it a chat template?"):
        template_of(tmp_path / "a")
