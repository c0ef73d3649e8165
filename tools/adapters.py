"""Writes docs/adapters.md: every kind of adapter beside PEFT, the largest difference measured, or why it is refused.

python tools/adapters.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Iterator

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests" / "helpers"))

HEAD = """# Adapters

Written by `python tools/adapters.py`, not by hand: what Mergeline makes of an adapter and its base, beside PEFT's
`merge_and_unload`, on tiny models of the real classes, in float32. The difference is the largest of any entry.

An expert that is an adapter stands for its base as it changes it, block by block, whatever the method. What no weights
stand for, and what is not read, is refused by its name in one line.

## Kinds

| adapter | equal to PEFT; largest difference |
|---|---|
"""
REFUSED = """
## Refused

| adapter | the line |
|---|---|
"""
TAIL = """
## Tied embeddings

Where the base's output matrix is its embedding, PEFT wraps one of the two modules, and the other stays the base's:
the merge then has an output matrix of its own, `tie_word_embeddings` is false, and the plan says so. Rows of single
tokens, and what PEFT keeps tied (`ensure_weight_tying`, and both are in the file), stay tied. The reference is what
the adapted model computes: `merge_and_unload` of PEFT 0.21 adds LoRA of one of the two to both.

## Packed experts

`target_parameters` has the factors of all experts in two matrices. PEFT orders their columns by rank first, Unsloth by
expert first, and files do not say which: PEFT's order is read, and the recipe's `packing: unsloth` reads the other. The
plan says so. Experts may lie packed or one by one on disk.

## Classifiers

A classifier among `modules_to_save` is the expert's own head, also where the base has none, or one of other classes:
name it in `heads` ([classifiers.md](classifiers.md)). The trunk has the names that it has in the model with that head.

## Without a base

`mergeline extract-lora` of adapters alone, with `average`, `linear` or `task_arithmetic`, makes one adapter whose
factors stand one after the other (PEFT's `combination_type="cat"`): exact, and the ranks add up. `--rank cat` does the
same where there is a base. `mergeline merge` needs the base, but for soft prompts ([prompts.md](prompts.md)) and
singular values (below), which are merged as they lie.

## Singular values in the base's own basis (SVFit)

SVFit ([2409.05926](https://arxiv.org/abs/2409.05926)) trains the largest singular values of the base's matrices, and
leaves their vectors. No official code or format was found: the method is reconstructed from its description, and the
format is Mergeline's own, in the form of PEFT's folders. `adapter_model.safetensors` holds
`base_model.model.MODULE.svfit_values` (R,), the trained values in the order of the base's. In `adapter_config.json`
`peft_type` is `SVFIT`, and `base_digests` has of every MODULE `blake3:` and the BLAKE3 of the bytes of the base's
tensor, in its dtype: the vectors are not stored, but those of this tensor. Another base is refused. So is one of
whose leading singular values two are equal (to 1e-8 of the largest), for their vectors are not unique; the sign of a
pair of vectors does not matter. Each matrix is decomposed whole, in float64 on one core, once for all adapters of a
base: `plan` counts the memory.

With a base, such an adapter is an expert as any other, and `extract-lora` makes LoRA of merges. Without one, or with
one that holds the values that training began with, `mergeline merge` merges the vectors of values by any method, in
the basis that all share (`base_digests` must be the same), and writes such an adapter.

## Adapters of components

With a pipeline of diffusers as base, an adapter of PEFT changes the component that its folder is called as (`unet`,
`transformer`, `text_encoder`, ...); if it is called otherwise, the one whose class its `auto_mapping` names, or else
the one that it fits. A folder that holds such folders, as trainings of UNet and text encoder together leave, is one
expert. The rest of the pipeline is as in the base, and the plan says which component is changed. Refused: an adapter
that fits no component, or several that are alike.

## Single files of diffusion models

`lora_unet_....lora_down.weight` (sd-scripts, with the layers of SDXL and FLUX as their own code calls them),
`unet....lora_A.weight` and `unet....lora.down.weight` (diffusers, for SDXL, SD3 and FLUX) are merged into the
component whose folder is the base: `unet`, `transformer`, `text_encoder` or `text_encoder_2`. Parts for others are
named by the plan. Each layer has its own `alpha`; diffusers 0.42 gives layers of attention the most frequent one.
LyCORIS's LoHa (`hada_...`), LoKr (`lokr_...`) and `lora_mid`, with or without cores for convolutions, are read with the
same names, scaled by alpha over rank once, as when LyCORIS runs them. Its other kinds (`diff`, `oft_...`, DoRA of LoHa
and LoKr) are refused.
"""


def main() -> None:
    import warnings

    import adapter_kinds
    import peft_adapters

    warnings.simplefilter("ignore")
    peft_adapters.transformers.logging.set_verbosity_error()
    rows = "".join(f"| {case} | {difference:.0e} |\n" for case, difference in _measured(adapter_kinds.KINDS))
    lines = "".join(f"| {case} | {line} |\n" for case, line in _refused(adapter_kinds.REFUSED))
    (REPOSITORY / "docs" / "adapters.md").write_text(HEAD + rows + REFUSED + lines + TAIL)


def _measured(kinds: dict) -> Iterator[tuple[str, float]]:
    import peft
    from adapter_kinds import maker
    from peft_adapters import save_any
    from safetensors.torch import load_file

    from mergeline.merging import merge

    for case, (model, kind, config) in kinds.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            maker(model)().save_pretrained(folder / "base")
            adapted = save_any(maker(model)(), folder / "lora", getattr(peft, f"{kind}Config")(**config))
            adapted.merge_and_unload().save_pretrained(folder / "peft")
            experts = {"a": folder / "lora"}
            merge({"method": "average", "base": folder / "base", "experts": experts}, folder / "out")
            ours, theirs = (load_file(folder / f / "model.safetensors") for f in ("out", "peft"))
            yield case, max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def _refused(cases: dict) -> Iterator[tuple[str, str]]:
    import json

    import peft
    from adapter_kinds import maker
    from peft_adapters import llama, save_any

    from mergeline.merging.engine.planning import make_plan

    def line(folder: Path) -> str:
        plan = make_plan({"method": "average", "base": folder / "base", "experts": {"a": folder / "lora"}})
        return plan.problems[0].partition("adapter_config.json: ")[2].replace("|", "\\|")

    for case, (model, kind, config, _) in cases.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            maker(model)().save_pretrained(folder / "base")
            save_any(maker(model)(), folder / "lora", getattr(peft, f"{kind}Config")(**config))
            yield case, line(folder)
    changes = {
        "aLoRA": {"alora_invocation_tokens": [1]}, "prompts": {"peft_type": "PREFIX_TUNING"},
        "other kinds": {"peft_type": "BOFT"}, "layer_replication": {"layer_replication": [[0, 1]]},
        "QALoRA": {"use_qalora": True}, "KaSA": {"kasa_config": {"x": 1}}, "VeLoRA": {"velora_config": {"x": 1}},
        "MonteCLoRA": {"monteclora_config": {"x": 1}}, "BD-LoRA": {"use_bdlora": {"nblocks": 2}},
        "Arrow": {"arrow_config": {"x": 1}}, "PiSSA and others that change the base": {"init_lora_weights": "pissa"},
    }  # fmt: skip
    for case, change in changes.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            llama().save_pretrained(folder / "base")
            save_any(llama(), folder / "lora", peft.LoraConfig(r=2, target_modules=["q_proj"]))
            path = folder / "lora" / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
            yield case, line(folder)


if __name__ == "__main__":
    main()
