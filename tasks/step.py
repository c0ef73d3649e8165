"""What a step is: one verb of the pipeline, which says all of itself, and the stages that it stands for.

Stages are declared in the notation of dvc.yaml, so that one declaration is both DVC's and ours: `${base}` is a value of
params.yaml, `${code}` the folder of Mergeline's sources; with `foreach`, `${key}` and `${item}` are a key and its value
under that part of params.yaml.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, NamedTuple

if TYPE_CHECKING:
    from mergeline.tasks.schema import Params

_PLACE = re.compile(r"\$\{([\w.-]+)\}")


class Stage(NamedTuple):
    """One step on one item. `deps` and `outs` are paths in the workspace, `params` dotted keys of params.yaml."""

    name: str
    step: str
    item: str | None
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]

    @property
    def out(self) -> str:
        return self.outs[0]


class StageTemplate(NamedTuple):
    """An entry of dvc.yaml: the stage `name`, or a stage `name@key` for each key under `foreach` of params.yaml.

    goes_on: whether it makes use of what an earlier run left in its outputs, so that DVC must not remove them before.
    turn: its stages come after those of all steps with a smaller one.
    """

    name: str
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]
    foreach: str = ""
    goes_on: bool = False
    turn: int = 0

    def stages(self, step: str, params: Params, code: str) -> Iterator[Stage]:
        """The stages that it stands for, as `step` runs them; `code` is where Mergeline's sources lie."""
        items = _value(params, self.foreach) if self.foreach else {None: None}
        for key, item in items.items():
            known = {"code": code, "key": key, "item": item}

            def filled(texts: tuple[str, ...], known: Mapping[str, Any] = known) -> tuple[str, ...]:
                return tuple(
                    _PLACE.sub(lambda place: _filler(place[1], known, params), text) for text in texts
                )

            name = f"{self.name}@{key}" if self.foreach else self.name
            deps = tuple(dict.fromkeys(filled(self.deps)))
            yield Stage(name, step, key, deps, filled(self.params), filled(self.outs))


class Step(NamedTuple):
    """One verb of the pipeline.

    name: the verb on the command line. help: its line there. run: what it does for one stage, in the workspace (the
    current folder), so that the paths it records are relative. templates: its stages. downloads: it may fail because
    of a network, and is tried more often. on_device: it computes on the `device` of params.yaml. merges: it runs the
    methods, those of the files of params.yaml, too. spreads: where the pipeline has an executor, it sends units of its
    own there; other steps `on_device` go there as a whole.
    """

    name: str
    help: str
    run: Callable[[Params, Stage], None]
    templates: tuple[StageTemplate, ...]
    downloads: bool = False
    on_device: bool = False
    merges: bool = False
    spreads: bool = False

    @property
    def takes_names(self) -> bool:
        """Whether it can be run for some of its items alone."""
        return any(template.foreach for template in self.templates)

    @property
    def folders(self) -> set[str]:
        """The folders whose entries belong to one item of params.yaml each."""
        outs = [out for template in self.templates if template.foreach for out in template.outs]
        return {str(PurePosixPath(out).parent) for out in outs}

    def stages(self, params: Params, code: str, turn: int) -> list[Stage]:
        """Its stages of a turn in a pipeline; `code` is where Mergeline's sources lie."""
        templates = [template for template in self.templates if template.turn == turn]
        made = [stage for template in templates for stage in template.stages(self.name, params, code)]
        if not self.merges:
            return made
        return [stage._replace(deps=(*stage.deps, *params.methods)) for stage in made]


def _filler(place: str, known: Mapping[str, Any], params: Params) -> str:
    return str(known[place] if place in known else _value(params, place))


def _value(params: Params, key: str) -> Any:
    """The value under a dotted key such as `checkpoints.files`."""
    value: Any = params
    for part in key.split("."):
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    return value
