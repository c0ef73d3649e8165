"""The code of a registered model: MLflow copies this file beside it, and runs it to load it (models from code)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from mergeline.merging.errors import UserError
from mergeline.tasks.serving.served import open_served


class ServedModel(PythonModel):
    """A model of Mergeline's; what it takes and gives is its signature."""

    def load_context(self, context: Any) -> None:
        """Open the model (raises MlflowException, with Mergeline's own line, if it does not open)."""
        try:
            self._predict = open_served(Path(context.artifacts["model"]), Path(context.artifacts["served"]))
        except UserError as error:
            raise MlflowException(str(error)) from None

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """A row for each row of `model_input`; rows that cannot be answered are blamed by their number."""
        frame = pandas.DataFrame(model_input)
        rows = [
            {key: value for key, value in row.items() if not _is_missing(value)}
            for row in frame.to_dict("records")
        ]
        try:
            return pandas.DataFrame(self._predict(rows, params or {}))
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


def _is_missing(value: Any) -> bool:
    return value is None or isinstance(value, float) and value != value


set_model(ServedModel())
