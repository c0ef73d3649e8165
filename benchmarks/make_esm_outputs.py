"""`python benchmarks/make_esm_outputs.py CLONE` runs the official code of ESM, in a clone of kiddo127/ESM@fc82fe76.

It writes the outputs of its two merges, of vision and of language models, on the inputs `elementwise`: the cases
`esm-vision` and `esm-language`. The code of the clone is run as it is, but on the CPU.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens"
INPUTS = GOLDENS / "inputs" / "elementwise"
ROWS = 160  # of made-up inputs, which have the Gram matrices of the statistics
SCALE = 0.8
# The names by which the language code knows what it scales over layers.
LANGUAGE_NAMES = {
    "attn.in_proj_weight": "attention.self.query.weight",
    "attn.out_proj.weight": "attention.output.dense.weight",
    "mlp.c_fc.weight": "intermediate.dense.weight",
    "mlp.c_proj.weight": "output.dense.weight",
}
State = dict[str, torch.Tensor]


class Stub(ModuleType):
    """A module of which anything can be imported, for what the merge does not use."""

    def __getattr__(self, name: str) -> Any:
        return None


def module(path: Path, *stubs: str) -> Any:
    """A file of the clone, with stubs for what it imports."""
    sys.modules.update({name: Stub(name) for name in stubs})
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found
    spec.loader.exec_module(found)
    return found


def rows_of(gram: torch.Tensor) -> torch.Tensor:
    """ROWS inputs whose X^T X / ROWS is the Gram matrix."""
    energy, vectors = torch.linalg.eigh(gram.double())
    orthonormal = torch.linalg.qr(
        torch.randn(ROWS, len(gram), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q
    return (orthonormal * (ROWS * energy.clamp(min=0)).sqrt() @ vectors.T).float()


def directions(esd: Any, experts: list[State], base: State) -> list[dict[str, Any]]:
    """The official decomposition of the output shifts of each expert's layers that have a Gram matrix."""
    found: list[dict[str, Any]] = []
    for t, expert in enumerate(experts):
        found.append({})
        for name, gram in load_file(INPUTS / f"gram{t}.safetensors").items():
            energy, vectors = esd(rows_of(gram) @ (expert[name] - base[name]).T)
            found[t][name] = {"eigenvalues": energy, "eigenvectors": vectors}
    return found


def vision(clone: Path, experts: list[State], base: State) -> State:
    folder = clone / "ESM-ViT"
    packages = ["src", "src.models", "src.datasets", "src.utils"]
    modules = [
        "models.task_vectors",
        "models.heads",
        "models.modeling",
        "datasets.registry",
        "datasets.common",
    ]
    modules = [f"src.{name}" for name in (*modules, "utils.variables_and_paths")]
    esd = module(folder / "essential_subspace_decomposition.py", *packages, *modules)._compute_esd
    esm_merge = module(folder / "src" / "utils" / "esm_utils.py").esm_merge
    tasks = {t: SimpleNamespace(vector={n: e[n] - base[n] for n in base}) for t, e in enumerate(experts)}
    config = SimpleNamespace(DATASETS=list(tasks), device="cpu")
    found = esm_merge(tasks, config, None, dict(enumerate(directions(esd, experts, base))))
    return {name: base[name] + update for name, update in found.items()}


def language(clone: Path, experts: list[State], base: State) -> State:
    folder = clone / "ESM-RoBERTa"
    utils = Stub("utils")
    utils.args_inspector = lambda function: function
    sys.modules["utils"] = utils
    param = module(folder / "param.py", "sparsify").param
    esd = module(folder / "essential_subspace_decomposition.py", "eval").get_principal_direction_svd
    method = module(folder / "merge.py").MergingMethod([], [])

    def official(name: str) -> str:
        for ours, theirs in LANGUAGE_NAMES.items():
            name = name.replace(ours, theirs)
        return name

    def renamed(state: dict[str, Any]) -> dict[str, Any]:
        return {official(name): value for name, value in state.items()}

    shifts = {str(t): renamed(found) for t, found in enumerate(directions(esd, experts, base))}
    tasks = {str(t): param(renamed(expert)) for t, expert in enumerate(experts)}
    merged = method.esm(param(renamed(base)), tasks, scaling=SCALE, principal_direction_dict=shifts)
    return {name: merged[official(name)] for name in base}


def main(clone: Path) -> None:
    torch.Tensor.cuda = lambda self, *_: self
    base = load_file(INPUTS / "base.safetensors")
    experts = [load_file(INPUTS / f"expert{t}.safetensors") for t in range(4)]
    cases = {case["case"]: case for case in json.loads((GOLDENS / "cases.json").read_text())["cases"]}
    for name, function in (("esm-vision", vision), ("esm-language", language)):
        merged = function(clone, experts, base)
        kept = {key: merged[key].contiguous() for key in cases[name]["expected_keys"]}
        save_file(kept, GOLDENS / cases[name]["expected"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
