"""A pretended device that pipelines may name, and proof that they used it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator
from unittest.mock import patch

import torch

from mergeline.flows import launch
from mergeline.merging.pretended_device import Pretended, pretended_device
from mergeline.tasks import schema
from mergeline.tasks.modalities import modalities


@contextmanager
def accelerator() -> Iterator[str]:
    """In this block a params.yaml may name the device whose name is given; something must have been brought there."""
    brought = 0
    make = Pretended.__new__

    def counted(cls: Any, held: torch.Tensor) -> Pretended:
        nonlocal brought
        brought += 1
        return make(cls, held)

    with (
        patch.object(schema, "check_device_name", lambda device: None),
        patch.object(launch, "check_device", lambda device: None),
        patch.object(Pretended, "__new__", staticmethod(counted)),
        pretended_device() as name,
    ):
        yield name
    assert brought


@contextmanager
def default_device(name: str) -> Iterator[None]:
    """In this block, pipelines run there that name none."""
    # Each has fields of its own, copied from those that it inherits when its module is loaded.
    kinds = [modality.schema() for modality in modalities().values()]
    before = kinds[0].model_fields["device"].default

    def set_default(device: str) -> None:
        for kind in kinds:
            kind.model_fields["device"].default = device
            kind.model_rebuild(force=True)

    set_default(name)
    try:
        yield
    finally:
        set_default(before)
