"""Tiny Decision Transformers with random weights, trajectories for them, and environments that count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch


def save_policy(folder: Path, seed: int, states: int, actions: int, near: Any = None, **config: Any) -> Any:
    """A model for states of so many numbers and so many actions, its trunk near that of another; returns it."""
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 4,
        "vocab_size": 1,
        "max_ep_len": 30,
    }
    others = {"action_tanh": False, "initializer_range": 0.5, "bos_token_id": 0, "eos_token_id": 0}
    own = {"state_dim": states, "act_dim": actions, **sizes, **others, **config}
    model = DecisionTransformerModel(DecisionTransformerConfig(**own)).eval()
    if near is not None:
        with torch.no_grad():
            for own, other in zip(model.encoder.parameters(), near.encoder.parameters()):
                own.copy_(other + 0.5 * own)
    model.save_pretrained(folder)
    return model


def trajectories(states: int, actions: int, discrete: bool, count: int = 3, steps: int = 7) -> dict[str, Any]:
    """Random ones; the last has no step but the first."""
    random = np.random.default_rng(states)
    mask = np.ones((count, steps), bool)
    mask[-1, 1:] = False
    return {
        "observations": random.normal(size=(count, steps, states)),
        "actions": random.integers(actions, size=(count, steps))
        if discrete
        else random.normal(size=(count, steps, actions)),
        "returns_to_go": random.normal(size=(count, steps)),
        "timesteps": np.tile(np.arange(steps), (count, 1)),
        "mask": mask,
    }


def environment(observations: Any = None, actions: Any = None) -> type:
    """A class of environments, which count.

    By default the state (1, 2) is how many steps were taken, and the seed; an action, one of 3, 4 and 5, or a number
    from -1 to 1, is its own reward; an episode ends after as many steps as its seed says.
    """
    import gymnasium
    from gymnasium.spaces import Box, Discrete

    class Counting(gymnasium.Env):
        observation_space = observations or Box(-np.inf, np.inf, (1, 2))
        action_space = actions or Discrete(3, start=3)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.seed, self.taken = seed or 0, 0
            return self.state, {}

        @property
        def state(self) -> np.ndarray:
            return np.array([[self.taken, self.seed]], np.float32)

        def step(self, action: Any) -> Any:
            assert self.action_space.contains(action)
            self.taken += 1
            return self.state, float(np.sum(action)), self.taken >= self.seed, False, {}

    return Counting
