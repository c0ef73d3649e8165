"""Classifiers with a head each go through the whole pipeline, whatever library made them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import classifier_workspace as made
import numpy as np
import pytest
import torch
from checkpoints import refused
from classifier_workspace import CLASSES, SIZE, N, of_images, of_texts
from ruamel.yaml import YAML
from safetensors.torch import load_file
from toy_workspace import run_all

from mergeline.merging.export import export_task
from mergeline.merging.verify import verify
from mergeline.tasks.dvc_yaml import dvc_yaml
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.workspace import Workspace

IMAGES = {
    "transformers_vit": (made.vit_of_transformers, {}),
    "transformers_resnet": (made.resnet_of_transformers, {}),
    "timm_vit": (made.vit_of_timm, {}),
    "timm_convnext": (made.convnext_of_timm, {"image_size": 2 * SIZE}),
    "torchvision_resnet": (made.resnet_of_torchvision, {"model": "torchvision/resnet18"}),
}
TEXTS = {"bert": made.bert, "roberta": made.roberta, "gpt2": made.gpt2}


def board(root: Path) -> dict[str, Any]:
    return json.loads((root / "build/leaderboard/leaderboard.json").read_text())


def images(task: str, split: str) -> torch.Tensor:
    """The images of a task, as the helper drew them, from -1 to 1 (N, 3, SIZE, SIZE)."""
    x = np.load(f"build/data/{task}/{split}_x.npy")
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if k == "torchvision_resnet" else []) for k in IMAGES]
)
def test_image_classifiers_go_through_the_whole_pipeline(kind, tmp_path, monkeypatch):
    build, more = IMAGES[kind]
    root = of_images(tmp_path / "work", build, **more)
    monkeypatch.chdir(root)
    run_all(root)
    rows = {row["name"]: row for row in board(root)["rows"]}
    assert rows.keys() == {"base", "experts", "average", "cart"}
    assert all(set(row["tasks"]) == set(CLASSES) for row in rows.values())
    heads = sorted(path.name for path in (root / "build/merges/cart/heads").glob("*.safetensors"))
    assert heads == ["a.safetensors", "b.safetensors", "c.safetensors"]
    for task, classes in CLASSES.items():
        head = load_file(root / f"build/merges/cart/heads/{task}.safetensors")
        assert {len(tensor) for name, tensor in head.items() if name.endswith("bias")} == {classes}


def opened_by_transformers(folder: Path) -> Any:
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder)
    return lambda x: model(x).logits


def opened_by_timm(folder: Path) -> Any:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize(
    "build, opened",
    [(made.vit_of_transformers, opened_by_transformers), (made.vit_of_timm, opened_by_timm)],
    ids=["transformers", "timm"],
)
def test_what_is_measured_is_what_the_library_gives_for_the_exported_task(
    build, opened, tmp_path, monkeypatch
):
    from safetensors.numpy import load_file as load_arrays

    root = of_images(tmp_path / "work", build)
    monkeypatch.chdir(root)
    run_all(root)
    for merge in ("average", "cart"):
        answers = load_arrays(root / f"build/evaluations/{merge}/predictions.safetensors")
        for task in CLASSES:
            export_task(root / f"build/merges/{merge}", task, tmp_path / merge / task)
            with torch.inference_mode():
                found = opened(tmp_path / merge / task)(images(task, "test")).argmax(1).numpy()
            assert np.array_equal(answers[f"test/{task}"], found)
    assert "bit-identical" in verify(root / "build/merges/cart")


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("kind", TEXTS)
def test_text_classifiers_go_through_the_whole_pipeline(kind, tmp_path, monkeypatch):
    from safetensors.numpy import load_file as load_arrays
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    root = of_texts(tmp_path / "work", TEXTS[kind])
    monkeypatch.chdir(root)
    run_all(root)
    rows = {row["name"]: row for row in board(root)["rows"]}
    answers = load_arrays(root / "build/evaluations/cart/predictions.safetensors")
    for task in CLASSES:
        export_task(root / "build/merges/cart", task, tmp_path / task)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / task)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / task)
        texts = [json.loads(line)["text"] for line in open(root / f"data/{task}/test.jsonl")]
        with torch.inference_mode():
            found = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
        own = model.config.id2label  # of BERT alone, names that the data have, too
        labels = [int(own[label][1:]) if kind == "bert" else label for label in found]
        assert answers[f"test/{task}"].tolist() == labels
    assert rows["cart"].get("labels_by_name", []) == []
    assert (
        0.3 < rows["average"]["norm_ratio"] < 1
    )  # of the three experts' vectors, whatever prefix the base has


def test_classes_go_by_their_names_where_both_have_some(tmp_path, monkeypatch):
    from safetensors.numpy import load_file as load_arrays

    root = of_texts(tmp_path / "work", made.bert)
    monkeypatch.chdir(root)
    for task, classes in CLASSES.items():  # as another one numbered them
        path = root / f"in/{task}/config.json"
        config = json.loads(path.read_text())
        names = [f"C{i}" for i in reversed(range(classes))]
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        path.write_text(json.dumps(config))
    run_all(root)
    before = load_arrays(root / "build/evaluations/average/predictions.safetensors")
    rows = {row["name"]: row for row in board(root)["rows"]}
    assert rows["average"]["labels_by_name"] == [*CLASSES]
    for path in (root / "in").glob("?/config.json"):
        config = json.loads(path.read_text())
        config["id2label"] = {i: f"LABEL_{i}" for i in range(len(config["id2label"]))}
        path.write_text(json.dumps(config))
    run_all(root)
    after = load_arrays(root / "build/evaluations/average/predictions.safetensors")
    for task, classes in CLASSES.items():
        assert (before[f"test/{task}"] == classes - 1 - after[f"test/{task}"]).all()


@pytest.mark.parametrize("kind", ["timm_vit", "bert"])
def test_of_some_examples_the_answers_are_those_of_all(kind, tmp_path, monkeypatch):
    root = (
        of_texts(tmp_path / "work", TEXTS[kind])
        if kind in TEXTS
        else of_images(tmp_path / "work", IMAGES[kind][0])
    )
    monkeypatch.chdir(root)
    workspace = run_all(root)
    modality, build = workspace.modality, root / "build"
    assert modality.in_parts(workspace.params)
    evaluator: Any = modality.evaluator(workspace.params, build, build / "checkpoints/base")
    merge = build / "merges/cart"
    whole = evaluator.evaluate(merge, ["val"], list(CLASSES)).answers
    part = {task: np.arange(i, evaluator.count("val", task), 3) for i, task in enumerate(CLASSES)}
    found = evaluator.evaluate_part(merge, "val", part).answers
    for task, which_n in part.items():
        assert len(found[f"val/{task}"]) == len(whole[f"val/{task}"])
        assert np.array_equal(found[f"val/{task}"][which_n], whole[f"val/{task}"][which_n])


@pytest.mark.slow
def test_points_of_classifiers_are_raced(tmp_path, monkeypatch):
    root = of_texts(tmp_path / "work", made.bert)
    monkeypatch.chdir(root)
    file = root / "params.yaml"
    space = {"rank": [0.1, 0.5], "scale": [0.5, 1.0, 30.0]}
    search = {"sampler": "random", "budget": 6, "race": {"looks": 1, "error": 0.4}, "space": space}
    content = YAML(typ="safe").load(file)
    YAML().dump({**content, "merges": {"cart": {"method": "cart", "search": search}}}, file)
    run_all(root)
    found = json.loads((root / "build/search/cart.json").read_text())
    whole = found["search"]["examples_of_a_point"]
    assert len(found["points"]) == 6
    assert all((point["examples"] < whole) == point["dropped"] for point in found["points"])


def test_a_head_of_one_number_is_measured_by_spearman(tmp_path, monkeypatch):
    from scipy.stats import spearmanr

    monkeypatch.setattr(made, "CLASSES", {"a": 1, "b": 1, "c": 1})
    columns = {task: {"text": "text", "label": "score", "target": "number"} for task in "abc"}
    root = of_texts(tmp_path / "work", made.bert, columns=columns)
    for path in (root / "data").rglob("*.jsonl"):
        rows = [json.loads(line) for line in open(path)]
        path.write_text("".join(json.dumps({**row, "score": len(row["text"]) / 7}) + "\n" for row in rows))
    monkeypatch.chdir(root)
    workspace = run_all(root)
    assert not workspace.modality.in_parts(workspace.params)  # a rank is among all examples
    from safetensors.numpy import load_file as load_arrays

    answers = load_arrays(root / "build/evaluations/average/predictions.safetensors")
    rows = {row["name"]: row for row in board(root)["rows"]}
    for task in "abc":
        gold = np.load(root / f"build/data/{task}/test_y.npy")
        rho = spearmanr(answers[f"test/{task}"], gold).statistic
        assert rows["average"]["tasks"][task]["accuracy"] == pytest.approx(rho, abs=1e-9)


@pytest.mark.usefixtures("anywhere")
def test_the_fisher_information_of_a_head_of_one_number(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "CLASSES", {"a": 1, "b": 1, "c": 1})
    columns = {task: {"text": "text", "label": "label", "target": "number"} for task in "abc"}
    root = of_texts(tmp_path / "work", made.bert, columns=columns)
    text = YAML(typ="safe").load((root / "params.yaml").read_text())
    text |= {"merges": {"fisher": {"method": "fisher"}}, "statistics": {"fisher": {"examples": 4}}}
    with open(root / "params.yaml", "w") as file:
        YAML().dump(text, file)
    for path in (root / "data").rglob("*.jsonl"):
        rows = [json.loads(line) for line in open(path)]
        path.write_text("".join(json.dumps({**row, "label": i / 7}) + "\n" for i, row in enumerate(rows)))
    monkeypatch.chdir(root)
    run_all(root)
    [*files] = (root / "build/statistics/fisher").rglob("*.safetensors")
    assert len(files) == 3
    for file in files:
        assert any(tensor.any() for tensor in load_file(file).values()), file


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("build", [made.vit_of_timm, made.vit_of_transformers], ids=["timm", "transformers"])
def test_learned_methods_are_fitted_to_classifiers(build, tmp_path, monkeypatch):
    """transformers has other names for a ViT's tensors while it runs than its checkpoints have."""
    merges = {
        "solved": {"method": "progressive_least_squares", "params": {"inner": "average"}, "examples": 8},
        "adamerging": {"method": "adamerging", "params": {"iterations": 2}, "examples": 8},
        "regmean": {"method": "regmean"},
        "average": {"method": "average"},
    }
    changed = {"merges": merges, "statistics": {"gram": {"examples": 8}, "fisher": {"examples": 8}}}
    root = of_images(tmp_path / "work", build, fit=True, changed=changed)
    monkeypatch.chdir(root)
    run_all(root)
    rows = {row["name"]: row for row in board(root)["rows"]}
    assert "8 unlabelled" in rows["solved"]["seen"]["words"]
    states = {name: load_file(root / f"build/merges/{name}/model.safetensors") for name in merges}
    assert len({frozenset(state) for state in states.values()}) == 1
    matrices = [
        n for n, t in states["average"].items() if t.ndim == 2 and re.search(r"\d\..*(weight|kernel)$", n)
    ]
    assert len(matrices) >= 8
    for name in matrices:
        average = states["average"][name]
        assert not torch.equal(states["solved"][name], average), name
        assert not torch.equal(states["regmean"][name], average), name


