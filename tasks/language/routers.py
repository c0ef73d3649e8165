"""Rows of the router of a mixture of dense models, of prompts: which hidden states each expert is for.

As mergekit-moe 0.1.5 makes them, but of every prompt by itself: there, hidden states of padding count, too.

Shape suffixes: L layers, T tokens of a prompt, H width of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Literal, Sequence, get_args

from mergeline.merging.canonical import canonical_json, text_digest
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.writer import CheckpointWriter, TensorSpec
from mergeline.merging.engine.places import refuse_file
from mergeline.merging.errors import UserError
from mergeline.merging.files import publish, staged

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed"]
MODES: tuple[Mode, ...] = get_args(Mode)
_METADATA = "mergeline.routers"
_SMALL = 1e-8


def write_routers(
    base: Path,
    prompts: Sequence[tuple[Sequence[str], Sequence[str]]],
    mode: Mode,
    out: Path,
    *,
    device: str = "cpu",
    force: bool = False,
) -> Path:
    """Write `layers.L` (E, H) float32 for each layer of `base` to the safetensors file `out`; returns it.

    prompts: of each expert, those that are for it, and those that are not. mode: `hidden` (or `hidden_last`), the
    input of each layer at a prompt's last token, `hidden_avg` the mean over its tokens; `cheap_embed` the sum of the
    embeddings of all tokens, the same for all layers. Means over prompts, the second less, divided by their norm.

    Raises:
        UserError: an expert without prompts, prompts without tokens; no causal language model or tokenizer.
    """
    import torch

    from mergeline.evaluation.language.models import load_model

    for i, (positive, _) in enumerate(prompts):
        if not positive:
            raise UserError(f"expert {i} has no positive_prompts, which gate_mode {mode} needs")
    if len({(tuple(p), tuple(n)) for p, n in prompts}) == 1 < len(prompts):
        raise UserError("all experts have the same prompts, which tell the router nothing")
    refuse_file(out, [base], _is_own, "file of routers", force)
    loaded = load_model(base, "float32", device)
    tokenizer, model = loaded.tokenizer, loaded.model
    of = _cheap if mode == "cheap_embed" else _hidden_average if mode == "hidden_avg" else _hidden_last

    def mean(texts: Sequence[str]) -> Tensor:
        return _of_prompts(texts, tokenizer, model, of)

    rows = []
    with torch.no_grad():
        for positive, negative in prompts:
            row_LH = mean(positive)
            if negative:
                row_LH = row_LH - mean(negative)
            rows.append(row_LH / row_LH.norm(dim=-1, keepdim=True).clamp(min=_SMALL))
    gates_LEH = torch.stack(rows, dim=1).float().cpu()
    said = {"mode": mode, "prompts": text_digest([[*map(list, pair)] for pair in prompts])}
    metadata = {"format": "pt", _METADATA: canonical_json({**said, "base": open_checkpoint(base).digest()})}
    shape = tuple(gates_LEH.shape[1:])
    specs = [TensorSpec(f"layers.{i}", "F32", shape, 4 * shape[0] * shape[1]) for i in range(len(gates_LEH))]
    with staged(out) as place:
        writer = CheckpointWriter(place, specs, metadata, None, file=out.name)
        try:
            for spec, gate_EH in zip(specs, gates_LEH):
                writer.write(spec.name, gate_EH)
            writer.finish()
        finally:
            writer.close()
        publish(place / out.name, out)
    return out


def _is_own(file: Path) -> bool:
    try:
        return _METADATA in open_checkpoint(file).metadata
    except UserError:
        return False


def _of_prompts(
    texts: Sequence[str], tokenizer: Any, model: Any, of: Callable[[Any, Tensor], Tensor]
) -> Tensor:
    """The mean over prompts of what `of` gives (L, H), float64; of `cheap_embed` their sum over its norm."""
    import torch

    found = []
    for text in texts:
        ids = tokenizer((tokenizer.bos_token or "") + text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"the prompt '{text[:40]}' has no tokens; leave it out")
        found.append(of(model, torch.tensor([ids], device=model.device)).double())
    total_LH = torch.stack(found).sum(0)
    if of is _cheap:
        return total_LH / total_LH.norm(dim=-1, keepdim=True).clamp(min=_SMALL)
    return total_LH / len(found)


def _hidden_last(model: Any, ids: Tensor) -> Tensor:
    return _hidden(model, ids)[:, -1]


def _hidden_average(model: Any, ids: Tensor) -> Tensor:
    return _hidden(model, ids).mean(1)


def _hidden(model: Any, ids: Tensor) -> Tensor:
    """The inputs of all layers, (L, T, H)."""
    import torch

    states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([state[0] for state in states[:-1]])


def _cheap(model: Any, ids: Tensor) -> Tensor:
    """The sum of the embeddings of all tokens, for every layer."""
    sum_H = model.get_input_embeddings().weight[ids[0]].double().sum(0)
    return sum_H.expand(model.config.num_hidden_layers, -1)
