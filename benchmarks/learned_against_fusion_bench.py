"""AdaMerging, RegMean, RegMean++ and Fisher beside FusionBench's: the same family, images, batches and settings.

    python learned_against_fusion_bench.py prepare --workspace .. --family FAMILY    after `make demo`
    python learned_against_fusion_bench.py compare --family FAMILY --peer PEERS/fusion_bench --repeats 3
    python learned_against_fusion_bench.py ours FAMILY OUT METHOD...                 merges by Mergeline
    python learned_against_fusion_bench.py random --family LARGER                    8 random towers of 21 M parameters
    python learned_against_fusion_bench.py compare --family LARGER --peer PEERS/fusion_bench --methods adamerging \\
        --experts 2 8 --steps 0

The family is the sample family as transformers' CLIPVisionModelWithProjection has it, which both sides load. Each is a
process of its own with one thread, in turns: CPU-seconds are those of the merge, of AdaMerging also of a step, without
imports and loading, medians of the repeats; bytes are those that torch allocates at the peak, of the whole and of
AdaMerging's second step, with the weights that stay in memory and with the images, of which both have all (cost.py).
`random` makes what only bytes and costs are measured on. Writes results/learned_fusion_bench.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Iterator

from measure import run, save

os.environ.setdefault("HF_HUB_OFFLINE", "1")

METHODS = ("adamerging", "regmean", "regmean_pp", "fisher")
IMAGES = 128  # of each task, for statistics
BATCH = 16  # images of a task in a step of AdaMerging
_BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_OTHERS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_CONVOLUTION = "patch_embedding"  # which FusionBench's RegMean averages


# -------------------------------------------------------------------------------------------------- the family


def to_transformers(tower: dict[str, Any]) -> dict[str, Any]:
    """Tensors `visual.*` of open_clip by the names and shapes of transformers; the reverse of `to_open_clip`."""
    found = {}
    for name, value in tower.items():
        stem, _, kind = name.rpartition(".")
        if name == "visual.proj":
            found["visual_projection.weight"] = value.T.contiguous()
        elif name in _OTHERS:
            found[_OTHERS[name]] = value
        elif stem in _OTHERS:
            found[f"{_OTHERS[stem]}.{kind}"] = value
        else:
            layer, module = stem.removeprefix("visual.transformer.resblocks.").split(".", 1)
            block = f"vision_model.encoder.layers.{layer}"
            if name.endswith(("in_proj_weight", "in_proj_bias")):
                for part, rows in zip("qkv", value.chunk(3)):
                    found[f"{block}.self_attn.{part}_proj.{kind.removeprefix('in_proj_')}"] = (
                        rows.contiguous()
                    )
            else:
                found[f"{block}.{_BLOCK[module]}.{kind}"] = value
    return found


def prepare(workspace: Path, family: Path) -> None:
    """Write base, experts, heads, images and the batches of AdaMerging, from a workspace's build/."""
    import torch
    from safetensors.torch import load_file, save_file

    from mergeline.evaluation.clip import zero_shot
    from mergeline.evaluation.datasets import load
    from mergeline.tasks.clip import places
    from mergeline.tasks.clip.learning import examples, network
    from mergeline.tasks.data_step import dataset
    from mergeline.tasks.workspace import Workspace

    params, build = Workspace(workspace / "params.yaml").params, workspace.resolve() / "build"
    base = build / "checkpoints" / params.base
    folders = {params.base: family / "base", **{e: family / "experts" / e for e in params.experts}}
    config = json.loads((base / "open_clip_config.json").read_text())["model_cfg"]
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        state = {}
        for file in (build / "checkpoints" / name).glob("*.safetensors"):
            state |= {k: v.float() for k, v in load_file(file).items() if k.startswith("visual.")}
        save_file(to_transformers(state), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_config(config)))
    whole = network(params, build, base)
    assert whole.score is not None
    scale = zero_shot.build_tower(base, "cpu")[1]
    save_file(
        {**load_file(places.heads(build)), "scale": torch.tensor(float(scale))}, family / "heads.safetensors"
    )
    seen = examples(params, build)
    images = {task: torch.cat([b["images"] for b in seen.of(task)]).contiguous() for task in params.tasks}
    save_file(images, family / "images.safetensors")
    test = {}
    for task in params.tasks:
        data = load(dataset(build, task))
        batches = zero_shot.batches(base, data, "test", task, "cpu")
        test[task] = torch.cat([batch["images"] for batch in batches]).contiguous()
        test[f"{task} labels"] = torch.from_numpy(data.split("test")[1].copy())
    save_file(test, family / "test.safetensors")
    _write_draws(images, family)


