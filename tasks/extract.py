"""The extract step: what the task vectors look like, tensor by tensor; no copy of them."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging import operators as ops
from merging import spectral
from merging.engine import one_thread
from merging.errors import UserError
from merging.files import publish, staged, write_json
from merging.inputs import FileInputs
from merging.keys import is_matrix
from merging.lazy import torch
from merging.plan import Plan, make_plan
from merging.rules import block_of
from merging.slots import Slot, View

if TYPE_CHECKING:
    from torch import Tensor

# An expert whose weights point elsewhere than the base's was not fine-tuned from it; real experts stay above 0.9.
_SAME_FAMILY = 0.5
_SHARES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)


def extract(base: Path, experts: dict[str, Path], out: Path) -> None:
    """Describe task vectors (expert - base) into `out/description.json`.

    Norm of every task vector, absolute and relative to the base, by tensor and by block; cosine and sign-conflict
    matrices between experts; the share of energy in the leading singular directions of the centred task vectors.

    Raises:
        UserError: checkpoints that do not match, an expert that is not of this base, two experts with one content.
    """
    plan = make_plan({"method": "average", "base": base, "experts": experts})
    plan.check()
    statistics = _Statistics(plan)
    with staged(out) as partial, one_thread(lapack=True), FileInputs(plan) as source:
        for entry in plan.entries:
            if entry.action == "merge":
                view = source.view(entry)
                statistics.add(view)
                if is_matrix(view.name, view.shape, "block_linear"):
                    statistics.add_spectra(_energies(next(view.blocks("tensor"))))
        write_json(partial / "description.json", statistics.describe())
        publish(partial, out)


def _energies(x: Slot) -> Tensor:
    """The squared singular values, descending, of each expert's centred task vector: (T, R)."""
    center_MN = ops.mean(x.experts)
    grams = (spectral.gram(expert_MN.double() - center_MN) for expert_MN in x.experts)
    return torch.stack([torch.linalg.eigvalsh(gram_RR).flip(0).clamp(min=0) for gram_RR in grams])


class _Statistics:
    """Sums over tensors, from which the description is made."""

    def __init__(self, plan: Plan):
        self.experts = list(plan.experts)
        count = len(self.experts)
        self.gram_TT = torch.zeros(count, count, dtype=torch.float64)
        self.conflicts_TT = torch.zeros(count, count, dtype=torch.float64)
        self.both_TT = torch.zeros(count, count, dtype=torch.float64)
        self.weights_T = torch.zeros(count, dtype=torch.float64)  # <expert, base> over matrices
        self.expert_T = torch.zeros(count, dtype=torch.float64)
        self.base = self.base_all = 0.0
        self.tensors: dict[str, list[float]] = {}
        self.blocks: dict[str, Any] = {}
        self.held = torch.zeros(count, len(_SHARES), dtype=torch.float64)
        self.total_T = torch.zeros(count, dtype=torch.float64)

    def add(self, view: View) -> None:
        energy_T = torch.zeros(len(self.experts), dtype=torch.float64)
        for x in view.blocks("element"):
            gram_TT = self._add_block(x)
            energy_T += gram_TT.diagonal()
        self.tensors[view.name] = energy_T.sqrt().tolist()
        block = block_of(view.name)
        key = f"block {block[1]}" if block else "outside blocks"
        self.blocks[key] = self.blocks.get(key, 0) + energy_T

    def _add_block(self, x: Slot) -> Tensor:
        tau_TD = x.task_vectors.double()
        gram_TT = tau_TD @ tau_TD.T
        self.gram_TT += gram_TT
        sign_TD = tau_TD.sign().float()
        products_TT = (sign_TD @ sign_TD.T).double()
        nonzero_TD = sign_TD.abs()
        both_TT = (nonzero_TD @ nonzero_TD.T).double()
        self.both_TT += both_TT
        self.conflicts_TT += (both_TT - products_TT) / 2
        base_D = x.base.double()
        self.base_all += float(base_D @ base_D)
        if len(x.tensor_shape) >= 2:
            experts_TD = x.experts.stacked.double()
            self.weights_T += experts_TD @ base_D
            self.expert_T += (experts_TD**2).sum(1)
            self.base += float(base_D @ base_D)
        return gram_TT

    def add_spectra(self, energy_TR: Tensor) -> None:
        held_TR = energy_TR.cumsum(1)
        ranks = [max(1, int(share * energy_TR.shape[1])) - 1 for share in _SHARES]
        self.held += held_TR[:, ranks]
        self.total_T += held_TR[:, -1]

    def describe(self) -> dict[str, Any]:
        norm_T = self.gram_TT.diagonal().sqrt()
        tiny = 1e-300
        cosine_TT = self.gram_TT / (norm_T[:, None] * norm_T[None]).clamp(min=tiny)
        alignment_T = self.weights_T / (self.expert_T.sqrt() * sqrt(self.base)).clamp(min=tiny)
        self._refuse_strangers(alignment_T.tolist(), cosine_TT, norm_T)
        energy_T = self.gram_TT.diagonal().clamp(min=tiny)
        return {
            "reference": "pretrained",
            "experts": {
                name: {
                    "norm": _round(norm_T[t]),
                    "relative_norm": _round(norm_T[t] / sqrt(self.base_all or 1.0)),
                    "alignment_with_base": _round(alignment_T[t]) if self.base else None,
                    "energy_by_block": {key: _round(e[t] / energy_T[t]) for key, e in self.blocks.items()},
                    "energy_in_leading_directions": {
                        f"{share:g}": _round(self.held[t, s] / self.total_T[t].clamp(min=tiny))
                        for s, share in enumerate(_SHARES if self.total_T.any() else ())
                    },
                }
                for t, name in enumerate(self.experts)
            },
            "cosine": [[_round(c) for c in row] for row in cosine_TT],
            "sign_conflict": [
                [_round(c) for c in row] for row in self.conflicts_TT / self.both_TT.clamp(min=1)
            ],
            "tensor_norms": {name: [_round(n) for n in norms] for name, norms in self.tensors.items()},
        }

    def _refuse_strangers(self, alignment: list[float], cosine_TT: Tensor, norm_T: Tensor) -> None:
        for name, value in zip(self.experts, alignment):
            if self.base and value < _SAME_FAMILY:
                raise UserError(
                    f"expert '{name}' was not fine-tuned from this base: the cosine of their weights is {value:.2f}, "
                    f"a fine-tuned copy has more than {_SAME_FAMILY}; remove it or name its own base"
                )
        for i, name in enumerate(self.experts):
            if norm_T[i] == 0:
                raise UserError(f"expert '{name}' equals the base; remove it from experts")
            for j in range(i):
                if norm_T[i] == norm_T[j] and cosine_TT[i, j] > 1 - 1e-12:
                    raise UserError(
                        f"experts '{self.experts[j]}' and '{name}' are the same; list one of them"
                    )


def _round(value: Any) -> float:
    """Six significant digits: enough to read, and the same text on every run."""
    return float(f"{float(value):.6g}")
