"""Write the test data of tests/test_mergekit_yaml.py: configurations, and what mergekit makes of them.

    PEERS/mergekit/bin/python make_mergekit_outputs.py [CASE ...]      with mergekit 0.1.5; see setup_peers.sh

Fills tests/goldens/mergekit: a Llama of four small layers (base.safetensors, expert0..2.safetensors, float32), and
for each case CASE.yml and CASE.safetensors. Nothing random is among them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
import yaml
from make_inputs import _write_tokenizer, llama
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import load_config, make_tasks
from safetensors.torch import load_file, save_file

OUT = Path(__file__).parent.parent / "tests" / "goldens" / "mergekit"
LAYERS, VOCAB, EXPERTS = 4, 20, 3
FAMILY = llama(layers=LAYERS, hidden=8, inter=20, kv=8, vocab=VOCAB, dtype=torch.float32)


def models(*parameters: dict[str, Any], first: int = 0) -> list[dict[str, Any]]:
    return [
        {"model": f"expert{first + t}", **({"parameters": own} if own else {})}
        for t, own in enumerate(parameters)
    ]


def sliced(method: str, parts: list[tuple[int, int, dict[str, Any]]], **more: Any) -> dict[str, Any]:
    """Slices of the base and two experts: first and last layer, and what stands in them."""
    return {
        "merge_method": method,
        "base_model": "base",
        "dtype": "float32",
        "slices": [
            {"sources": [{"model": m, "layer_range": [a, b], **own.get(m, {})}
                         for m in own.get("models", ("base", "expert0", "expert1"))],
             **({"parameters": own["parameters"]} if "parameters" in own else {})}
            for a, b, own in parts
        ],
        **more,
    }  # fmt: skip


def taken(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    """A source of a slice."""
    found = {"model": model, "layer_range": [first, end]}
    return {**found, **({"parameters": parameters} if parameters else {})}


def around(
    method: str, listed: list[dict[str, Any]], dtype: str = "float32", **shared: Any
) -> dict[str, Any]:
    found = {"merge_method": method, "base_model": "base", "models": listed, "dtype": dtype}
    return {**found, **({"parameters": shared} if shared else {})}


def weights(*values: Any) -> list[dict[str, Any]]:
    return models(*({"weight": value} for value in values))


BASE = {"model": "base"}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": weights(1.0, 2.0, 0.5), "dtype": "float32"},
    "linear-sum-with-base": around(
        "linear", [{"model": "base", "parameters": {"weight": 0.5}}, *weights(0.3, 0.4)], normalize=False
    ),
    "linear-gradient": {
        "merge_method": "linear", "models": weights([0.0, 1.0], [1.0, 0.2, 0.5], 0.3), "dtype": "float32",
    },
    "slerp": around("slerp", [BASE, *models({})], t=0.4),
    "slerp-filters": around(
        "slerp", [*models({}), BASE],
        t=[{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7]},
           {"value": 0.25}],
    ),
    "slerp-slices": sliced(
        "slerp",
        [(0, 2, {"models": ("base", "expert0"), "parameters": {"t": [0.2, 0.4]}}),
         (2, 3, {"models": ("base", "expert0"), "parameters": {"t": [0.1, 0.9]}}),
         (3, 4, {"models": ("base", "expert0")})],
        parameters={"t": [{"filter": "mlp", "value": 0.6}, {"value": 0.3}]},
    ),
    "karcher-with-base": around("karcher", models({}, {}), max_iter=20, tol="1e-9"),
    "task_arithmetic": around(
        "task_arithmetic", weights(0.3, [0.1, 0.9], 0.5), normalize=True, int8_mask=True, **{"lambda": 0.7}
    ),
    "task_arithmetic-bf16": around("task_arithmetic", weights(0.3, 0.4, 0.5), "bfloat16"),
    "task_arithmetic-out-bf16": {
        **around("task_arithmetic", weights(0.3, 0.4, 0.5)), "out_dtype": "bfloat16",
    },
    "task_arithmetic-slices": sliced(
        "task_arithmetic",
        [(0, 1, {"expert0": {"parameters": {"weight": 0.9}}}),
         (1, 3, {"expert0": {"parameters": {"weight": [0.2, 0.8]}}, "parameters": {"lambda": 0.5}}),
         (3, 4, {"expert1": {"parameters": {"weight": [{"filter": "mlp", "value": 0.7}]}}})],
        parameters={"weight": [{"filter": "embed", "value": 0.6}, {"value": 0.4}], "lambda": 1.2},
    ),
    "ties": around(
        "ties",
        models({"weight": 0.3, "density": 0.2}, {"weight": 0.5, "density": 0.7}, {"weight": 0.4}),
        **{"lambda": 1.1},
    ),
    "ties-filters": around(
        "ties",
        models(
            {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0.2}], "density": [0.2, 0.9]},
            {"weight": [{"filter": "q_proj", "value": [0.1, 0.7]}, {"filter": "self_attn", "value": 0.6},
                        {"filter": "*", "value": 0.3}], "density": 0.5},
            {},
        ),
        weight=0.25, density=[{"filter": "norm", "value": 1.0}, {"value": 0.4}], normalize=False,
    ),
    "ties-bf16": around(
        "ties", models({"weight": 0.3, "density": 1.0}, {"weight": 0.5, "density": 1.0}), "bfloat16"
    ),
    "dare_linear-whole": around("dare_linear", models({"weight": 0.3, "density": 1.0}, {"weight": 0.6})),
    "dare_ties-whole": around("dare_ties", weights(0.3, 0.6, 0.2), normalize=True),
    "breadcrumbs": around(
        "breadcrumbs",
        models({"weight": 0.3, "density": 0.8, "gamma": 0.05}, {"weight": 0.5, "density": 0.4}, {"weight": 0.2}),
    ),
    "breadcrumbs_ties": around(
        "breadcrumbs_ties",
        models({"weight": 0.3, "density": 0.8, "gamma": 0.05}, {"weight": 0.5, "density": 0.4}, {"weight": 0.2}),
        normalize=True,
    ),
    "sce": around("sce", models({}, {}, {}), select_topk=0.3),
    "model_stock": around("model_stock", models({}, {}, {})),
    "model_stock-rows": around("model_stock", models({}, {}), filter_wise=True),
    "passthrough": {
        "merge_method": "passthrough", "dtype": "float32",
        "models": models({"scale": [{"filter": "mlp.down_proj", "value": [0.5, 1.5]}, {"value": 1.0}]}),
    },
    "nuslerp": around("nuslerp", weights(0.3, 0.9)),
    "nuslerp-no-base": {"merge_method": "nuslerp", "models": weights(0.3, 0.9), "dtype": "float32"},
    "nuslerp-rows": around("nuslerp", weights(0.3, 0.9), nuslerp_flatten=False),
    "nuslerp-columns": around("nuslerp", weights(0.3, 0.9), nuslerp_flatten=False, nuslerp_row_wise=True),
    "multislerp": around("multislerp", weights(0.3, 0.9, 0.4)),
    "nearswap": around("nearswap", models({}), t=3e-4),
    "arcee_fusion": around("arcee_fusion", models({})),
    "ram": around("ram", models({}, {}, {}), epsilon=5e-4),
    "ramplus_tl": around("ramplus_tl", models({}, {}, {}), epsilon=5e-4, r=0.2, alpha=0.3),
    "slerp-with-weights": around("slerp", [BASE, *weights(0.3)], t=0.4),
    "ram-with-weights": around("ram", weights(0.3, 0.6), epsilon=5e-4, density=0.2),
    "ties-rescale": around(
        "ties", models({"weight": 0.3, "density": 0.2}, {"weight": 0.5, "density": 0.7}), rescale=True
    ),
    "breadcrumbs-rescale": around(
        "breadcrumbs",
        models({"weight": 0.3, "density": 0.8, "gamma": 0.05}, {"weight": 0.5, "density": 0.4}),
        rescale=True,
    ),
    "multislerp-sums": around("multislerp", weights(0.3, 0.9, 0.4), normalize_weights=False),
    "slices-of-other-models": {
        "merge_method": "linear", "dtype": "float32", "base_model": "base",
        "parameters": {"weight": [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.5}], "normalize": False},
        "slices": [
            {"sources": [taken("expert0", 0, 3, weight=[0.1, 0.9]), taken("expert1", 1, 4)]},
            {"sources": [taken("expert2", 2, 3), taken("expert1", 0, 1, weight=[0.3, 0.7])]},
            {"sources": [taken("expert2", 3, 4)], "parameters": {"weight": 2.0}},
        ],
    },
    "slices-with-bases": {
        "merge_method": "ties", "dtype": "float32", "base_model": "base",
        "parameters": {"weight": 0.6, "density": [0.9, 0.3]},
        "slices": [
            {"sources": [taken("base", 0, 2), taken("expert0", 0, 2), taken("expert1", 2, 4, weight=0.3)]},
            {"sources": [taken("expert2", 1, 3), taken("expert1", 0, 2, density=0.5)], "base_model": "expert2"},
            {"sources": [taken("base", 3, 4), taken("expert2", 3, 4)], "parameters": {"lambda": 0.5}},
        ],
    },
    "slices-with-filters-of-layers": {
        "merge_method": "task_arithmetic", "base_model": "base", "dtype": "float32", "parameters": {"lambda": 0.8},
        "slices": [
            {"sources": [
                taken("base", 1, 4),
                taken("expert0", 0, 3, weight=[{"filter": "layers.1", "value": 0.9}, {"filter": "mlp", "value": 0.2},
                                               {"filter": "layers.3.", "value": 5.0}, {"value": 0.5}]),
                taken("expert1", 1, 4, weight=[{"filter": "model.layers.3.self_attn", "value": 0.7},
                                               {"filter": "layers.1.mlp", "value": 0.3}, {"value": 0.1}])]},
            {"sources": [
                taken("base", 0, 2),
                taken("expert0", 2, 4, weight=[{"filter": "layers.2.", "value": [0.4, 0.6]}, {"value": 1.0}]),
                taken("expert2", 1, 3, weight=[{"filter": "layers.2", "value": -0.5}, {"value": 0.2}])]},
        ],
    },
    "slices-slerp-repeated": {
        "merge_method": "slerp", "dtype": "float32", "base_model": "base",
        "parameters": {"t": [{"filter": "self_attn", "value": [0.1, 0.9]}, {"value": 0.4}]},
        "slices": [
            {"sources": [taken("base", 0, 3), taken("expert0", 0, 3)]},
            {"sources": [taken("expert0", 1, 4), taken("base", 0, 3)]},
        ],
    },
    "llama-pro": {
        "merge_method": "passthrough", "dtype": "float32",
        "slices": [
            {"sources": [taken("expert0", 0, 2)]},
            {"sources": [taken("expert0", 1, 2, scale=[{"filter": "o_proj", "value": 0.0},
                                                       {"filter": "down_proj", "value": 0.0}, {"value": 1.0}])]},
            {"sources": [taken("expert0", 2, 4)]},
        ],
    },
    "frankenmerge": {
        "merge_method": "passthrough", "dtype": "bfloat16",
        "slices": [{"sources": [taken(m, a, b)]} for m, a, b in
                   (("expert0", 0, 3), ("expert1", 1, 4), ("expert0", 3, 4))],
    },
    "pruned": {
        "merge_method": "passthrough", "dtype": "float32", "base_model": "base",
        "slices": [{"sources": [taken("expert1", 0, 1)]}, {"sources": [taken("expert1", 3, 4)]}],
    },
}  # fmt: skip
# Several documents, of which each but the last has a name (mergekit-multi).
CHAINS: dict[str, list[dict[str, Any]]] = {
    "multi": [
        {"name": "mean", "merge_method": "linear", "models": weights(1.0, 1.0), "dtype": "float32"},
        {"merge_method": "ties", "base_model": "base", "dtype": "float32",
         "parameters": {"weight": 0.5, "density": 0.6}, "models": [{"model": "mean"}, {"model": "turned"}]},
        {"name": "turned", "merge_method": "slerp", "base_model": "mean", "dtype": "float32",
         "models": [{"model": "mean"}, {"model": "expert2"}], "parameters": {"t": 0.3}},
    ],
}  # fmt: skip


def state(expert: int | None) -> dict[str, torch.Tensor]:
    """One checkpoint, drawn from a single generator; norms too are changed by experts."""
    generator = torch.Generator().manual_seed(0 if expert is None else 1 + expert)
    return {
        name: torch.randn(shape, generator=generator) * (0.02 if expert is None else 1e-3)
        + (1.0 if expert is None and "norm" in name else 0.0)
        for name, shape in FAMILY.shapes.items()
    }


def write_family(folder: Path) -> None:
    base = state(None)
    for number in (None, *range(EXPERTS)):
        own = base if number is None else {name: base[name] + tau for name, tau in state(number).items()}
        name = "base" if number is None else f"expert{number}"
        save_file(own, OUT / f"{name}.safetensors", metadata={"format": "pt"})
        (folder / name).mkdir()
        shutil.copyfile(OUT / f"{name}.safetensors", folder / name / "model.safetensors")
        config = {**FAMILY.config, "num_attention_heads": 2, "num_key_value_heads": 2}
        (folder / name / "config.json").write_text(json.dumps(config))
        _write_tokenizer(folder / name, VOCAB)


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_family(folder)
        for name in (n for n in sys.argv[1:] or CASES if n in CASES):
            text = yaml.safe_dump(CASES[name], sort_keys=False, default_flow_style=None, width=110)
            (OUT / f"{name}.yml").write_text(text)
            local = yaml.safe_load(text)
            _localise(local, folder)
            run_merge(
                MergeConfiguration.model_validate(local), str(folder / name),
                MergeOptions(copy_tokenizer=False, lazy_unpickle=True), config_source=text,
            )  # fmt: skip
            merged = {}
            for file in (folder / name).glob("*.safetensors"):
                merged |= load_file(file)
            save_file(dict(sorted(merged.items())), OUT / f"{name}.safetensors")
            print(name, len(merged), flush=True)
        for name in (n for n in sys.argv[1:] or CHAINS if n in CHAINS):
            write_chain(name, folder)


def write_chain(name: str, folder: Path) -> None:
    """The file of a chain of merges, and what mergekit-multi makes of it."""
    text = yaml.safe_dump_all(CHAINS[name], sort_keys=False, default_flow_style=None, width=110)
    (OUT / f"{name}.yml").write_text(text)
    local, own = CHAINS[name], {part.get("name") for part in CHAINS[name]}
    _localise(local, folder, own)
    configs, needed = load_config(yaml.safe_dump_all(local), str(folder / "merges"))
    options = MergeOptions(copy_tokenizer=False)
    tasks = make_tasks(configs, needed, options, str(folder / "merges"), str(folder / name), lazy=False)
    Executor(tasks).execute()
    merged = load_file(folder / name / "model.safetensors")
    save_file(dict(sorted(merged.items())), OUT / f"{name}.safetensors")
    print(name, len(merged), flush=True)


def _localise(part: Any, folder: Path, but: Container[str | None] = ()) -> None:
    """Models' names become paths."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        if key in ("model", "base_model") and value not in but:
            part[key] = str(folder / value)
        elif isinstance(value, (dict, list)):
            _localise(value, folder, but)


if __name__ == "__main__":
    main()
