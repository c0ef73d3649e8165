"""The extract step: what the task vectors look like, tensor by tensor; no copy of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from mergeline.merging.describe import describe_family
from mergeline.merging.diagnoses.sums import number
from mergeline.merging.engine.mergelock import refuse_locked
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.errors import UserError
from mergeline.merging.files import publish, staged, write_json

_OUTSIDE = "outside blocks"


def extract(base: Path, experts: dict[str, Path], out: Path, heads: Sequence[str] = ()) -> None:
    """Describe task vectors (expert - base) into `out/description.json`.

    Norm of every task vector, absolute and relative to the base, by tensor and by block; cosine and sign-conflict
    matrices between experts; the share of energy in the leading singular directions of the centred task vectors.
    heads: names of tensors that are each expert's own.

    Raises:
        UserError: checkpoints that do not match, an expert that is not of this base or is locked against merging,
            two experts with one content.
    """
    plan = make_plan({"method": "average", "base": base, "experts": experts, "heads": heads})
    plan.check()
    refuse_locked(plan)
    with staged(out) as partial:
        found = describe_family(base, experts, heads=heads, workers=1)
        for advice in found["diagnoses"]["advice"]:
            if advice["diagnosis"] == "origins":  # an expert is not of this base, or not itself
                raise UserError(advice["sentence"])
        write_json(partial / "description.json", _description(found))
        publish(partial, out)


def _description(found: dict[str, Any]) -> dict[str, Any]:
    """What is written, of what `describe_family` found."""
    blocks = _energies(found["layers"], len(found["experts"]))
    centred = found["origins"].get("mean", {}).get("energy", [])
    return {
        "reference": "pretrained",
        "experts": {
            name: {
                **{key: own[key] for key in ("norm", "relative_norm", "alignment_with_base")},
                "energy_by_block": {
                    key: number(energy[t] / _total(blocks, t)) for key, energy in blocks.items()
                },
                "energy_in_leading_directions": (
                    dict(zip((f"{rank:g}" for rank in found["ranks"]), centred[t])) if centred else {}
                ),
            }
            for t, (name, own) in enumerate(found["experts"].items())
        },
        "cosine": found["cosine"],
        "sign_conflict": found["sign_conflict"],
        "tensor_norms": {row["tensor"]: row["norm"] for row in found["by_tensor"]},
    }


def _energies(layers: list[dict[str, Any]], experts: int) -> dict[str, list[float]]:
    """Squared norms of the task vectors by the number of a block, of all towers together."""
    energies: dict[str, list[float]] = {}
    for layer in layers:
        key = _OUTSIDE if layer["block"] is None else f"block {layer['block']}"
        before = energies.setdefault(key, [0.0] * experts)
        energies[key] = [energy + norm**2 for energy, norm in zip(before, layer["norm"])]
    return energies


def _total(energies: dict[str, list[float]], expert: int) -> float:
    return sum(energy[expert] for energy in energies.values())
