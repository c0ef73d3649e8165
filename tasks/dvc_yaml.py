"""dvc.yaml, written from the declarations of the steps: the same graph for `dvc repro`.

`python -m mergeline.tasks.dvc_yaml` writes the files of the repository anew after a step has changed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Iterator

from mergeline.merging.errors import UserError
from mergeline.merging.files import write_bytes
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.places import CODE_LINK, SOURCES
from mergeline.tasks.steps import steps

if TYPE_CHECKING:
    from mergeline.tasks.modality import Modality
    from mergeline.tasks.step import StageTemplate, Step

# The files of the repository: where, of which modality, and where the sources lie, seen from there. Those below
# samples/ are DVC projects of their own, so that metrics and parameters do not mix.
FILES = {
    "dvc.yaml": ("clip", "."),
    "samples/llm/dvc.yaml": ("language", CODE_LINK),
    "samples/classifiers/vit/dvc.yaml": ("image_classification", CODE_LINK),
    "samples/classifiers/resnet/dvc.yaml": ("image_classification", CODE_LINK),
    "samples/text_classifiers/dvc.yaml": ("text_classification", CODE_LINK),
    "samples/embeddings/dvc.yaml": ("embeddings", CODE_LINK),
}

_RESULTS = """
metrics:
  - build/leaderboard/metrics.json

plots:
  - Test {measure}, mean of tasks:
      template: bar_horizontal
      x: mean
      y: {{build/leaderboard/models.csv: model}}
  - Validation {measure} by scale:
      template: scatter
      x: scale
      y: {{build/leaderboard/search.csv: mean}}
"""


def dvc_yaml(modality: Modality, code: str) -> str:
    """The text of dvc.yaml for pipelines of a modality; `code` is where Mergeline's sources lie, seen from there."""
    lines = [
        "# The pipeline of params.yaml as DVC sees it, written by `python -m mergeline.tasks.dvc_yaml` from what each",
        "# step says of itself in tasks/: change it there.",
        "vars:",
        f"  - code: {code}   # where Mergeline's sources lie, seen from here",
        "  - statistics: {}   # for a params.yaml without any",
        "  - merges_of_merges: {}",
        "",
        "stages:",
    ]
    for step in steps(modality):
        for template in step.templates:
            lines += [*_entry(step, template), ""]
    return "\n".join(lines[:-1]) + "\n" + _RESULTS.format(measure=modality.measure)


def _entry(step: Step, template: StageTemplate) -> Iterator[str]:
    yield f"  {template.name}:"
    indent = "    "
    if template.foreach:
        yield f"{indent}foreach: ${{{template.foreach}}}"
        yield f"{indent}do:"
        indent += "  "
    yield f"{indent}cmd: {command(step.name, bool(template.foreach))}"
    for part in ("deps", "params", "outs"):
        values = dict.fromkeys(getattr(template, part))
        if values:
            yield f"{indent}{part}:"
            kept = ": {persist: true}" if part == "outs" and template.goes_on else ""
            yield from (f"{indent}  - {value}{kept}" for value in values)


def command(verb: str, of_item: bool) -> str:
    """What DVC gives to a shell. A name of params.yaml, which could be any text, is no part of it: DVC tells in the
    environment which stage it runs.
    """
    return f"mergeline {verb}" + (" --dvc-stage" if of_item else "")


def item_of_dvc_stage() -> str:
    """The item of the stage that DVC runs, of `[path/dvc.yaml:]stage@item`.

    Raises:
        UserError: DVC runs none.
    """
    stage = os.environ.get("DVC_STAGE", "")
    _, of_item, item = stage.rpartition("@")
    if not of_item:
        raise UserError("--dvc-stage is for commands that DVC runs; name the item instead")
    return item


def main() -> None:
    """Write the files of the repository."""
    for name, (modality, code) in FILES.items():
        write_bytes(SOURCES / name, dvc_yaml(modality_named(modality), code).encode())


if __name__ == "__main__":
    main()
