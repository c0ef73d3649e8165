"""Models that an OpenAI-compatible server runs are measured as those that run here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from checkpoints import refused
from places import REPOSITORY
from small_language_model import save_experts, save_model, save_tasks, skill

from mergeline.evaluation.language import Language, LanguageEvaluator, load_model
from mergeline.evaluation.language.server import served
from mergeline.evaluation.language.settings import Server

SKILLS = {"one": skill(0)}
SERVER = str(REPOSITORY / "tests/helpers/completions_server.py")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_experts(folder, save_model(folder / "base", 0), SKILLS)
    save_tasks(folder / "tasks", SKILLS)
    return folder


def server(*more: str, **changes: Any) -> Server:
    return Server(**{"command": [sys.executable, SERVER, "{model}", "{port}", *more], **changes})


def children() -> list[str]:
    running = psutil.Process(os.getpid()).children(recursive=True)
    return [" ".join(process.cmdline()) for process in running if process.status() != psutil.STATUS_ZOMBIE]


def test_a_served_model_gets_the_scores_that_it_gets_here_and_its_server_ends(family, tmp_path):
    language = Language(
        tasks=str(family / "tasks"), suites={"s": ["one"]}, perplexity=["prose"], server=server(concurrent=2)
    )
    evaluator = LanguageEvaluator(language)
    here = evaluator.score(load_model(family / "one"), "test", ["one"], ["prose"])
    with served(family / "one", language.server, tmp_path / "server.log") as model:
        assert any(SERVER in line for line in children())
        there = evaluator.score(model, "test", ["one"], ["prose"])
        assert model.check() == {"round_trip": True, "generates": True}
        assert model.key not in " ".join(children())
    assert not any(SERVER in line for line in children())
    assert np.array_equal(here.graded["one"], there.graded["one"]) and there.graded["one"].mean() > 0.9
    assert there.perplexity["prose"]["value"] == pytest.approx(here.perplexity["prose"]["value"], rel=1e-4)


def test_a_server_that_ends_or_never_answers_is_named(family, tmp_path):
    failing = Server(command=[sys.executable, "-c", "import sys; sys.exit('no room on {model}')", "{port}"])
    with refused("language.server", "exit code 1", "no room on"):
        with served(family / "one", failing, tmp_path / "server.log"):
            pass
    silent = Server(
        command=[sys.executable, "-c", "import time; time.sleep(60)", "{model}", "{port}"], minutes=0.02
    )
    with refused("did not answer within 0.02 minutes", "server.log"):
        with served(family / "one", silent, tmp_path / "server.log"):
            pass
    assert not any("time.sleep(60)" in line for line in children())


def test_a_command_that_names_no_model_or_port_is_refused():
    with pytest.raises(ValueError, match=r"where \{port\} goes"):
        Server(command=["vllm", "serve", "{model}"])
