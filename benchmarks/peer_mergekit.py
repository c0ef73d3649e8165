"""Records what mergekit makes of configurations; runs in mergekit's own environment, beside its tests.

    RECORD_INTO=FOLDER PEERS/mergekit/bin/python -m pytest -p peer_mergekit CHECKOUT/tests     all merges of its tests
    PEERS/mergekit/bin/python peer_mergekit.py CONFIGURATION FOLDER                            one of a file

A recorded merge is a folder: `mergekit.yml`, `expected/` as mergekit wrote it, and the name of the test in `test.txt`.
Where the arithmetic would be bfloat16's it is float32's: mergekit rounds every step, which is another thing to compare.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import mergekit.merge
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

_merge = mergekit.merge.run_merge


def record(config: MergeConfiguration, folder: Path, options: MergeOptions, test: str) -> None:
    """Merge into a folder, which is left away if mergekit fails; the exception is raised."""
    if config.dtype in ("bfloat16", "float16"):
        config = config.model_copy(update={"dtype": "float32"})
    text = config.to_yaml()
    folder.mkdir(parents=True)
    (folder / "mergekit.yml").write_text(text)
    (folder / "test.txt").write_text(test)
    if options.unsafe_truncate_embeddings and not (config.tokenizer or config.tokenizer_source):
        (folder / "truncated").touch()
    try:
        _merge(config, str(folder / "expected"), options)  # changes the configuration
    except BaseException:
        shutil.rmtree(folder)
        raise


def recorded(
    config: MergeConfiguration, out_path: str, options: MergeOptions, *more: Any, **named: Any
) -> None:
    """In place of mergekit's `run_merge`: what its tests merge is recorded, too."""
    into = Path(os.environ["RECORD_INTO"])
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    number = sum(1 for _ in into.glob("*")) if into.is_dir() else 0
    record(config.model_copy(deep=True), into / f"{number:03}", options, test)
    _merge(config, out_path, options, *more, **named)


def main() -> None:
    written = MergeConfiguration.model_validate(yaml.safe_load(Path(sys.argv[1]).read_text()))
    record(written, Path(sys.argv[2]), MergeOptions(), sys.argv[1])


if __name__ == "__main__":
    main()
elif "RECORD_INTO" in os.environ:
    mergekit.merge.run_merge = recorded
