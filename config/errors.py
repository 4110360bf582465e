"""The exception for wrong input; any other exception is a defect of the program."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the outside: a file, a table row, a configuration key, a flag.

    The message is one line: what is wrong, what was expected, how to fix it. Entry points print it after ``error:``
    and exit with status 2, without a traceback.
    """
