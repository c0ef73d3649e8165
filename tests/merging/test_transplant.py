"""A model with the vocabulary of another one: known tokens keep their rows, new ones are sums of known ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from hypothesis import given
from hypothesis import strategies as st
from junk import junked
from places import GOLDENS
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.tokens import meanings
from mergeline.merging.errors import UserError
from mergeline.merging.transplant import matching_pursuit, transplant
from mergeline.merging.verify import verify

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def by_hand(target_D: Tensor, points_ND: Tensor, count: int) -> tuple[list[int], Tensor]:
    """Orthogonal matching pursuit of one target, by least squares after each choice."""
    chosen: list[int] = []
    rest_D = target_D
    for _ in range(count):
        products_N = (points_ND @ rest_D).abs()
        products_N[chosen] = -1
        chosen.append(int(products_N.argmax()))
        solved = torch.linalg.lstsq(points_ND[chosen].T, target_D[:, None], driver="gelsd").solution[:, 0]
        rest_D = target_D - solved @ points_ND[chosen]
    return chosen, solved


def test_matching_pursuit_is_that_by_hand_and_mergekits():
    golden = load_file(GOLDENS / "transplant.safetensors")
    target, points, model = (golden[name].double() for name in ("target", "points", "model"))
    chosen, coefficients = matching_pursuit(target, golden["points"], 8)
    assert torch.equal(chosen, golden["chosen"])
    assert torch.allclose(coefficients, golden["coefficients"].double(), rtol=1e-4, atol=1e-5)
    rows = torch.einsum("bk,bkd->bd", coefficients, model[chosen])
    assert torch.allclose(rows, golden["rows"].double(), rtol=1e-4, atol=1e-5)
    for b in range(len(target)):
        picked, solved = by_hand(target[b], points, 8)
        assert chosen[b].tolist() == picked
        assert torch.allclose(coefficients[b], solved, rtol=1e-9, atol=1e-10)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 40), st.integers(0, 1000))
def test_what_remains_is_orthogonal_to_all_that_was_taken(points, width, count, seed):
    made = torch.Generator().manual_seed(seed)
    points_ND = torch.randint(-2, 3, (points, width), generator=made).float()  # many alike, and zeros
    target_BD = torch.randn(3, width, generator=made).double()
    target_BD[2] = 0
    chosen, coefficients = matching_pursuit(target_BD, points_ND, count)
    assert chosen.shape == coefficients.shape == (3, min(count, points))
    assert all(len(set(row)) == len(row) for row in chosen.tolist())
    rest_BD = target_BD - torch.einsum("bk,bkd->bd", coefficients, points_ND[chosen].double())
    assert (rest_BD.norm(dim=1) <= target_BD.norm(dim=1) + 1e-9).all()
    used = torch.where((coefficients != 0)[:, :, None], points_ND[chosen].double(), 0.0)
    assert torch.einsum("bkd,bd->bk", used, rest_BD).abs().max() < 1e-6
    assert not coefficients[2].any()


# Files

BYTES = ["<s>", "</s>", "a", "b", "Ġthe", "Ġcat", "ab", "Ã©", "Ċ"]  # GPT-2's letters for bytes
PIECES = ["<s>", "</s>", "<unk>", "▁the", "▁dog", "a", "b", "é", "<0x0A>", "c"]


def tokenizer(folder: Path, tokens: list[str], kind: str, special: tuple[str, str]) -> None:
    """A tokenizer.json that `tokenizers` opens: special is (bos, eos)."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": []}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    if kind == "pieces":
        model |= {"byte_fallback": True, "unk_token": "<unk>"}
    added = [
        {"id": vocabulary[t], "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for t in special
    ]  # fmt: skip
    whole = {"version": "1.0", "model": model, "added_tokens": added, "truncation": None, "padding": None}
    whole |= {key: decoder if kind == "bytes" else None for key in ("pre_tokenizer", "decoder")}
    whole |= {"normalizer": None, "post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    said = {"bos_token": special[0], "eos_token": special[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def model(
    folder: Path,
    tokens: list[str],
    kind: str,
    seed: int,
    width: int = 8,
    tied: bool = False,
    padding: int = 0,
) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens) + padding, hidden_size=width, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=tokens.index("<s>"),
        eos_token_id=tokens.index("</s>"),
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(folder, tokens, kind, ("<s>", "</s>"))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return (
        model(tmp_path / "model", PIECES, "pieces", 0),
        model(tmp_path / "donor", BYTES, "bytes", 1, width=6, padding=3),
    )


def test_tokens_of_other_makes_are_matched_by_what_they_stand_for(pair):
    found = [
        meanings(folder, {t: i for i, t in enumerate(tokens)})
        for folder, tokens in zip(pair, (PIECES, BYTES))
    ]
    assert found[0][3] == found[1][4] == b" the" and found[0][7] == found[1][7] == "é".encode()
    assert found[0][8] == found[1][8] == b"\n" and found[0][0] == found[1][0] == "role bos_token"


