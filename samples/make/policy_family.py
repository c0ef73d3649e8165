"""The checkpoints of the family of policies: a small Decision Transformer of all tasks, and experts tuned from it."""

from __future__ import annotations

import math
import time
from functools import cache
from pathlib import Path
from typing import Any, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from make.policy_tasks import STEPS, TASKS, Trajectories, trajectories

CONTEXT = 5
CONFIG: dict[str, Any] = {
    "hidden_size": 64, "n_layer": 2, "n_head": 2, "max_ep_len": STEPS, "n_positions": 8, "vocab_size": 1,
    "activation_function": "gelu_new", "action_tanh": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
EPISODES = 80  # of each task, to train on
_FIT = 4  # further ones, for statistics
_SIZE = 64  # windows a step
_WARMUP = 0.1  # of all steps
BASE_STEPS, EXPERT_STEPS = 600, 600
_STARTS = "starts"
_RATES = {"base": 2e-3, "expert": 1e-3}

Batch = dict[str, Tensor]


def write_base(out: Path, steps: int = BASE_STEPS, config: Mapping[str, Any] = CONFIG) -> str:
    """Train one trunk on all tasks, each under a head of its own, and write it; a line about the outcome.

    `out` has the head of the first task; beside it, _STARTS/TASK have each task's own, from which experts go on.
    """
    wall, cpu = time.time(), time.process_time()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {name: _new(name, config) for name in TASKS}
    trunk = next(iter(models.values())).encoder
    for model in models.values():
        model.encoder = trunk
    batches = {name: _batches(name, "base") for name in TASKS}
    _train(models, batches, steps, _RATES["base"])
    for name, model in models.items():
        save(model, out.parent / _STARTS / name)
    save(next(iter(models.values())), out)
    return f"base: {_took(wall, cpu)}"


def write_expert(name: str, base: Path, out: Path, steps: int = EXPERT_STEPS) -> str:
    """Train all weights of the base, and its head for a task, on that task, and write `out`; a line about it."""
    from transformers import DecisionTransformerModel

    wall, cpu = time.time(), time.process_time()
    torch.set_num_threads(1)
    model = DecisionTransformerModel.from_pretrained(base.parent / _STARTS / name)
    loss = _train({name: model}, {name: _batches(name, name)}, steps, _RATES["expert"])
    save(model, out)
    return f"{name}: loss {loss:.4f}, {_took(wall, cpu)}"


def write_trajectories(folder: Path) -> None:
    """`folder`/TASK.npz: a few episodes that no model was trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        np.savez_compressed(folder / f"{name}.npz", **trajectories(name, _FIT, first=EPISODES).arrays)


def _new(name: str, config: Mapping[str, Any]) -> Any:
    """A model for a task, which knows how its states are normalised."""
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    own = _known(name)
    states = own.observations[own.mask].astype(np.float64)
    actions = int(own.actions.max()) + 1 if own.actions.ndim == 2 else own.actions.shape[2]
    return DecisionTransformerModel(
        DecisionTransformerConfig(
            **config,
            state_dim=states.shape[1],
            act_dim=actions,
            state_mean=states.mean(0).round(5).tolist(),
            state_std=(states.std(0) + 1e-4).round(5).tolist(),
        )
    )


@cache
def _known(name: str) -> Trajectories:
    """The episodes of a task that are trained on."""
    return trajectories(name, EPISODES)


def _batches(name: str, seed: str) -> Iterator[Batch]:
    """Windows of CONTEXT steps; one that reaches behind an episode's end is none."""
    own, random = _known(name), np.random.default_rng([len(name), *seed.encode()])
    lengths = own.mask.sum(1)
    starts = np.array([(i, t) for i, n in enumerate(lengths) for t in range(max(1, n - CONTEXT + 1))])
    while True:
        rows_B, first_B = starts[random.integers(len(starts), size=_SIZE)].T
        steps_BT = (first_B[:, None] + np.arange(CONTEXT)).clip(max=STEPS - 1)
        yield {key: torch.from_numpy(array[rows_B[:, None], steps_BT]) for key, array in own.arrays.items()}


def _train(
    models: Mapping[str, Any], batches: Mapping[str, Iterator[Batch]], steps: int, learning_rate: float
) -> float:
    """Cross-entropy of discrete actions, mean squared error of others, the mean over tasks; the loss at the end."""
    parameters = [*{id(p): p for model in models.values() for p in model.parameters()}.values()]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4, fused=True)
    losses: list[float] = []
    for model in models.values():
        model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * _schedule(step / steps)
        total = 0.0
        for name, model in models.items():
            loss = _loss(model, name, next(batches[name])) / len(models)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(total)
    for model in models.values():
        model.eval()
    return sum(losses[-20:]) / len(losses[-20:])


def _loss(model: Any, name: str, batch: Batch) -> Tensor:
    config, actions = model.config, batch["actions"]
    mean, std = torch.tensor(config.state_mean), torch.tensor(config.state_std)
    discrete, mask = actions.ndim == 2, batch["mask"]
    predicted = model(
        states=(batch["observations"] - mean) / std,
        actions=F.one_hot(actions, config.act_dim).float() if discrete else actions,
        returns_to_go=batch["returns_to_go"][..., None] / TASKS[name].scale,
        timesteps=batch["timesteps"],
        attention_mask=mask.long(),
        return_dict=True,
    ).action_preds[mask]
    return F.cross_entropy(predicted, actions[mask]) if discrete else F.mse_loss(predicted, actions[mask])


def _schedule(progress: float) -> float:
    return min(1.0, (progress + 0.01) / _WARMUP) * (0.5 + 0.5 * math.cos(math.pi * progress))


def save(model: Any, out: Path) -> None:
    """With the access rights that the folder has: safetensors lets only the owner read."""
    model.save_pretrained(out)
    for path in out.glob("*.safetensors"):
        path.chmod(0o644)


def _took(wall: float, cpu: float) -> str:
    return f"{time.time() - wall:.0f} s, {time.process_time() - cpu:.0f} CPU s"
