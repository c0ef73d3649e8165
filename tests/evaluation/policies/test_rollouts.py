"""Episodes side by side: what the model sees, what becomes of its actions, and which environments are measured."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest
from checkpoints import refused
from small_policies import environment, save_policy

gymnasium = pytest.importorskip("gymnasium")

from mergeline.evaluation.policies.environments import look_at  # noqa: E402
from mergeline.evaluation.policies.models import Policy, load_model  # noqa: E402
from mergeline.evaluation.policies.rollouts import rollouts  # noqa: E402
from mergeline.evaluation.policies.settings import Episodes, Task  # noqa: E402


@pytest.fixture
def registered() -> Any:
    """Registers a class of environments as Counting-v0 for this test."""
    yield lambda made, **more: gymnasium.register("Counting-v0", entry_point=made, **more)
    gymnasium.registry.pop("Counting-v0", None)


class Scripted:
    """Acts by a function of what it sees, and keeps that."""

    def __init__(self, task: Task, act: Callable[[Any], Any]):
        self.task, self.facts, self.act, self.seen = task, look_at(task), act, list[Any]()

    def next_actions(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        self.seen.append({key: value.copy() for key, value in batch.items()})
        return np.array(self.act(batch), np.float32)


def test_returns_and_what_is_still_to_come_are_counted_step_by_step(registered):
    registered(environment())
    task = Task(environment="Counting-v0", target_return=21.0, floor=1.0, context=2, max_steps=4)
    policy = Scripted(task, lambda batch: [[0, 1, 2]] * len(batch["states"]))
    found = rollouts(policy, [2, 3, 9], 3)
    # The last of three actions, from 3 on, is 5; the third episode is cut after 4 steps.
    assert found.tolist() == [[10, 2], [15, 3], [20, 4]]
    assert task.normalised(found[:, 0]).tolist() == [0.45, 0.7, 0.95] and task.return_of(0.7) == 15
    first, second, third, last = policy.seen
    assert first["states"].tolist() == [[[0, 2]], [[0, 3]], [[0, 9]]] and not first["actions"].any()
    assert second["returns_to_go"][..., 0].tolist() == [[21, 16]] * 3
    assert second["actions"].tolist() == [[[0, 0, 1], [0, 0, 0]]] * 3
    assert third["timesteps"].tolist() == [[1, 2]] * 2 and third["states"][..., 0].tolist() == [[1, 2]] * 2
    assert last["states"].tolist() == [[[2, 9], [3, 9]]]


def test_numbers_are_clipped_and_what_is_no_number_is_0(registered):
    from gymnasium.spaces import Box

    registered(environment(actions=Box(-1, 1, (1, 2), np.float32)))
    task = Task(environment="Counting-v0", target_return=2.0, max_steps=3)
    script = iter([[[0.5, 7.0]], [[np.nan, -np.inf]], [[0.25, -0.25]]])
    policy = Scripted(task, lambda batch: next(script))
    assert rollouts(policy, [3], 1).tolist() == [[0.5, 3]]
    assert policy.seen[-1]["actions"].tolist() == [[[0.5, 1], [0, -1], [0, 0]]]


@pytest.mark.parametrize(("name", "states", "actions"), [("CartPole-v1", 4, 2), ("Pendulum-v1", 3, 1)])
def test_episodes_are_the_same_however_many_run_side_by_side(tmp_path, name, states, actions):
    save_policy(tmp_path, 0, states, actions)
    task = Task(environment=name, target_return=20.0, scale=10.0, context=4, max_steps=30)
    policy = Policy("task", task, look_at(task), load_model(tmp_path), [], tmp_path)
    counted: list[int] = []
    alone = rollouts(policy, range(7), 1)
    np.testing.assert_allclose(rollouts(policy, range(7), 3, counted.append), alone, rtol=1e-5)
    np.testing.assert_allclose(rollouts(policy, range(7)[::-1], 7), alone[::-1], rtol=1e-5)
    assert counted == [3, 3, 1] and len(np.unique(alone, axis=0)) > 3


def test_a_policy_predicts_as_the_model_itself_does_from_normalised_states(tmp_path):
    import torch

    model = save_policy(tmp_path, 0, 3, 1, state_mean=[1.0, 2.0, 3.0], state_std=[2.0, 1.0, 0.5])
    random = np.random.default_rng(0)
    batch = {
        "states": random.normal(size=(2, 4, 3)).astype(np.float32),
        "actions": random.normal(size=(2, 4, 1)).astype(np.float32),
        "returns_to_go": random.normal(size=(2, 4, 1)).astype(np.float32),
        "timesteps": np.tile(np.arange(5, 9), (2, 1)),
    }
    for given in ({}, {"mean": [0.0, 1.0, 0.0], "std": [3.0, 3.0, 3.0]}):
        task = Task(environment="Pendulum-v1", target_return=1.0, scale=4.0, max_steps=30, **given)
        policy = Policy("task", task, look_at(task), load_model(tmp_path), [], tmp_path)
        mean, std = given.get("mean", [1, 2, 3]), given.get("std", [2, 1, 0.5])
        inputs = {key: torch.tensor(value) for key, value in batch.items()}
        inputs["states"] = (inputs["states"] - torch.tensor(mean)) / torch.tensor(std)
        inputs["returns_to_go"] = inputs["returns_to_go"] / 4
        with torch.no_grad():
            wanted = model(**inputs, attention_mask=torch.ones(2, 4)).action_preds[:, -1]
        np.testing.assert_allclose(policy.next_actions(batch), wanted, rtol=1e-4, atol=1e-5)


def test_seeds_of_splits_are_fixed_and_disjoint():
    most = Episodes(val=1_000_000, test=1_000_000)
    assert Episodes(val=3).seeds("val") == range(3) and Episodes(test=2).seeds("test") == range(
        1000000, 1000002
    )
    assert most.seeds("val").stop == most.seeds("test").start


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("CartPole-v7", "has no environment 'CartPole-v7'; did you mean 'CartPole-v"),
        ("os:CartPole-v1", "'os:CartPole-v1' would import a module of its own, which is not done"),
        ("CartPole", "has no environment 'CartPole'"),
    ],
)
def test_environments_that_gymnasium_does_not_have_are_refused(name, said):
    with refused(said):
        look_at(Task(environment=name, target_return=1))


def test_environments_of_other_kinds_are_refused(registered):
    from gymnasium.spaces import Box, Discrete, MultiDiscrete

    task = Task(environment="Counting-v0", target_return=1)
    for spaces, said in (
        (
            {"observations": Discrete(2)},
            "'Counting-v0': its observations are a Discrete; only a Box is measured",
        ),
        ({"actions": MultiDiscrete([2, 2])}, "'Counting-v0': its actions are a MultiDiscrete"),
        (
            {"actions": Box(0, 9, (1,), np.int64)},
            "'Counting-v0': its actions are a Box; only Discrete ones, and a Box",
        ),
        ({}, "'Counting-v0': its episodes have no end; add max_steps"),
    ):
        registered(environment(**spaces))
        with refused(said):
            look_at(task)
        gymnasium.registry.pop("Counting-v0")


def test_an_environment_that_does_not_open_is_refused(registered):
    def broken(**_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'mujoco'\nat all")

    registered(broken)
    with refused("gymnasium does not make the environment 'Counting-v0' (No module named 'mujoco' at all)"):
        look_at(Task(environment="Counting-v0", target_return=1))
