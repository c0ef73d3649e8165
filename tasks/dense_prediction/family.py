"""A family of models of every pixel in build/: which tensors are heads, and the experts' models."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mergeline.evaluation.dense_prediction.models import Predictor, open_predictor
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.errors import UserError
from mergeline.tasks.heads import FamilyWithHeads

if TYPE_CHECKING:
    from mergeline.tasks.dense_prediction.params import DensePredictionParams

# Modules that are heads as a whole: of SegFormer, UperNet, BEiT, DPT, GLPN and Swin2SR, and of torchvision's models.
_WHOLE = ("decode_head", "auxiliary_head", "head", "classifier", "aux_classifier", "decoder", "upsample")


class Family(FamilyWithHeads):
    """The base and the experts of a pipeline."""

    def __init__(self, params: DensePredictionParams, build: Path):
        super().__init__(params, build)
        self.params = params
        self._predictors: dict[str, Predictor] = {}

    @cached_property
    def patterns(self) -> list[str]:
        self.refuse_adapters("head")
        return self.params.dense_prediction.heads or self._found()

    def _found(self) -> list[str]:
        """Modules that are heads by their names, and tensors that the base lacks, whatever prefix its names have."""
        found: set[str] = set()
        for folder in map(self.expert, self.params.experts):
            for name in open_checkpoint(folder).tensors:
                top = name.partition(".")[0]
                if top in _WHOLE:
                    found.add(f"{top}.*")
                elif self.base_lacks(name):
                    found.add(name)
        if not found:
            raise UserError(
                f"{self.base}: no head is found among the tensors of its experts; name them: heads: ['decode_head.*']"
            )
        return sorted(found)

    def predictor(self, task: str) -> Predictor:
        """The model of a task's expert, loaded once."""
        expert = self.params.owners[task]
        if expert not in self._predictors:
            with FileInputs(self.plan) as source:
                head = {name: source.whole(expert, name) for name in self.plan.heads[expert]}
            settings = self.params.dense_prediction
            self._predictors[expert] = open_predictor(
                self.expert(expert), settings.model, head, self.params.device
            )
        return self._predictors[expert]
