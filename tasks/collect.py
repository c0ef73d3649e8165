"""The collect step: statistics of the experts on examples of their own tasks, for the methods that read them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Mapping

from mergeline.merging.errors import UserError
from mergeline.merging.files import empty, make_folder, write_json
from mergeline.merging.learning.collect import collect, provenance
from mergeline.merging.methods import get_method
from mergeline.merging.reading import sha256_of
from mergeline.tasks.progress import counting

if TYPE_CHECKING:
    from mergeline.tasks.modality import Modality
    from mergeline.tasks.schema import Params


def collect_all(modality: Modality, params: Params, kind: str, build: Path, out: Path) -> None:
    """Write statistics of one kind of every expert to the folder `out`, EXPERT.safetensors.

    What lies there and was made from the same files, examples and settings stays.

    Raises:
        UserError: as `merging.learning.collect.collect`; models that cannot be run on examples.
    """
    if modality.network is None or modality.examples is None:
        raise UserError(f"{modality.models} are not run on examples; remove `statistics` from params.yaml")
    [known] = [k for k in params.statistics if k == kind]
    base = build / "checkpoints" / params.base
    network, examples = modality.network(params, build, base), modality.examples(params, build)
    make_folder(out)
    done = 0
    with counting("examples") as count:
        for expert in params.experts:
            before = done

            def progress(some: int, of: int, before: int = before) -> None:
                nonlocal done
                done = before + some
                count(done, before + of)

            collect(
                known,
                build / "checkpoints" / expert,
                network,
                examples,
                out / f"{expert}.safetensors",
                gathering=params.statistics[known].gathering,
                expert=expert,
                base=base,
                seed=params.seed,
                progress=progress,
            )
    empty(out, keep=[f"{expert}.safetensors" for expert in params.experts])


def statistics_for(
    method: str, params: Mapping[str, Any], build: Path, experts: Iterable[str]
) -> dict[str, list[Path]]:
    """The files that a method with these parameters reads, kind by kind, one an expert.

    Raises:
        UserError: one was not collected.
    """
    entry = get_method(method)
    found = {
        kind: [build / "statistics" / kind / f"{expert}.safetensors" for expert in experts]
        for kind in entry.kinds(entry.resolve(params))
    }
    for kind, files in found.items():
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing; run `mergeline collect {kind}` first")
    return found


def note_size(checkpoint: Path, out: Path) -> None:
    """Write to the JSON file `out` what is known of a checkpoint before any example is seen: the bytes of its files.

    Fetched checkpoints have it in `build/statistics`, which every merge waits for: it is there where nothing is
    collected, too.
    """
    write_json(out, {"bytes": sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())})


def digests_read(params: Params, merge: str, build: Path) -> dict[str, dict[str, str]]:
    """The digests of the statistics that a merge reads at any point of its grid: kind -> expert -> SHA-256.

    Raises:
        UserError: one was not collected.
    """
    found: dict[str, dict[str, str]] = {}
    if not params.kinds_of(merge):  # learned methods read none of these
        return found
    for method, point in params.settings_of(merge):
        for kind, files in statistics_for(method, point, build, params.experts_of(merge)).items():
            if kind not in found:
                found[kind] = {file.stem: sha256_of(file) for file in files}
    return found


def seen_through(
    method: str, params: Mapping[str, Any], files: Mapping[str, Iterable[Path]]
) -> dict[str, Any] | None:
    """What a merge by these statistics has seen of data, as a recipe's `fitted` has it; None where it reads none."""
    made = [provenance(file)["made_from"] for each in files.values() for file in each]
    if not made:
        return None
    examples: dict[str, int] = {}
    for one in made:
        examples |= {task: max(count, examples.get(task, 0)) for task, count in one["examples"].items()}
    labelled = any(one["settings"].get("labels") == "empirical" for one in made)
    return {
        "method": method,
        "params": dict(params),
        "data": "labelled" if labelled else "unlabelled",
        "split": made[0]["split"],
        "examples": examples,
        "digests": {task: digest for one in made for task, digest in one["data"].items()},
    }
