"""Output of the command: all text goes through here, so that no control characters are printed.

Names, metadata and texts come from files of others. What a terminal would obey (escape sequences, carriage
returns, text that runs from right to left) is shown as Python writes it in a string.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

__all__ = [
    "OutputError",
    "complain",
    "drop_output",
    "flush",
    "one_line",
    "prepare",
    "printable",
    "say",
    "say_json",
    "say_piece",
]

#: Kinds of characters that are obeyed instead of shown, or are half of one: controls, surrogates, and the
#: separators of lines and of paragraphs.
_OBEYED = {"Cc", "Cs", "Zl", "Zp"}

#: What changes the direction in which a line runs.
_DIRECTIONS = {
    "\u061c",
    "\u200e",
    "\u200f",
    *map(chr, range(0x202A, 0x202F)),
    *map(chr, range(0x2066, 0x206A)),
}

_KEPT = {"\n", "\t"}


class OutputError(OSError):
    """Standard output does not take what is written to it."""


def printable(text: str) -> str:
    r"""A text without what a terminal obeys, but for newlines and tabs.

    Examples
    --------
    >>> printable("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(_shown(letter) for letter in text)


def _shown(letter: str) -> str:
    obeyed = unicodedata.category(letter) in _OBEYED or letter in _DIRECTIONS
    return repr(letter)[1:-1] if obeyed and letter not in _KEPT else letter


def one_line(text: str) -> str:
    """A text with its white space, newlines among it, as single blanks."""
    return printable(" ".join(text.split()))


def prepare() -> None:
    """Let letters that the terminal's encoding does not have be shown as escapes.

    Raises
    ------
    OutputError
        Standard output is closed.
    """
    if sys.stdout is None:
        raise OutputError("standard output: is closed, expected one to write to (/dev/null will do)")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Write lines to standard output."""
    say_piece(f"{text}\n")


def say_json(value: Any) -> None:
    """Write JSON, in which all but printable ASCII is escaped, to standard output."""
    say(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))


def say_piece(text: str) -> None:
    """Write a part of a line to standard output."""
    with _naming_output():
        sys.stdout.write(printable(text))


def flush() -> None:
    """Make sure that what was said is out."""
    with _naming_output():
        sys.stdout.flush()


@contextlib.contextmanager
def _naming_output() -> Iterator[None]:
    """Say of an error that it is standard output's, which then gets nothing more."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a stream that was closed
        drop_output()
        if isinstance(error, BrokenPipeError):
            raise
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputError(f"standard output: {reason}") from error


def drop_output() -> None:
    """Let what is buffered, which Python writes at its end, go nowhere."""
    _drop(sys.stdout)


def _drop(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def complain(text: str) -> None:
    """Write a line to standard error, where there is one that takes it."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(f"{one_line(text)}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        _drop(sys.stderr)  # else Python tries again at its end, and changes the exit status
