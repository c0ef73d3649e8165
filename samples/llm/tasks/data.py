"""Where lm-eval finds the examples of these tasks, whatever the current folder is."""

import json
from pathlib import Path

from datasets import Dataset, DatasetDict

_DATA = Path(__file__).parent / "data"


def load(folder: str, **_: object) -> DatasetDict:
    """Every split in data/FOLDER; `_` is the metadata that lm-eval adds."""
    files = sorted((_DATA / folder).glob("*.jsonl"))
    return DatasetDict({path.stem: Dataset.from_list(_rows(path)) for path in files})


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
