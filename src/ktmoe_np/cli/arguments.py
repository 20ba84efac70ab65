"""The types of the command's arguments: each refuses in one line what it is not."""

from __future__ import annotations

import argparse
import math
from typing import Literal, TypeAlias, cast

from ..config.activation_dtype import ACTIVATION_DTYPES

__all__ = [
    "Count",
    "Dtype",
    "activation_dtype",
    "activation_dtypes",
    "counts",
    "counts_from_0",
    "duration",
    "fraction",
    "layer_ranges",
    "method_names",
    "positive",
    "share",
    "temperature",
    "utf8",
]

#: What a command computes activations in; None is the default of the layer or the model.
Dtype: TypeAlias = Literal["bfloat16", "int8"] | None

_AUTO = "auto"

#: More than any model has, so that a mistyped range is said to be one.
_MAX_LAYERS = 100_000

#: More than anything that is counted here; sizes of arrays overflow far above it.
_MAX_INTEGER = 2**31 - 1


class Count:
    """Argument type: an integer of at least `least`, at most `most`."""

    def __init__(self, least: int, most: int = _MAX_INTEGER) -> None:
        self.least, self.most = least, most

    def __call__(self, text: str) -> int:
        """Read it."""
        digits = text.strip()
        # The length first: Python refuses to convert thousands of digits, in words of its own.
        if not digits.isdecimal() or len(digits) > 100 or int(digits) < self.least:
            raise argparse.ArgumentTypeError(
                f"got {text[:100]!r}, expected an integer of {self.least} or more"
            )
        if int(digits) > self.most:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected at most {self.most}")
        return int(digits)


def counts(text: str, least: int = 1) -> list[int]:
    """Argument type: integers with commas between them."""
    return [Count(least)(part) for part in text.split(",")]


def counts_from_0(text: str) -> list[int]:
    """Argument type: integers of 0 or more with commas between them."""
    return counts(text, 0)


def layer_ranges(text: str) -> list[int]:
    """Argument type: numbers and ranges of them, as in 0-3,7."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = [Count(0)(end) for end in ((first, last) if dash else (first,))]
        if ends[0] > ends[-1] or ends[-1] >= _MAX_LAYERS:
            raise argparse.ArgumentTypeError(
                f"got {part!r}, expected an ascending range of numbers below {_MAX_LAYERS}"
            )
        numbers += range(ends[0], ends[-1] + 1)
    return numbers


def method_names(text: str) -> list[str]:
    """Argument type: names with commas between them."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected names with commas between them")
    return found


def activation_dtype(text: str) -> Dtype:
    """Argument type: auto, bfloat16 or int8."""
    if text not in (_AUTO, *ACTIVATION_DTYPES):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {_AUTO}, {' or '.join(ACTIVATION_DTYPES)}")
    return None if text == _AUTO else cast(Dtype, text)


def activation_dtypes(text: str) -> list[Dtype]:
    """Argument type: such names with commas between them, or all, which is bfloat16 and int8."""
    names = ACTIVATION_DTYPES if text == "all" else text.split(",")
    return list(dict.fromkeys(map(activation_dtype, names)))


def utf8(text: str) -> str:
    """Argument type: a text. Bytes that are not UTF-8 arrive as surrogates, which nothing can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(
            f"got {text[error.start : error.start + 1]!r} at letter {error.start}, expected UTF-8"
        ) from error
    return text


def _float(text: str) -> float:
    """Parse a number; NaN, which is in no range, if the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def temperature(text: str) -> float:
    """Argument type: a temperature."""
    value = _float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to 100")
    return value


def fraction(text: str) -> float:
    """Argument type: a probability."""
    value = _float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to 1")
    return value


def share(text: str) -> float:
    """Argument type: a part of a whole, not nothing."""
    value = _float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0, at most 1")
    return value


def positive(text: str) -> float:
    """Argument type: a number above 0."""
    value = _float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


def duration(text: str) -> float:
    """Argument type: seconds."""
    value = _float(text)
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0, at most 600")
    return value
