"""The exception for wrong input; any other exception is a defect of the program."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the outside: a file, a table row, a configuration key, a flag.

    The message is one line: what is wrong, what was expected, how to fix it. Entry points print it after ``error:``
    and exit with status 2, without a traceback.
    """


def first_line(error: BaseException) -> str:
    """First line of an exception's message, at most 200 characters; the type of an exception without a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()[:200]


def counted(number: int, noun: str) -> str:
    """``1 epoch``, ``2 epochs``, ``2 processes``."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{'' if number == 1 else ending}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or not: torch has several errors for it, known by their text alone."""
    text = str(error).lower()
    words = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in words))
