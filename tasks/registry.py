"""The registry: versions of the pipeline's model, and the aliases `candidate` and `champion`.

MLflow keeps both. What is written is safe to repeat, and what others write at the same time is seen: see `turns`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mergeline.tasks import tracking
from mergeline.tasks.turns import turn

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE, CHAMPION = "candidate", "champion"
URI_TAG, MERGE_TAG, MD5_TAG = "uri", "merge.name", "dvc.md5"
_TAKEN_DOWN_TAG = "rolled_back_to"
_TAGS = {
    "merge": MERGE_TAG,
    "uri": URI_TAG,
    "digest": tracking.MODEL_TAG,
    "at_use": tracking.AT_USE_TAG,
    "md5": MD5_TAG,
    "taken_down": _TAKEN_DOWN_TAG,
}


@dataclass(frozen=True)
class Version:
    """A version of the registered model `model`.

    merge: what it was called. uri: where its files are kept, seen from the workspace. digest: of its weights. md5: of
    its files, as DVC has it ("": an earlier Mergeline registered it and kept none). at_use: as
    `tasks.leaderboard.at_use` says it. taken_down: the version that was made champion in its place by hand, or "".
    source: where MLflow has its files.
    """

    model: str
    version: str
    merge: str
    uri: str
    digest: str
    run_id: str
    at_use: str = ""
    md5: str = ""
    taken_down: str = ""
    source: str = ""

    @property
    def model_id(self) -> str:
        """Of MLflow's logged model, which the registry does not keep: `source` is .../models/ID/artifacts."""
        return PurePosixPath(urlsplit(self.source).path).parent.name


def version_by_alias(client: MlflowClient, model: str, alias: str) -> Version | None:
    """The version that an alias stands for, if it stands for one."""
    for registered in client.search_registered_models(f"name = '{model}'"):
        if alias in registered.aliases:
            return as_version(client.get_model_version(model, str(registered.aliases[alias])))
    return None


def versions(client: MlflowClient, model: str) -> list[Version]:
    """All that are registered."""
    return [as_version(found) for found in client.search_model_versions(f"name = '{model}'")]


def as_it_is(client: MlflowClient, known: Version) -> Version:
    """What the registry says of a version by now."""
    return as_version(client.get_model_version(known.model, known.version))


def as_version(found: Any) -> Version:
    """What MLflow's own entity says of a version."""
    tags = {field: found.tags.get(tag, "") for field, tag in _TAGS.items()}
    return Version(
        model=found.name, version=str(found.version), run_id=found.run_id, source=found.source, **tags
    )


def is_named(client: MlflowClient, md5: str) -> bool:
    """Whether any version of any model has these files."""
    return bool(client.search_model_versions(f"tags.`{MD5_TAG}` = '{md5}'", max_results=1))


def promote(client: MlflowClient, experiment_id: str, before: Version | None, new: Version) -> bool:
    """Make a version the champion in place of `before`; False where that is no longer the champion, or the version was
    taken down meanwhile: then it is to be judged anew.
    """
    with turn(client, experiment_id):
        now = version_by_alias(client, new.model, CHAMPION)
        if (now and now.version) != (before and before.version) or as_it_is(client, new).taken_down:
            return False
        client.set_registered_model_alias(new.model, CHAMPION, new.version)
        return True


def put_back(client: MlflowClient, experiment_id: str, new: Version) -> Version | None:
    """Make a version the champion by hand; the one that was it, if another, is marked as taken down."""
    with turn(client, experiment_id):
        before = version_by_alias(client, new.model, CHAMPION)
        if before and before.version == new.version:
            before = None
        if before:  # first, so that no run promotes it in between
            client.set_model_version_tag(before.model, before.version, _TAKEN_DOWN_TAG, new.version)
        if as_it_is(client, new).taken_down:
            client.delete_model_version_tag(new.model, new.version, _TAKEN_DOWN_TAG)
        client.set_registered_model_alias(new.model, CHAMPION, new.version)
    return before
