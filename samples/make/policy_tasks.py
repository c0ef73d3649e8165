"""Control tasks of gymnasium's classic ones, and trajectories of controllers that are written down, with noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import numpy as np

STEPS = 200  # of an episode, at most
_SEEDS = 2_000_000  # from here on: those of val and test are below (evaluation/policies/settings.py)
_NOISE = 0.6  # at most, the share of actions that are drawn


def _cartpole(state: np.ndarray) -> int:
    """Push to the side that the pole falls to, a little sooner where the cart is off the middle."""
    x, v, angle, turning = state
    return int(0.1 * x + 0.3 * v + 3.0 * angle + turning > 0)


def _acrobot(state: np.ndarray) -> int:
    """Torque along the swing of the lower link, which pumps energy."""
    return 2 if state[5] > 0 else 0


def _mountain_car(state: np.ndarray) -> np.ndarray:
    """Full throttle along the velocity."""
    return np.array([1.0 if state[1] >= 0 else -1.0])


def _pendulum(state: np.ndarray) -> np.ndarray:
    """Pump energy while it hangs, a linear law near the top; torque in units of the largest, 2."""
    cos, sin, turning = state
    angle = np.arctan2(sin, cos)
    if cos > 0.8:
        return np.clip([-(10.0 * angle + 2.0 * turning)], -2, 2)
    energy = turning**2 / 6 + 5 * (cos - 1)  # of a rod of length and mass 1, g = 10; 0 at the top
    return np.array([2.0 * np.sign(turning or 1.0) * (1 if energy < 0 else -1)])


@dataclass(frozen=True)
class Control:
    """A task: its environment, who acts in the trajectories, and the returns that a good one and a random one have.

    scale: by which returns to go are divided.
    """

    environment: str
    controller: Callable[[np.ndarray], Any]
    target: float
    floor: float
    scale: float


TASKS = {
    "cartpole": Control("CartPole-v1", _cartpole, 200.0, 22.0, 100.0),
    "acrobot": Control("Acrobot-v1", _acrobot, -80.0, -200.0, 100.0),
    "car": Control("MountainCarContinuous-v0", _mountain_car, 90.0, -10.0, 100.0),
    "pendulum": Control("Pendulum-v1", _pendulum, -150.0, -1200.0, 500.0),
}


@dataclass(frozen=True)
class Trajectories:
    """N episodes of up to T steps; behind an episode's end all is 0.

    observations (N, T, s), actions (N, T) int64 or (N, T, a), returns_to_go (N, T), timesteps (N, T) int64, and mask
    (N, T) bool, where an episode still runs.
    """

    observations: np.ndarray
    actions: np.ndarray
    returns_to_go: np.ndarray
    timesteps: np.ndarray
    mask: np.ndarray

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return dict(vars(self))

    @property
    def returns(self) -> np.ndarray:
        """Of each episode, (N)."""
        return self.returns_to_go[:, 0]


def trajectories(name: str, count: int, first: int = 0, noise: float = _NOISE) -> Trajectories:
    """Episodes of a task's controller, of which a share of the actions, from 0 to `noise`, is drawn at random."""
    import gymnasium

    control = TASKS[name]
    env = gymnasium.make(control.environment, max_episode_steps=STEPS, disable_env_checker=True)
    space: Any = env.action_space
    discrete = isinstance(space, gymnasium.spaces.Discrete)
    shape = (count, STEPS)
    found = Trajectories(
        np.zeros((*shape, *(env.observation_space.shape or ())), np.float32),
        np.zeros(shape, np.int64) if discrete else np.zeros((*shape, *space.shape), np.float32),
        np.zeros(shape, np.float32),
        np.tile(np.arange(STEPS), (count, 1)),
        np.zeros(shape, bool),
    )
    for i in range(count):
        random = np.random.default_rng([_SEEDS, first + i])
        share = noise * random.random()
        state, _ = env.reset(seed=_SEEDS + first + i)
        rewards = np.zeros(STEPS)
        for t in range(STEPS):
            action = control.controller(state)
            if random.random() < share:
                action = int(random.integers(space.n)) if discrete else random.uniform(space.low, space.high)
            found.observations[i, t], found.actions[i, t], found.mask[i, t] = state, action, True
            state, reward, ended, cut, _ = env.step(action if discrete else np.asarray(action, np.float32))
            rewards[t] = float(reward)
            if ended or cut:
                break
        found.returns_to_go[i] = np.where(found.mask[i], rewards[::-1].cumsum()[::-1], 0.0)
    return found
