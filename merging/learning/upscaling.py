"""SMILE, made: what each expert changed of every linear map of the base, cut to low rank (checkpoints/upscaling.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterator, NamedTuple

from mergeline.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeline.merging.checkpoints.upscaling import SETTINGS
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.contract import Job
from mergeline.merging.learning.corrections import expert_folder, started, tell, written
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


class _Map(NamedTuple):
    """A linear map, or a third of a packed one: its name in the file, and its weight and bias in the checkpoint."""

    name: str
    weight: str
    bias: str
    part: int
    parts: int

    def read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        return checkpoint.read(name).double().chunk(self.parts)[self.part]


def upscaled(job: Job, rank: int, gate_rank: int, top: int) -> Recipe:
    """The base, with a file of each expert beside it, under the name of its task.

    Raises:
        UserError: an expert without a task of its own, or with several; a model without blocks of linear maps.
    """
    assert job.recipe.base is not None, "fit has checked it"
    tasks = {expert: job.examples.tasks_of(expert) for expert in job.recipe.experts}
    for expert, own in tasks.items():
        if len(own) != 1:
            raise UserError(
                f"'{expert}' has {len(own)} tasks of its own, and needs one, whose name its file has"
            )
    start = started(job, "task_arithmetic", {"scale": 0.0})
    base, maps = open_checkpoint(job.recipe.base), list(_maps(job))
    adapters = {}
    for expert, [task] in tasks.items():
        tuned = open_checkpoint(expert_folder(job, expert))
        tensors = {SETTINGS: torch.tensor([float(gate_rank), float(top)])}
        for m in maps:
            down, up = triplets(m.read(tuned, m.weight) - m.read(base, m.weight), rank)
            bias = (
                m.read(tuned, m.bias) - m.read(base, m.bias)
                if m.bias in base.tensors
                else torch.zeros(len(up))
            )
            tensors |= {f"{m.name}/down": down, f"{m.name}/up": up, f"{m.name}/bias": bias}
        adapters[task] = written(job, start, task, "smile", tensors)
        tell(job, len(adapters), len(tasks))
    return start.recipe.model_copy(update={"adapters": adapters})


def triplets(tau_MN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading singular triplets: V' (K, N), orthonormal rows, and U S (M, K)."""
    m, n = tau_MN.shape
    if m >= n:
        _, q_NN = torch.linalg.eigh(tau_MN.T @ tau_MN)
        down_KN = q_NN[:, -rank:].T.flip(0)
        return down_KN, tau_MN @ down_KN.T
    _, q_MM = torch.linalg.eigh(tau_MN @ tau_MN.T)
    left_MK = q_MM[:, -rank:].flip(1)
    scaled_KN = left_MK.T @ tau_MN
    sizes_K1 = scaled_KN.norm(dim=1, keepdim=True)
    return scaled_KN / sizes_K1.clamp_min(1e-300), left_MK * sizes_K1.T


def _maps(job: Job) -> Iterator[_Map]:
    """The linear maps of the numbered blocks: those of modules, and the packed ones of attention in their thirds."""
    stored, found = job.network.stored, False
    for name, part in job.network.module.named_modules():
        if isinstance(part, torch.nn.MultiheadAttention):
            if part.in_proj_weight is None or part.in_proj_bias is None or not part.batch_first:
                raise UserError(f"'{name}' is an attention of another kind than experts can add to")
            weight = f"{name}.in_proj_weight"
            for i in range(3):
                yield _Map(f"{weight}/{i}", stored(weight), stored(f"{name}.in_proj_bias"), i, 3)
            found = True
        elif isinstance(part, torch.nn.Linear):
            yield _Map(f"{name}.weight/0", stored(f"{name}.weight"), stored(f"{name}.bias"), 0, 1)
            found = True
    if not found:
        raise UserError("the model has no linear maps as modules, to which experts could add")
