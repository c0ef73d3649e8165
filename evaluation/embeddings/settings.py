"""What embedding models are measured by: the entries of `embeddings.tasks` in params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Similarity(BaseModel):
    """Pairs of texts with a score each, by the columns that hold them; measured by Spearman's correlation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["similarity"]
    first: str = "sentence1"
    second: str = "sentence2"
    score: str = "score"

    @property
    def roles(self) -> tuple[str, str]:
        """What a prompt can be given for."""
        return "first", "second"


class Retrieval(BaseModel):
    """Queries, and ids of the documents of a corpus that answer them; measured by nDCG@10.

    query, relevant: columns with the text of a query, and with a list of ids or an object id -> grade.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["retrieval"]
    query: str = "query"
    relevant: str = "relevant"

    @property
    def roles(self) -> tuple[str, str]:
        """What a prompt can be given for."""
        return "query", "document"


Task = Annotated[Similarity | Retrieval, Field(discriminator="kind")]
