"""The extract step: what the task vectors look like, tensor by tensor; no copy of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging import operators as ops
from merging import spectral
from merging.engine import one_thread
from merging.errors import UserError
from merging.family import RANKS, Sums, number, oddities, sums_of, total
from merging.files import publish, staged, write_json
from merging.inputs import FileInputs
from merging.keys import is_matrix
from merging.lazy import torch
from merging.mergelock import refuse_locked
from merging.plan import make_plan
from merging.rules import block_of
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


def extract(base: Path, experts: dict[str, Path], out: Path) -> None:
    """Describe task vectors (expert - base) into `out/description.json`.

    Norm of every task vector, absolute and relative to the base, by tensor and by block; cosine and sign-conflict
    matrices between experts; the share of energy in the leading singular directions of the centred task vectors.

    Raises:
        UserError: checkpoints that do not match, an expert that is not of this base or is locked against merging,
            two experts with one content.
    """
    plan = make_plan({"method": "average", "base": base, "experts": experts})
    plan.check()
    refuse_locked(plan)
    tensors: dict[str, Sums] = {}
    energies: list[Tensor] = []
    with staged(out) as partial, one_thread(lapack=True), FileInputs(plan) as source:
        for entry in plan.entries:
            if entry.action == "merge":
                view = source.view(entry)
                tensors[view.name] = sums_of(view)
                if is_matrix(view.name, view.shape, "block_linear"):
                    energies.append(_energies(next(view.blocks("tensor"))))
        write_json(partial / "description.json", _description(list(experts), tensors, energies))
        publish(partial, out)


def _energies(x: Slot) -> Tensor:
    """The squared singular values, descending, of each expert's centred task vector: (T, R)."""
    center_MN = ops.mean(x.experts)
    grams = (spectral.gram(expert_MN.double() - center_MN) for expert_MN in x.experts)
    return torch.stack([torch.linalg.eigvalsh(gram_RR).flip(0).clamp(min=0) for gram_RR in grams])


def _description(experts: list[str], tensors: dict[str, Sums], energies: list[Tensor]) -> dict[str, Any]:
    """What is written, from the sums over each tensor and the spectra (T, R) of matrices (raises UserError)."""
    sums = total(tensors.values(), len(experts))
    for sentence in oddities(sums, experts):
        raise UserError(sentence)
    blocks: dict[str, list[Sums]] = {}
    for name, part in tensors.items():
        block = block_of(name)
        blocks.setdefault(f"block {block[1]}" if block else "outside blocks", []).append(part)
    energy_T, alignment_T = sums.products_TT.diagonal(), sums.alignment_T
    shares = {
        key: total(parts, len(experts)).products_TT.diagonal() / energy_T for key, parts in blocks.items()
    }
    leading = _leading(energies)
    return {
        "reference": "pretrained",
        "experts": {
            name: {
                "norm": number(sums.norm_T[t]),
                "relative_norm": number(sums.relative_norm_T[t]),
                "alignment_with_base": None if alignment_T is None else number(alignment_T[t]),
                "energy_by_block": {key: number(share_T[t]) for key, share_T in shares.items()},
                "energy_in_leading_directions": {key: number(held_T[t]) for key, held_T in leading.items()},
            }
            for t, name in enumerate(experts)
        },
        "cosine": [[number(c) for c in row] for row in sums.cosine_TT],
        "sign_conflict": [[number(c) for c in row] for row in sums.conflict_TT],
        "tensor_norms": {name: [number(n) for n in part.norm_T] for name, part in tensors.items()},
    }


def _leading(energies: list[Tensor]) -> dict[str, Tensor]:
    """For each share of full rank, the share of each expert's energy in so many directions: (T,)."""
    energy_T = sum(energy_TR.sum(1) for energy_TR in energies)
    if not energies or not energy_T.any():
        return {}
    held = {
        f"{rank:g}": sum(e_TR[:, : spectral.rank_of(rank, e_TR.shape[1:])].sum(1) for e_TR in energies)
        for rank in RANKS
    }
    return {key: held_T / energy_T.clamp(min=1e-300) for key, held_T in held.items()}
