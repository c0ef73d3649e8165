"""Write the test data of tests/flows/test_moe_command.py: what mergekit-moe makes of a tiny Llama and prompts.

    PEERS/mergekit/bin/python make_mergekit_moe_outputs.py      with mergekit 0.1.5; see setup_peers.sh

Fills tests/goldens/mergekit_moe.safetensors: the base (`base/NAME`), the router's rows by gate_mode
(`GATE_MODE/layers.L`, experts, then the shared one), and the names that each layout has (`names/ARCHITECTURE`, UTF-8).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
from small_language_model import save_model  # noqa: E402

OUT = ROOT / "tests" / "goldens" / "mergekit_moe.safetensors"
SIZES = {"hidden_size": 16, "intermediate_size": 24}
PROMPTS = [(["w1 w2 w3", "w4 w5 w6"], ["w9"]), (["w5 w6"], []), (["w7 w8"], [])]
# Prompts of one length in each list: mergekit lets padding count.
MODES = ("hidden", "hidden_avg", "cheap_embed")


def made(folder: Path, mode: str, architecture: str, shared: bool) -> dict[str, torch.Tensor]:
    """What mergekit-moe writes of base, one and two."""
    listed: list[dict[str, Any]] = [
        {"source_model": str(folder / name), "positive_prompts": positive, "negative_prompts": negative}
        for name, (positive, negative) in zip(("one", "two", "base"), PROMPTS)
    ]
    config: dict[str, Any] = {
        "base_model": str(folder / "base"), "gate_mode": mode, "dtype": "float32", "experts": listed[:2],
        "architecture": architecture,
    }  # fmt: skip
    if shared:
        own = listed[2] if architecture == "qwen" else {"source_model": listed[2]["source_model"]}
        config["shared_experts"] = [own]
    file, out = folder / "moe.yml", folder / f"out-{mode}-{architecture}"
    file.write_text(yaml.safe_dump(config))
    command = Path(sys.executable).with_name("mergekit-moe")
    subprocess.run([str(command), str(file), str(out), "--device", "cpu"], check=True)
    return load_file(out / "model.safetensors")


def main() -> None:
    found: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for seed, name in enumerate(("base", "one", "two")):
            save_model(folder / name, seed, **SIZES)
        found |= {f"base/{name}": t for name, t in load_file(folder / "base/model.safetensors").items()}
        for mode in MODES:
            held = made(folder, mode, "qwen", shared=True)
            for layer in range(2):
                before = f"model.layers.{layer}.mlp."
                rows = [held[f"{before}gate.weight"], held[f"{before}shared_expert_gate.weight"]]
                found[f"{mode}/layers.{layer}"] = torch.cat(rows)
            if mode == "cheap_embed":
                deepseek = made(folder, mode, "deepseek", shared=True)
                for architecture, names in (("qwen", held), ("deepseek", deepseek)):
                    text = "\n".join(sorted(names)).encode()
                    found[f"names/{architecture}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(found, OUT)


if __name__ == "__main__":
    main()
