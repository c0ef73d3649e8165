"""Tasks of MTEB become tables; a stand-in has the form that mteb 2 gives its tasks."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from checkpoints import refused

from mergeline.evaluation.embeddings import data
from mergeline.evaluation.embeddings.mteb_tables import write_mteb_tables
from mergeline.evaluation.embeddings.settings import Retrieval, Similarity
from mergeline.evaluation.tables import load_table, prepare_table

PAIRS = [{"a": f"w{i}", "b": f"w{i + 1}", "score": i / 4} for i in range(6)]
FOUND = {
    "corpus": [{"id": "d1", "title": "T", "text": "one"}, {"id": "d2", "text": "two"}],
    "queries": [{"id": "q1", "text": "first"}, {"id": "q2", "text": "second"}, {"id": "q3", "text": "third"}],
    "relevant_docs": {"q1": {"d1": 1}, "q2": {"d1": 0}, "q3": {"d2": 2, "d1": 1}},
    "top_ranked": None,
}
TASKS = {
    "Pairs": {"column_names": ("a", "b"), "dataset": {"test": PAIRS, "validation": PAIRS[:2]}},
    "Languages": {"column_names": ("a", "b"), "dataset": {"de": {"test": PAIRS}, "fr": {"test": PAIRS[:4]}}},
    "Documents": {"dataset": {"default": {"test": FOUND}}},
}
SIMILARITY = Similarity(kind="similarity", first="one", second="other", score="gold")
RETRIEVAL = Retrieval(kind="retrieval")


@pytest.fixture(autouse=True)
def mteb(monkeypatch):
    def get_task(name):
        return SimpleNamespace(**TASKS[name], load_data=lambda: None)

    monkeypatch.setitem(sys.modules, "mteb", SimpleNamespace(get_task=get_task))


def made(source, task, tmp_path):
    prepare_table(str(write_mteb_tables(source, task, tmp_path)), tmp_path / "table", data.beside(task))
    data.check(tmp_path / "table", task)
    return load_table(tmp_path / "table")


def test_pairs_keep_their_split_that_chooses(tmp_path):
    table = made("mteb://Pairs?val=validation", SIMILARITY, tmp_path)
    assert table.rows("val") == [{"one": r["a"], "other": r["b"], "gold": r["score"]} for r in PAIRS[:2]]
    assert len(table.rows("test")) == 6


def test_without_one_every_other_row_chooses(tmp_path):
    table = made("mteb://Languages?subset=fr", SIMILARITY, tmp_path)
    assert [row["one"] for row in table.rows("val")] == ["w0", "w2"]
    assert [row["one"] for row in table.rows("test")] == ["w1", "w3"]


def test_queries_have_grades_and_documents_their_titles(tmp_path):
    table = made("mteb://Documents", RETRIEVAL, tmp_path)
    assert table.rows("corpus") == [{"id": "d1", "text": "T one"}, {"id": "d2", "text": "two"}]
    assert table.rows("val") == [{"query": "first", "relevant": {"d1": 1}}]
    assert table.rows("test") == [{"query": "third", "relevant": {"d1": 1, "d2": 2}}]


@pytest.mark.parametrize(
    ("source", "task", "wrong"),
    [
        ("mteb://Nothing", SIMILARITY, "mteb://Nothing: 'Nothing'"),
        ("mteb://Pairs", RETRIEVAL, "mteb://Pairs: is no task of retrieval"),
        ("mteb://Documents", SIMILARITY, "mteb://Documents: is no task of similarity"),
        ("mteb://Languages", SIMILARITY, "has no subset or split 'test'; it has de, fr"),
        ("mteb://Pairs?val=dev", SIMILARITY, "has no subset or split 'dev'; it has test, validation"),
        ("mteb://Pairs?split=test", SIMILARITY, "unknown option 'split'"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(source, task, wrong, tmp_path):
    with refused(wrong):
        write_mteb_tables(source, task, tmp_path)


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with refused("mteb://Pairs: the package mteb is needed (pip install mteb)"):
        write_mteb_tables("mteb://Pairs", SIMILARITY, tmp_path)
