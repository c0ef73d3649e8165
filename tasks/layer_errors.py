"""Where a merge goes wrong: its activations beside those of each expert on its own task, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from mergeline.merging.engine.inputs import places_of
from mergeline.merging.engine.places import refuse_file
from mergeline.merging.errors import UserError
from mergeline.merging.learning.ensembles import ensembles
from mergeline.merging.learning.layer_errors import layer_errors
from mergeline.tasks.fit import examples_of

if TYPE_CHECKING:
    from mergeline.tasks.modality import Modality
    from mergeline.tasks.schema import Params


def measured_errors(
    modality: Modality,
    params: Params,
    build: Path,
    merge: Path,
    *,
    first: int | None = None,
    ensembled: bool = False,
    page: Path | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """What `merging.learning.layer_errors` finds of a merge of a pipeline's experts, on examples of its split `fit`.

    first: how many examples of each task, None for as many as fits take. ensembled: whether the merge is held against
    ensembles of the experts, too, under `ensembles` (`merging.learning.ensembles`). page: where the same is
    written as HTML.

    Raises:
        UserError: models that are not run on examples; as `layer_errors`; a place that holds something else.
    """
    from mergeline.evaluation.pages.layer_errors import render_layer_errors
    from mergeline.evaluation.pages.page import is_page

    if modality.network is None:
        raise UserError(
            f"{modality.models} are not run on examples; `mergeline inspect` looks at their weights"
        )
    checkpoints = build / "checkpoints"
    base, experts = checkpoints / params.base, {name: checkpoints / name for name in params.experts}
    if page:
        refuse_file(page, places_of([merge, base, *experts.values()]), is_page, "page", force)
    examples = examples_of(modality, params, build, first)
    network = modality.network(params, build, base)
    found: dict[str, Any] = {"merge": str(merge)}
    if ensembled:
        found["ensembles"] = ensembles(network, examples, base, merge, experts, progress)
    found |= layer_errors(network, examples, base, merge, experts, progress)
    if page:
        render_layer_errors(page, found)
    return found
