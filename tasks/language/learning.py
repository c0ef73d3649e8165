"""Language models as learners see them, and the prompts that they learn from.

Shape suffixes: B prompts of a batch, L tokens of the longest, R tokens that count, d width of the model.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Sequence, cast

from mergeline.evaluation.pretrained import side_by_side
from mergeline.merging.canonical import text_digest
from mergeline.merging.learning.network import Examples, Network

if TYPE_CHECKING:
    from torch import Tensor

    from mergeline.tasks.language.params import LanguageParams
    from mergeline.tasks.schema import Params

_PROMPTS = 64  # of each task, where nothing else is said
_BATCH = 16


def network(params: Params, build: Path, like: Path) -> Network:
    """The causal language model of `like`, as `network_of` has it."""
    from mergeline.evaluation.language.models import load_model

    return network_of(load_model(like, "float32", params.device).model)


def network_of(model: Any) -> Network:
    """A causal language model of transformers, whose weights become those of one checkpoint after another.

    Its features (R, d) are the last hidden states, after the last norm, of every token of the prompts; logits are what
    the head makes of them, without what some models do to these afterwards.
    """
    model.requires_grad_(False)

    def run(module: Any, batch: Any) -> Tensor:
        mask = batch["attention_mask"]
        hidden = module.base_model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)[0]
        return hidden[mask.bool()]

    head = model.get_output_embeddings()
    own = {id(tensor) for tensor in head.parameters()}
    heads = tuple(name for name, tensor in model.named_parameters() if id(tensor) in own)
    return Network(model, run, lambda features, task: head(features), heads=heads, extend=_extended)


def _extended(module: Any, batch: Any, count: int) -> dict[str, Any]:
    """A batch of prompts with up to `count` tokens after each, the likeliest ones, up to the end of a text."""
    import torch

    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows = [row[kept] for row, kept in zip(ids, mask.bool())]
    width = ids.shape[1]
    # What is written goes on at the right end of all.
    left, left_mask = torch.zeros_like(ids), torch.zeros_like(mask)
    for i, row in enumerate(rows):
        left[i, width - len(row) :], left_mask[i, width - len(row) :] = row, 1
    end = module.generation_config.eos_token_id
    ends = [] if end is None else end if isinstance(end, list) else [end]
    written = module.generate(
        input_ids=left, attention_mask=left_mask, max_new_tokens=count, do_sample=False,
        pad_token_id=ends[0] if ends else 0,
    )[:, width:]  # fmt: skip
    longer = []
    for row, new in zip(rows, written):
        stops = [i for i, token in enumerate(new.tolist()) if token in ends]
        longer.append(torch.cat([row, new[: stops[0] + 1] if stops else new]))
    return {**batch, **side_by_side([row.tolist() for row in longer], str(ids.device))}


def examples(params: Params, build: Path, split: str = "fit") -> Examples:
    """64 prompts of each task's own training or few-shot part, or more where a merge asks for more; no answers.

    Batches: "task", and "input_ids" and "attention_mask", int64 (B, L).
    """
    from mergeline.evaluation.language.prompts import prompts
    from mergeline.evaluation.pretrained import load_tokenizer

    language = cast("LanguageParams", params).language
    tokenizer = load_tokenizer(build / "checkpoints" / params.base)
    found = prompts(language, params.tasks, tokenizer, split)
    batches = {
        task: partial(_batches, tokenizer, task, texts, language.apply_chat_template, params.device)
        for task, texts in found.items()
    }
    counts = {task: len(texts) for task, texts in found.items()}
    digests = {task: text_digest(texts) for task, texts in found.items()}
    return Examples(batches, counts, params.owners, digests, split, labelled=False, first=_PROMPTS)


def _batches(
    tokenizer: Any, task: str, texts: Sequence[str], is_chat: bool, device: str
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(texts), _BATCH):
        rows = [
            tokenizer(t, add_special_tokens=not is_chat)["input_ids"] for t in texts[start : start + _BATCH]
        ]
        yield {"task": task, **side_by_side(rows, device)}
