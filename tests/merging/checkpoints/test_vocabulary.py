"""Checkpoints of different vocabularies: rows follow their tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.engine.manifest import identity
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.verify import verify

WIDTH = 3
WORDS = ["a", "b", "c", "d"]


def row(token: str | None, checkpoint: int) -> list[float]:
    """What a checkpoint has in the row of a token; padding is negative."""
    return [(ord(token[0]) if token else -1.0) + 1000.0 * checkpoint + i for i in range(WIDTH)]


def save(
    folder: Path,
    checkpoint: int,
    tokens: list[str | None],
    added: tuple[str, ...] = (),
    tokenizer: bool = True,
) -> Path:
    """A model whose embeddings say which token and checkpoint each row is of; None is a padding row."""
    folder.mkdir(parents=True)
    embeddings = torch.tensor([row(t, checkpoint) for t in tokens])
    weights = {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings + 0.5}
    weights["model.norm.weight"] = torch.full((WIDTH,), float(checkpoint))
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(tokens), "torch_dtype": "float32"}))
    if tokenizer:
        ids = {t: i for i, t in enumerate(tokens) if t is not None}
        entries = [{"id": ids[t], "content": t, "special": True} for t in added]
        model = {"type": "WordLevel", "vocab": {t: i for t, i in ids.items() if t not in added}}
        (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": entries}))
    return folder


def merged(recipe: dict[str, Any], out: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    merge(recipe, out)
    found = load_file(out / "model.safetensors")
    assert torch.allclose(found["lm_head.weight"], found["model.embed_tokens.weight"] + 0.5)
    return found["model.embed_tokens.weight"], json.loads((out / "config.json").read_text())


def average(token: str | None, *checkpoints: int) -> list[float]:
    rows = [row(token, c) for c in checkpoints]
    return [sum(column) / len(column) for column in zip(*rows)]


def test_rows_follow_their_tokens(tmp_path):
    base = save(tmp_path / "base", 0, WORDS)
    one = save(tmp_path / "one", 1, ["b", "a", "d", "c"])
    two = save(tmp_path / "two", 2, WORDS)
    recipe = {"method": "average", "base": base, "experts": {"one": one, "two": two}}
    found, config = merged(recipe, tmp_path / "out")
    assert found.tolist() == [average(t, 1, 2) for t in WORDS] and config["vocab_size"] == 4
    assert any("'one'" in w and "matched by token" in w for w in make_plan(recipe).warnings)
    assert "bit-identical" in verify(tmp_path / "out")


def test_an_added_token_is_left_out_of_the_bases_vocabulary_and_padding_stays(tmp_path):
    base = save(tmp_path / "base", 0, [*WORDS, None, None])
    one = save(tmp_path / "one", 1, [*WORDS, "<x>"], added=("<x>",))
    two = save(tmp_path / "two", 2, [*WORDS, None, None])
    recipe = {"method": "average", "base": base, "experts": {"one": one, "two": two}}
    found, config = merged(recipe, tmp_path / "out")
    padding = [average(None, 0, 2)] * 2  # the base's stand in for those that `one` lacks
    assert found.tolist() == [*(average(t, 1, 2) for t in WORDS), *padding] and config["vocab_size"] == 6
    warnings = make_plan(recipe).warnings
    assert any("'one'" in w and "left out" in w and "'<x>'" in w and "union" in w for w in warnings)


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_a_union_keeps_the_added_tokens_of_all(padding, tmp_path):
    base = save(tmp_path / "base", 0, [*WORDS, *[None] * padding])
    one = save(tmp_path / "one", 1, [*WORDS, "<x>", "<y>"], added=("<x>", "<y>"))
    two = save(tmp_path / "two", 2, [*WORDS, "<y>"], added=("<y>",))
    recipe = {"method": "task_arithmetic", "params": {"scale": 1.0}, "base": base, "vocabulary": "union"}
    recipe |= {"experts": {"one": one, "two": two}}
    found, config = merged(recipe, tmp_path / "out")
    rows = max(6, 4 + padding)
    assert config["vocab_size"] == len(found) == rows
    for i, token in enumerate(WORDS):  # base + (one - base) + (two - base)
        expected = [x + y - b for x, y, b in zip(row(token, 1), row(token, 2), row(token, 0))]
        assert found[i].tolist() == expected
    assert found[4].tolist() == row("<x>", 1)  # only one has it, and it stands in for the others
    assert found[5].tolist() == row("<y>", 2)  # from the first that has it, one, to two
    assert found[6:].tolist() == [row(None, 0)] * (rows - 6)
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert [(e["content"], e["id"]) for e in tokenizer["added_tokens"]] == [("<x>", 4), ("<y>", 5)]
    assert all(e["special"] for e in tokenizer["added_tokens"])
    assert "bit-identical" in verify(tmp_path / "out")


def test_another_donor_brings_its_vocabulary(tmp_path):
    base = save(tmp_path / "base", 0, WORDS)
    one = save(tmp_path / "one", 1, [*WORDS, "<x>"], added=("<x>",))
    recipe = {"method": "average", "base": base, "experts": {"one": one}, "donor": "one"}
    found, config = merged(recipe, tmp_path / "out")
    assert found.tolist() == [row(t, 1) for t in (*WORDS, "<x>")] and config["vocab_size"] == 5


def test_equal_vocabularies_are_left_alone(tmp_path):
    folders = [save(tmp_path / str(i), i, WORDS) for i in range(3)]
    recipe = {"method": "average", "base": folders[0], "experts": {"a": folders[1], "b": folders[2]}}
    assert make_plan(recipe).alignment is None


def test_any_pieces_give_the_same_rows(tmp_path):
    from mergeline.merging.engine.sources import FileInputs

    base = save(tmp_path / "base", 0, WORDS)
    one = save(tmp_path / "one", 1, ["c", "d", "a", "b"])
    with FileInputs(make_plan({"method": "average", "base": base, "experts": {"one": one}})) as source:
        name = "model.embed_tokens.weight"
        whole = source.stored("one", name, 0, 4 * WIDTH)
        assert whole.reshape(4, WIDTH).tolist() == [row(t, 1) for t in WORDS]
        for step in (1, 2, 5, 12):
            pieces = [source.stored("one", name, i, min(i + step, 12)) for i in range(0, 12, step)]
            assert torch.equal(torch.cat(pieces), whole)


def test_transformers_opens_a_union(tmp_path):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folders = {}
    for seed, (name, extra) in enumerate({"base": [], "one": ["<x>"], "two": ["<y>", "<z>"]}.items()):
        model = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(extra)
        config = transformers.LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(seed)
        folders[name] = tmp_path / name
        transformers.LlamaForCausalLM(config).save_pretrained(folders[name])
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folders[name])
    merge(
        {"method": "average", "base": folders.pop("base"), "experts": folders, "vocabulary": "union"},
        tmp_path / "out",
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("b <x> c <z> <y>")["input_ids"] == [1, 4, 2, 6, 5]
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not loaded["missing_keys"] and not loaded["mismatched_keys"] and model.config.vocab_size == 7
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(
        embeddings[4], load_file(folders["one"] / "model.safetensors")["model.embed_tokens.weight"][4]
    )


def test_rows_of_tokens_come_from_where_the_recipe_says(tmp_path):
    base = save(tmp_path / "base", 0, [*WORDS, None])
    one = save(tmp_path / "one", 1, [*WORDS, "<x>"], added=("<x>",))
    two = save(tmp_path / "two", 2, [*WORDS, "<y>"], added=("<y>",))
    recipe = {
        "method": "linear",
        "params": {"weights": [1, 1, 1]},
        "vocabulary": "union",
        "pad_to_multiple_of": 4,
    }
    recipe |= {"experts": {"base_model": base, "one": one, "two": two}, "missing_tokens": "mean"}
    recipe["tokens"] = {
        "a": {"expert": "one", "force": True},
        "<y>": {"expert": "two", "token": "b"},
        "<new>": {"zero": True},
    }
    merge(recipe, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(found) == 8
    assert found[0].tolist() == row("a", 1)
    for i, token in enumerate(WORDS[1:], 1):
        assert found[i].tolist() == average(token, 0, 1, 2)
    assert found[4].tolist() == row("<x>", 1)  # the only one that has it
    expected = torch.tensor([row("b", 2), row("b", 2), row("<y>", 2)]).mean(0)
    assert torch.allclose(found[5], expected)
    assert torch.allclose(found[7], found[:7].mean(0), atol=0.1)  # the mean of each, merged
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    entries = {e["content"]: (e["id"], e["special"]) for e in tokenizer["added_tokens"]}
    assert entries == {"<x>": (4, True), "<y>": (5, True), "<new>": (6, False)}
    assert "bit-identical" in verify(tmp_path / "out")
    warnings = make_plan(recipe).warnings
    assert any("multiple of 4" in w for w in warnings) and any("added as ordinary" in w for w in warnings)


def test_a_token_that_several_have_gets_the_mean_of_their_rows_or_the_named_ones(tmp_path):
    base = save(tmp_path / "base", 0, WORDS)
    one, two, three = (save(tmp_path / n, i, [*WORDS, "<x>"], added=("<x>",)) for i, n in enumerate("abc", 1))
    recipe = {"method": "average", "experts": {"base_model": base, "a": one, "b": two, "c": three}}
    recipe["vocabulary"] = "union"
    for missing, stand_in in (("first", 1), ("b", 2)):
        found, _ = merged({**recipe, "missing_tokens": missing}, tmp_path / f"of-{missing}")
        assert found[4].tolist() == average("<x>", stand_in, 1, 2, 3)
    found, _ = merged({**recipe, "missing_tokens": "mean"}, tmp_path / "of-mean")
    assert found[4].tolist() == average("<x>", 1, 2, 3)


def test_tokens_that_have_no_row_are_left_out(tmp_path):
    base = save(tmp_path / "base", 0, WORDS)
    one = save(tmp_path / "one", 1, [*WORDS, "<x>"], added=("<x>",))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [{"id": 7, "content": "<beyond>", "special": True}]
    tokenizer["model"]["merges"] = ["a b", ["<beyond>", "c"]]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = {"method": "average", "base": base, "experts": {"one": one}}
    found, _ = merged(recipe, tmp_path / "out")
    assert found.tolist() == [row(t, 1) for t in WORDS]
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert written["added_tokens"] == [] and written["model"]["merges"] == ["a b"]
    assert any("'<beyond>' first" in w and "beyond its 4 rows" in w for w in make_plan(recipe).warnings)


def refuse(recipe: dict[str, Any], out: Path, *parts: str) -> None:
    with refused(*parts):
        merge(recipe, out)
    assert not out.exists()


def test_what_is_refused(tmp_path):
    base = save(tmp_path / "base", 0, WORDS)
    bare = save(tmp_path / "bare", 1, [*WORDS, "x"], tokenizer=False)
    refuse(
        {"method": "average", "base": base, "experts": {"bare": bare}}, tmp_path / "out",
        "'bare'", "'base' 4, 'bare' 5 rows", "no tokenizer.json",
    )  # fmt: skip
    other = save(tmp_path / "other", 1, [*WORDS, "x"])
    recipe = {"method": "average", "base": base, "experts": {"other": other}}
    for tokens, part in (
        ({"q": {"expert": "othre"}}, "did you mean 'other'?"),
        ({"q": {"expert": "other"}}, "'other' has no token 'q'"),
        ({"q": {"expert": "other", "id": 7}}, "'other' has no row 7"),
    ):
        refuse({**recipe, "tokens": tokens}, tmp_path / "out", "tokens: 'q'", part)
    refuse({**recipe, "missing_tokens": "othre"}, tmp_path / "out", "missing_tokens", "did you mean 'other'?")
    (other / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 0}}}))
    refuse(recipe, tmp_path / "out", "tokenizer.json", "one id to two tokens")
    for text in (
        "{",
        "[]",
        '{"model": 3}',
        '{"model": {"vocab": {"a": -1}}}',
        '{"model": {"vocab": {"a": "x"}}}',
    ):
        (other / "tokenizer.json").write_text(text)
        refuse(recipe, tmp_path / "out", "tokenizer.json", "download it again")


def test_another_tokenizer_is_another_merge(tmp_path):
    base, one = save(tmp_path / "base", 0, WORDS), save(tmp_path / "one", 1, WORDS)
    recipe = {"method": "average", "base": base, "experts": {"one": one}}
    before = identity(make_plan(recipe), "cpu")
    assert identity(make_plan(recipe), "cpu") == before
    text = (one / "tokenizer.json").read_text()
    (one / "tokenizer.json").write_text(text.replace('"a"', '"e"'))
    assert identity(make_plan(recipe), "cpu") != before
