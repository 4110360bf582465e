"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the outside: a file, a table row, a configuration key, a flag.

    The message is one line that names the culprit, says what was expected and how to mend it.
    Entry points print it after ``error:`` and exit with status 2, without a traceback;
    every other exception is a defect of ours and keeps its traceback.
    """
