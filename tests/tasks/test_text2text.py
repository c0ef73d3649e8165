"""Sequence-to-sequence models through the whole pipeline: data, search, leaderboard, registry, learning, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import refused
from fresh_workspace import fresh_workspace
from ruamel.yaml import YAML
from safetensors.numpy import load_file, save_file
from scipy.stats import spearmanr
from small_text2text import save, save_bart, save_t5, save_table, teach
from toy_workspace import run_all

from mergeline.evaluation.pretrained import load_tokenizer
from mergeline.evaluation.state import load_state
from mergeline.evaluation.text2text.models import load_writer
from mergeline.merging import merge
from mergeline.merging.learning.watching import watched
from mergeline.tasks.dvc_yaml import dvc_yaml
from mergeline.tasks.fit import examples_of
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.new_workspace import init_workspace
from mergeline.tasks.publish import publish
from mergeline.tasks.workspace import Workspace

WORDS = ["sun", "moon", "a star", "sea", "some sand", "tree", "stone", "two rivers"]
KIND = [{"word": word, "label": i % 2} for i, word in enumerate(WORDS)]
SIZE = [{"source": f"size {word}", "target": len(word)} for word in WORDS]
PAIRS = {
    "kind": [(f"kind of {row['word']}?", "no yes".split()[int(row["label"])]) for row in KIND],
    "size": [(str(row["source"]), str(row["target"])) for row in SIZE],
}
PARAMS: dict[str, Any] = {
    "name": "texts",
    "seed": 0,
    "checkpoints": {
        "layout": "as_is",
        "files": {n: f"in/{n}" for n in ("base", "kinds", "size")},
        "uris": {},
    },
    "base": "base",
    "experts": ["kinds", "size"],
    "text2text": {
        "data": {"files": {"kind": "in/data/kind", "size": "in/data/size"}, "uris": {}},
        "suites": {"kinds": ["kind"]},
        "tasks": {
            "kind": {"template": "kind of {word}?", "target": "label", "answers": {0: "no", 1: "yes"}},
            "size": {"metric": "spearman", "max_new_tokens": 4},
        },
        "batch_size": 3,
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
    root = tmp_path_factory.mktemp("texts")
    base = save_t5(root / "in/base", 0)
    for name, pairs in zip(("kinds", "size"), PAIRS.values()):
        expert = save_t5(root / "again", 0)
        assert all(torch.equal(a, b) for a, b in zip(expert.parameters(), base.parameters()))
        teach(expert, pairs)
        save(expert, root / "in" / name)
    save_table(root / "in/data/kind", KIND, ("val", "test"))
    save_table(root / "in/data/size", SIZE, ("val", "test", "fit"))
    return root


def write(root: Path, **changes: Any) -> None:
    YAML().dump({**PARAMS, **changes}, root / "params.yaml")


@pytest.fixture
def root(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in which nothing has run, as the current folder."""
    return fresh_workspace(family, PARAMS, tmp_path, monkeypatch)


