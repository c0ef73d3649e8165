"""Rankings, nDCG, Spearman's correlation, and the tables and models that they are of."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import edit, refused
from small_embeddings import TASKS, save_base, write_table, write_tables

from mergeline.evaluation.embeddings import data, scores
from mergeline.evaluation.embeddings.measures import ndcg, nearest
from mergeline.evaluation.embeddings.models import load_model, refuse_other_kinds
from mergeline.evaluation.embeddings.settings import Retrieval, Similarity
from mergeline.evaluation.metrics import interval
from mergeline.evaluation.tables import load_table, prepare_table

pytest.importorskip("sentence_transformers")

FIND, NEAR = Retrieval.model_validate(TASKS["find"]), Similarity.model_validate(TASKS["near"])


# ---------------------------------------------------------------------------------------------- measures


def test_ndcg_is_the_formula():
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = int(rng.integers(1, 30))
        grades = {int(d): float(g) for d, g in zip(rng.permutation(40)[:count], rng.integers(1, 4, count))}
        ranking = rng.permutation(40)[:15]
        gained = sum(grades.get(int(ranking[i]), 0) / math.log2(i + 2) for i in range(10))
        best = sum(g / math.log2(i + 2) for i, g in enumerate(sorted(grades.values(), reverse=True)[:10]))
        assert ndcg(ranking, grades) == pytest.approx(gained / best)


def test_ndcg_by_hand():
    assert ndcg([7, 3, 5], {7: 1.0}) == 1
    assert ndcg([3, 7, 5], {7: 1.0}) == pytest.approx(1 / math.log2(3))
    assert ndcg([*range(10)], {10: 1.0}) == 0
    # Gains are grades: (1 + 2 / log2 3) / (2 + 1 / log2 3), not of 2^2 - 1 = 3.
    assert ndcg([1, 2], {1: 1.0, 2: 2.0}) == pytest.approx((1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)))
    assert ndcg([0], {0: 1.0, 1: 1.0}) == pytest.approx(1 / (1 + 1 / math.log2(3)))


def test_ndcg_is_that_of_scikit_learn():
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng(1)
    grade_D, value_D = rng.integers(0, 4, 30).astype(float), rng.normal(size=30)
    ranking = np.argsort(-value_D)
    relevant = {i: g for i, g in enumerate(grade_D) if g}
    assert ndcg(ranking, relevant) == pytest.approx(ndcg_score([grade_D], [value_D], k=10))


@pytest.mark.parametrize("elements", [1, 40, 300, 1 << 22])
def test_the_nearest_are_those_of_a_whole_sort_whatever_fits_into_memory(elements):
    rng = np.random.default_rng(0)
    # Small whole numbers: products are exact, and many are equal.
    query_Qd, document_Dd = (rng.integers(-2, 3, (n, 4)).astype(np.float32) for n in (23, 97))
    wanted = np.argsort(-(query_Qd @ document_Dd.T), axis=1, kind="stable")[:, :10]
    assert np.array_equal(nearest(query_Qd, document_Dd, elements=elements), wanted)


def test_a_corpus_of_fewer_documents_than_the_cut_is_ranked_whole():
    ranking = nearest(np.array([[1.0, 0.0]], np.float32), np.array([[0, 1], [1, 0], [0, 1]], np.float32))
    assert ranking.tolist() == [[1, 0, 2]]


def test_outcomes_of_pairs_have_spearmans_correlation_for_their_mean():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    answer = np.stack([rng.normal(size=400), rng.integers(0, 6, 400)], axis=1)
    answer[:, 0] += 0.3 * answer[:, 1]
    outcome_N = scores.outcomes(answer)
    rho = spearmanr(answer[:, 0], answer[:, 1]).statistic
    assert outcome_N.mean() == pytest.approx(rho, abs=1e-12)
    lower, upper = interval(outcome_N)
    assert lower < rho < upper and 0.05 < upper - lower < 0.25
    assert scores.outcomes(np.array([0.5, 1.0])).tolist() == [0.5, 1.0]


# ---------------------------------------------------------------------------------------------- tables


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    write_tables(tmp_path / "in")
    return tmp_path


def prepared(root: Path, name: str) -> Path:
    task = {"near": NEAR, "find": FIND}[name]
    prepare_table(str(root / "in" / name), root / name, data.beside(task))
    data.check(root / name, task)
    return root / name


def test_lists_of_ids_and_grades_are_read(tables):
    ids = [{"id": 7, "text": "w1"}, {"id": "b", "text": "w2"}]
    rows = [{"query": "w1", "relevant": [7]}, {"query": "w2", "relevant": {"b": 2, "7": 0}}]
    write_table(tables / "in/find", corpus=ids, val=rows, test=rows, fit=rows)
    table = load_table(prepared(tables, "find"))
    read = data.queries(table, FIND, "test", data.corpus(table))
    assert read.relevant == [{0: 1.0}, {1: 2.0}]


def test_a_text_may_hold_characters_that_end_lines_elsewhere(tables):
    text = "a\u2028b\x85c\x0cd"
    row = {"sentence1": text, "sentence2": "w1", "score": 1}
    write_table(tables / "in/near", val=[row], test=[row])
    assert data.pairs(load_table(prepared(tables, "near")), NEAR, "test").first == [text]


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"query": "w1"}, "find: row 0 of val has no 'relevant'"),
        ({"relevant": ["d1"]}, "find: row 0 of val has no 'query'"),
        (
            {"query": "w1", "relevant": ["d99"]},
            "find: row 0 of val: 'd99' is no document of the corpus; did you mean",
        ),
        ({"query": "w1", "relevant": []}, "find: row 0 of val: no document is relevant; leave the query out"),
        ({"query": "w1", "relevant": {"d1": 0}}, "no document is relevant"),
        ({"query": "w1", "relevant": {"d1": -1}}, "the grade of 'd1' is -1; grades are 0 or more"),
        (
            {"query": "w1", "relevant": {"d1": "much"}},
            "grade of 'd1' of row 0 of val is no finite number but 'much'",
        ),
        ({"query": "w1", "relevant": "d1"}, "must be a list of ids, or an object id -> grade, not 'd1'"),
        ({"query": 3, "relevant": ["d1"]}, "find: 'query' of row 0 of val is no text but 3"),
    ],
)
def test_bad_queries_are_refused_in_one_line(tables, row, wrong):
    write_table(tables / "in/find", val=[row])
    with refused(wrong):
        prepared(tables, "find")


@pytest.mark.parametrize(
    ("corpus", "wrong"),
    [
        (
            [{"id": "d1", "text": "w1"}, {"id": "d1", "text": "w2"}],
            "find: the document 'd1' is in the corpus twice",
        ),
        ([{"id": "d1"}], "find: row 0 of corpus has no 'text'"),
        ([{"text": "w1"}], "find: row 0 of corpus has no 'id'"),
    ],
)
def test_a_bad_corpus_is_refused_in_one_line(tables, corpus, wrong):
    write_table(tables / "in/find", corpus=corpus)
    with refused(wrong):
        prepared(tables, "find")


def test_a_missing_corpus_is_refused_in_one_line(tables):
    (tables / "in/find/corpus.jsonl").unlink()
    with refused("has no corpus.jsonl"):
        prepared(tables, "find")


@pytest.mark.parametrize("score", ["high", None, float("inf")])
def test_a_score_that_is_no_number_is_refused_in_one_line(tables, score):
    write_table(tables / "in/near", val=[{"sentence1": "w1", "sentence2": "w2", "score": score}])
    with refused("near: ", "score"):
        prepared(tables, "near")


# ---------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_base(root / "base")
    return root / "base"


@pytest.fixture
def base(made, tmp_path):
    shutil.copytree(made, tmp_path / "base")
    return tmp_path / "base"


def test_embeddings_are_those_of_sentence_transformers(made):
    from sentence_transformers import SentenceTransformer

    texts = ["w1 w2", "w3", "w1 w2", "w4 w5 w6 w7", ""]
    model, told = SentenceTransformer(str(made), device="cpu", local_files_only=True), []
    embedder = load_model(made)
    for role, encode in (
        ("", model.encode),
        ("query", model.encode_query),
        ("document", model.encode_document),
    ):
        found = embedder.embed(texts, role, batch_size=2, more=told.append)
        assert np.allclose(found, encode(texts, normalize_embeddings=True), atol=1e-6), role
        assert np.array_equal(found[0], found[2])
    assert sum(told) == 3 * len(texts)
    prompted = embedder.embed(texts, "query", prompt="w9 ")
    assert np.allclose(prompted, model.encode(texts, prompt="w9 ", normalize_embeddings=True), atol=1e-6)
    assert np.abs(prompted - embedder.embed(texts, "query")).max() > 1e-3


def test_answers_are_cosines_beside_scores_and_ndcg(tables, made):
    embedder, told = load_model(made), []
    near = scores.answers(embedder, prepared(tables, "near"), NEAR, ("val", "test"), {}, 4, told.append)
    pairs = data.pairs(load_table(tables / "near"), NEAR, "test")
    first, second = embedder.embed(pairs.first), embedder.embed(pairs.second)
    assert near["test"].shape == (40, 2) and near["val"].shape == (24, 2)
    assert np.allclose(near["test"], np.stack([(first * second).sum(1), pairs.score_N], 1), atol=1e-6)
    find = scores.answers(embedder, prepared(tables, "find"), FIND, ("val", "test"), {}, 4, told.append)
    table = load_table(tables / "find")
    corpus = data.corpus(table)
    queries = data.queries(table, FIND, "test", corpus)
    cosines = embedder.embed(queries.texts, "query") @ embedder.embed(corpus.texts, "document").T
    wanted = [ndcg(np.argsort(-row, kind="stable"), grades) for row, grades in zip(cosines, queries.relevant)]
    assert find["test"] == pytest.approx(wanted) and 0 < find["test"].mean() < 1
    expected = [
        scores.texts(tables / name, task, ("val", "test")) for name, task in (("near", NEAR), ("find", FIND))
    ]
    assert sum(told) == sum(expected)


def test_a_model_with_infinite_weights_scores_badly_and_does_not_fail(base, tables):
    edit(base / "model.safetensors", embeddings__LayerNorm__weight=torch.full((16,), float("inf")))
    answer = scores.answers(
        load_model(base), prepared(tables, "near"), NEAR, ("val",), {}, 8, lambda n: None
    )["val"]
    assert np.isfinite(answer).all() and scores.outcomes(answer).mean() == 0


def test_a_model_that_lacks_tensors_is_refused(base):
    edit(base / "model.safetensors", encoder__layer__1__output__dense__weight=None)
    with refused("lacks 1 tensor(s) of a BertModel, first 'encoder.layer.1.output.dense.weight'"):
        load_model(base)


def test_a_pooler_that_nobody_asks_may_lack(base):
    edit(base / "model.safetensors", pooler__dense__weight=None, pooler__dense__bias=None)
    load_model(base)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_is_no_model_of_sentence_transformers_is_refused(base):
    listed = json.loads((base / "modules.json").read_text())
    (base / "modules.json").unlink()
    with refused("base: has no modules.json, so it is no model of sentence-transformers"):
        refuse_other_kinds(base)
    for kind in ("own.Module", "os.system", "sentence_transformers.models.Router"):
        (base / "modules.json").write_text(
            json.dumps([*listed, {"idx": 3, "name": "3", "path": "", "type": kind}])
        )
        with refused(f"is made with '{kind}'; known are Transformer"):
            refuse_other_kinds(base)
    (base / "modules.json").write_text(json.dumps(listed[1:]))
    with refused("not with a Transformer in the folder itself"):
        refuse_other_kinds(base)
    (base / "modules.json").write_text(json.dumps(listed))
    (base / "1_Pooling/config.json").unlink()
    with refused("lacks '1_Pooling/config.json'; copy the folder whole"):
        refuse_other_kinds(base)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_args": {"attn_implementation": "someone/kernels"}},
        {"transformer_task": "text-generation"},
        {"modality_config": {"text": {"method": "push_to_hub", "method_output_name": None}}},
    ],
)
def test_settings_that_do_more_than_run_the_model_are_refused(base, settings):
    change(base / "sentence_bert_config.json", **settings)
    with refused("sentence_bert_config.json: asks for more than feature-extraction by forward"):
        load_model(base)
