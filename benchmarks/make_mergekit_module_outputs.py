"""Write the test data of tests/merging/recipes/test_mergekit_modules.py: what mergekit makes of modules that differ.

    PEERS/mergekit/bin/python make_mergekit_module_outputs.py      with mergekit 0.1.5; see setup_peers.sh

Fills tests/goldens/mergekit/modules, in float32: of a T5, whose modules mergekit's own table names, and of a BART,
whose it finds by names, a base and two experts (KIND-base.safetensors ...), and for each case KIND-CASE.yml and
KIND-CASE.safetensors.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from make_mergekit_outputs import OUT as BESIDE
from make_mergekit_outputs import _localise, models, weights
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

OUT = BESIDE / "modules"
CONFIGS = {
    "t5": T5Config(
        vocab_size=10, d_model=8, d_kv=4, d_ff=6, num_layers=2, num_decoder_layers=3, num_heads=2,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=4, decoder_start_token_id=0,
    ),
    "bart": BartConfig(
        vocab_size=10, d_model=8, encoder_ffn_dim=6, decoder_ffn_dim=6, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=4,
    ),
}  # fmt: skip
CLASSES = {"t5": T5ForConditionalGeneration, "bart": BartForConditionalGeneration}
FILTERED = [
    {"filter": "SelfAttention", "value": [0.1, 0.9]},
    {"filter": "r.block.1", "value": 0.6},
    {"value": 0.3},
]


def module(listed: list[dict[str, Any]], **parameters: Any) -> dict[str, Any]:
    return {"models": listed, **({"parameters": parameters} if parameters else {})}


def slices(*taken: tuple[tuple[int, int], list[dict[str, Any]]]) -> dict[str, Any]:
    """Slices of these layers of these models; of the base, too, where they have weights."""
    found = []
    for layers, listed in taken:
        models = [*listed, {"model": "base"}] if "parameters" in listed[0] else listed
        found.append({"sources": [{**model, "layer_range": list(layers)} for model in models]})
    return {"slices": found}


def case(method: str, modules: dict[str, Any], **shared: Any) -> dict[str, Any]:
    found = {"merge_method": method, "base_model": "base", "modules": modules, "dtype": "float32"}
    return {**found, **({"parameters": shared} if shared else {})}


ONE, OTHER = [{"model": "expert0"}], [{"model": "expert1"}]
CASES: dict[str, dict[str, Any]] = {
    "t5-task_arithmetic": case(
        "task_arithmetic",
        {"encoder": module(weights(FILTERED, 0.3)), "decoder": module(weights(0.4, [0.2, 0.8]), **{"lambda": 0.5}),
         "shared": module(weights(1.0, 0.0))},
        **{"lambda": 0.9},
    ),
    "t5-ties": case(
        "ties",
        {"encoder": module(models({"weight": 0.5, "density": 0.4}, {"weight": 0.3})),
         "decoder": module(models({"weight": 1.0}), density=0.3), "shared": module(weights(0.5, 0.5))},
        density=0.6,
    ),
    "t5-linear": case(
        "linear",
        {"encoder": module(weights(0.5, 0.2)), "decoder": module(weights(0.4)),
         "shared": module(weights(0.1, 0.7), normalize=False)},
        weight=0.6,
    ),
    "t5-slerp": case(
        "slerp",
        {"encoder": module(ONE, t=[0.1, 0.9]),
         "decoder": module(ONE, t=[{"filter": "EncDec", "value": 1}, {"value": 0}]), "shared": module(ONE)},
        t=0.5,
    ),
    "t5-passthrough": {
        "merge_method": "passthrough", "dtype": "float32",
        "modules": {"encoder": module(ONE), "decoder": module(OTHER, scale=0.5), "shared": module(ONE)},
    },
    "t5-encoder-alone": case("task_arithmetic", {"encoder": module(weights(0.7, 0.4))}),
    "t5-slices": case(
        "task_arithmetic",
        {"encoder": slices([(0, 2), weights([0.2, 0.8], 0.3)], [(1, 2), weights(0.5, [0.1, 0.7])]),
         "decoder": module(weights(0.4, [0.2, 0.8]), **{"lambda": 0.5}), "shared": module(weights(1.0, 0.0))},
        **{"lambda": 0.9},
    ),
    "t5-passthrough-slices": {
        "merge_method": "passthrough", "dtype": "float32",
        "modules": {"encoder": module(ONE), "shared": module([{"model": "base"}]),
                    "decoder": slices([(0, 2), ONE], [(1, 3), OTHER], [(2, 3), ONE])},
    },
    "bart-slices": case(
        "ties",
        {"model.encoder.layers": module(models({"weight": 0.5, "density": 0.4}, {"weight": 0.3})),
         "model.decoder.layers": slices([(0, 1), weights(0.3, 0.5)], [(0, 2), weights(1.0, 0.5)]),
         "default": module(weights([{"filter": "embed", "value": 0.9}, {"value": 0.4}], 0.1))},
        density=0.6,
    ),
    "bart-task_arithmetic": case(
        "task_arithmetic",
        {"model.encoder.layers": module(weights([0.2, 0.8], 0.3)), "model.decoder.layers": module(weights(0.0, 0.5)),
         "default": module(weights([{"filter": "embed", "value": 0.9}, {"value": 0.4}], 0.1))},
    ),
}  # fmt: skip


def write_family(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    base = CLASSES[kind](CONFIGS[kind])
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("base", "expert0", "expert1"):
            for parameter in base.parameters():
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.copy_(0.02 * noise if name == "base" else parameter + 1e-3 * noise)
            base.save_pretrained(folder / name)
            state = load_file(folder / name / "model.safetensors")
            save_file(state, OUT / f"{kind}-{name}.safetensors", metadata={"format": "pt"})


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for kind in CLASSES:
            write_family(kind, Path(scratch) / kind)
        for name, config in CASES.items():
            folder = Path(scratch) / name.partition("-")[0]
            text = yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=110)
            (OUT / f"{name}.yml").write_text(text)
            local = yaml.safe_load(text)
            _localise(local, folder)
            made = folder / "out" / name
            options = MergeOptions(copy_tokenizer=False, lazy_unpickle=True)
            run_merge(MergeConfiguration.model_validate(local), str(made), options, config_source=text)
            merged = {n: t for file in made.glob("*.safetensors") for n, t in load_file(file).items()}
            save_file(dict(sorted(merged.items())), OUT / f"{name}.safetensors")
            print(name, len(merged), flush=True)


if __name__ == "__main__":
    main()
