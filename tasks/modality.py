"""What a modality is: how models of one kind are measured, and what that adds to the pipeline.

The steps are the same for all modalities; what they ask of one is this protocol. To add a modality, write a class with
these members and register it (see tasks/modalities.py). Members that have a default here may be left out.

`build` is the folder build/ of the workspace; paths of params.yaml are seen from the current folder.
Shape suffixes: N examples of a task.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeline.evaluation.measures import Measure
    from mergeline.evaluation.pages.examples import Shown
    from mergeline.evaluation.pages.page import Section
    from mergeline.merging.learning.network import Examples, Network
    from mergeline.tasks.digests import Digests
    from mergeline.tasks.gates import Finding, Gates
    from mergeline.tasks.schema import Params
    from mergeline.tasks.serving.contract import Predict, Served
    from mergeline.tasks.step import Step

Json = dict[str, Any]
Model = Path | Mapping[str, "Tensor"]  # a folder on the disk, or a state dict


class Evaluation(NamedTuple):
    """What a model did on some splits.

    answers: "SPLIT/TASK" -> an array whose first axis is the task's examples, in their order: whatever `outcomes` needs
    to say how good each answer is. scores: what else was measured, as JSON; it goes into scores.json and to `row`.
    """

    answers: dict[str, np.ndarray]
    scores: Json


class Classes(NamedTuple):
    """The classes of a task whose answers are their numbers. label_N: the right one of every example, int (N)."""

    names: list[str]
    label_N: np.ndarray


class Evaluator(Protocol):
    """Measures any number of models of one pipeline; what they share is loaded once."""

    def evaluate(self, model: Model, splits: Sequence[str], tasks: Sequence[str]) -> Evaluation:
        """A model on some tasks and splits ("val", "test"); state dicts only where the modality is `in_memory`.

        Raises:
            UserError: the model does not fit, or does not open.
        """


class PartialEvaluator(Evaluator, Protocol):
    """Measures models on some of the examples, too."""

    def count(self, split: str, task: str) -> int:
        """How many examples there are, N."""

    def evaluate_part(self, model: Model, split: str, part: Mapping[str, np.ndarray]) -> Evaluation:
        """As `evaluate`, of the examples of a split whose numbers `part` has by tasks, int64 (n), ascending.

        Answers are (N) all the same: those of other examples are fillers.
        """


class Known(NamedTuple):
    """What the row of one model is made from.

    means: task -> its mean test outcome, larger is better. base, experts: the same of the base, and of each expert on
    its own tasks. scores: the model's part of scores.json; empty for the row of the experts. base_scores: the base's.
    """

    means: Mapping[str, float]
    base: Mapping[str, float]
    experts: Mapping[str, float]
    scores: Json
    base_scores: Json


class Modality(Protocol):
    """How models of one kind are measured.

    name: as the leaderboard has it. models: which they are and by what sections they are measured, such as "image
    models with datasets and suite". sections: the top-level keys of params.yaml that are its own; they choose it.
    measure: what a score is called, where all tasks have the same. deps, params: what every stage that evaluates
    depends on, in the notation of dvc.yaml, and the parameters that it watches. compare_deps: what `outcomes` and `row`
    read besides. merge_params: what every stage that merges watches besides. steps: those that come after `fetch` and
    before anything is evaluated. in_memory: whether a search hands merged models over as state dicts; else it merges
    them to the disk, a few at a time. hub_task: what the Hugging Face Hub calls what such models do.
    """

    name: str
    models: str
    sections: tuple[str, ...]
    deps: tuple[str, ...]
    params: tuple[str, ...] = ()
    compare_deps: tuple[str, ...] = ()
    merge_params: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    in_memory: bool = False
    hub_task: str = "other"
    measure: str = "accuracy"

    @abstractmethod
    def schema(self) -> type[Params]:
        """What its params.yaml must be; says the tasks, and which expert each is held in for."""

    def in_parts(self, params: Params) -> bool:
        """Whether `evaluator` measures models on some of the examples, too (`PartialEvaluator`).

        Then the outcome of an example depends on no other.
        """
        return False

    @abstractmethod
    def evaluator(self, params: Params, build: Path, like: Path) -> Evaluator:
        """What measures models of the architecture of the checkpoint `like`.

        Raises:
            UserError: data and models do not fit one another.
        """

    def check(self, base: Path) -> None:
        """Refuse a base whose models cannot be measured, before anything is merged; by small files alone.

        Raises:
            UserError: it is of another kind.
        """
        return None

    @abstractmethod
    def outcomes(self, build: Path, split: str, task: str, answers: np.ndarray) -> np.ndarray:
        """How good each answer of a task is, (N,): 1 or 0, or any other finite number; larger is better.

        answers: what `evaluate` found, maybe in an earlier version or at the time of an earlier champion.
        """

    def heads(self, params: Params, build: Path) -> list[str]:
        """Names of tensors of the experts in `build` that are each one's own, as classifiers are, and not merged.

        Raises:
            UserError: it cannot be told which these are.
        """
        return []

    @abstractmethod
    def lineage(self, workspace: Path, board: Json, digests: Digests) -> dict[str, str]:
        """Tags `lineage.data.TASK`: what of a task's data, where it changes, makes models no longer comparable.

        Raises:
            UserError: data are missing.
        """

    def measures(self, params: Params) -> Mapping[str, Measure]:
        """What the score of each task is, by tasks: `measure`, larger is better, unless it says otherwise.

        Where smaller scores are better, outcomes are the negated scores; whatever people see has the scores.
        """
        from mergeline.evaluation.measures import Measure

        return dict.fromkeys(params.tasks, Measure(self.measure))

    def settings(self, params: Params) -> Json:
        """Entries that the leaderboard has besides: how models were measured."""
        return {}

    def row(self, params: Params, name: str, known: Known) -> Json:
        """Entries that a model's row of the leaderboard has besides."""
        return {}

    def metrics(self, row: Json) -> dict[str, float]:
        """The numbers among the entries of `row`, by the names that MLflow and metrics.json show."""
        return {}

    def gates(self) -> type[Gates]:
        """The gates that params.yaml may ask for; a class of its own where outcomes are no fractions of one."""
        from mergeline.tasks.gates import Gates

        return Gates

    def findings(self, row: Json, base: Json, gates: Any) -> Iterable[Finding]:
        """What its own gates find in a candidate's row of the leaderboard, beside the base's row."""
        return ()

    def report(self, board: Json) -> Section | None:
        """Its section of the report of a leaderboard."""
        return None

    def show(self, params: Params, build: Path, split: str, task: str, index: int) -> Shown | None:
        """An example, by its place among the answers, for people; nothing where none can be shown.

        A picture is uint8 (H x W x 3); it may come with a text, or a text alone.

        Raises:
            UserError: the data cannot be read.
        """
        return None

    def classes(self, params: Params, build: Path, split: str, task: str) -> Classes | None:
        """The classes of a task, where answers are numbers of classes."""
        return None

    def served(self, params: Params, build: Path, merge: Path) -> Served | str:
        """For serving, optional: what `predictor` is given besides the folder of a merge; or why it is not served."""
        return f"what models of {self.name} do is no answer to one input"

    @property
    def predictor(self) -> Callable[[Path, Path, Json], Predict] | None:
        """For serving, optional: `predictor(model, beside, settings)` opens the folder of a merge.

        beside: the folder with the files that `served` named; settings: as it said. Nothing else of the workspace is
        there. It raises UserError for models that do not open, and what it gives for inputs that cannot be answered.
        """
        return None

    def files(self, params: Params) -> Mapping[str, str]:
        """Files of the user's that a new workspace takes along: top-level key of params.yaml -> path."""
        return {}

    def paths(self, params: Params) -> Mapping[tuple[str, ...], str]:
        """Files and folders of the user's that stay where they are: place in params.yaml, as keys -> path."""
        return {}

    @property
    def network(self) -> Callable[[Params, Path, Path], Network] | None:
        """For collecting statistics and for fitting, optional: a model that is run on `examples`.

        `network(params, build, like)` is of the architecture of the checkpoint `like`, and has its weights.
        """
        return None

    @property
    def examples(self) -> Callable[..., Examples] | None:
        """For the same: `examples(params, build, split="fit")` are those that models are run on, of all tasks.

        None of them chooses between merges, and none is of the test split, unless `split` says "test".
        """
        return None

    def choosing(self, build: Path, task: str) -> slice:
        """The examples of val that `examples` leaves to choose by: all of them, unless some stand for a split `fit`."""
        return slice(None)
