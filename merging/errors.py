"""Mistakes in what the user gave us, and what they may have meant."""

from typing import Any, Iterable, Mapping

_FEW = 12
_LONGEST, _END = 2000, 400  # characters of a message, and how many of them are its end
# What pydantic calls a mistake -> what it is.
_PLAIN = {
    "missing": "is required, and missing",
    "extra_forbidden": "is no key that is known",
    "string_type": "must be text",
    "list_type": "must be a list, such as [a, b]",
    "dict_type": "must hold keys and values",
    "model_type": "must hold keys and values",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be finite",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "literal_error": "must be {expected}",
    "too_short": "must list {min_length} or more",
    "too_long": "must list {max_length} or fewer",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
}


class UserError(Exception):
    """Bad input: its message is one line that says what is wrong and how to mend it (exit code 2, no traceback)."""

    def __init__(self, message: str):
        if len(message) > _LONGEST:  # values come from the input, too
            message = f"{message[: _LONGEST - _END]} ... {message[-_END:]}"
        super().__init__(printable(message))


def printable(text: str, but: str = "") -> str:
    """A text of which each character is shown: names of the input may hold what ends the line or commands the terminal.

    but: characters that stay as they are.
    """
    return "".join(c if c.isprintable() or c in but else repr(c)[1:-1] for c in text)


def plainly(error: Mapping[str, Any]) -> str:
    """What one of the `errors()` of a pydantic ValidationError says, as the end of a sentence on the value."""
    kind, given = error["type"], error.get("ctx", {})
    if kind in _PLAIN:
        return _PLAIN[kind].format(**given)
    return error["msg"].removeprefix("Value error, ")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them if they are few."""
    from difflib import get_close_matches  # only what is wrong pays for it

    known = list(map(str, known))
    close = get_close_matches(str(name), known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= _FEW else ""