def test_what_is_collected_of_a_vit_of_transformers_has_the_names_of_its_file(tmp_path, monkeypatch):
    changed: dict[str, Any] = {"statistics": {"fisher": {"labels": "true"}}}
    changed["merges"] = {"fisher": {"method": "fisher"}}
    root = of_images(tmp_path / "work", made.vit_of_transformers, fit=True, changed=changed)
    monkeypatch.chdir(root)
    run_all(root)
    [file] = (root / "build/statistics/fisher").rglob("a*.safetensors")
    found, expert = load_file(file), load_file(root / "in/a/model.safetensors")
    name = "vit.encoder.layer.0.attention.attention.query.weight"
    assert found.keys() <= expert.keys() and found[name].shape == expert[name].shape and found[name].any()
    # Squares of gradients, by autograd through the model that transformers opens.
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(root / "in/a").eval()
    weight = model.vit.layers[0].attention.q_proj.weight
    x, total = images("a", "fit"), torch.zeros_like(weight)
    for image in x:
        logits = model(image[None]).logits[0].log_softmax(0)
        for logit in logits:
            [gradient] = torch.autograd.grad(logit, weight, retain_graph=True)
            total += logit.exp().detach() * gradient**2
    assert torch.allclose(found[name].float(), total / len(x), rtol=1e-3, atol=1e-9)


