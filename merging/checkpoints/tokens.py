"""What tokens stand for, in tokenizers of different makes: bytes, or a place such as the beginning of a text."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Mapping

from mergeline.merging.checkpoints.companions import TOKENIZER
from mergeline.merging.files import read_object

TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "chat_template.json",
)  # fmt: skip
Meaning = bytes | str
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_WORD = "▁"  # what SentencePiece writes for a space


def meanings(folder: Path, ids: Mapping[str, int]) -> dict[int, Meaning]:
    """What each token of a folder's tokenizer stands for, by id, those first that have a byte of their own last.

    Bytes of text; of special tokens their role (`bos_token`), or their name. GPT-2's tokenizers write bytes as letters,
    SentencePiece a space as U+2581 and single bytes as `<0x0A>`: what stands for the same text is the same.
    """
    told = read_object(folder / TOKENIZER)
    special = {
        str(t.get("content"))
        for t in told.get("added_tokens") or ()
        if isinstance(t, dict) and t.get("special")
    }
    roles = _roles(folder)
    text = json.dumps({key: told.get(key) for key in ("pre_tokenizer", "decoder", "normalizer")})
    of_letters = '"ByteLevel"' in text
    found: dict[int, Meaning] = {}
    single: dict[int, Meaning] = {}
    for token, id in ids.items():
        byte = _BYTE.fullmatch(token)
        if token in roles:
            found[id] = f"role {roles[token]}"
        elif token in special:
            found[id] = f"special {token}"
        elif byte and not of_letters:
            single[id] = bytes.fromhex(byte[1])
        elif of_letters and all(letter in _bytes() for letter in token):
            found[id] = bytes(_bytes()[letter] for letter in token)
        else:
            found[id] = token.replace(_WORD, " ").encode(errors="surrogatepass")
    return found | single


def _roles(folder: Path) -> dict[str, str]:
    """The special tokens of a folder, with the first role that each has."""
    said: dict[str, Any] = read_object(folder / "special_tokens_map.json")
    said = {**said, **read_object(folder / "tokenizer_config.json")}
    found: dict[str, str] = {}
    for role in _ROLES:
        value = said.get(role)
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            found.setdefault(token, role)
    return found


@cache
def _bytes() -> dict[str, int]:
    """The byte of each letter of GPT-2's tokenizers: printable ones are themselves, others follow from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