def written(folder: str, sources: list[str], most: int) -> list[str]:
    """What a folder's model writes to each text by itself, token by token; nothing is missing in the folder."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model, told = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), []
    for source in sources:
        ids, out = tokenizer(source, return_tensors="pt").input_ids, [0]
        while len(out) <= most and out[-1] != 1:
            with torch.no_grad():
                logits = model(input_ids=ids, decoder_input_ids=torch.tensor([out])).logits
            out.append(int(logits[0, -1].argmax()))
        texts.append(tokenizer.decode(out, skip_special_tokens=True))
    return texts


def plain(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def edited(file: str | Path, **changes: Any) -> None:
    Path(file).write_text(json.dumps({**json.loads(Path(file).read_text()), **changes}))


# ---------------------------------------------------------------------------------------------- the pipeline


@pytest.mark.usefixtures("anywhere")
def test_the_whole_pipeline_scores_what_models_write(root, mlflow_database):
    mlflow_database(root)
    workspace = run_all(root)
    board = json.loads((root / "build/leaderboard/leaderboard.json").read_text())
    rows = {row["name"]: row for row in board["rows"]}
    assert (board["modality"], board["measure"], board["tasks"]) == ("text2text", "score", ["kind", "size"])
    assert (
        rows["experts"]["tasks"]["kind"]["accuracy"] == 1
        and rows["experts"]["tasks"]["size"]["accuracy"] > 0.9
    )
    assert rows["base"]["mean"] < 0.3

    for name, folder in (("base", "in/base"), ("average", "build/merges/average")):
        sources, right = zip(*PAIRS["kind"])
        texts = written(folder, [*sources], 16)
        share = np.mean([a.strip() == b for a, b in zip(texts, right)])
        assert rows[name]["tasks"]["kind"]["accuracy"] == pytest.approx(share)
        assert [text for *_, text in rows[name]["samples"]["kind"]] == texts[:3]
        sources, right = zip(*PAIRS["size"])
        numbers = np.array([plain(text) for text in written(folder, [*sources], 4)])
        assert rows[name]["no_number"] == {"size": np.isnan(numbers).mean()}
        numbers[np.isnan(numbers)] = (
            np.median(numbers[~np.isnan(numbers)]) if not np.isnan(numbers).all() else 0
        )
        rho = spearmanr(numbers, [float(x) for x in right])[0] if len({*numbers}) > 1 else 0.0
        assert rows[name]["tasks"]["size"]["accuracy"] == pytest.approx(rho)
    kept = load_file("build/evaluations/average/predictions.safetensors")
    assert kept["test/kind"].shape == (8,) and kept["test/size"].shape == (8, 2)
    assert {array.dtype for array in kept.values()} == {np.dtype("float64")}
    search = json.loads(Path("build/search/sum.json").read_text())
    assert search["chosen"] == max(search["points"], key=lambda point: point["mean"])["params"]

    assert publish(workspace).run_id
    verdict = json.loads((workspace.state / "verdict.json").read_text())
    assert verdict["passed"] and verdict["champion_after"] == "1"
    page = Path("build/report.html").read_text()
    assert '<section id="text2text">' in page and "kind of sun?" in page and "test score" in page


def test_the_measure_of_a_task_is_its_metric(root):
    modality = modality_named("text2text")
    data = {"files": {"kind": "in/data/kind"}, "uris": {}}
    write(root, text2text={"data": data, "tasks": {"kind": {"metric": "chrf"}}})
    assert modality.measures(Workspace(root / "params.yaml").params)["kind"].name == "chrf"


def test_stages_depend_on_tables_and_settings_and_dvc_sees_them(root):
    found = {stage.name: stage for stage in Workspace(root / "params.yaml").stages}
    assert (
        found["data-file@kind"].outs == ("build/data/kind",)
        and "in/data/kind" in found["data-file@kind"].deps
    )
    for name in ("baselines", "search@sum", "evaluate@sum"):
        assert "build/data" in found[name].deps and "text2text" in found[name].params
    text = dvc_yaml(modality_named("text2text"), ".")
    assert "foreach: ${text2text.data.files}" in text and "Test score" in text


def test_lineage_is_of_the_table_and_of_how_texts_are_made(root):
    modality, tags = modality_named("text2text"), []
    for metric in ("exact_match", "chrf", "exact_match"):
        tasks = {"kind": {**PARAMS["text2text"]["tasks"]["kind"], "metric": metric}, "size": {}}
        write(root, text2text={**PARAMS["text2text"], "tasks": tasks})
        workspace = Workspace(root / "params.yaml")
        for stage in workspace.stages:
            if stage.step == "data":
                workspace.run(stage)
        board = {"tasks": workspace.params.tasks, **modality.settings(workspace.params)}
        tags.append(modality.lineage(root, board, workspace.digests))
    first, other, again = tags
    assert first == again and set(first) == {"lineage.data.kind", "lineage.data.size"}
    assert first["lineage.data.kind"] != other["lineage.data.kind"] and len({*first.values()}) == 2


def test_a_new_workspace_finds_its_tables(root, monkeypatch):
    from mergeline.tasks import new_workspace

    monkeypatch.setattr(new_workspace, "run_dvc", lambda folder, *_: (folder / ".dvc").mkdir())
    init_workspace(root / "new", params=root / "params.yaml")
    params = Workspace(root / "new/params.yaml").params
    assert params.text2text.data.files == {"kind": "../in/data/kind", "size": "../in/data/size"}


# ---------------------------------------------------------------------------------------------- models


def test_texts_come_in_the_order_of_their_inputs_whatever_the_batches(root):
    writer = load_writer(Path("in/size"))
    sources = [source for pairs in PAIRS.values() for source, _ in pairs]
    counted: list[int] = []
    one = writer.write(sources, 5, 1)
    assert writer.write(sources, 5, 7, counted.append) == one and counted == [7, 7, 2] and not one.cut
    assert writer.write(sources[::-1], 5, 7).texts == one.texts[::-1] and len({*one.texts}) > 3


def test_inputs_longer_than_the_model_reads_are_cut_and_counted(root):
    edited("in/size/tokenizer_config.json", model_max_length=9)
    writer = load_writer(Path("in/size"))
    long, short = (
        writer.write(["size moonlight", "size sun"], 4, 2),
        writer.write(["size moo", "size sun"], 4, 2),
    )
    assert (long.cut, short.cut) == (1, 0) and long.texts == short.texts


@pytest.mark.parametrize("save_model", [save_t5, save_bart])
def test_a_merged_folder_opens_whole(tmp_path, save_model):
    for i, name in enumerate(("base", "a", "b")):
        save_model(tmp_path / name, i)
    merge(average_of(tmp_path), tmp_path / "merged")
    assert "lm_head.weight" not in load_state(tmp_path / "merged")
    texts = written(str(tmp_path / "merged"), ["a", "bc"], 3)
    assert load_writer(tmp_path / "merged").write(["a", "bc"], 3, 2).texts == texts


def test_a_head_of_its_own_is_merged_as_flan_t5_has_one(tmp_path):
    for i, name in enumerate(("base", "a", "b")):
        model = save_t5(tmp_path / name, i)
        heads = {"lm_head.weight": np.random.default_rng(i).normal(size=(259, 32)).astype(np.float32)}
        save_file(
            {**load_file(tmp_path / name / "model.safetensors"), **heads},
            tmp_path / name / "model.safetensors",
        )
        edited(tmp_path / name / "config.json", tie_word_embeddings=False)
    merge(average_of(tmp_path), tmp_path / "merged")
    merged = load_writer(tmp_path / "merged").model
    kept = [load_file(tmp_path / name / "model.safetensors")["lm_head.weight"] for name in "ab"]
    torch.testing.assert_close(merged.lm_head.weight, torch.tensor(np.mean(kept, 0)))
    assert not torch.equal(merged.lm_head.weight, merged.shared.weight) and model is not merged


def average_of(folder: Path) -> dict[str, Any]:
    return {"method": "average", "base": folder / "base", "experts": {name: folder / name for name in "ab"}}


# ---------------------------------------------------------------------------------------------- learning


def prepared(root: Path, **changes: Any) -> Any:
    """Checkpoints and tables of the workspace as the first steps leave them."""
    write(root, **changes)
    workspace = Workspace(root / "params.yaml")
    for stage in workspace.stages:
        if stage.step in ("fetch", "data"):
            workspace.run(stage)
    return modality_named("text2text"), workspace.params, root / "build"


def test_features_are_of_the_first_token_and_logits_are_the_models_own(root):
    modality, params, build = prepared(root)
    base = build / "checkpoints/base"
    network = modality.network(params, build, build / "checkpoints/size")
    network.load(load_state(base))
    [batch] = examples_of(modality, params, build).of("size")
    writer, seen = load_writer(base), set()
    with torch.no_grad(), watched(network.tensors(), lambda use: seen.add(use.tensor)):
        features = network.features(batch)
        logits = network.logits(features, "size")
        inputs = {key: value for key, value in batch.items() if key != "task"}
        wanted = writer.model(**inputs, decoder_input_ids=torch.zeros(8, 1).long())
    assert features.shape == (8, 32) and network.heads == ("shared.weight",)
    torch.testing.assert_close(logits, wanted.logits[:, 0], rtol=1e-4, atol=1e-5)
    assert seen == {name for name, tensor in network.tensors().items() if tensor.ndim == 2}


def test_a_bart_reads_as_many_tokens_as_it_has_positions_and_its_features_give_its_logits(root):
    base = save_bart(root / "in/base", 0)
    long = [{"source": "size " + 50 * "x", "target": 1}, {"source": "size", "target": 2}]
    save_table(root / "in/data/size", long, ("val", "test", "fit"))
    modality, params, build = prepared(root)
    writer = load_writer(build / "checkpoints/base")
    assert writer.write([str(row["source"]) for row in long], 3, 2).cut == 1
    network = modality.network(params, build, build / "checkpoints/base")
    [batch] = examples_of(modality, params, build).of("size")
    assert batch["input_ids"].shape == (2, 40)
    with torch.no_grad():
        logits = network.logits(network.features(batch), "size")
        inputs = {key: value for key, value in batch.items() if key != "task"}
        wanted = base(**inputs, decoder_input_ids=torch.zeros(2, 1).long()).logits[:, 0]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def test_examples_are_of_fit_or_of_half_of_val_and_have_no_targets(root):
    modality, params, build = prepared(root)
    examples = examples_of(modality, params, build)
    assert (
        examples.counts == {"kind": 4, "size": 8}
        and examples.split == "half of val"
        and not examples.labelled
    )
    assert {key for batch in examples.of("kind") for key in batch} == {"task", "input_ids", "attention_mask"}
    assert modality.choosing(build, "kind") == slice(1, None, 2) and modality.choosing(
        build, "size"
    ) == slice(None)


@pytest.mark.usefixtures("anywhere")
def test_statistics_are_collected_and_merges_fitted(root):
    learn(
        root,
        regmean={"method": "regmean"},
        fitted={"method": "adamerging", "params": {"iterations": 2}, "examples": 4},
    )


@pytest.mark.usefixtures("anywhere")
@pytest.mark.slow
def test_maps_are_solved_for_and_the_fisher_information_is_that_of_the_first_token(root):
    learn(root, fisher={"method": "fisher"}, solved={"method": "progressive_least_squares", "examples": 4})


def learn(root: Path, **merges: Any) -> None:
    """All merges are made of the models that were looked at with examples, and write texts."""
    write(
        root,
        statistics={"gram": {"examples": 3}, "fisher": {"examples": 3, "labels": "sampled"}},
        merges=merges,
    )
    run_all(root)
    rows = {r["name"]: r for r in json.loads(Path("build/leaderboard/leaderboard.json").read_text())["rows"]}
    for name in merges:
        assert rows[name]["seen"]["data"] == "unlabelled" and rows[name]["finite"], name
        assert not load_writer(Path(f"build/merges/{name}")).write(["size sun"], 4, 1).cut


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_other_kinds_of_models_are_told_where_they_belong(root):
    edited("in/base/config.json", is_encoder_decoder=False, model_type="gpt2")
    said = "base: is of type gpt2, no encoder with a decoder, .* for causal language models write `language:`"
    for refuse in (load_writer, modality_named("text2text").check):
        with pytest.raises(Exception, match=said):
            refuse(Path("in/base"))


def test_a_missing_tokenizer_is_refused_although_transformers_makes_an_empty_one(root):
    Path("in/base/tokenizer_config.json").unlink()
    for refuse in (load_tokenizer, load_writer, modality_named("text2text").check):
        with refused("in/base: has no tokenizer (", "spiece.model", "put its files beside the weights"):
            refuse(Path("in/base"))


def test_a_router_beside_a_model_is_not_passed_over(root):
    Path("in/base/adapters").mkdir()
    with refused("in/base: has adapters of tasks, or a router"):
        load_writer(Path("in/base"))


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ({"source": "a", "aim": "b"}, {}, "size: row 0 of val has no 'target'; known: aim, source"),
        ({"source": "a", "target": ""}, {}, "size: row 0 of val has an empty target"),
        (
            {"source": "a", "target": "b"},
            {"metric": "spearman"},
            "size: row 0 of val: the target 'b' is no number",
        ),
        ({"source": "a", "target": "b"}, {"template": "{text}"}, "size: row 0 of val has no 'text'"),
    ],
)
def test_tables_that_do_not_fit_are_blamed_by_row(root, mergeline, row, settings, said):
    save_table(Path("in/data/size"), [row])
    write(
        root, text2text={"data": {"files": {"size": "in/data/size"}, "uris": {}}, "tasks": {"size": settings}}
    )
    workspace = Workspace(root / "params.yaml")
    for stage in workspace.stages:
        if stage.step in ("fetch", "data"):
            workspace.run(stage)
    found = mergeline("baselines")
    assert found.code == 2 and found.err.startswith(f"mergeline: {said}") and found.err.count("\n") == 1
    assert not Path("build/evaluations/baselines").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": {"kinds": {}}}, "'kinds' is not among the data; did you mean 'kind'"),
        ({"suites": {"kinds": ["sizes"]}}, "'sizes' is not among the data; did you mean 'size'"),
        ({"tasks": {"kind": {"template": "{word"}}}, "expected '}'"),
        ({"tasks": {"kind": {"metric": "rouge"}}}, "text2text.tasks.kind.metric"),
        ({"batch_size": 0}, "text2text.batch_size"),
        ({"data": {"files": {}, "uris": {}}}, "data are empty; list some under files: or uris:"),
    ],
)
def test_mistakes_in_params_yaml_are_blamed(root, changes, said):
    write(root, text2text={**PARAMS["text2text"], **changes})
    with refused("params.yaml:", said):
        Workspace(root / "params.yaml").params  # noqa: B018
