"""The card of an exported version, as the Hugging Face Hub reads it: the merge's own, with what was measured.

https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Mapping

from mergeline.evaluation.measures import Measures, measures_of
from mergeline.merging.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def exported_card(
    card: str,
    name: str,
    board: Mapping[str, Any],
    row: Mapping[str, Any],
    task: str,
    license: str | None,
    datasets: list[str],
) -> str:
    """The Markdown of a card with metadata and a section on what was measured.

    card: as the merge wrote it. name: of the model. board, row: the leaderboard and the row of the version. task: what
    the Hub calls what such models do. license: an id of the Hub's, or None. datasets: ids of the Hub's.
    """
    from huggingface_hub import ModelCard

    found = ModelCard(card, ignore_metadata_errors=False)
    data: Any = found.data
    data.model_name, data.license, data.pipeline_tag, data.datasets = name, license, task, datasets or None
    data.eval_results = list(_results(board, row, task))
    return f"---\n{found.data.to_yaml()}\n---\n{found.text.rstrip()}\n\n{_section(board, row)}"


def _results(board: Mapping[str, Any], row: Mapping[str, Any], task: str) -> Iterator[EvalResult]:
    """The test score of each task with its interval, and their mean."""
    from huggingface_hub import EvalResult

    measures = measures_of(dict(board))
    for name, found in row["tasks"].items():
        yield _result(EvalResult, task, name, measures.of(name).name, found["accuracy"], found)
    mean = measures.mean.name
    yield _result(EvalResult, task, f"mean of {len(row['tasks'])} tasks", mean, row["mean"], row)


def _result(
    kind: type[EvalResult], task: str, dataset: str, measure: str, value: float, found: Mapping[str, Any]
) -> EvalResult:
    told = {key: found[key] for key in ("lower", "upper", "n") if key in found}
    return kind(
        task_type=task,
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split="test",
        metric_type=measure,
        metric_name=f"test {measure}",
        metric_value=value,
        metric_args=told or None,
    )


def _section(board: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    measures: Measures = measures_of(dict(board))
    lines = ["## Evaluation", "", "Test scores, with 95 % intervals over examples:", ""]
    lines += ["| task | measure | score | interval |", "|---|---|---|---|"]
    rows = [(name, measures.of(name), found["accuracy"], found) for name, found in row["tasks"].items()]
    rows.append(("mean", measures.mean, row["mean"], row))
    for name, measure, value, found in rows:
        interval = f"{found['lower']:.4f} to {found['upper']:.4f}" if "lower" in found else ""
        lines.append(f"| {name} | {measure.name} | {value:.4f} | {interval} |")
    return "\n".join([*lines, "", "`report.html` beside this shows the whole comparison.", ""])


def license_of(parts: Mapping[str, Path], asked: str | None) -> str | None:
    """The licence of what is made of `parts`: the one asked for, or theirs if the cards of all say the same.

    None where not all of them say one.

    Raises:
        UserError: they say different ones, and none is asked for.
    """
    if asked:
        return asked
    found = {name: _licence_told(folder) for name, folder in parts.items()}
    told = {name: licence for name, licence in found.items() if licence}
    if len(set(told.values())) > 1:
        said = ", ".join(f"{name}: {licence}" for name, licence in told.items())
        raise UserError(f"the parts have different licences ({said}); say which holds: --license ID")
    return next(iter(told.values())) if told and len(told) == len(found) else None


def _licence_told(folder: Path) -> str | None:
    """What the card beside a checkpoint says."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        found = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    except (ValueError, TypeError, YAMLError) as error:
        raise UserError(f"{card}: its front matter cannot be read ({str(error).splitlines()[0]})") from None
    return found if isinstance(found, str) else None
