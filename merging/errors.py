"""Mistakes in what the user gave us, and what they may have meant."""

from difflib import get_close_matches
from typing import Iterable

_FEW = 12


class UserError(Exception):
    """Bad input: its message is one line that says what is wrong and how to mend it (exit code 2, no traceback)."""

    def __init__(self, message: str):
        # Names come from the input: a line feed would end the line, other control characters command the terminal.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them if they are few."""
    known = list(map(str, known))
    close = get_close_matches(str(name), known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= _FEW else ""
