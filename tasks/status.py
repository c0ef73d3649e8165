"""Which stages of a pipeline are up to date, and why others are not; nothing is run or written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Collection, Iterator, Literal, Mapping, NamedTuple, Sequence

from mergeline.merging.canonical import canonical_json
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.tasks import records
from mergeline.tasks.versioning import locked

if TYPE_CHECKING:
    from mergeline.tasks.step import Stage
    from mergeline.tasks.workspace import Workspace

_MOST_NAMES = 3  # of stages of one step
_MERGES = ("merges", "merges_of_merges")  # sections of params.yaml
_LONGEST = 60  # characters of a parameter's value that are shown


class State(NamedTuple):
    """What a run would do with a stage.

    action: "none", it is up to date; "run"; "restore", DVC's cache is asked for its outputs, and it runs if they are
    not there; "follow", it runs if the stages before it write other bytes than now. why: what changed, most important
    first; empty where nothing did.
    """

    stage: Stage
    action: Literal["none", "run", "restore", "follow"]
    why: list[str]


def names(workspace: Workspace) -> set[str]:
    """What `select` knows: the names of stages and steps, and of merges and other items."""
    return {name for stage in workspace.stages for name in (stage.name, stage.step, stage.item) if name}


def select(workspace: Workspace, chosen: Sequence[str]) -> list[Stage]:
    """The stages that are called `chosen`: stages, steps, or merges and other items, which have several; in order.

    Raises:
        UserError: nothing is called so.
    """
    stages = workspace.stages
    known = names(workspace)
    for name in chosen:
        if name not in known:
            raise UserError(
                f"{workspace.params_file.name} has no merge, stage or step '{name}'{did_you_mean(name, known)}"
            )
    merges = workspace.params.all_merges.keys()

    def is_called(stage: Stage, name: str) -> bool:
        of_merges = any(template.foreach in _MERGES for template in workspace.steps[stage.step].templates)
        # Where a merge has the name of a checkpoint, the merge is meant.
        item = stage.item == name and (of_merges or name not in merges)
        return item or name in (stage.name, stage.step)

    return [stage for stage in stages if any(is_called(stage, name) for name in chosen)]


def chosen_stages(
    workspace: Workspace, only: Sequence[str], force: Sequence[str]
) -> tuple[list[Stage], set[str]]:
    """The stages of a run in their order, those that are called `only` and all that they need, or all; and the names
    of those that run although they are up to date.

    Raises:
        UserError: nothing is called so, or what is forced is not in the run.
    """
    chosen = _with_needs(workspace, select(workspace, only)) if only else workspace.stages
    forced = {stage.name for stage in select(workspace, force)}
    if outside := sorted(forced - {stage.name for stage in chosen}):
        raise UserError(f"--force {outside[0]}: it is not among what --only runs; name it there too")
    return chosen, forced


def _with_needs(workspace: Workspace, stages: Sequence[Stage]) -> list[Stage]:
    wanted = {stage.name for stage in stages}
    todo = list(stages)
    while todo:
        for needed in workspace.needs(todo.pop()):
            if needed.name not in wanted:
                wanted.add(needed.name)
                todo.append(needed)
    return [stage for stage in workspace.stages if stage.name in wanted]


def refuse_missing(workspace: Workspace, stages: Sequence[Stage]) -> None:
    """Raises UserError with all files that these stages read, no stage makes, and are not there."""
    missing: dict[str, str] = {}
    for stage in stages:
        made = [out for maker in workspace.needs(stage) for out in maker.outs]
        for dep in stage.deps:
            of_a_stage = any(
                out == dep or out.startswith(f"{dep}/") or dep.startswith(f"{out}/") for out in made
            )
            if not of_a_stage and not workspace.path(dep).exists():
                missing.setdefault(dep, stage.name)
    if missing:
        listed = ", ".join(f"{dep} (of {name})" for dep, name in missing.items())
        is_or_are = "is" if len(missing) == 1 else "are"
        raise UserError(f"{workspace.params_file.name}: {listed} {is_or_are} missing; check the paths")


def states(workspace: Workspace, stages: Sequence[Stage], force: Collection[str] = ()) -> list[State]:
    """What a run of these stages, in their order, would do with each; those named in `force` run anyway."""
    found: list[State] = []
    busy: set[str] = set()  # stages whose outputs may change
    leftovers = workspace.leftovers()  # which a run removes first
    for stage in stages:
        record = workspace.record(stage, leftovers)
        before = [needed.name for needed in workspace.needs(stage) if needed.name in busy]
        if stage.name in force:
            state = State(stage, "run", ["forced"])
        elif vouched(workspace, stage, record):
            state = State(stage, "follow" if before else "none", [])
        else:
            state = _stale(workspace, stage, record, before)
        if state.action != "none":
            busy.add(stage.name)
        if state.action == "follow":
            state.why.append(f"after {_in_short(workspace, before)}")
        found.append(state)
    return found


def vouched(workspace: Workspace, stage: Stage, record: Mapping[str, Any]) -> bool:
    """Whether dvc.lock, or its last run here, says that the outputs of a stage are of a run with just this record."""
    whole = {**record, "outs": workspace.outputs(stage)}
    return any(known == whole for known in _known(workspace, stage))


def _known(workspace: Workspace, stage: Stage) -> Iterator[records.Record]:
    lock = locked(workspace, stage) if workspace.has_dvc else None
    yield from (known for known in (lock, records.last_run(workspace, stage)) if known)


def _stale(workspace: Workspace, stage: Stage, record: Mapping[str, Any], before: list[str]) -> State:
    known = list(_known(workspace, stage))
    if not known:
        return State(stage, "run", ["never ran here"])
    why, nearest = min(
        ((_changes(workspace, one, record), one) for one in known), key=lambda pair: len(pair[0])
    )
    if not why:
        outs = [f"output {path} {word}" for path, word in _changed(nearest["outs"], workspace.outputs(stage))]
        return State(stage, "restore" if nearest == locked(workspace, stage) else "run", outs)
    # What stages before make anew may come out as it was.
    own = [word for word in why if not word.startswith("dependency build/")] if before else why
    return State(stage, "run" if own else "follow", own)


def _in_short(workspace: Workspace, names: Collection[str]) -> str:
    """Stages without those that others of them wait for; many of one step by its name alone."""
    stages = [stage for stage in workspace.stages if stage.name in names]
    waited_for = {needed.name for stage in stages for needed in workspace.needs(stage)}
    steps: dict[str, list[str]] = {}
    for stage in stages:
        if stage.name not in waited_for:
            steps.setdefault(stage.step, []).append(stage.name)
    return ", ".join(
        f"{len(found)} of {step}" if len(found) > _MOST_NAMES else ", ".join(found)
        for step, found in steps.items()
    )


def _changes(workspace: Workspace, known: records.Record, record: Mapping[str, Any]) -> list[str]:
    """What is not as it was recorded: code, parameters, dependencies."""
    words = []
    for path, word in _changed(known["deps"], record["deps"]):
        is_code = path.startswith(f"{workspace.code}/")
        words.append(f"{'code' if is_code else 'dependency'} {path.removeprefix('./')} {word}")
    for key in sorted(known["params"].keys() | record["params"].keys()):
        for place, old, new in _differences(key, known["params"].get(key), record["params"].get(key)):
            words.append(f"parameter {place}: {_shown(old)} -> {_shown(new)}")
    return words


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for path in [*new, *(path for path in old if path not in new)]:
        if path not in new:
            yield path, "is no longer read"
        elif new[path] is None:
            yield path, "is missing"
        elif path not in old:
            yield path, "is new"
        elif old[path] != new[path]:
            yield path, "changed"


def _differences(place: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """The deepest keys at which two values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(f"{place}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield place, old, new


def _shown(value: Any) -> str:
    text = "none" if value is None else canonical_json(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
