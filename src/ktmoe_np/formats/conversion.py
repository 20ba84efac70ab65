"""Converting the matrices of experts, several at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["convert_each"]

Result = TypeVar("Result")

#: Conversion is bound by memory: more threads than these gain nothing, and each holds a copy of a matrix.
_MAX_THREADS = 16


def convert_each(convert: Callable[..., Result], *arguments: Iterable[Any]) -> list[Result]:
    """Call `convert` for each expert, in threads, and list what it returns.

    Examples
    --------
    >>> convert_each(max, [1, 2], [0, 3])
    [1, 3]
    """
    rows = list(zip(*arguments, strict=True))
    num_threads = max(1, min(len(os.sched_getaffinity(0)), _MAX_THREADS, len(rows)))
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(lambda row: convert(*row), rows))
