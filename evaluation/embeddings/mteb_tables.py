"""Tasks of MTEB as tables: `mteb://STSBenchmark?val=validation`, by the package mteb, which downloads their data.

Options: subset (of tasks in several languages), test (the split that reports, test) and val (the split that chooses;
without it, every other row of test chooses and the rest report). https://github.com/embeddings-benchmark/mteb
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergeline.evaluation.embeddings.data import CORPUS
from mergeline.evaluation.embeddings.settings import Retrieval, Similarity
from mergeline.evaluation.splits import blame, check_options, parsed
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import json_bytes, write_bytes

MTEB = "mteb://"

Tables = dict[str, list[dict[str, Any]]]


def write_mteb_tables(source: str, task: Similarity | Retrieval, folder: Path) -> Path:
    """The tables of a task of MTEB, with the columns that `task` names, in a folder of its own below `folder`.

    Raises:
        UserError: the package is missing, it knows no such task, cannot load it, or the task is of another kind.
    """
    name, options = parsed(source)
    check_options(source, options, {"subset", "test", "val"})
    with blame(f"{source}: the package mteb is needed (pip install mteb)", ImportError):
        import mteb  # type: ignore[import-not-found]
    # Of the package, datasets and the network, which all have exceptions of their own.
    with blame(source, Exception):
        loaded = mteb.get_task(name)
        loaded.load_data()
    test = _rows(loaded, task, source, options.get("subset"), options.get("test", "test"))
    if "val" in options:
        val = _rows(loaded, task, source, options.get("subset"), options["val"])
    else:
        rows = test["rows"]
        val, test = {**test, "rows": rows[::2]}, {**test, "rows": rows[1::2]}
    tables = {"val": val["rows"], "test": test["rows"]}
    if isinstance(task, Retrieval):
        tables[CORPUS] = [*{row["id"]: row for row in [*test[CORPUS], *val[CORPUS]]}.values()]
    out = folder / name
    for table, rows in tables.items():
        write_bytes(out / f"{table}.json", json_bytes(rows))
    return out


def _rows(loaded: Any, task: Similarity | Retrieval, source: str, subset: str | None, split: str) -> Tables:
    """The rows of a split, and of retrieval the corpus."""
    names = getattr(loaded, "column_names", None)
    is_pairs = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if is_pairs != isinstance(task, Similarity):
        raise UserError(
            f"{source}: is no task of {task.kind}; say of which kind it is under embeddings.tasks"
        )
    splits = loaded.dataset
    # Tasks in several languages, and all of retrieval, have splits below subsets.
    if subset is not None or split not in splits:
        chosen = subset or ("default" if "default" in splits else "")
        if chosen not in splits:
            known = ", ".join(map(str, splits))
            raise UserError(f"{source}: has no subset or split '{chosen or split}'; it has {known}")
        splits = splits[chosen]
    if split not in splits:
        raise UserError(f"{source}: has no split '{split}'{did_you_mean(split, [*splits])}")
    held = splits[split]
    if isinstance(task, Similarity):
        first, second = loaded.column_names
        return {
            "rows": [{task.first: r[first], task.second: r[second], task.score: r["score"]} for r in held]
        }
    texts = {str(row["id"]): row["text"] for row in held["queries"]}
    relevant = {str(q): {str(d): g for d, g in found.items()} for q, found in held["relevant_docs"].items()}
    return {
        "rows": [
            {task.query: text, task.relevant: relevant[query]}
            for query, text in texts.items()
            if any(relevant.get(query, {}).values())
        ],
        # As MTEB shows documents to a model: their title before their text.
        CORPUS: [
            {"id": str(row["id"]), "text": f"{row.get('title') or ''} {row['text']}".strip()}
            for row in held["corpus"]
        ],
    }
