"""What a language model is measured on: the section `language` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Server(BaseModel):
    """`language.server`: models are run by an OpenAI-compatible server, which is started for each of them.

    command: a program and its arguments, with {model} for the folder and {port} for the port to listen at, on loopback;
    it finds the key that requests come with in the environment, as VLLM_API_KEY. minutes: that it may take to start.
    concurrent: requests at a time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: Annotated[list[str], Field(min_length=1)]
    minutes: Annotated[float, Field(gt=0)] = 15.0
    concurrent: Annotated[int, Field(ge=1)] = 8

    @model_validator(mode="after")
    def _names_both(self) -> Self:
        for place in ("{model}", "{port}"):
            if not any(place in part for part in self.command):
                raise ValueError(f"the command must say where {place} goes")
        return self


class Language(BaseModel):
    """`language` of params.yaml: what a language model is measured on.

    tasks: a folder of lm-eval's task files. built_in: the tasks that lm-eval comes with, too.
    suites: domain -> tasks. An expert is scored on the suite of its own name. metrics: task -> the metric that counts,
    `name` or `name,filter`; by default one that says right or wrong. lower: tasks of whose metric smaller values are
    better. perplexity: tasks of `loglikelihood_rolling`.
    server: in whose place transformers runs the models, if none is named; dtype is then the server's own affair.
    limit: examples of a task and split, the first ones. num_fewshot: None leaves it to the task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: str
    built_in: bool = False
    suites: Annotated[dict[str, Annotated[list[str], Field(min_length=1)]], Field(min_length=1)]
    perplexity: list[str] = []
    metrics: dict[str, str] = {}
    lower: list[str] = []
    limit: Annotated[int, Field(gt=0)] | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    apply_chat_template: bool = False
    batch_size: Annotated[int, Field(gt=0)] = 16
    server: Server | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"

    @property
    def scored(self) -> list[str]:
        """The tasks of all suites, in order, once each."""
        return list(dict.fromkeys(task for tasks in self.suites.values() for task in tasks))
