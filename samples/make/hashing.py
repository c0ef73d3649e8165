"""A hash that is the same in every process, for seeds and for orders that follow no alphabet."""

from __future__ import annotations

import hashlib


def stable_hash(text: str) -> int:
    """48 bits."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
