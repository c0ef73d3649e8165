"""Adapters of every kind that is read: what PEFT's merge_and_unload makes of tiny real models, to 1e-6."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_kinds import EXPERTS, KINDS, REFUSED, maker
from checkpoints import refused
from peft_adapters import mixtral, peft, save_any
from places import REPOSITORY
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs


@pytest.mark.parametrize("case", KINDS)
def test_an_adapter_of_any_kind_is_what_peft_merges(case, tmp_path):
    model, kind, config = KINDS[case]
    make = maker(model)
    make().save_pretrained(tmp_path / "base")
    adapted = save_any(make(), tmp_path / "lora", getattr(peft, f"{kind}Config")(**config))
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    recipe = {"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "lora"}}
    merge(recipe, tmp_path / "out")
    found, expected, before = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "peft", "base"))
    assert found.keys() == expected.keys()
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert changed and max((found[n] - before[n]).abs().max() for n in changed) > 1e-3
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("case", KINDS)
def test_any_pieces_of_any_kind_give_the_same_bits(case, tmp_path, monkeypatch):
    monkeypatch.setattr("mergeline.merging.checkpoints.adapters.tensor._BLOCK", 64)
    model, kind, config = KINDS[case]
    make = maker(model)
    make().save_pretrained(tmp_path / "base")
    save_any(make(), tmp_path / "lora", getattr(peft, f"{kind}Config")(**config))
    plan = make_plan({"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "lora"}})
    plan.check()
    entry = max((e for e in plan.entries if e.sources["a"] is not e.base), key=lambda e: e.spec.nbytes)
    with FileInputs(plan) as source:
        length = source.length("a", entry.name)
        whole = source.stored("a", entry.name, 0, length)
        for step in (97, length // 3 + 1):
            pieces = [
                source.stored("a", entry.name, i, min(i + step, length)) for i in range(0, length, step)
            ]
            assert torch.equal(torch.cat(pieces), whole)


def test_factors_of_packed_experts_lie_as_is_said(tmp_path):
    """The same product from columns by expert, as Unsloth packs them."""
    mixtral().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=EXPERTS)
    save_any(mixtral(), tmp_path / "lora", config)
    recipe = {"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "lora"}}
    assert any("packing: unsloth" in warning for warning in make_plan(recipe).warnings)
    merge(recipe, tmp_path / "one")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    parts = load_file(file)
    for name, value in parts.items():
        if "lora_B" in name:
            parts[name] = value.reshape(len(value), 3, 4).transpose(1, 2).reshape(len(value), -1).contiguous()
    save_file(parts, file)
    merge({**recipe, "packing": "unsloth"}, tmp_path / "two")
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_by_its_name(case, tmp_path):
    model, kind, config, line = REFUSED[case]
    make = maker(model)
    make().save_pretrained(tmp_path / "base")
    save_any(make(), tmp_path / "lora", getattr(peft, f"{kind}Config")(**config))
    with refused("a: ", line):
        merge(
            {"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "lora"}},
            tmp_path / "out",
        )
    assert not Path(tmp_path / "out").exists()


def test_the_table_of_the_docs_has_every_kind():
    """python tools/adapters.py writes it, and measures."""
    text = (REPOSITORY / "docs" / "adapters.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    read = {row[0].removeprefix("| "): row[1].removesuffix(" |") for row in rows}
    assert {*KINDS, *REFUSED} <= read.keys()
    assert all(float(read[kind].rpartition(" ")[2]) <= 1e-6 for kind in KINDS)
