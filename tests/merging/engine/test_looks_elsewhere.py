"""What a look at the model finds does not depend on where its questions are answered."""

from __future__ import annotations

import pickle
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, Callable

import pytest
from checkpoints import SHAPES, save_family_for
from uses import USES

from mergeline.merging.algebra.slots import Runner
from mergeline.merging.engine import elsewhere
from mergeline.merging.engine.blocks import look_at_model
from mergeline.merging.engine.elsewhere import Elsewhere, address_of
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.methods import get_method
from mergeline.merging.methods.bound import bind

SEVERAL = SHAPES | {f"blocks.{i}.mlp.weight": (16, 24) for i in range(2, 4)}
CHAINS = [
    ("dare", {"inner": "ties", "drop_rate": 0.5, "variant": "mergekit"}),  # which looks at each tensor first
    ("lines", {"inner": "ties", "alpha": "auto"}),  # which looks at what is wrapped
    ("knots", {"inner": "ties"}),  # whose shapes must be read
    ("lines", {"inner": "knots", "inner_inner": "ties", "alpha": "auto"}),
]


def looks(use: tuple[str, dict[str, Any]]) -> bool:
    method = get_method(use[0])
    return bind(method, method.resolve(use[1])).looks_at_model


class Sent(Executor):
    """Another process as far as can be without one: only what can be sent arrives. Counts units of work."""

    def __init__(self) -> None:
        self.units = 0

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.units += 1
        done: Future[Any] = Future()
        function, args = pickle.loads(pickle.dumps((function, args)))
        done.set_result(pickle.loads(pickle.dumps(function(*args))))
        return done


@pytest.mark.parametrize("use", [*filter(looks, USES), *CHAINS], ids=str)
def test_a_look_finds_the_same_elsewhere(use: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(elsewhere, "_UNIT_BYTES", 1 << 9)
    method, params = use
    plan = make_plan({**save_family_for(method, tmp_path, SEVERAL), "params": params})
    plan.check()
    with FileInputs(plan) as source:
        views = [source.view(entry) for entry in plan.merged]
        here = look_at_model(plan.bound, views, Runner(), {})
        assert here is not None
        read = source.hashes
    with FileInputs(plan) as source:
        views = [source.view(entry) for entry in plan.merged]
        sent = Sent()
        there = look_at_model(plan.bound, views, Elsewhere(sent, address_of(plan, source), source.hashes), {})
        assert there == here
        assert source.hashes == read
        assert sent.units > 1 or method == "shared_basis"  # which looks at names alone
