"""Sequence-to-sequence models as learners see them, and the texts that they learn from.

Shape suffixes: B texts of a batch, L tokens of the longest, d width of the model.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Sequence, cast

from mergeline.evaluation.pretrained import side_by_side
from mergeline.merging.canonical import text_digest
from mergeline.merging.checkpoints.companions import CONFIG
from mergeline.merging.files import read_object
from mergeline.merging.learning.network import Examples, Network
from mergeline.tasks.data_step import dataset

if TYPE_CHECKING:
    from torch import Tensor

    from mergeline.tasks.schema import Params
    from mergeline.tasks.text2text.params import Text2TextParams

_TEXTS = 64  # of each task, where nothing else is said
_BATCH = 16


def network(params: Params, build: Path, like: Path) -> Network:
    """The encoder-decoder of `like`, which reads a text whole and is asked for the first token that it writes.

    Its features (B, d) are the decoder's last hidden states at the token that it begins with, logits what the head
    makes of them. No target is used; of answers of several tokens, what comes after the first is not seen.
    """
    import torch

    from mergeline.evaluation.pretrained import load_pretrained
    from mergeline.evaluation.text2text.models import refuse_other_kinds

    refuse_other_kinds(like)
    model: Any = load_pretrained(like, "AutoModelForSeq2SeqLM", device=params.device)
    config, first = model.config, _first_token(model)
    # T5 with a tied head scales what this reads.
    scale = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0

    def run(module: Any, batch: Any) -> Tensor:
        ids = batch["input_ids"]
        begun = torch.full((len(ids), 1), first, device=ids.device)
        mask = batch["attention_mask"]
        read = module.get_encoder()(input_ids=ids, attention_mask=mask)[0]
        hidden = module.get_decoder()(
            input_ids=begun, encoder_hidden_states=read, encoder_attention_mask=mask, use_cache=False
        )[0]
        return hidden[:, 0] * scale

    head = model.get_output_embeddings()
    own = {id(tensor) for tensor in head.parameters()}
    heads = tuple(name for name, tensor in model.named_parameters() if id(tensor) in own)
    return Network(model, run, lambda features, task: head(features), heads=heads)


def _first_token(model: Any) -> int:
    """The token that the decoder begins with."""
    keys = ("decoder_start_token_id", "bos_token_id")
    places = (model.generation_config, model.config)
    return next(found for key in keys for place in places if (found := getattr(place, key, None)) is not None)


def examples(params: Params, build: Path, split: str = "fit") -> Examples:
    """64 texts of the split `fit` of each task, or of every other one of `val`, or more where a merge asks for more.

    Without the right answers. Batches: "task", and "input_ids" and "attention_mask", int64 (B, L).
    """
    from mergeline.evaluation.pretrained import load_tokenizer
    from mergeline.evaluation.tables import load_table
    from mergeline.evaluation.text2text.models import tokens
    from mergeline.evaluation.text2text.texts import sources

    section = cast("Text2TextParams", params).text2text
    base = build / "checkpoints" / params.base
    tokenizer, config = load_tokenizer(base), read_object(base / CONFIG)
    tables = {task: load_table(dataset(build, task)) for task in params.tasks}
    found = {task: sources(section.task(task), table, split) for task, table in tables.items()}
    fits_val = split == "fit" and any(table.fits_val for table in tables.values())
    rows = {task: tokens(tokenizer, texts, config)[0] for task, texts in found.items()}
    return Examples(
        {task: partial(_batches, task, own, params.device) for task, own in rows.items()},
        {task: len(texts) for task, texts in found.items()},
        params.owners,
        {task: text_digest(texts) for task, texts in found.items()},
        "half of val" if fits_val else split,
        labelled=False,
        first=_TEXTS,
    )


def _batches(task: str, rows: Sequence[Sequence[int]], device: str) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), _BATCH):
        yield {"task": task, **side_by_side(rows[start : start + _BATCH], device)}
