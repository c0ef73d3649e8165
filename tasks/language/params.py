"""What params.yaml holds of language models: `language`, and a gate of their own."""

from __future__ import annotations

from functools import cached_property

from mergeline.evaluation.language.settings import Language
from mergeline.tasks.language.gates import LanguageGates
from mergeline.tasks.schema import Params


class LanguageParams(Params):
    """Language models are measured on `language`; an expert's tasks are those of the suite of its own name."""

    language: Language
    gates: LanguageGates = LanguageGates()

    @cached_property
    def tasks(self) -> list[str]:
        return self.language.scored

    @cached_property
    def owners(self) -> dict[str, str]:
        return self.owned(self.language.suites)
