"""The gates of language models: a candidate works as a model, and has not forgotten what the base knew."""

from __future__ import annotations

from typing import Annotated, Any, Iterator

from pydantic import Field

from mergeline.tasks.gates import Finding, Gates

# What a language model does not do, for each check that it may fail.
_WORKS = {
    "finite": "computes NaN or Inf",
    "round_trip": "has a tokenizer that does not give back a text",
    "generates": "generates nothing",
}


class LanguageGates(Gates):
    """`gates` of a params.yaml with language models.

    Always asked for: the model computes finite logits and generates, and its tokenizer gives back a text.

    largest_perplexity_ratio: of the perplexity to the base's, on every perplexity task.
    """

    largest_perplexity_ratio: Annotated[float, Field(gt=0)] | None = None


def findings(row: dict[str, Any], base: dict[str, Any], gates: LanguageGates) -> Iterator[Finding]:
    """What these gates find in a candidate's row of the leaderboard, beside the base's row."""
    if "checks" in row:
        failed = [_WORKS[name] for name, passed in row["checks"].items() if not passed]
        sentence = f"The language model {'; '.join(failed) or 'loads, gives back a text, and generates'}."
        yield Finding("works", not failed, sentence)
    if gates.largest_perplexity_ratio is not None:
        yield _perplexity(
            row.get("perplexity", {}), base.get("perplexity", {}), gates.largest_perplexity_ratio
        )


def _perplexity(found: dict[str, Any], base: dict[str, Any], limit: float) -> Finding:
    ratios = {task: scores["value"] / base[task]["value"] for task, scores in found.items()}
    if not ratios:
        return Finding(
            "largest_perplexity_ratio", False, "No perplexity was measured: list tasks under language."
        )
    worst = max(ratios, key=lambda task: (ratios[task] != ratios[task], ratios[task]))
    sentence = (
        f"The perplexity of task {worst} is {found[worst]['value']:.2f}, {ratios[worst]:.3f} times the base's; "
        f"at most {limit:.3f} is allowed."
    )
    return Finding("largest_perplexity_ratio", bool(ratios[worst] <= limit), sentence)
