"""Merging: checkpoints in, one checkpoint out.

from mergeline.merging import merge, merge_state_dicts
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergeline.merging.api import merge, merge_state_dicts

__all__ = ["merge", "merge_state_dicts"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from mergeline.merging import api

        return getattr(api, name)
    raise AttributeError(f"module 'merging' has no attribute '{name}'")
