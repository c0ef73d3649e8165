"""The heads step: class embeddings of every task, which all image towers of a pipeline share."""

from __future__ import annotations

from pathlib import Path

from mergeline.merging.engine.machine import one_thread
from mergeline.merging.errors import UserError
from mergeline.merging.files import write_bytes


def write_heads(base: Path, suite: Path, datasets: dict[str, Path], out: Path, device: str) -> None:
    """Class embeddings of every task from the base's text tower: one (C, d) float32 tensor a task.

    Raises:
        UserError: a task without class names, in the suite or in its data; a base without a text tower.
    """
    from safetensors.torch import save

    from mergeline.evaluation.clip.suite import load_suite
    from mergeline.evaluation.clip.zero_shot import build_heads
    from mergeline.evaluation.datasets import load

    tasks = load_suite(suite)
    absent = sorted(set(datasets) - set(tasks.tasks))
    if absent:
        raise UserError(f"{suite}: describes no task '{absent[0]}', which params.yaml evaluates; add it")
    wanted = tasks.model_copy(update={"tasks": {name: tasks.tasks[name] for name in datasets}})
    names = {task: load(folder).classnames for task, folder in datasets.items()}
    with one_thread():
        heads = build_heads(base, wanted, {t: n for t, n in names.items() if n}, device)
    write_bytes(out, save({task: head.cpu().contiguous() for task, head in heads.items()}))
