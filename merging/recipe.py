"""A recipe: what to merge, how, into which dtype. It travels inside the merged checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merging.errors import UserError


class Recipe(BaseModel):
    """Paths are local safetensors files or folders; `experts` is in the order of all per-expert lists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    params: dict[str, Any] = {}
    experts: dict[str, Path]
    base: Path | None = None
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = (
        None  # None: each tensor keeps its own
    )
    seed: int = 0
    shard_size: Annotated[int, Field(gt=0)] | None = None  # bytes a file; None writes one file

    @classmethod
    def of(cls, value: Recipe | Mapping[str, Any]) -> Recipe:
        """A recipe from a recipe or a mapping (raises UserError if a key or value is wrong)."""
        if isinstance(value, Recipe):
            return value
        try:
            return cls.model_validate(dict(value))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"recipe: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def text_digest(value: Any) -> str:
    """`sha256:...` of the canonical JSON of a value."""
    return "sha256:" + hashlib.sha256(canonical_json(value).encode()).hexdigest()
