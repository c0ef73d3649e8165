"""The extract step: what the task vectors look like, and the spectra that a search will need; no dense copy of them."""

from __future__ import annotations

import re
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence

from merging.checkpoint import open_checkpoint
from merging.engine import FileInputs, one_thread
from merging.errors import UserError
from merging.files import publish, staged, write_json
from merging.methods import Slot
from merging.methods.cart import is_matrix
from merging.plan import Plan, make_plan
from merging.writer import CheckpointWriter, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

# An expert whose weights point elsewhere than the base's was not fine-tuned from it; real experts stay above 0.9.
_SAME_FAMILY = 0.5
_SHARES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


def extract(base: Path, experts: dict[str, Path], out: Path, *, rank: float) -> None:
    """Describe task vectors (expert - base) into `out`: description.json, and spectra in a folder `factors`.

    description.json: norm of every task vector, absolute and relative to the base, by tensor and by block; cosine
    and sign-conflict matrices between experts; the share of energy in the leading singular directions of the
    centred task vectors. Factors (float64, up to `rank` of full rank; 0 stores none) are read by `StoredFactors`.

    Raises:
        UserError: checkpoints that do not match, an expert that is not of this base, two experts with one content.
    """
    plan = make_plan({"method": "average", "base": base, "experts": experts})
    plan.check()
    with staged(out) as partial, one_thread():
        source = FileInputs(plan, "cpu")
        statistics = _Statistics(plan)
        store = _FactorWriter(plan, partial / "factors", rank)
        for slot in source.slots():
            statistics.add(slot)
            store.add(slot, statistics)
        store.finish()
        write_json(partial / "description.json", statistics.describe())
        publish(partial, out)


class StoredFactors:
    """Spectra of the mean-centred task vectors that `extract` stored, tensor by tensor."""

    def __init__(self, folder: Path):
        self._store = open_checkpoint(folder / "factors") if (folder / "factors").exists() else None

    def get(self, tensor: str) -> Sequence[tuple[Tensor, Tensor]] | None:
        """Per expert, squared singular values (R,) and singular vectors (R, K) of the smaller side, or None."""
        if self._store is None or f"{tensor}.vectors" not in self._store.tensors:
            return None
        return list(zip(self._store.read(f"{tensor}.energy"), self._store.read(f"{tensor}.vectors")))


class _FactorWriter:
    def __init__(self, plan: Plan, folder: Path, rank: float):
        self._kept: dict[str, int] = {}
        specs = []
        for entry in plan.entries:
            if (
                rank
                and entry.action == "merge"
                and is_matrix(entry.name, len(entry.spec.shape), "block_linear")
            ):
                side = min(entry.spec.shape)
                self._kept[entry.name] = kept = max(1, int(rank * side))
                for suffix, shape in (
                    ("energy", (len(plan.experts), side)),
                    ("vectors", (len(plan.experts), side, kept)),
                ):
                    count = shape[0] * shape[1] * (shape[2] if len(shape) == 3 else 1)
                    specs.append(TensorSpec(f"{entry.name}.{suffix}", "F64", shape, 8 * count))
        self._writer = None
        if specs:
            folder.mkdir()
            self._writer = CheckpointWriter(
                folder, specs, {"content": "spectra of mean-centred task vectors"}, None
            )

    def add(self, slot: Slot, statistics: _Statistics) -> None:
        if slot.name not in self._kept:
            return
        import torch

        from merging import operators as ops

        center = ops.mean(slot.experts)
        spectra = [ops.spectrum(expert.double() - center) for expert in slot.experts]
        energy_TR = torch.stack([energy for energy, _ in spectra])
        vectors_TRK = torch.stack([vectors[:, : self._kept[slot.name]] for _, vectors in spectra])
        self._writer.write(f"{slot.name}.energy", energy_TR)
        self._writer.write(f"{slot.name}.vectors", vectors_TRK)
        statistics.add_spectra(energy_TR)

    def finish(self) -> None:
        if self._writer:
            self._writer.finish()


class _Statistics:
    """Sums over tensors, from which the description is made."""

    def __init__(self, plan: Plan):
        import torch

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

    def add(self, slot: Slot) -> None:
        tau_TD = slot.task_vectors.reshape(len(self.experts), -1).double()
        gram_TT = tau_TD @ tau_TD.T
        self.gram_TT += gram_TT
        sign_TD = tau_TD.sign().float()
        products_TT = (sign_TD @ sign_TD.T).double()
        nonzero_TD = sign_TD.abs()
        both_TT = (nonzero_TD @ nonzero_TD.T).double()
        self.both_TT += both_TT
        self.conflicts_TT += (both_TT - products_TT) / 2
        base_D = slot.base.reshape(-1).double()
        self.base_all += float(base_D @ base_D)
        if slot.base.ndim >= 2:
            experts_TD = slot.experts.reshape(len(self.experts), -1).double()
            self.weights_T += experts_TD @ base_D
            self.expert_T += (experts_TD**2).sum(1)
            self.base += float(base_D @ base_D)
        energy = gram_TT.diagonal()
        self.tensors[slot.name] = [sqrt(e) for e in energy.tolist()]
        block = _BLOCK.search(slot.name)
        key = f"block {block.group(1)}" if block else "outside blocks"
        self.blocks[key] = self.blocks.get(key, 0) + energy

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
