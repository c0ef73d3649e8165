"""The one exception that stands for a mistake in what the user gave us."""


class UserError(Exception):
    """Bad input: its message is one line that says what is wrong and how to mend it (exit code 2, no traceback)."""