def test_known_tokens_keep_their_rows_and_new_ones_are_sums_of_them(pair, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    manifest = transplant(*pair, out, neighbours=3)
    assert manifest["transplanted"]["tokens"] == {"same": 7, "new": 2, "rows": 9}
    own, given, found = (
        {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
        for folder in (*pair, out)
    )
    same = {0: 0, 1: 1, 2: 5, 3: 6, 4: 3, 7: 7, 8: 8}
    for name in (EMBEDDING, HEAD):
        assert found[name].shape == (9, 8)
        for row, known in same.items():
            assert torch.equal(found[name][row], own[name][known])
        for row in (5, 6):
            chosen, solved = by_hand(given[name][row].double(), given[name][list(same)].double(), 3)
            expected = solved @ own[name][list(same.values())].double()[chosen]
            assert torch.allclose(found[name][row].double(), expected, atol=1e-6)
    for name in own.keys() - {EMBEDDING, HEAD}:
        assert torch.equal(found[name], own[name])
    opened = AutoModelForCausalLM.from_pretrained(out)
    tokens = AutoTokenizer.from_pretrained(out)
    assert opened.config.vocab_size == 9 and opened.config.eos_token_id == 1
    assert tokens.convert_tokens_to_ids("Ġcat") == 5
    assert opened(torch.tensor([[0, 5, 6]])).logits.shape == (1, 3, 9)
    assert "bit-identical to a new transplant of its inputs" in verify(out)
    again = transplant(*pair, tmp_path / "again", neighbours=3, workers=1, shard_size=1000)
    assert again["output"]["tensors"] == manifest["output"]["tensors"]
    transplant(*pair, out, neighbours=2)  # in place of its like


def test_the_headers_of_model_and_donor_are_read_once(pair, tmp_path, monkeypatch):
    opened: list[Path] = []

    def counted(path):
        opened.append(Path(path))
        return open_checkpoint(path)

    monkeypatch.setattr("mergeline.merging.transplant.open_checkpoint", counted)
    told = transplant(*pair, tmp_path / "out", neighbours=2)["transplanted"]
    assert opened == [*pair]
    for name, folder in zip(("model", "donor"), pair):  # of all that lies there, tied heads, too
        assert told[name]["digest"] == open_checkpoint(folder).digest()


def test_a_model_of_the_same_vocabulary_stays_as_it_is(tmp_path):
    own = model(tmp_path / "model", PIECES, "pieces", 0, tied=True)
    other = model(tmp_path / "donor", PIECES, "pieces", 1)
    transplant(own, other, tmp_path / "out")
    before, found = (load_file(folder / "model.safetensors") for folder in (own, tmp_path / "out"))
    assert found.keys() == before.keys() and HEAD not in found
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_a_tied_donor_gives_its_embedding_for_the_output_matrix(tmp_path):
    own = model(tmp_path / "model", PIECES, "pieces", 0)
    other = model(tmp_path / "donor", BYTES, "bytes", 1, tied=True)
    transplant(own, other, tmp_path / "out", neighbours=2)
    given, found = (load_file(folder / "model.safetensors") for folder in (other, tmp_path / "out"))
    assert HEAD not in given and found[HEAD].shape == (9, 8)


def test_what_cannot_be_transplanted_is_refused_before_anything_is_written(pair, tmp_path):
    own, other = pair
    out = tmp_path / "out"
    with refused("neighbours: 0 is no whole number above 0"):
        transplant(own, other, out, neighbours=0)
    with refused("name a folder"):
        transplant(own, other, tmp_path / "out.safetensors")
    with refused("needs a folder"):
        transplant(own / "model.safetensors", other, out)
    with refused("holds the input"):
        transplant(own, other, own)
    with refused("allow more"):
        transplant(own, other, out, memory=10)
    tokenizer(other, [f"x{i}" for i in range(9)], "bytes", ("x0", "x1"))
    (other / "tokenizer_config.json").unlink()
    with refused("has no token in common"):
        transplant(own, other, out)
    (other / "tokenizer.json").unlink()
    with refused("has no tokenizer.json"):
        transplant(own, other, out)
    save_file({"x.weight": torch.ones(2, 2)}, other / "model.safetensors")
    tokenizer(other, BYTES, "bytes", ("<s>", "</s>"))
    with refused("tells the rows of its embeddings"):
        transplant(own, other, out)
    assert not out.exists()


def test_tokens_of_the_donor_that_have_no_row_are_refused(pair, tmp_path):
    model, donor = pair
    tokenizer = json.loads((donor / "tokenizer.json").read_text())
    added = {"content": "<beyond>", "id": 9_999, "special": False, "normalized": True}
    tokenizer["added_tokens"] = [
        *(tokenizer.get("added_tokens") or ()),
        {**added, **dict.fromkeys(("single_word", "lstrip", "rstrip"), False)},
    ]
    (donor / "tokenizer.json").write_text(json.dumps(tokenizer))
    with refused("1 token(s) of its tokenizer have ids beyond its", "'<beyond>' first"):
        transplant(model, donor, tmp_path / "out")


def test_rows_that_are_not_finite_are_refused(pair, tmp_path):
    own, other = pair
    tensors = load_file(other / "model.safetensors")
    tensors[EMBEDDING][5] = torch.nan
    save_file(tensors, other / "model.safetensors")
    with refused(f"tensor '{EMBEDDING}': a row is NaN or Inf"):
        transplant(own, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", [40, pytest.param(2, marks=pytest.mark.slow)])
def test_damaged_tokenizers_and_configurations_are_read_or_refused(pair, tmp_path, step):
    """1,568 cases, where every second is tried."""
    for path in (
        folder / name
        for folder in pair
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
    ):
        text = path.read_text()
        for i, (_, _, changed) in enumerate(junked(json.loads(text))):
            if i % step == 0:
                path.write_text(json.dumps(changed))
                try:
                    transplant(*pair, tmp_path / "out", neighbours=2, force=True)
                except UserError as error:
                    assert "\n" not in str(error)
        path.write_text(text)


def test_the_command(pair, tmp_path, mergeline):
    outcome = mergeline("transplant", *pair, "--out", tmp_path / "out", "--neighbours=2")
    assert outcome.code == 0, outcome.err
    assert "7 tokens keep their rows, 2 new ones are approximated" in outcome.out
    assert mergeline("verify", tmp_path / "out").code == 0
