"""The catalogue of methods: `contract` says what a method is, `bound` carries one out, each other file defines one.

What a file that defines methods needs can be imported from here.
"""

from mergeline.merging.algebra.slots import Slot, View, Views
from mergeline.merging.methods.bound import Inner
from mergeline.merging.methods.contract import (
    Look,
    Mean,
    Method,
    Note,
    Origin,
    catalogue,
    get_method,
    load_methods,
    method,
)
from mergeline.merging.methods.parameters import (
    BelowOne,
    Count,
    NotNegative,
    Positive,
    Rate,
    Rates,
    Share,
    Shares,
    Task,
    Weights,
)

__all__ = [
    "BelowOne", "Count", "Inner", "Look", "Mean", "Method", "NotNegative", "Note", "Origin", "Positive", "Rate",
    "Rates", "Share", "Shares", "Slot", "Task", "View", "Views", "Weights", "catalogue", "get_method", "load_methods",
    "method",
]  # fmt: skip