def test_dvc_yaml_has_the_stages_of_both(tmp_path):
    for name in ("image_classification", "text_classification"):
        found = YAML(typ="safe").load(dvc_yaml(modality_named(name), "."))["stages"]
        assert found["data-file"]["foreach"] == f"${{{name}.data.files}}"
        assert f"{name}.heads" in found["merge"]["do"]["params"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"image_size": SIZE * 2}, ("set image_size: 16",)),
        ({"heads": ["clasifier.*"]}, ("no tensor matches", "did you mean")),
        ({"model": "timm/no_such_model"}, ("timm has no model", "no_such_model")),
    ],
)
def test_settings_that_do_not_fit_the_models_are_refused(change, said, tmp_path, monkeypatch):
    root = of_images(tmp_path / "work", made.vit_of_transformers, **change)
    monkeypatch.chdir(root)
    with refused(*said):
        run_all(root)


def test_a_label_beyond_the_head_is_refused(tmp_path, monkeypatch):
    root = of_images(tmp_path / "work", made.vit_of_transformers)
    arrays = dict(np.load(root / "data/a.npz"))
    np.savez(root / "data/a.npz", **{**arrays, "test_y": arrays["test_y"] + 1})
    monkeypatch.chdir(root)
    with refused("a: label 3 in test", "has 3 classes"):
        run_all(root)


