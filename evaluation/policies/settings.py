"""What a task of policies is: an environment, the return that is asked for, and how the model sees both."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The seed of the first episode of each split; the next ones follow. They are the same for every model, so that
# outcomes are paired, and no split reaches the next one's.
FIRST_SEED = {"val": 0, "test": 1_000_000}
_MOST = 1_000_000

Count = Annotated[int, Field(gt=0, le=_MOST)]


class Episodes(BaseModel):
    """How many episodes each split has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    val: Count = 20
    test: Count = 50

    def seeds(self, split: str) -> range:
        """The seeds of the episodes of a split."""
        first = FIRST_SEED[split]
        return range(first, first + getattr(self, split))


class Task(BaseModel):
    """An entry of `policies.tasks` of params.yaml.

    environment: an id of gymnasium's own registry. target_return: what the model is asked for, and what a normalised
    return of 1 is; floor: what 0 is, such as a random policy's return. scale: returns to go are divided by it. context:
    how many steps the model sees. max_steps: of an episode; the environment's own limit where it is left out. mean,
    std: by which states are normalised, a number each; where they are left out, `state_mean` and `state_std` of the
    expert's config.json, and, without those, 0 and 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    environment: str
    target_return: float
    floor: float = 0.0
    scale: Annotated[float, Field(gt=0)] = 1.0
    context: Annotated[int, Field(gt=0)] = 20
    max_steps: Annotated[int, Field(gt=0)] | None = None
    mean: list[float] | None = None
    std: list[Annotated[float, Field(gt=0)]] | None = None

    @model_validator(mode="after")
    def _target_above_floor(self) -> Self:
        if self.target_return <= self.floor:
            raise ValueError(f"target_return must be more than floor, which is {self.floor:g}")
        return self

    def normalised(self, found: float) -> float:
        """(return - floor) / (target_return - floor)."""
        return (found - self.floor) / (self.target_return - self.floor)

    def return_of(self, normalised: float) -> float:
        """The return that this is the normalised one of."""
        return self.floor + normalised * (self.target_return - self.floor)
