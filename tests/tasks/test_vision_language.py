"""Models of images and texts: what they write whatever the batches, their merges, the pipeline, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import refused
from fresh_workspace import fresh_workspace
from PIL import Image
from ruamel.yaml import YAML
from safetensors.numpy import load_file
from small_vision_language import (
    CHAT,
    COLOURS,
    image,
    save,
    save_idefics3,
    save_image_table,
    save_llava,
    save_paligemma,
    save_qwen2_vl,
    teach,
)
from toy_workspace import run_all

from mergeline.evaluation.vision_language.models import Reader, load_reader
from mergeline.merging import merge
from mergeline.tasks.dvc_yaml import dvc_yaml
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.publish import publish
from mergeline.tasks.workspace import Workspace

ASKED = {"colour": "what colour is this ?", "light": "how light ?"}
ROWS = {
    "colour": [(image(colour, i), ASKED["colour"], colour) for i in range(3) for colour in COLOURS],
    "light": [
        (image(colour, i), ASKED["light"], "9" if colour == "white" else "1")
        for i in range(3)
        for colour in COLOURS
    ],
}
PARAMS: dict[str, Any] = {
    "name": "pictures",
    "seed": 0,
    "checkpoints": {"layout": "as_is", "files": {n: f"in/{n}" for n in ("base", *ROWS)}, "uris": {}},
    "base": "base",
    "experts": [*ROWS],
    "vision_language": {
        "data": {"files": {task: f"in/data/{task}" for task in ROWS}, "uris": {}},
        "tasks": {
            "colour": {"metric": "anls", "max_new_tokens": 4},
            "light": {"image": "picture", "template": "how {much} ?", "metric": "relaxed_accuracy"},
        },
        "batch_size": 5,
    },
    "merges": {
        "average": {"method": "average"},
        "sum": {"method": "task_arithmetic", "search": {"scale": [0.5, 0.8]}},
    },
    "gates": {"minimum_mean": 0.0, "minimum_gain": 0.0, "largest_drop": 1.0},
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a base and two experts, and the tables of their tasks."""
    root = tmp_path_factory.mktemp("pictures")
    save_llava(root / "in/base", 0)
    for name, rows in ROWS.items():
        expert = save_llava(root / "again", 0)
        expert.model.vision_tower.requires_grad_(False)
        teach(expert, rows)
        save(expert, root / "in" / name)
    colour = [
        {"image": pixels, "question": asked, "target": right} for pixels, asked, right in ROWS["colour"]
    ]
    light = [{"picture": pixels, "much": "light", "target": int(right)} for pixels, _, right in ROWS["light"]]
    save_image_table(root / "in/data/colour", colour)
    save_image_table(root / "in/data/light", light)
    return root


def write(root: Path, **changes: Any) -> None:
    YAML().dump({**PARAMS, **changes}, root / "params.yaml")


