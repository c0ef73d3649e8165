"""Merging: checkpoints in, one checkpoint out.

from merging import merge, merge_state_dicts
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merging.engine import merge, merge_state_dicts

__all__ = ["merge", "merge_state_dicts"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from merging import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'merging' has no attribute '{name}'")
