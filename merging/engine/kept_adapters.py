"""Adapters that are merged as they lie, with one another and without a model; what comes out is such an adapter.

Soft prompts have no weights that they could be merged into. Singular values (SVFit) are of one basis, in which merging
them is merging what they add.
"""

from __future__ import annotations

from typing import Any, Mapping

from mergeline.merging.checkpoints.adapters import ADAPTER_CONFIG, is_adapter, is_kept
from mergeline.merging.engine.plan import Plan
from mergeline.merging.files import read_object


def keep_adapters(plan: Plan) -> bool:
    """Whether all that is merged are such adapters; problems and notes of the plan say where they differ."""
    known = plan.checkpoints
    if plan.recipe.onto or not known or not all(is_adapter(c) and is_kept(c.folder) for c in known.values()):
        return False
    plan.keeps_adapters = True
    configs = {who: read_object(checkpoint.folder / ADAPTER_CONFIG) for who, checkpoint in known.items()}
    like, *others = configs
    for who in others:
        _compare(plan, (who, configs[who]), (like, configs[like]))
    in_basis = configs[like]["peft_type"] == "SVFIT"
    how = (
        "singular values are merged in the basis of their base"
        if in_basis
        else "soft prompts are merged by position"
    )
    plan.warnings.append(f"{how}, and stay an adapter")
    return True


def _compare(plan: Plan, one: tuple[str, Mapping[str, Any]], other: tuple[str, Mapping[str, Any]]) -> None:
    """A problem where two adapters are of other types or bases, a note where their models have other names."""
    (who, own), (like, reference) = one, other
    kind, model = (reference.get(key) for key in ("peft_type", "base_model_name_or_path"))
    if own["peft_type"] != kind:
        plan.problems.append(
            f"'{who}' is an adapter of type {own['peft_type']}, '{like}' of {kind}: merge those of one type"
        )
    elif kind == "SVFIT" and own.get("base_digests") != reference.get("base_digests"):
        plan.problems.append(
            f"'{who}' has singular values of another base than '{like}' (base_digests): merge those of one base, or "
            "name each one's base in onto"
        )
    elif own.get("base_model_name_or_path") != model:
        plan.warnings.append(
            f"'{who}' is for {own.get('base_model_name_or_path')!r}, '{like}' for {model!r}: an adapter is of use to "
            "one model alone"
        )