def test_a_dataset_without_labels_and_models_without_a_processor_are_refused(tmp_path, monkeypatch):
    root = of_images(tmp_path / "work", made.vit_of_transformers)
    for path in (root / "in").glob("*/preprocessor_config.json"):
        path.unlink()
    monkeypatch.chdir(root)
    with refused("has no preprocessor_config.json", "say mean and std"):
        run_all(root)
    arrays = dict(np.load(root / "data/a.npz"))
    np.savez(root / "data/a.npz", **{key: value for key, value in arrays.items() if key != "test_y"})
    with refused("'test_y' is missing"):
        run_all(root)


def test_texts_without_labels_a_column_or_a_tokenizer_are_refused(tmp_path, monkeypatch):
    root = of_texts(tmp_path / "work", made.gpt2)
    monkeypatch.chdir(root)
    for path in (root / "in").glob("*/tokenizer*.json"):
        path.unlink()
    with refused("has no tokenizer"):
        run_all(root)
    rows = [{"text": "w1", "label": -1}] * N
    (root / "data/a/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with refused("row 0 of test has the label -1"):
        run_all(root)
    (root / "data/a/test.jsonl").write_text(json.dumps({"text": "w1"}) + "\n")
    with refused("row 0 of test has no 'label'"):
        run_all(root)


def test_a_task_that_is_no_expert_s_is_refused_by_its_line(tmp_path):
    root = of_images(tmp_path / "work", made.vit_of_transformers)
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("c: data/c.npz", "d: data/c.npz"))
    with refused("params.yaml:", "'d' is no expert's", "suites"):
        _ = Workspace(root / "params.yaml").stages