def _write_draws(images: dict[str, Any], family: Path) -> None:
    """The batches of AdaMerging, as Mergeline draws them."""
    from mergeline.merging.learning.pool import Pool

    pools = {task: Pool(task, _examples(images, {}), 0) for task in images}
    draws = {task: [next(pool.drawn(step, BATCH)) for step in range(1000)] for task, pool in pools.items()}
    (family / "draws.json").write_text(json.dumps(draws))


def prepare_random(family: Path, width: int, layers: int, experts: int) -> None:
    """Write a random family of larger towers, on whose merges only costs are measured."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    vision = {"width": width, "layers": layers, "head_width": 64, "image_size": 36, "patch_size": 12}
    config = _config({"vision_cfg": vision, "embed_dim": 128})
    base = CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).state_dict()
    base = {name: value for name, value in base.items() if value.is_floating_point()}
    tasks = [f"task{i}" for i in range(experts)]
    for name in ("base", *(f"experts/{task}" for task in tasks)):
        state = {k: v.clone() if name == "base" else v + 1e-5 * torch.randn_like(v) for k, v in base.items()}
        (family / name).mkdir(parents=True, exist_ok=True)
        save_file(state, family / name / "model.safetensors", {"format": "pt"})
        (family / name / "config.json").write_text(json.dumps(config))
    images = {task: torch.randn(IMAGES, 3, 36, 36) for task in tasks}
    save_file(images, family / "images.safetensors")
    model = CLIPVisionModelWithProjection.from_pretrained(family / "base").eval()
    with torch.no_grad():
        mean = model(images[tasks[0]]).image_embeds.mean(0)
    # What all features have in common says no class: predictions of one class are refused.
    heads = {task: torch.randn(10, 128) for task in tasks}
    heads = {task: head - head @ mean[:, None] * mean / mean.square().sum() for task, head in heads.items()}
    save_file({**heads, "scale": torch.tensor(10.0)}, family / "heads.safetensors")
    _write_draws(images, family)


def _config(config: dict[str, Any]) -> dict[str, Any]:
    vision, width = config["vision_cfg"], config["vision_cfg"]["width"]
    return {
        "architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model", "hidden_act": "gelu",
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": vision["layers"],
        "num_attention_heads": width // vision["head_width"], "image_size": vision["image_size"],
        "patch_size": vision["patch_size"], "layer_norm_eps": 1e-5, "projection_dim": config["embed_dim"],
        "torch_dtype": "float32",
    }  # fmt: skip


def _examples(images: dict[str, Any], digests: dict[str, str], first: int | None = None) -> Any:
    from mergeline.merging.learning.network import Examples

    def batches(task: str) -> Iterator[dict[str, Any]]:
        for start in range(0, len(images[task]), 32):
            yield {"images": images[task][start : start + 32], "task": task}

    counts = {task: len(x) for task, x in images.items()}
    owners = {task: task for task in images}
    return Examples({t: partial(batches, t) for t in images}, counts, owners, digests, "fit", first=first)


def _network(family: Path) -> Any:
    from safetensors.torch import load_file
    from torch.nn.functional import normalize
    from transformers import CLIPVisionModelWithProjection

    from mergeline.merging.learning.network import Network

    heads = load_file(family / "heads.safetensors")
    module = CLIPVisionModelWithProjection.from_pretrained(family / "base").eval()
    return Network(
        module,
        lambda m, batch: m(batch["images"]).image_embeds,
        lambda features, task: heads["scale"] * normalize(features, dim=-1) @ heads[task].T,
    )


# -------------------------------------------------------------------------------------------------- merges of ours


def ours(family: Path, out: Path, methods: list[str], steps: int, count: int | None) -> None:
    """Merges by Mergeline, with FusionBench's own settings for CLIP."""
    from cost import Clock, measured

    for method in methods:
        folder = out / method
        folder.mkdir(parents=True, exist_ok=True)

        def load() -> tuple[Any, list[Any]]:
            network = _network(family)
            return network, [network.module]

        def run(network: Any, steps: int, clock: Clock, method: str = method, folder: Path = folder) -> None:
            _merge(method, network, family, folder, steps, clock, count)

        measured(load, run, folder, steps)


