"""What families share whose models write texts: tokens that are whole words, and trainings."""

from __future__ import annotations

import math
import time
from random import Random
from typing import Any, Callable, Iterator, Sequence, TypeVar

import torch
from torch import Tensor

Example = TypeVar("Example")

PAD, END = 0, 1
IGNORED = -100
_WARMUP = 0.1  # of all steps
_BLANK = "\u2581"  # what a word begins with


def whole_words(words: Sequence[str], signs: Sequence[str], split: str, ends: bool, **more: Any) -> Any:
    """A tokenizer of whole words, and of signs, as which `split`, a regular expression, cuts what it finds in a word.

    A word begins with the blank before it. ends: whether each text gets the token of its end. more: for transformers.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*(_BLANK + word for word in dict.fromkeys(words)), _BLANK, *signs]
    core = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *pieces])}, "<unk>")
    )
    cut = pre_tokenizers.Split(Regex(split), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(_BLANK), cut])
    core.decoder = decoders.Metaspace(_BLANK)
    if ends:
        core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **more
    )


def side_by_side(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Rows of tokens (B, L), filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row] + [fill] * (longest - len(row)) for row in rows])


def train(
    model: Any,
    loss: Callable[[Any, Sequence[Example]], Tensor],
    batches: Iterator[Sequence[Example]],
    steps: int,
    learning_rate: float,
) -> None:
    """Minimise a loss of batches, by AdamW."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    for step, examples in zip(range(steps), batches):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * _schedule(step / steps)
        loss(model, examples).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


def _schedule(progress: float) -> float:
    return min(1.0, (progress + 0.01) / _WARMUP) * (0.5 + 0.5 * math.cos(math.pi * progress))


def rounds(examples: Sequence[Example], size: int, seed: str) -> Iterator[list[Example]]:
    """Batches from shuffled rounds through all examples."""
    random, order = Random(seed), list[int]()
    while True:
        while len(order) < size:
            order += random.sample(range(len(examples)), len(examples))
        yield [examples[i] for i in order[:size]]
        order = order[size:]


def took(wall: float, cpu: float) -> str:
    """How long it is since these two readings, of time.time and time.process_time."""
    return f"{time.time() - wall:.0f} s, {time.process_time() - cpu:.0f} CPU s"
