"""Runs a user's own evaluation of one model, and reads the scores that it prints."""

from __future__ import annotations

import json
import subprocess
import tempfile
from math import isfinite
from pathlib import Path
from typing import IO, Mapping, Sequence

from mergeline.evaluation.custom.settings import Evaluate
from mergeline.evaluation.processes import last_words, running
from mergeline.merging.errors import UserError
from mergeline.merging.files import write_bytes

Scores = dict[str, dict[str, float]]  # task -> example -> score

_SHOWN = 200  # characters of what a process printed, in an error


def run(
    settings: Evaluate, model: Path, split: str, tasks: Sequence[str], device: str, log: Path
) -> Mapping[str, Mapping[str, float]]:
    """The scores of a model on a split: task -> example's id -> score, ids in order.

    log: where what a process wrote to stderr is left if it fails.

    Raises:
        UserError: there is no such folder; the process fails, or takes too long; what it prints are no scores, not of
            these tasks, or of an example twice.
    """
    ran = ["command", *settings.command] if settings.command else ["function", settings.function or ""]
    asked = ["--model", str(model.absolute()), "--split", split, "--device", device, "--tasks", *tasks]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        code = _finished([*ran, *asked], settings, out, errors, f"{model.name} on {split}")
        out.seek(0)
        errors.seek(0)
        said = errors.read()
        if code:
            write_bytes(log, said)
            raise UserError(
                f"{_name(settings)} failed with {_ended(code)} for {model.name} on {split}: {last_words(said, log)}"
            )
        return _checked(_parsed(out, settings), settings, tasks)


def _finished(argv: list[str], settings: Evaluate, out: IO[bytes], errors: IO[bytes], what: str) -> int:
    """The exit code of a process; it and all that it started end here in any case."""
    try:
        with running(argv, cwd=settings.folder, stdout=out, stderr=errors) as process:
            return process.wait(settings.minutes * 60)
    except OSError as error:
        raise UserError(f"evaluate.folder '{settings.folder}': {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{_name(settings)} took more than {settings.minutes:g} minutes for {what}; raise evaluate.minutes, or "
            "have it do less"
        ) from None


def _parsed(out: IO[bytes], settings: Evaluate) -> Scores:
    scores: Scores = {}
    for number, line in enumerate(out, 1):
        if not line.strip():
            continue
        where = f"line {number} that {_name(settings)} printed"
        try:
            row = json.loads(line)
            task, example, score = row["task"], row["id"], row["score"]
        except (ValueError, KeyError, TypeError, RecursionError):
            shown = line.decode(errors="replace").strip()[:_SHOWN]
            raise UserError(f"{where} is no JSON object with task, id and score: {shown!r}") from None
        if (
            not isinstance(task, str)
            or not isinstance(example, str | int)
            or not isinstance(score, int | float)
        ):
            raise UserError(
                f"{where} must have a text as task, a text or integer as id and a number as score"
            )
        own = scores.setdefault(task, {})
        if str(example) in own:
            raise UserError(f"{where}: example {str(example)!r} of '{task}' was scored before")
        if not isfinite(score):
            raise UserError(f"{where}: the score of example {str(example)!r} of '{task}' is {score}")
        own[str(example)] = float(score)
    return scores


def _checked(scores: Scores, settings: Evaluate, tasks: Sequence[str]) -> Scores:
    if absent := [task for task in tasks if not scores.get(task)]:
        raise UserError(f"{_name(settings)} printed no score for '{absent[0]}'")
    if other := [task for task in scores if task not in tasks]:
        raise UserError(f"{_name(settings)} printed scores for {other[0]!r}, which it was not asked for")
    return {task: dict(sorted(scores[task].items())) for task in tasks}


def _name(settings: Evaluate) -> str:
    return f"evaluate.function '{settings.function}'" if settings.function else "evaluate.command"


def _ended(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {-code}"
