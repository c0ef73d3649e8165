"""Training of the language experts: next-token loss on the answers alone."""

from __future__ import annotations

import math
from random import Random
from typing import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import clip_grad_norm_

from make.skills import Example

_IGNORED = -100
_WARMUP = 0.1  # of all steps

# Tokens (B, L), and the token after each of them where that belongs to an answer (B, L).
Batch = tuple[Tensor, Tensor]


def train(model: Module, batches: Sequence[Batch], learning_rate: float) -> None:
    """One AdamW step a batch, on the parameters that are not frozen."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    for step, (tokens, targets) in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * _schedule(step / len(batches))
        loss = F.cross_entropy(*answer_logits(model, tokens, targets))
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()


def _schedule(progress: float) -> float:
    return min(1.0, (progress + 0.01) / _WARMUP) * (0.5 + 0.5 * math.cos(math.pi * progress))


def answer_logits(model: Module, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (A, V) and targets (A) of the answers' tokens alone; products in bfloat16 where the CPU has them."""
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = inner.model(tokens, use_cache=False).last_hidden_state
        asked = targets != _IGNORED
        return inner.lm_head(hidden[asked]).float(), targets[asked]


def batches(tokenizer, examples: Sequence[Example], steps: int, size: int, seed: str) -> Iterator[Batch]:
    """`steps` batches of `size` examples, from shuffled rounds through all of them."""
    random, order = Random(seed), []
    for _ in range(steps):
        while len(order) < size:
            order += random.sample(range(len(examples)), len(examples))
        yield batch(tokenizer, [examples[i] for i in order[:size]])
        order = order[size:]


def batch(tokenizer, examples: Sequence[Example]) -> Batch:
    """Padded on the right, where causal attention does not look."""
    pairs = [[tokenizer(text).input_ids for text in (e.prompt, e.answer)] for e in examples]
    length = max(len(prompt) + len(answer) for prompt, answer in pairs) - 1
    tokens = torch.zeros(len(pairs), length, dtype=torch.long)
    targets = torch.full_like(tokens, _IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        both = prompt + answer
        tokens[row, : len(both) - 1] = torch.tensor(both[:-1])
        targets[row, len(prompt) - 1 : len(both) - 1] = torch.tensor(answer)
    return tokens, targets


@torch.no_grad()
def accuracy(model: Module, tokenizer, examples: Sequence[Example], size: int = 40) -> float:
    """Share of answers whose every token is the likeliest one: lm-eval's `acc`."""
    model.eval()
    right = 0
    for start in range(0, len(examples), size):
        tokens, targets = batch(tokenizer, examples[start : start + size])
        logits, answers = answer_logits(model, tokens, targets)
        wrong = torch.zeros_like(targets, dtype=torch.bool)
        wrong[targets != _IGNORED] = logits.argmax(-1) != answers
        right += int((~wrong.any(1)).sum())
    return right / len(examples)
