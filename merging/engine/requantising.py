"""Which tensors of a plan are written in the quantised format of its base."""

from __future__ import annotations

from dataclasses import replace
from typing import Iterator

from mergeline.merging.checkpoints.quantised.rounding import is_plain_rounding
from mergeline.merging.checkpoints.quantised.tensor import QuantisedTensor
from mergeline.merging.engine.entries import make_entry
from mergeline.merging.engine.plan import Entry, Plan


def say_what_is_written(plan: Plan) -> None:
    """Have what is quantised in the base rounded to its format again, if the recipe says so; sentences on either."""
    if plan.recipe.requantise:
        plan.problems += _requantise(plan)
    elif any(
        isinstance(info, QuantisedTensor) for c in plan.checkpoints.values() for info in c.tensors.values()
    ):
        beside = (
            "its config.json has no quantization_config"
            if plan.donor
            else "no config.json lies beside it, for which a folder must be the base or the donor"
        )
        plan.warnings.append(f"what is written is not quantised: {beside}")


def _requantise(plan: Plan) -> Iterator[str]:
    """Marks what is written in the base's own format; a sentence if that cannot be done."""
    forms = {
        n: t for n, t in (plan.base.tensors if plan.base else {}).items() if isinstance(t, QuantisedTensor)
    }
    if not forms or plan.base is None:
        yield "requantise: the base is not quantised, so that it has no format to write; leave requantise out"
        return
    other = next((name for name, form in forms.items() if not is_plain_rounding(form)), None)
    if other:
        yield (
            f"requantise: '{other}' of the base is in a format that is no plain rounding; FP8, MXFP8 and MXFP4 can be "
            "written: leave requantise out, and quantise the merge with what quantised the base"
        )
        return
    moved = next((name for name, form in forms.items() if form.name != name), None)
    if moved or plan.alignment or plan.stack:
        yield "requantise: the merge has other names, rows or layers than its base; leave requantise out"
        return
    if plan.recipe.heads:
        yield "requantise: heads go onto merges that are not quantised; leave one of the two out"
        return
    if plan.donor != plan.base.path:
        yield "requantise: config.json must be that of the base, to say its format; name a folder as base, and donor"
        return
    scales = plan.base.stored.tensors.keys() - plan.base.tensors.keys() - {
        part.name for form in forms.values() for part in form.parts
    }  # fmt: skip
    if scales:
        yield (
            f"requantise: the base has scales of quantised activations ('{min(scales)}'), which are another's in a "
            "merge; leave requantise out"
        )
        return
    entries: list[Entry] = []
    for entry in plan.entries:
        form = forms.get(entry.name)
        if form is not None and entry.action == "copy" and not entry.sources:  # the base's own codes
            entries += [make_entry(plan, "copy", part.name, {}, part) for part in form.parts]
        else:
            entries.append(replace(entry, form=form))
    plan.entries = sorted(entries, key=lambda entry: entry.name)
    plan.warnings.append(
        f"requantise: {sum(entry.form is not None for entry in entries)} tensors are rounded to the base's format as "
        "they are written, with new scales; the card has the error"
    )
