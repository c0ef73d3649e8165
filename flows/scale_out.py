"""Merges on many machines: units of work as tasks of a Prefect flow, on whatever its task runner runs them."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from typing import Any, Callable

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture


class FlowExecutor(Executor):
    """Runs functions as tasks of the flow that is running, such as one whose task runner is Dask's or Ray's:

    @flow(task_runner=DaskTaskRunner(address="tcp://..."))
    def merge_there(recipe: dict, out: str) -> None:
        merge(recipe, out, executor=FlowExecutor())

    The workers must see the same files.
    """

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # a task that was submitted is waited for

        def finish(done: PrefectFuture[Any]) -> None:
            try:
                future.set_result(done.result())
            except BaseException as error:
                future.set_exception(error)

        run = task(cache_policy=NO_CACHE, persist_result=False)(function).submit(*args, **kwargs)
        run.add_done_callback(finish)
        return future
