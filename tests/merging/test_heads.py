"""Experts with heads of their own: the trunk is merged, the heads lie beside it, and go back onto it."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import refused
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.export import export_task
from mergeline.merging.verify import verify

transformers = pytest.importorskip("transformers")

CLASSES = {"a": 3, "b": 5}
HEADS = ["classifier.*"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A ViT without a head and two fine-tunes of it, for 3 and 5 classes, as transformers saves them."""
    root = tmp_path_factory.mktemp("family")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
    torch.manual_seed(0)
    trunk = transformers.ViTModel(config, add_pooling_layer=False)
    trunk.save_pretrained(root / "base")
    for name, count in CLASSES.items():
        labels = {i: f"{name}{i}" for i in range(count)}
        model = transformers.ViTForImageClassification.from_pretrained(
            root / "base", num_labels=count, id2label=labels, label2id={v: k for k, v in labels.items()}
        )
        with torch.no_grad():
            for tensor in model.parameters():
                tensor += 0.1 * torch.randn_like(tensor)
        model.save_pretrained(root / name)
    return root


def recipe(family, **more):
    experts = {name: family / name for name in CLASSES}
    return {"method": "linear", "base": family / "base", "experts": experts, "heads": HEADS, **more}


def test_the_trunk_is_merged_and_every_head_lies_beside_it_bit_for_bit(family, tmp_path):
    merge(recipe(family), tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    experts = {name: load_file(family / name / "model.safetensors") for name in CLASSES}
    assert not any(name.startswith("classifier") for name in merged)
    for name, tensor in merged.items():
        expected = (experts["a"][name].double() + experts["b"][name].double()) / 2
        assert torch.allclose(tensor.double(), expected, atol=1e-6)
    for name in CLASSES:
        head = load_file(tmp_path / f"out/heads/{name}.safetensors")
        assert sorted(head) == ["classifier.bias", "classifier.weight"]
        assert all(torch.equal(tensor, experts[name][key]) for key, tensor in head.items())
        told = json.loads((tmp_path / f"out/heads/{name}.json").read_text())
        assert told["id2label"] == {str(i): f"{name}{i}" for i in range(CLASSES[name])}
    assert "`heads/` holds the head of each expert: a, b" in (tmp_path / "out/README.md").read_text()


def test_an_exported_task_opens_in_transformers_as_the_trunk_under_its_head(family, tmp_path):
    merge(recipe(family), tmp_path / "out")
    for name, count in CLASSES.items():
        export_task(tmp_path / "out", name, tmp_path / name)
        model, told = transformers.AutoModelForImageClassification.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.config.num_labels == count and model.config.id2label[0] == f"{name}0"
        own = load_file(family / name / "model.safetensors")
        assert torch.equal(model.classifier.weight, own["classifier.weight"])
        merged = load_file(tmp_path / "out/model.safetensors")
        assert torch.equal(model.vit.layernorm.weight, merged["vit.layernorm.weight"])


def test_merge_and_export_are_verified_with_their_heads(family, tmp_path):
    merge(recipe(family), tmp_path / "out")
    export_task(tmp_path / "out", "a", tmp_path / "a")
    assert "bit-identical to a new merge" in verify(tmp_path / "out")
    assert "bit-identical to what its merge exports" in verify(tmp_path / "a")
    file = tmp_path / "out/heads/a.safetensors"
    changed = load_file(file)
    save_file({name: tensor + 1 for name, tensor in changed.items()}, file)
    with refused("heads/a.safetensors", "changed after the merge"):
        verify(tmp_path / "out")


def test_a_head_of_the_base_stays_in_the_merge_and_leaves_with_the_export(family, tmp_path):
    base = transformers.ViTForImageClassification.from_pretrained(family / "base", num_labels=7)
    base.save_pretrained(tmp_path / "base")
    merge(recipe(family, base=tmp_path / "base"), tmp_path / "out")
    assert len(load_file(tmp_path / "out/model.safetensors")["classifier.bias"]) == 7
    export_task(tmp_path / "out", "b", tmp_path / "b")
    assert len(load_file(tmp_path / "b/model.safetensors")["classifier.bias"]) == 5


def test_a_merge_with_heads_is_made_again_over_an_earlier_one_but_not_over_what_was_added(family, tmp_path):
    merge(recipe(family), tmp_path / "out")
    merge(recipe(family, params={"weights": [1, 2]}), tmp_path / "out")
    (tmp_path / "out/heads/mine.txt").write_text("mine")
    with refused("holds 'heads/mine.txt'"):
        merge(recipe(family), tmp_path / "out")


def test_plan_says_what_becomes_of_heads(family):
    plan = make_plan(recipe(family))
    assert not plan.problems
    assert any(
        "classifier.bias, classifier.weight of each expert lie beside the merge" in w for w in plan.warnings
    )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"heads": ["clasifier.*"]}, ("heads: no tensor matches", "did you mean")),
        ({"heads": []}, ("the base lacks 2 tensor(s)", "classifier")),
    ],
)
def test_heads_that_are_not_there_or_not_named_are_refused(family, tmp_path, change, said):
    with refused(*said):
        merge(recipe(family, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_has_no_place_for_heads(family, tmp_path):
    with refused("lie beside weights in a folder"):
        merge(recipe(family), tmp_path / "out.safetensors")


def test_an_export_names_what_there_is(family, tmp_path):
    merge(recipe(family), tmp_path / "out")
    with refused("has no head of 'c'", "a, b"):
        export_task(tmp_path / "out", "c", tmp_path / "c")
    with refused("has no head of 'a'"):
        export_task(family / "a", "a", tmp_path / "c")
    with refused("holds the input"):
        export_task(tmp_path / "out", "a", tmp_path / "out", force=True)


def test_the_command_line_merges_with_heads_and_exports(family, tmp_path, mergeline):
    experts = [f"--expert={name}={family / name}" for name in CLASSES]
    argv = ["merge", "--method", "task_arithmetic", "--base", family / "base", *experts, "--heads", *HEADS]
    assert mergeline(*argv, "--out", tmp_path / "out").code == 0
    done = mergeline("export", tmp_path / "out", "--task", "a", "--out", tmp_path / "a")
    assert done.code == 0 and "sha256:" in done.out
    assert Path(tmp_path / "a/config.json").exists()


def test_a_family_with_heads_is_inspected_without_them(family, mergeline):
    experts = [f"--expert={name}={family / name}" for name in CLASSES]
    done = mergeline("inspect", "--base", family / "base", *experts)
    assert done.code == 2 and "keep every expert's own with --heads 'classifier.*'" in done.err
    done = mergeline("inspect", "--base", family / "base", *experts, "--heads", "classifier.*", "--json")
    found = json.loads(done.out)
    assert done.code == 0 and not any("classifier" in row["tensor"] for row in found["by_tensor"])
