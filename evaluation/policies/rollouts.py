"""Episodes of a policy, many side by side: each has an environment of its own, and the model acts in all at once.

Shape suffixes: N episodes, T steps, s numbers of a state, A of an action.
"""

from __future__ import annotations

from typing import Any, Callable, Protocol, Sequence

import numpy as np

from mergeline.evaluation.policies.environments import Facts, make
from mergeline.evaluation.policies.settings import Task


class Acting(Protocol):
    """What acts: see `models.Policy`."""

    task: Task
    facts: Facts

    def next_actions(self, batch: dict[str, np.ndarray]) -> np.ndarray: ...


def rollouts(
    policy: Acting,
    seeds: Sequence[int],
    batch_size: int,
    count: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """The return and the length of an episode for each of N seeds, float64 (N, 2).

    All that is random in an episode is its environment's, which its seed fixes. `count` is told how many are done.
    """
    parts = []
    for start in range(0, len(seeds), batch_size):
        some = seeds[start : start + batch_size]
        environments = [make(policy.task) for _ in some]
        try:
            parts.append(_together(policy, environments, some))
        finally:
            for env in environments:
                env.close()
        count(len(some))
    return np.concatenate(parts)


def _together(policy: Acting, environments: Sequence[Any], seeds: Sequence[int]) -> np.ndarray:
    """Episodes that begin together, so that those that still run have seen equally many steps: nothing is padded."""
    task, facts = policy.task, policy.facts
    shape = (len(seeds), facts.steps)
    states = np.zeros((*shape, facts.states), np.float32)
    actions = np.zeros((*shape, facts.actions), np.float32)
    to_go = np.zeros((*shape, 1), np.float32)
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds))
    for i, (env, seed) in enumerate(zip(environments, seeds)):
        states[i, 0] = np.ravel(env.reset(seed=seed)[0])
    running = np.arange(len(seeds))
    for t in range(facts.steps):
        to_go[running, t, 0] = task.target_return - returns[running]
        seen = slice(max(0, t + 1 - task.context), t + 1)
        batch = {
            "states": states[running, seen],
            "actions": actions[running, seen],
            "returns_to_go": to_go[running, seen],
            "timesteps": np.tile(np.arange(seen.start, seen.stop), (len(running), 1)),
        }
        taken, actions[running, t] = facts.act(policy.next_actions(batch), environments[0].action_space)
        still = []
        for i, action in zip(running, taken):
            state, reward, ended, cut, _ = environments[i].step(action)
            returns[i] += float(reward)
            lengths[i] = t + 1
            if not (ended or cut) and t + 1 < facts.steps:
                states[i, t + 1] = np.ravel(state)
                still.append(i)
        running = np.array(still, dtype=int)
        if not len(running):
            break
    return np.stack([returns, lengths], 1)
