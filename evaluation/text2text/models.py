"""Encoder-decoders as transformers opens them, and the texts that they write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Sequence

from mergeline.evaluation.pretrained import load_pretrained, load_tokenizer, refuse_corrections, side_by_side
from mergeline.merging.checkpoints.companions import CONFIG
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Written(NamedTuple):
    """The N texts that a model wrote, and how many of its inputs were cut because it reads no longer ones."""

    texts: list[str]
    cut: int


@dataclass(frozen=True)
class Writer:
    """An encoder-decoder in memory with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def write(
        self,
        sources: Sequence[str],
        max_new_tokens: int,
        batch_size: int,
        count: Callable[[int], None] = lambda done: None,
    ) -> Written:
        """What the model writes to each of N texts: the likeliest token each time, up to `max_new_tokens`.

        Texts of like length go together, the longest first; `count` is told how many each batch had. Whatever else the
        folder's generation_config.json asks for, such as a token that all texts begin with, holds.
        """
        import torch

        model: Any = self.model
        rows, cut = tokens(self.tokenizer, sources, self.model.config.to_dict())
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        texts = [""] * len(rows)
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            batch = side_by_side([rows[i] for i in some], model.device, self.pad)
            with torch.inference_mode():
                out = model.generate(
                    **batch,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=self.pad,
                )
            for i, text in zip(some, self.tokenizer.batch_decode(out, skip_special_tokens=True)):
                texts[i] = text
            count(len(some))
        return Written(texts, cut)

    @property
    def pad(self) -> int:
        """The token that shorter texts are filled up with."""
        known = (self.tokenizer.pad_token_id, getattr(self.model.config, "pad_token_id", None))
        return next((token for token in known if isinstance(token, int)), 0)


def tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], config: Mapping[str, Any]
) -> tuple[list[list[int]], int]:
    """The tokens of each text, of long ones as many as the model reads, and how many texts were cut so.

    config: of the model.
    """
    known = (tokenizer.model_max_length, config.get("max_position_embeddings"))
    longest = min(int(limit) for limit in known if limit)
    rows = tokenizer(list(texts))["input_ids"]
    cut = sum(len(row) > longest for row in rows)
    if cut:
        rows = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
    return rows, cut


def refuse_other_kinds(folder: Path) -> None:
    """Raises UserError if a checkpoint's configuration does not say that it is an encoder with a decoder."""
    config = read_object(folder / CONFIG)
    if not config.get("is_encoder_decoder"):
        kind = config.get("model_type", "unknown")
        raise UserError(
            f"{folder}: is of type {kind}, no encoder with a decoder, which `text2text:` measures; for causal language "
            "models write `language:`"
        )


def load_writer(folder: Path, device: str = "cpu") -> Writer:
    """A folder that transformers' AutoModelForSeq2SeqLM and AutoTokenizer open, without code of its own.

    Raises:
        UserError: it is of another kind, or does not open; beside it lies what corrects it for tasks.
    """
    refuse_corrections(folder)
    refuse_other_kinds(folder)
    return Writer(load_pretrained(folder, "AutoModelForSeq2SeqLM", device=device), load_tokenizer(folder))
