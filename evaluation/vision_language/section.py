"""What the report of models of images and texts shows besides: texts that they wrote."""

from __future__ import annotations

from typing import Any

from mergeline.evaluation.pages.page import Section
from mergeline.evaluation.text2text.section import grids

_TEXT = "The first test examples of each task: what was asked, the right answers, and what every model wrote."


def section(board: dict[str, Any]) -> Section:
    """The section of a leaderboard."""
    return Section("vision_language", "Texts", _TEXT, grids(board))