def _merge(
    method: str, network: Any, family: Path, out: Path, steps: int, clock: Any, count: int | None = None
) -> None:
    from safetensors.torch import load_file

    from mergeline.merging import merge
    from mergeline.merging.learning.collect import collect
    from mergeline.merging.learning.fitting import fit
    from mergeline.merging.learning.gathering import Gathering

    images = load_file(family / "images.safetensors")
    experts = {path.name: path for path in sorted((family / "experts").iterdir())[:count]}
    settings: dict[str, dict[str, Any]] = {
        "adamerging": {"iterations": steps, "batch": BATCH, "batches": 1, "rate": 1e-3, "clamp": True},
        "regmean": {"nondiagonal": 0.95, "keys": "matrices", "exclude": [_CONVOLUTION]},
        "regmean_pp": {"nondiagonal": 0.95},
        # FusionBench adds 1e-6 to squares of sums over a batch; those of single examples are far smaller.
        "fisher": {"variant": "mergelm", "floor": 1e-12},
    }
    recipe: dict[str, Any] = {
        "method": method,
        "params": settings[method],
        "base": family / "base",
        "experts": experts,
    }
    for kept in ("fit", "statistics"):
        shutil.rmtree(out / kept, ignore_errors=True)  # a merge that is measured uses nothing of one before
    own = {task: images[task] for task in experts}
    digests = dict.fromkeys(own, "sha256:")
    if method in ("adamerging", "regmean_pp"):
        seen = _examples(own, digests, None if method == "adamerging" else IMAGES)
        found: Any = fit(recipe, network, seen, out / "fit", progress=lambda *_: clock.step())
    else:
        kind: Any = "gram" if method == "regmean" else "fisher"
        seen, folder = _examples(own, digests, IMAGES), out / "statistics"
        files = [
            collect(
                kind,
                path,
                network,
                seen,
                folder / f"{name}.safetensors",
                gathering=Gathering(labels="sampled"),  # of `fisher`; FusionBench squares sums over a batch
            )
            for name, path in experts.items()
        ]
        found = {**recipe, "statistics": {kind: files}}
    merge(found, out / "merged", force=True)


# -------------------------------------------------------------------------------------------------- side by side


