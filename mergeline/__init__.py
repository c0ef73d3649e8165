"""Mergeline: checkpoints in, one better checkpoint out, with proof.

from mergeline import merge, merge_state_dicts

The rooms `merging`, `evaluation`, `tasks` and `flows` lie at the top of the repository and are linked in here.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergeline.merging.api import merge, merge_state_dicts

__all__ = ["merge", "merge_state_dicts"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from mergeline.merging import api

        return getattr(api, name)
    raise AttributeError(f"module 'mergeline' has no attribute '{name}'")