@pytest.fixture
def root(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in which nothing has run, as the current folder."""
    return fresh_workspace(family, PARAMS, tmp_path, monkeypatch)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """The files of 12 images."""
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for path, (pixels, *_) in zip(paths, ROWS["colour"]):
        Image.fromarray(pixels).save(path)
    return paths


def written(folder: str, name: str, most: int) -> list[str]:
    """What a folder's model writes to each example by itself, token by token; nothing is missing in the folder."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, told = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    processor, texts = AutoProcessor.from_pretrained(folder), []
    for pixels, question, _ in ROWS[name]:
        batch = processor(
            images=Image.fromarray(pixels), text=f"<image> {question} <sep>", return_tensors="pt"
        )
        ids, out = batch["input_ids"], []
        while len(out) < most and 1 not in out:
            with torch.no_grad():
                now = torch.cat([ids, torch.tensor([out], dtype=torch.long)], 1)
                logits = model(input_ids=now, pixel_values=batch["pixel_values"]).logits
            out.append(int(logits[0, -1].argmax()))
        texts.append(processor.tokenizer.decode(out, skip_special_tokens=True))
    return texts


# ---------------------------------------------------------------------------------------------- models


def test_texts_come_in_the_order_of_their_images_whatever_the_batches(root, pictures):
    reader = load_reader(Path("in/colour"))
    questions = [ASKED["colour"] if i % 2 else ASKED["light"] for i in range(12)]
    counted: list[int] = []
    one = reader.write(pictures, questions, 4, 1)
    assert reader.write(pictures, questions, 4, 5, counted.append) == one and counted == [5, 5, 2]
    assert reader.write(pictures[::-1], questions[::-1], 4, 5) == one[::-1] and len({*one}) > 2
    assert reader.write(pictures, 12 * [ASKED["colour"]], 4, 7) == written("in/colour", "colour", 4)


@pytest.mark.parametrize("save_model", [save_qwen2_vl, save_idefics3, save_paligemma])
def test_images_of_different_sizes_are_read_side_by_side(tmp_path, save_model):
    save_model(tmp_path / "model")
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        pixels = np.random.default_rng(i).integers(0, 255, (8 + 4 * (i % 3), 8 + 8 * (i % 2), 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    reader, questions = load_reader(tmp_path / "model"), 3 * [ASKED["colour"], ASKED["light"]]
    one = reader.write(paths, questions, 5, 1)
    assert reader.write(paths, questions, 5, 4) == one and len({*one}) > 2


def test_a_prompt_stands_in_for_the_chat_template(root, pictures):
    questions = 12 * [ASKED["colour"]]
    by_template = load_reader(Path("in/colour"))
    by_prompt = load_reader(Path("in/colour"), prompt="{image} {question} <sep>")
    assert by_prompt.write(pictures, questions, 4, 4) == by_template.write(pictures, questions, 4, 4)
    save(by_template.model, root / "plain", chat_template=None)
    plain = load_reader(root / "plain")
    assert plain.processor.chat_template is None
    batch = plain.inputs(pictures[:2], ["what {image} ?", "how ?"])
    first, second = (plain.processor.tokenizer.decode(row) for row in batch["input_ids"])
    assert first == 4 * "<image> " + "what <unk> ?" and second == "<pad> " + 4 * "<image> " + "how ?"


def test_a_question_with_the_token_of_an_image_is_refused(root, pictures):
    with refused("the question '<image> what ?' has the token of images, <image>, which is put beside it"):
        load_reader(Path("in/base")).inputs(pictures[:1], ["<image> what ?"])


def test_the_first_token_is_not_written_twice(root, pictures):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained("in/base")
    processor.chat_template = "<s> " + CHAT
    processor.tokenizer.padding_side = "left"
    asked: list[Any] = []
    reader = Reader(Path("in/base"), load_reader(Path("in/base")).model, Spy(processor, asked))
    reader.inputs(pictures[:1], ["how ?"])
    reader = Reader(Path("in/base"), reader.model, Spy(processor, asked), prompt="{image} {question}")
    reader.inputs(pictures[:1], ["how ?"])
    assert [given.get("add_special_tokens") for given in asked] == [False, None]


class Spy:
    """A processor that keeps what it is called with."""

    def __init__(self, processor: Any, asked: list[Any]):
        self._processor, self._asked = processor, asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, **given: Any) -> Any:
        self._asked.append(given)
        return self._processor(**given)


def test_a_merged_folder_opens_whole_with_its_processor(root):
    family = {"base": "in/base", "experts": {name: f"in/{name}" for name in ROWS}}
    merge({"method": "average", **family, "include": ["*language_model*"]}, "merged")
    files = {path.name for path in Path("merged").iterdir()}
    assert {"processor_config.json", "chat_template.jinja", "tokenizer.json"} <= files
    texts = written("merged", "colour", 4)
    save_image_table(Path("table"), [{"image": row[0]} for row in ROWS["colour"]])
    paths = [Path(f"table/png/{i}.png") for i in range(12)]
    assert load_reader(Path("merged")).write(paths, 12 * [ASKED["colour"]], 4, 12) == texts
    merged, base, one, two = (
        load_file(f"{n}/model.safetensors") for n in ("merged", "in/base", *map("in/{}".format, ROWS))
    )
    for name, tensor in merged.items():
        assert np.array_equal(one[name], base[name]) == ("vision_tower" in name), name
        mean = (one[name] + two[name]) / 2 if "language_model" in name else base[name]
        np.testing.assert_allclose(tensor, mean, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------- the pipeline


@pytest.mark.usefixtures("anywhere")
@pytest.mark.slow
def test_the_whole_pipeline_scores_what_models_write(root, mlflow_database):
    mlflow_database(root)
    workspace = run_all(root)
    board = json.loads((root / "build/leaderboard/leaderboard.json").read_text())
    rows = {row["name"]: row for row in board["rows"]}
    assert (board["modality"], board["measure"], board["tasks"]) == ("vision_language", "score", [*ROWS])
    assert all(rows["experts"]["tasks"][task]["accuracy"] > 0.7 for task in ROWS)
    for name in ("average", "sum"):
        texts = written(f"build/merges/{name}", "light", 16)
        share = np.mean([text.strip() == right for text, (*_, right) in zip(texts, ROWS["light"])])
        assert rows[name]["tasks"]["light"]["accuracy"] == pytest.approx(share)
        assert [text for *_, text in rows[name]["samples"]["light"]] == texts[:3]
    kept = load_file("build/evaluations/average/predictions.safetensors")
    assert kept["test/colour"].shape == (12,) and kept["test/colour"].dtype == np.float64
    assert publish(workspace).run_id
    page = Path("build/report.html").read_text()
    assert '<section id="vision_language">' in page and "how light ?" in page
    shots = page.partition('<figure class="shot">')[2].partition("</figure>")[0]
    assert "data:image/png;base64," in shots and "?</p>" in shots


def test_measures_stages_and_lineage_are_those_of_the_settings(root):
    modality, workspace = modality_named("vision_language"), Workspace(root / "params.yaml")
    assert {task: m.name for task, m in modality.measures(workspace.params).items()} == {
        "colour": "anls",
        "light": "relaxed accuracy",
    }
    found = {stage.name: stage for stage in workspace.stages}
    assert "vision_language.tasks.colour" in found["data-file@colour"].params
    assert "build/data" in found["baselines"].deps
    assert "foreach: ${vision_language.data.files}" in dvc_yaml(modality, ".")
    prepare(root)
    digests = []
    for prompt in (None, "{image} {question} <sep>"):
        write(root, vision_language={**PARAMS["vision_language"], "prompt": prompt})
        workspace = Workspace(root / "params.yaml")
        board = {"tasks": workspace.params.tasks, **modality.settings(workspace.params)}
        digests.append(modality.lineage(root, board, workspace.digests))
    assert digests[0].keys() == {"lineage.data.colour", "lineage.data.light"}
    assert not {*digests[0].values()} & {*digests[1].values()}


def test_an_example_is_shown_with_its_image_and_its_question(root):
    prepare(root)
    params = Workspace(root / "params.yaml").params
    pixels, asked = modality_named("vision_language").show(params, root / "build", "test", "light", 3)
    assert np.array_equal(pixels, ROWS["light"][3][0]) and asked == "how light ?"


def prepare(root: Path) -> None:
    workspace = Workspace(root / "params.yaml")
    for stage in workspace.stages:
        if stage.step in ("fetch", "data"):
            workspace.run(stage)


# ---------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "of type gpt2, .* write `language:`"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "of type t5, .* write `text2text:`"),
        (
            {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
            "write `image_classification:`",
        ),
        ({"model_type": "clip", "architectures": True}, "write `datasets:` and `suite:`"),
    ],
)
def test_other_kinds_of_models_are_told_where_they_belong(root, changes, said):
    config = json.loads(Path("in/base/config.json").read_text())
    Path("in/base/config.json").write_text(json.dumps({**config, **changes}))
    for refuse in (load_reader, modality_named("vision_language").check):
        with pytest.raises(Exception, match=said):
            refuse(Path("in/base"))


def test_a_missing_processor_is_refused_although_transformers_gives_a_tokenizer(root):
    Path("in/base/processor_config.json").unlink()
    for refuse in (load_reader, modality_named("vision_language").check):
        with refused("in/base: "):
            refuse(Path("in/base"))


def test_adapters_of_tasks_beside_a_model_are_not_passed_over(root):
    Path("in/base/adapters").mkdir()
    with refused("in/base: has adapters of tasks, or a router"):
        load_reader(Path("in/base"))


def test_an_image_that_is_missing_stops_the_data_step_with_its_row(root, mergeline):
    Path("in/data/colour/png/3.png").unlink()
    found = mergeline("data")
    assert found.code == 2 and found.err.count("\n") == 1
    assert "in/data/colour: row 3 of val: there is no image in/data/colour/png/3.png" in found.err
    assert not Path("build/data/colour").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": {"colours": {}}}, "'colours' is not among the data; did you mean 'colour'"),
        ({"suites": {"colour": ["lite"]}}, "'lite' is not among the data"),
        ({"tasks": {"colour": {}}}, "'light' is among the data alone; add `light: {metric: exact_match}`"),
        ({"tasks": {"colour": {"metric": "iou"}, "light": {}}}, "iou compares boxes; say how"),
        ({"prompt": "{question}"}, "must say once where {image} goes"),
        ({"batch_size": 0}, "vision_language.batch_size"),
    ],
)
def test_mistakes_in_params_yaml_are_blamed(root, changes, said):
    write(root, vision_language={**PARAMS["vision_language"], **changes})
    with refused("params.yaml:", said):
        Workspace(root / "params.yaml").params  # noqa: B018


def test_statistics_are_refused_for_nothing_runs_the_models_for_them(root, mergeline):
    write(root, merges={"regmean": {"method": "regmean"}}, statistics={"gram": {"examples": 3}})
    prepare(root)
    found = mergeline("statistics", "colour")
    assert found.code == 2 and found.err.count("\n") == 1
