"""Tables of texts are read from folders and hubs into JSON lines, split as they say, or refused in a line."""

import json

import pytest
from checkpoints import refused

from mergeline.evaluation.tables import load_table, prepare_table

ROWS = [{"text": f"text {i}", "label": i % 3} for i in range(40)]


def written(folder, **tables):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_splits_are_those_of_the_folder(tmp_path):
    source = written(tmp_path / "in", val=ROWS[:4], test=ROWS[4:10], fit=ROWS[10:])
    prepare_table(source, tmp_path / "out")
    table = load_table(tmp_path / "out")
    assert table.rows("val") == ROWS[:4]
    assert table.rows("test") == ROWS[4:10]
    assert table.rows("fit") == ROWS[10:] and not table.fits_val
    assert table.column("test", "label") == [row["label"] for row in ROWS[4:10]]


def test_without_val_a_tenth_of_train_is_drawn_and_without_fit_half_of_val_stands_for_it(tmp_path):
    prepare_table(written(tmp_path / "in", train=ROWS, test=ROWS[:5]), tmp_path / "out")
    table = load_table(tmp_path / "out")
    assert len(table.rows("val")) == 4 and table.drawn == ["val"]
    assert table.fits_val and table.rows("fit") == table.rows("val")[::2]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".parquet"])
def test_other_kinds_of_files_hold_the_same(tmp_path, ending):
    pandas = pytest.importorskip("pandas")
    (tmp_path / "in").mkdir()
    frame = pandas.DataFrame([{"text": 'a, "quoted"\ttext', "label": "1"}, {"text": "zwei", "label": "2"}])
    for split in ("val", "test"):
        path = tmp_path / "in" / f"{split}{ending}"
        if ending == ".parquet":
            frame.to_parquet(path)
        elif ending == ".json":
            frame.to_json(path, orient="records")
        else:
            frame.to_csv(path, index=False, sep="\t" if ending == ".tsv" else ",")
    prepare_table(str(tmp_path / "in"), tmp_path / "out")
    assert load_table(tmp_path / "out").rows("test") == frame.to_dict("records")


def test_a_hub_is_read_with_the_names_of_its_classes(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes", "maybe"])}
    )
    made = datasets.Dataset.from_list(ROWS, features=features)
    (tmp_path / "org").mkdir()
    for split in ("train", "test"):
        made.to_parquet(tmp_path / "org" / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    prepare_table("hf-dataset://org?val=train[:10]&fit=train[10:20]", tmp_path / "out")
    table = load_table(tmp_path / "out")
    assert [len(table.rows(split)) for split in ("val", "test", "fit")] == [10, 40, 10]


@pytest.mark.parametrize(
    "tables, said",
    [
        ({"val": ROWS}, ("no test.jsonl",)),
        ({"val": ROWS, "test": []}, ("'test' is empty",)),
        ({"val": ROWS, "test": [3]}, ("row 0", "no object")),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, tables, said):
    with refused(*said):
        prepare_table(written(tmp_path / "in", **tables), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there_and_one_of_another_kind_are_refused(tmp_path):
    for source, said in ((str(tmp_path / "none"), "no such folder"), ("ftp://x/y", "unknown scheme")):
        with refused(said):
            prepare_table(source, tmp_path / "out")


def test_tables_that_all_splits_share_must_be_there(tmp_path):
    source = written(tmp_path / "in", val=ROWS, test=ROWS)
    with refused("no corpus.jsonl"):
        prepare_table(source, tmp_path / "out", beside=("corpus",))
    written(tmp_path / "in", corpus=ROWS[:2])
    prepare_table(source, tmp_path / "out", beside=("corpus",))
    assert load_table(tmp_path / "out").rows("corpus") == ROWS[:2]


def test_a_column_that_a_row_lacks_is_named(tmp_path):
    prepare_table(written(tmp_path / "in", val=ROWS, test=ROWS), tmp_path / "out")
    with refused("row 0", "'texts'", "did you mean", "text"):
        load_table(tmp_path / "out").column("val", "texts")


def test_texts_may_hold_characters_that_end_lines_elsewhere(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0ce"
    line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
    for split in ("val", "test"):
        (tmp_path / f"{split}.jsonl").write_text(line, encoding="utf-8")
    prepare_table(str(tmp_path), tmp_path / "made")
    assert load_table(tmp_path / "made").column("test", "text") == [text]
