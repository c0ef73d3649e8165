"""How Decision Transformers are measured: by the returns of their episodes, each task with its own expert's head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Callable, cast

from mergeline.tasks.modality import Evaluator, Json, Known, Modality
from mergeline.tasks.step import Stage, StageTemplate, Step

if TYPE_CHECKING:
    import numpy as np

    from mergeline.evaluation.pages.page import Section
    from mergeline.evaluation.policies.settings import Task
    from mergeline.merging.learning.network import Examples, Network
    from mergeline.tasks.digests import Digests
    from mergeline.tasks.gates import Gates
    from mergeline.tasks.policies.family import Family
    from mergeline.tasks.policies.params import PolicyParams
    from mergeline.tasks.schema import Params

_CODE = ("${code}/evaluation/policies", "${code}/tasks/policies", "${code}/tasks/heads.py")
_TRAJECTORIES = "trajectories"  # the stage that brings them


def _data(params: Params, stage: Stage) -> None:
    """What is to be known of a task's environment, or its trajectories, if there are any."""
    import gymnasium

    from mergeline.evaluation.policies.environments import look_at
    from mergeline.merging.files import publish, staged, write_json

    assert stage.item
    section, task, out = cast("PolicyParams", params).policies, stage.item, Path(stage.out)
    facts = look_at(section.tasks[task])
    if not stage.name.startswith(_TRAJECTORIES):
        found = {"environment": section.tasks[task].environment, "gymnasium": gymnasium.__version__}
        return write_json(out, {**found, "facts": facts._asdict()})
    from shutil import copyfile

    from mergeline.evaluation.policies.trajectories import read_trajectories
    from mergeline.tasks.policies.learning import FILE

    file = Path(section.trajectories.files[task])
    read_trajectories(file, facts)
    with staged(out) as partial:
        copyfile(file, partial / FILE)
        publish(partial, out)


class Policies(Modality):
    """Decision Transformers; an outcome is the normalised return of an episode."""

    name = "policies"
    hub_task = "reinforcement-learning"
    models = "Decision Transformers with policies"
    sections = ("policies",)
    measure = "normalised return"
    deps = ("build/data", "build/checkpoints", "${code}/evaluation/pretrained.py", *_CODE)
    params = ("policies",)
    compare_deps = ("build/data", *_CODE)
    merge_params = ("policies.heads",)
    steps = (
        Step(
            "data",
            "decode datasets into build/data",
            _data,
            (
                StageTemplate(
                    "environment",
                    deps=("${code}/evaluation/policies",),
                    params=("policies.tasks.${key}",),
                    outs=("build/data/${key}.json",),
                    foreach="policies.tasks",
                ),
                StageTemplate(
                    _TRAJECTORIES,
                    deps=("${item}", "${code}/evaluation/policies"),
                    params=("policies.trajectories.files.${key}", "policies.tasks.${key}"),
                    outs=("build/data/${key}",),
                    foreach="policies.trajectories.files",
                ),
            ),
        ),
    )

    def _family(self, params: Params, build: Path) -> Family:
        from mergeline.tasks.policies.family import Family

        return Family(cast("PolicyParams", params), build)

    def schema(self) -> type[Params]:
        from mergeline.tasks.policies.params import PolicyParams

        return PolicyParams

    def evaluator(self, params: Params, build: Path, like: Path) -> Evaluator:
        from mergeline.tasks.policies.evaluator import PolicyEvaluator

        return PolicyEvaluator(self._family(params, build))

    def check(self, base: Path) -> None:
        from mergeline.evaluation.policies.models import refuse_other_kinds

        refuse_other_kinds(base)

    def heads(self, params: Params, build: Path) -> list[str]:
        return self._family(params, build).patterns

    def outcomes(self, build: Path, split: str, task: str, answers: np.ndarray) -> np.ndarray:
        return answers[:, 0]

    def lineage(self, workspace: Path, board: Json, digests: Digests) -> dict[str, str]:
        """A digest of the environment, gymnasium's version and how returns are measured."""
        from mergeline.merging.canonical import text_digest
        from mergeline.tasks.leaderboard import present
        from mergeline.tasks.policies.family import environment_file

        settings = board["policies"]
        files = {task: present(environment_file(workspace / "build", task)) for task in board["tasks"]}
        return {
            f"lineage.data.{task}": text_digest(
                [str(digests.of(file)), settings["tasks"][task], settings["seeds"]]
            )
            for task, file in files.items()
        }

    def settings(self, params: Params) -> Json:
        """How each task is measured, and the first seed of every split and the one behind its last."""
        section = cast("PolicyParams", params).policies
        seeds = {split: section.episodes.seeds(split) for split in ("val", "test")}
        return {
            "heads": "each task's own expert's",
            "policies": {
                "tasks": {name: task.model_dump(mode="json") for name, task in section.tasks.items()},
                "seeds": {split: [own.start, own.stop] for split, own in seeds.items()},
            },
        }

    def row(self, params: Params, name: str, known: Known) -> Json:
        """Mean returns and lengths of the test episodes; of the experts together, returns alone."""
        if "returns" in known.scores:
            return {"returns": known.scores["returns"]}
        tasks: dict[str, Task] = cast("PolicyParams", params).policies.tasks
        return {
            "returns": {task: {"mean": tasks[task].return_of(mean)} for task, mean in known.means.items()}
        }

    def metrics(self, row: Json) -> dict[str, float]:
        return {f"return.{task}": found["mean"] for task, found in row["returns"].items()}

    def gates(self) -> type[Gates]:
        from mergeline.tasks.custom.params import ScoreGates

        return ScoreGates

    def report(self, board: Json) -> Section:
        from mergeline.evaluation.policies.section import section

        return section(board)

    def show(self, params: Params, build: Path, split: str, task: str, index: int) -> str:
        """The seed of an episode."""
        section = cast("PolicyParams", params).policies
        return f"{section.tasks[task].environment}, seed {section.episodes.seeds(split)[index]}"

    def paths(self, params: Params) -> dict[tuple[str, ...], str]:
        files = cast("PolicyParams", params).policies.trajectories.files
        return {("policies", "trajectories", "files", task): file for task, file in files.items()}

    @property
    def network(self) -> Callable[[Params, Path, Path], Network]:
        def network(params: Params, build: Path, like: Path) -> Network:
            from mergeline.tasks.policies.learning import network_of

            return network_of(self._family(params, build), like)

        return network

    @property
    def examples(self) -> Callable[..., Examples]:
        def examples(params: Params, build: Path, split: str = "fit") -> Examples:
            from mergeline.tasks.policies.learning import examples_of

            return examples_of(self._family(params, build), split)

        return examples