def as_lora(build: Any, kind: str, targets: list[str], whole: list[str], merged: bool) -> Any:
    """What makes a base, and LoRA of it with a head of its own; merged: as PEFT puts it into the base."""
    import transformers
    from peft import LoraConfig, get_peft_model

    def made_of(folder: Path, classes: int | None, seed: int) -> None:
        build(folder, None, 0)
        if classes is None:
            return
        torch.manual_seed(seed)
        model = getattr(transformers, kind).from_pretrained(
            folder, num_labels=classes, ignore_mismatched_sizes=True
        )
        for file in folder.iterdir():
            file.unlink()
        config = LoraConfig(
            r=2, lora_alpha=0.2, target_modules=targets, modules_to_save=whole, init_lora_weights=False
        )
        adapted = get_peft_model(model, config)
        (adapted.merge_and_unload() if merged else adapted).save_pretrained(folder)

    return made_of


TEXT, IMAGE = "AutoModelForSequenceClassification", "AutoModelForImageClassification"
ADAPTERS = {
    "bert": (of_texts, made.bert, TEXT, ["query", "value"], ["classifier", "pooler"]),
    "roberta": (of_texts, made.roberta, TEXT, ["query"], ["classifier"]),
    "gpt2": (of_texts, made.gpt2, TEXT, ["c_attn"], ["score"]),
    "vit": (of_images, made.vit_of_transformers, IMAGE, ["q_proj", "fc1"], ["classifier"]),
    "resnet": (of_images, made.resnet_of_transformers, IMAGE, ["layer.0.convolution"], ["classifier"]),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_with_a_head_each_are_what_peft_puts_into_the_base(case, tmp_path, monkeypatch):
    import transformers

    workspace, build, kind, targets, whole = ADAPTERS[case]
    roots = {}
    for merged in (True, False):
        roots[merged] = workspace(tmp_path / str(merged), as_lora(build, kind, targets, whole, merged))
        monkeypatch.chdir(roots[merged])
        run_all(roots[merged])
    states = {
        merged: load_file(root / "build/merges/cart/model.safetensors") for merged, root in roots.items()
    }
    assert states[False].keys() == states[True].keys()
    assert all(torch.allclose(states[False][n], t, atol=1e-5) for n, t in states[True].items())
    means = [{row["name"]: row["mean"] for row in board(root)["rows"]} for root in roots.values()]
    assert means[0].keys() == means[1].keys()
    export_task(roots[False] / "build/merges/cart", "b", tmp_path / "b")
    model = getattr(transformers, kind).from_pretrained(tmp_path / "b")
    assert model.config.num_labels == CLASSES["b"]
    head = load_file(roots[True] / "build/merges/cart/heads/b.safetensors")
    held = load_file(tmp_path / "b/model.safetensors")
    assert head and all(torch.equal(held[name], tensor) for name, tensor in head.items())


def test_what_learns_of_examples_reads_adapters_with_a_head_each(tmp_path, monkeypatch):
    merges = {
        "solved": {"method": "progressive_least_squares", "params": {"inner": "average"}, "examples": 8},
        "regmean": {"method": "regmean"},
    }
    changed = {"merges": merges, "statistics": {"gram": {"examples": 8}}}
    found = {}
    for merged in (True, False):
        build = as_lora(made.vit_of_transformers, IMAGE, ["q_proj", "fc1"], ["classifier"], merged)
        root = of_images(tmp_path / str(merged), build, fit=True, changed=changed)
        monkeypatch.chdir(root)
        run_all(root)
        found[merged] = {name: load_file(root / f"build/merges/{name}/model.safetensors") for name in merges}
    for name in merges:
        for tensor, value in found[True][name].items():
            assert torch.allclose(found[False][name][tensor], value, atol=1e-3), (name, tensor)


def test_adapters_of_another_base_are_refused(tmp_path, monkeypatch):
    build = as_lora(made.bert, TEXT, ["query"], ["classifier"], merged=False)
    root = of_texts(tmp_path / "work", build)
    for file in (root / "in/base").iterdir():
        file.unlink()
    made.gpt2(root / "in/base", None, 0)
    monkeypatch.chdir(root)
    with refused("does not fit the base", "is not there"):
        run_all(root)
