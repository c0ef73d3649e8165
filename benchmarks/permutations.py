"""The line between two models that were trained independently, before and after they are aligned.

    python samples/make_independent.py /tmp/independent
    python benchmarks/permutations.py /tmp/independent --out benchmarks/results/permutations.json

Aligns b with a of each kind, by weights and by activations, and measures 11 points of the line between a and b on test
images or texts: the loss, and its barrier, which is the most by which the line's loss is above the straight line
between its ends. Of networks with BatchNorm also with statistics that are computed anew at each point, from training
images, as REPAIR does. docs/permutations.md has the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samples"))
from make.independent_models import KINDS, TASK, TEXTS, logits_of, test_batches
from make.model import channels_first, normalised

from mergeline.merging.align import align
from mergeline.merging.architecture import on_disk
from mergeline.merging.learning.activation_matching import collect_activations
from mergeline.merging.learning.network import Examples, Network

_POINTS = [i / 10 for i in range(11)]
_SEEN = 128  # training examples: of activations, and of BatchNorm


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, help="what samples/make_independent.py wrote")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--out", type=Path, required=True, help="JSON; what is there of other kinds stays")
    given = parser.parse_args()
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    for kind in given.kinds:
        found[kind] = measured(kind, given.models)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        for how, line in found[kind]["lines"].items():
            print(
                f"{kind:7} {how:34} barrier {line['barrier']:.3f}  middle {line['losses'][5]:.3f}", flush=True
            )


def measured(kind: str, models: Path) -> dict[str, Any]:
    """All that is measured of one kind of models."""
    torch.set_num_threads(1)
    a, b = models / kind / "a", models / kind / "b"
    classes = 0 if kind == "llama" else int(np.load(models / "data" / f"{TASK}.npz")["train_y"].max()) + 1
    model = KINDS[kind](classes).eval().requires_grad_(False)
    config = json.loads((a / "config.json").read_text()) if (a / "config.json").exists() else {}
    state = load_file(a / "model.safetensors")
    names = {memory: stored for memory, [stored] in on_disk(state, config).items()}
    seen = _seen(kind, models / "data")
    network = Network(model, lambda module, batch: _run(kind, module, batch["images"]), names=names)
    examples = Examples(
        batches={TASK: lambda: ({"images": part} for part in seen.split(64))},
        counts={TASK: len(seen)},
        owners={TASK: "b"},
        digests={TASK: "sha256:0"},
        split="fit",
    )
    found: dict[str, Any] = {"lines": {}, "aligned": {}}
    states = {"before": load_file(b / "model.safetensors")}
    with tempfile.TemporaryDirectory() as folder:
        statistics = collect_activations(a, b, network, examples, Path(folder) / "seen.safetensors")
        for how, more in (("weights", {"restarts": 3}), ("activations", {"statistics": statistics})):
            out = Path(folder) / how
            manifest = align(a, {"b": b}, out, singular_vectors=True, **more)["b"]  # type: ignore[arg-type]
            states[how] = load_file(out / "model.safetensors")
            told = manifest["aligned"]
            found["aligned"][how] = {key: told[key] for key in ("distance", "overlap", "sweeps")}
    norms = any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    for how, other in states.items():
        for reset in (False, True) if norms else (False,):
            name = f"{how}, statistics anew" if reset else how
            found["lines"][name] = _line(
                kind, network, state, other, models / "data", seen if reset else None
            )
    return found


def _run(kind: str, module: nn.Module, x: Tensor) -> Tensor:
    return module(input_ids=x).logits.flatten(0, 1) if kind == "llama" else logits_of(kind, module, x)


def _seen(kind: str, data: Path) -> Tensor:
    """Training examples."""
    if kind == "llama":
        bytes_N = np.load(data / f"{TEXTS}.npz")["train_x"].astype(np.int64)
        return torch.from_numpy(bytes_N[: _SEEN * 64].reshape(_SEEN, 64))
    return normalised(channels_first(np.load(data / f"{TASK}.npz")["train_x"][:_SEEN]))


def _line(
    kind: str, network: Network, a: dict[str, Tensor], b: dict[str, Tensor], data: Path, seen: Tensor | None
) -> dict[str, Any]:
    """Losses and accuracies at the points of the line from a to b. seen: for BatchNorm's statistics."""
    losses, right = [], []
    for share in _POINTS:
        mixed = {k: torch.lerp(t, b[k], share) if t.is_floating_point() else t for k, t in a.items()}
        network.load(mixed)
        if seen is not None:
            _reset(kind, network.module, seen)
        each, hits, count = [], 0, 0
        for x, y in test_batches(kind, data):
            logits = _run(kind, network.module, x)
            next_or_class = x[:, 1:].flatten() if y is None else y
            if y is None:
                logits = logits.unflatten(0, x.shape)[:, :-1].flatten(0, 1)
            each.append(float(nn.functional.cross_entropy(logits, next_or_class)) * len(x))
            hits += int((logits.argmax(1) == next_or_class).sum()) / (len(next_or_class) / len(x))
            count += len(x)
        losses.append(sum(each) / count)
        right.append(hits / count)
    straight = [losses[0] + share * (losses[-1] - losses[0]) for share in _POINTS]
    barrier = max(loss - line for loss, line in zip(losses, straight))
    return {"losses": losses, "accuracies": right, "barrier": barrier}


def _reset(kind: str, module: nn.Module, seen: Tensor) -> None:
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for part in seen.split(64):
            _run(kind, module, part)
    module.eval()


if __name__ == "__main__":
    main()
