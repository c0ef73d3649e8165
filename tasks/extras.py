"""Extras: what pip installs besides what merging needs, and what to type where some of it is missing."""

from __future__ import annotations

from contextlib import contextmanager
from importlib.util import find_spec
from typing import Iterator

from mergeline.merging.errors import UserError

# Extra of pyproject.toml -> packages that it brings, by the names that are imported. That of a modality has its name,
# with hyphens where that has underscores: pip knows no others.
EXTRAS = {
    "pipeline": ("prefect", "dvc", "mlflow", "matplotlib", "apprise"),
    "clip": ("open_clip", "torchvision", "PIL", "datasets"),
    "language": ("lm_eval", "transformers", "accelerate", "tenacity"),
    "image_classification": ("timm", "torchvision", "transformers", "PIL", "datasets"),
    "text_classification": ("transformers", "datasets"),
    "dense_prediction": ("torchvision", "transformers", "PIL", "datasets"),
    "embeddings": ("sentence_transformers", "datasets"),
    "text2text": ("transformers", "rouge_score", "sacrebleu", "datasets"),
    "policies": ("transformers", "gymnasium"),
    "vision_language": ("transformers", "torchvision", "PIL", "rouge_score", "sacrebleu", "datasets"),
    "s3": ("s3fs",),
    "server": ("psycopg2", "flask_wtf", "boto3", "dvc_s3"),
    "dask": ("distributed", "cryptography"),
    "ray": ("ray",),
    "search": ("optuna", "cmaes"),
    "sign": ("cryptography",),
    "gguf": ("gguf",),
}


def require(*extras: str) -> None:
    """See that what these extras bring is there; a name that is no extra needs nothing.

    Raises:
        UserError: a package is missing; the message has the command that brings it.
    """
    for extra in extras:
        for package in EXTRAS.get(extra, ()):
            if find_spec(package) is None:
                raise _missing(package, extra)


@contextmanager
def missing_ones_named() -> Iterator[None]:
    """Turn the import of a package that an extra brings, where it is missing, into a UserError."""
    try:
        yield
    except ModuleNotFoundError as error:
        if told := missing(error):
            raise told from error
        raise


def missing(error: BaseException | None) -> UserError | None:
    """What to tell of an import that failed for want of a package that an extra brings; None for other errors."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        for extra, brought in EXTRAS.items():
            if package in brought:
                return _missing(package, extra)
    return None


def _missing(package: str, extra: str) -> UserError:
    return UserError(f"{package} is not installed; pip install 'mergeline[{extra.replace('_', '-')}]'")
