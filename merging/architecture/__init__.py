"""One description of what each tensor of a model is: its role, layer, matrices, and what moves together.

from mergeline.merging.architecture import describe

`tensors` says what can be said of a tensor, `rows` how architectures name theirs, `model` reads a model with both,
`axes` finds the dimensions that move together, `classes` the classes that a configuration names, and `renames` knows
what names on disk become in memory.
"""

from mergeline.merging.architecture.classes import classes_of
from mergeline.merging.architecture.model import Model, describe, describe_all, layer_counts, layer_of
from mergeline.merging.architecture.renames import InMemory, disk_name, in_memory, memory_name, on_disk
from mergeline.merging.architecture.rows import Pattern, Row, prompt_role, register
from mergeline.merging.architecture.tensors import (
    CLASSIFIERS,
    RUNNING_STATISTICS,
    Keys,
    Matrix,
    PackedExperts,
    Role,
    TensorRole,
    is_matrix,
    kind_of,
)

__all__ = [
    "CLASSIFIERS",
    "RUNNING_STATISTICS",
    "InMemory",
    "Keys",
    "Matrix",
    "Model",
    "PackedExperts",
    "Pattern",
    "Role",
    "Row",
    "TensorRole",
    "classes_of",
    "describe",
    "describe_all",
    "disk_name",
    "in_memory",
    "is_matrix",
    "kind_of",
    "layer_counts",
    "layer_of",
    "memory_name",
    "on_disk",
    "prompt_role",
    "register",
]
