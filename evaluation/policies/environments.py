"""Environments of gymnasium: which of them policies are measured in, and what these take and give."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from mergeline.evaluation.policies.settings import Task
from mergeline.merging.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

_LONGEST = 100_000  # steps of an episode


class Facts(NamedTuple):
    """What an environment takes and gives.

    states: how many numbers a state has. actions: how many actions there are (`discrete`), or how many numbers an
    action has. first: the number of the first discrete action. steps: after which an episode is cut.
    """

    states: int
    actions: int
    discrete: bool
    first: int
    steps: int

    def act(self, predicted_NA: np.ndarray, space: Any) -> tuple[list[Any], np.ndarray]:
        """What N predictions (N, A) are as actions of `space`, and as the model sees them afterwards, float32 (N, A).

        Of discrete ones the likeliest is taken, and seen as one-hot; others are clipped to the space. What is no number
        counts as 0.
        """
        import numpy as np

        if self.discrete:
            chosen_N = np.nan_to_num(predicted_NA).argmax(1)
            return [self.first + int(chosen) for chosen in chosen_N], np.eye(self.actions, dtype=np.float32)[
                chosen_N
            ]
        clipped_NA = np.clip(np.nan_to_num(predicted_NA), space.low.reshape(-1), space.high.reshape(-1))
        actions = [action.astype(space.dtype).reshape(space.shape) for action in clipped_NA]
        return actions, clipped_NA.astype(np.float32)


def make(task: Task) -> Any:
    """A new environment of a task.

    Raises:
        UserError: gymnasium has none of this id, or does not make it.
    """
    import gymnasium

    name = task.environment
    if ":" in name:
        raise UserError(
            f"'{name}' would import a module of its own, which is not done; name an environment that gymnasium has, "
            "such as CartPole-v1"
        )
    if name not in gymnasium.registry:
        known = did_you_mean(name, gymnasium.registry)
        raise UserError(f"gymnasium {gymnasium.__version__} has no environment '{name}'{known}")
    try:
        return gymnasium.make(name, max_episode_steps=task.max_steps, disable_env_checker=True)
    except (gymnasium.error.Error, ImportError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"gymnasium does not make the environment '{name}' ({reason})") from None


def look_at(task: Task) -> Facts:
    """What the environment of a task takes and gives.

    Raises:
        UserError: there is none, or it is of a kind that is not measured.
    """
    from gymnasium.spaces import Box, Discrete

    env, name = make(task), task.environment
    seen, acted = env.observation_space, env.action_space
    steps = task.max_steps or (env.spec.max_episode_steps if env.spec else None)
    env.close()
    if not isinstance(seen, Box):
        raise UserError(f"'{name}': its observations are a {type(seen).__name__}; only a Box is measured")
    if not isinstance(acted, Box | Discrete) or (isinstance(acted, Box) and acted.dtype.kind != "f"):
        raise UserError(
            f"'{name}': its actions are a {type(acted).__name__} of {acted.dtype}; only Discrete ones and a Box of "
            "floats are measured"
        )
    if not steps or steps > _LONGEST:
        told = f"are cut after {steps} steps" if steps else "have no end"
        raise UserError(f"'{name}': its episodes {told}; add max_steps, at most {_LONGEST}")
    discrete = isinstance(acted, Discrete)
    actions = int(acted.n) if isinstance(acted, Discrete) else prod(acted.shape)
    return Facts(prod(seen.shape), actions, discrete, int(acted.start) if discrete else 0, steps)
