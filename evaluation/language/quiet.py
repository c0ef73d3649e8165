"""lm-eval and what it uses print much; here they are told not to."""

from __future__ import annotations

from functools import cache
from importlib import import_module


@cache
def be_quiet() -> None:
    """Progress bars and notices of lm-eval and what it uses stay away from now on; errors come through.

    transformers is imported before lm-eval, which would keep what another thread has of it so far: while it is imported
    the package puts another module in its own place, and the first has no classes.
    """
    import_module("transformers")

    import logging

    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    import transformers
    from tqdm import tqdm

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
        module.tqdm = lambda *args, **more: tqdm(*args, **{**more, "disable": True})
    for name in ("lm_eval", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