def compare_all(
    family: Path, peer: Path, methods: list[str], steps: int, counts: list[int | None], repeats: int
) -> None:
    here = Path(__file__).parent
    commands = {
        "fusion_bench": [peer / "bin" / "python", here / "peer_fusion_bench_learned.py"],
        "mergeline": [sys.executable, Path(__file__), "ours"],
    }
    for method, count in product(methods, counts):
        costs: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
        with tempfile.TemporaryDirectory() as work:
            folders = {side: Path(work, side) for side in commands}
            for _, (side, command) in product(range(repeats), commands.items()):
                more = ["--steps", str(steps), *(["--experts", str(count)] if count else [])]
                cost = run([*command, family, folders[side], method, *more], threads=1)
                if cost.failed:
                    raise SystemExit(f"{side} {method}: {cost.failed}")
                found = json.loads((folders[side] / method / "cost.json").read_text())
                costs[side].append({**found, "process_mib": round(cost.peak_mib)})
            job = method if count is None else f"{method}, {family.name}, {count} experts"
            row = {"job": job, **{side: _medians(found) for side, found in costs.items()}}
            row["images"] = (family / "images.safetensors").stat().st_size
            row |= _outputs(method, family, {side: folder / method for side, folder in folders.items()})
        save("learned_fusion_bench", [row], ("job",))
        print(json.dumps(row), flush=True)


def _medians(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure, and the CPU-seconds of all runs."""
    middle = {
        k: None if v is None else statistics.median(run[k] for run in found) for k, v in found[0].items()
    }
    return {**middle, "runs": [[run["cpu_s"], run["step_cpu_s"]] for run in found]}


def _outputs(method: str, family: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """Test accuracies of both merges, and how far they, and what was fitted, are apart."""
    from compare import difference
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    if (family / "test.safetensors").exists():
        network, test = _network(family), load_file(family / "test.safetensors")
        tasks = [name for name in test if not name.endswith(" labels")]
        for side, folder in folders.items():
            network.load(load_file(_file(folder / "merged")))
            found[f"{side} accuracy"] = round(sum(_accuracy(network, test, t) for t in tasks) / len(tasks), 4)
    apart = difference(_file(folders["fusion_bench"] / "merged"), _file(folders["mergeline"] / "merged"),
                       _file(family / "base"))  # fmt: skip
    found["relative to the update"] = apart.update
    if method == "adamerging":
        left = load_file(folders["fusion_bench"] / "coefficients.safetensors")
        right = load_file(folders["mergeline"] / "fit" / "coefficients.safetensors")
        found["coefficients"] = sum(c.numel() for c in right.values())
        found["coefficients apart"] = max(float((left[n] - right[n].flatten()).abs().max()) for n in left)
    return found


def _file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def _accuracy(network: Any, test: dict[str, Any], task: str) -> float:
    import torch

    with torch.no_grad():
        logits = network.logits(network.features({"images": test[task]}), task)
    return float((logits.argmax(1) == test[f"{task} labels"]).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("--workspace", type=Path, required=True)
    first.add_argument("--family", type=Path, required=True)
    second = commands.add_parser("compare")
    second.add_argument("--family", type=Path, required=True)
    second.add_argument("--peer", type=Path, required=True)
    second.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    second.add_argument("--steps", type=int, default=50)
    second.add_argument("--experts", type=int, nargs="+", default=[None], help="the first so many, in turns")
    second.add_argument("--repeats", type=int, default=1)
    third = commands.add_parser("ours")
    third.add_argument("family", type=Path)
    third.add_argument("out", type=Path)
    third.add_argument("methods", nargs="+", choices=METHODS)
    third.add_argument("--steps", type=int, default=50)
    third.add_argument("--experts", type=int)
    fourth = commands.add_parser("random")
    fourth.add_argument("--family", type=Path, required=True)
    fourth.add_argument("--width", type=int, default=384)
    fourth.add_argument("--layers", type=int, default=12)
    fourth.add_argument("--experts", type=int, default=8)
    a = parser.parse_args()
    if a.command == "prepare":
        prepare(a.workspace, a.family)
    elif a.command == "compare":
        compare_all(a.family.resolve(), a.peer.absolute(), a.methods, a.steps, a.experts, a.repeats)
    elif a.command == "random":
        prepare_random(a.family, a.width, a.layers, a.experts)
    else:
        ours(a.family.resolve(), a.out.resolve(), a.methods, a.steps, a.experts)


if __name__ == "__main__":
    main()
