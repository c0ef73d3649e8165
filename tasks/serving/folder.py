"""The folder that MLflow loads a registered model from: its files, what is served beside them, and the code.

    MLmodel, python_env.yaml, requirements.txt ...
    code.py                 what MLflow runs: models from code, no pickle
    artifacts/model/        the files, by hard link where the disk is the same
    artifacts/served/       see `served`
https://mlflow.org/docs/latest/ml/model/models-from-code/
"""

from __future__ import annotations

import os
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeline.merging.files import link_or_copy
from mergeline.tasks.digests import files_of
from mergeline.tasks.serving.contract import NUMBER, OPTIONAL_TEXT, VECTOR, Served
from mergeline.tasks.serving.served import write_served

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

    from mergeline.tasks.modality import Modality

MLMODEL = "MLmodel"
MODEL, _BESIDE = "artifacts/model", "artifacts/served"


def write_folder(out: Path, scratch: Path, files: Path, modality: Modality, served: Served) -> bool:
    """Make the folder in `out`, which is empty; whether all files could be linked.

    scratch: a folder for what MLflow copies. files: those of the version.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    write_served(scratch / "served", modality, served)
    made = scratch / "made"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would have an example of the input beside the signature
        mlflow.pyfunc.save_model(
            path=str(made),
            python_model=str(Path(__file__).with_name("code.py")),
            artifacts={"served": str(scratch / "served")},
            signature=_signature(served),
            pip_requirements=[_requirement(modality.name)],
        )
    described = Model.load(str(made / MLMODEL))
    function = described.flavors["python_function"]
    # As MLflow would say it, without the copy that it would make.
    function["artifacts"] |= {"model": {"path": MODEL, "uri": files.name}}
    function["artifacts"]["served"]["uri"] = "served"
    described.save(str(made / MLMODEL))
    for entry in made.iterdir():
        os.rename(entry, out / entry.name)
    linked = True
    for file in files_of(files):
        target = out / MODEL / file.relative_to(files)
        target.parent.mkdir(parents=True, exist_ok=True)
        linked &= link_or_copy(file, target)
    return linked


def _requirement(modality: str) -> str:
    extra = f"mergeline[{modality.replace('_', '-')}]"
    try:
        return f"{extra}=={version('mergeline')}"
    except PackageNotFoundError:  # run from its sources
        return extra


def _signature(served: Served) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema

    params = [ParamSpec(name, "long", default) for name, default in served.parameters.items()]
    return ModelSignature(
        inputs=Schema([_column(name, kind) for name, kind in served.inputs.items()]),
        outputs=Schema([_column(name, kind) for name, kind in served.outputs.items()]),
        params=ParamSchema(params) if params else None,
    )


def _column(name: str, kind: str) -> Any:
    from mlflow.types import ColSpec
    from mlflow.types.schema import Array

    types: dict[str, Any] = {OPTIONAL_TEXT: "string", VECTOR: Array(NUMBER)}
    return ColSpec(types.get(kind, kind), name, required=kind != OPTIONAL_TEXT)
