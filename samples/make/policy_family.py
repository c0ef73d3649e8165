"""The checkpoints of the family of policies: a small Decision Transformer, and experts tuned from it."""

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

from make.policy_tasks import OF_BASE, STEPS, TASKS, Trajectories, trajectories

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
_BASE_RATE, _RATE = 2e-3, 1e-3
BASE_STEPS = 300
EXPERT_STEPS = {"cartpole": 600, "acrobot": 600, "car": 600, "pendulum": 1200}
_LOUDER = 5.0  # predictions, by this factor: they are not trained, and must reach the largest actions
_STARTS = "starts"

Batch = dict[str, Tensor]


def write_base(out: Path, steps: int = BASE_STEPS, config: Mapping[str, Any] = CONFIG) -> str:
    """Train a trunk on a task that is no expert's, and write it; a line about the outcome.

    Heads are drawn, and stay: the trunk has to learn all. `out` has the head of its own task; beside it, _STARTS/TASK
    have the trunk under each expert's head, from which these go on.
    """
    wall, cpu = time.time(), time.process_time()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {name: _new(name, config) for name in [*OF_BASE, *TASKS]}
    trunk = next(iter(models.values())).encoder
    for model in models.values():
        model.encoder = trunk
    [own] = OF_BASE
    loss = _train(models[own], own, "base", steps, _BASE_RATE)
    for name in TASKS:
        save(models[name], out.parent / _STARTS / name)
    save(models[own], out)
    return f"base: loss {loss:.4f}, {_took(wall, cpu)}"


def write_expert(name: str, base: Path, out: Path, steps: int | None = None) -> str:
    """Train the trunk under the head of a task, on that task, and write both to `out`; a line about it."""
    from transformers import DecisionTransformerModel

    wall, cpu = time.time(), time.process_time()
    torch.set_num_threads(1)
    model = DecisionTransformerModel.from_pretrained(base.parent / _STARTS / name)
    loss = _train(model, name, "expert", steps or EXPERT_STEPS[name], _RATE)
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

    own = known(name)
    states = own.observations[own.mask].astype(np.float64)
    actions = int(own.actions.max()) + 1 if own.actions.ndim == 2 else own.actions.shape[2]
    model = DecisionTransformerModel(
        DecisionTransformerConfig(
            **config,
            state_dim=states.shape[1],
            act_dim=actions,
            state_mean=states.mean(0).round(5).tolist(),
            state_std=(states.std(0) + 1e-4).round(5).tolist(),
        )
    )
    with torch.no_grad():
        model.predict_action[0].weight.mul_(_LOUDER)
    return model


@cache
def known(name: str) -> Trajectories:
    """The episodes of a task that are trained on."""
    return trajectories(name, EPISODES)


def _batches(name: str, seed: str) -> Iterator[Batch]:
    """Windows of CONTEXT steps; one that reaches behind an episode's end is none."""
    own, random = known(name), np.random.default_rng([*f"{name} {seed}".encode()])
    lengths = own.mask.sum(1)
    starts = np.array([(i, t) for i, n in enumerate(lengths) for t in range(max(1, n - CONTEXT + 1))])
    while True:
        rows_B, first_B = starts[random.integers(len(starts), size=_SIZE)].T
        steps_BT = (first_B[:, None] + np.arange(CONTEXT)).clip(max=STEPS - 1)
        yield {key: torch.from_numpy(array[rows_B[:, None], steps_BT]) for key, array in own.arrays.items()}


def _train(model: Any, name: str, seed: str, steps: int, learning_rate: float) -> float:
    """Train the trunk alone on a task; the mean loss of the last steps."""
    trunk = model.train().requires_grad_(False).encoder.requires_grad_(True)
    optimiser = torch.optim.AdamW(trunk.parameters(), lr=learning_rate, weight_decay=1e-4, fused=True)
    losses: list[float] = []
    for step, batch in zip(range(steps), _batches(name, seed)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * _schedule(step / steps)
        loss = _loss(model, name, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trunk.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-20:]) / len(losses[-20:])


def _loss(model: Any, name: str, batch: Batch) -> Tensor:
    """Cross-entropy of discrete actions, mean squared error of others."""
    config, actions = model.config, batch["actions"]
    mean, std = torch.tensor(config.state_mean), torch.tensor(config.state_std)
    discrete, mask = actions.ndim == 2, batch["mask"]
    predicted = model(
        states=(batch["observations"] - mean) / std,
        actions=F.one_hot(actions, config.act_dim).float() if discrete else actions,
        returns_to_go=batch["returns_to_go"][..., None] / (TASKS | OF_BASE)[name].scale,
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
