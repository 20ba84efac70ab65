"""Parsing untrusted JSON: any text gives a value or a ValueError that names the file."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .regular_file import read_regular

__all__ = ["MAX_JSON_BYTES", "naming_file", "parse_json", "parse_json_object", "read_json_object", "shown"]

#: No file of a checkpoint has more; parsed, a text takes up to some thirty times its size.
MAX_JSON_BYTES = 100_000_000

#: The most objects and arrays of a text: they are what takes memory, up to a few hundred bytes each.
_MAX_CONTAINERS = 2**22

#: More digits than an integer has that a float can hold.
_MAX_DIGITS = 308

#: An escape that may be one half of a surrogate pair.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxstring = _short.maxother = _short.maxlong = 80


def parse_json(text: bytes, what: str, *, finite: bool = False) -> Any:
    """Parse a JSON text.

    Parameters
    ----------
    text : bytes
        In UTF-8.
    what : str
        What messages open with: the file.
    finite : bool
        Refuse NaN and infinities, which are no JSON but written by Python, among others in config.json.

    Returns
    -------
    object
        Its integers fit a float, its strings are Unicode.

    Raises
    ------
    ValueError
        Not JSON; nested too deeply; millions of objects and arrays; a key that occurs twice in an object; an
        integer of more than 308 digits; half a surrogate pair.

    Examples
    --------
    >>> parse_json(b'{"a": [1, 2.5]}', "x.json")
    {'a': [1, 2.5]}
    >>> parse_json(b'{"a": 1, "a": 2}', "x.json")
    Traceback (most recent call last):
    ValueError: x.json is not JSON: key 'a' occurs twice
    """
    containers = text.count(b"{") + text.count(b"[")  # those in strings too, which are few
    if containers > _MAX_CONTAINERS:
        raise ValueError(f"{what}: got {containers} objects and arrays, expected at most {_MAX_CONTAINERS}")
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_constant=_no_constant if finite else None,
            parse_float=_finite if finite else None,
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not JSON: a string has half a surrogate pair") from None
    except RecursionError:
        raise ValueError(f"{what} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from None
    return value


def parse_json_object(text: bytes, what: str, *, finite: bool = False) -> dict[str, Any]:
    """Parse a JSON object as `parse_json` does; ValueError, too, when it is anything else."""
    value = parse_json(text, what, finite=finite)
    if not isinstance(value, dict):
        raise ValueError(f"{what}: got {type(value).__name__}, expected a JSON object")
    return value


def read_json_object(path: str | os.PathLike[str], *, finite: bool = False) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises
    ------
    FileNotFoundError, OSError
        The file cannot be opened.
    ValueError
        Not a regular file, more than 100 MB, or what `parse_json` refuses.
    """
    return parse_json_object(read_regular(path, MAX_JSON_BYTES), str(path), finite=finite)


def shown(value: object) -> str:
    """`value` for a message: short, and bounded in depth and time.

    Examples
    --------
    >>> shown([[[[[1]]]]]), shown("x" * 100) == repr("x" * 100)
    ('[[[[...]]]]', False)
    """
    return f"{_short.repr(value):.80}"


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a TypeError or ValueError about what a file says into a ValueError that names the file."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r:.80} occurs twice")
    return value


def _integer(digits: str) -> int:
    """An integer, unless it is longer than a float can hold: code that converts it need not expect that."""
    num_digits = len(digits.removeprefix("-"))
    if num_digits > _MAX_DIGITS:
        raise ValueError(f"got an integer of {num_digits} digits, expected at most {_MAX_DIGITS}")
    return int(digits)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits:.80} is beyond what a float can hold")
    return value
