"""Statistics of the experts of one language model on the lines of a file, without a workspace."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Sequence

from mergeline.evaluation.pretrained import side_by_side
from mergeline.merging.canonical import text_digest
from mergeline.merging.engine.places import refuse_file
from mergeline.merging.errors import UserError
from mergeline.merging.learning.collect import collect, provenance
from mergeline.merging.learning.gathering import Gathering
from mergeline.merging.learning.network import Examples
from mergeline.merging.reading import open_regular
from mergeline.tasks.language.learning import network_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 8
_TASK = "texts"


def collect_experts(
    model: Path,
    texts: Path,
    out: Path,
    *,
    outputs: bool = False,
    length: int = 512,
    examples: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the statistics `experts` of a folder of transformers on a file of UTF-8 to `out`; returns it.

    texts: one a line, empty ones left out. length: how many tokens of each are taken. outputs, examples: as
    `merging.learning.gathering.Gathering` says.

    Raises:
        UserError: as `merging.learning.collect.collect`; no texts, no tokenizer, no causal language model.
    """
    from mergeline.evaluation.language.models import load_model

    refuse_file(out, [model, texts], lambda path: bool(provenance(path)), "file of statistics", force)
    lines = _lines(texts)
    if length < 1:
        raise UserError(f"--length {length}: give a number from 1 on")
    loaded = load_model(model, "float32", device)
    found = Examples(
        batches={_TASK: partial(_batches, loaded.tokenizer, lines, length, device)},
        counts={_TASK: len(lines)},
        owners={_TASK: model.name},
        digests={_TASK: text_digest([lines, length])},
        split="fit",
    )
    gathering = Gathering(examples=examples, outputs=outputs)
    return collect(
        "experts", model, network_of(loaded.model), found, out, gathering=gathering, expert=model.name, seed=seed,
        progress=progress,
    )  # fmt: skip


def _lines(file: Path) -> list[str]:
    try:
        with open_regular(file) as opened:
            text = opened.read().decode()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: is no UTF-8") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{file}: holds no text; write one a line")
    return lines


def _batches(
    tokenizer: PreTrainedTokenizerBase, lines: Sequence[str], length: int, device: str
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(lines), _BATCH):
        rows = [tokenizer(line)["input_ids"][:length] for line in lines[start : start + _BATCH]]
        yield {"task": _TASK, **side_by_side([row or [0] for row in rows], device)}
