"""What several hold at a time, made once and let go with its last holder."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from .. import kt_kernel_ext as ext

__all__ = ["Held"]

T = TypeVar("T")


class Held(Generic[T]):
    """Objects that someone holds, by a key that says what they were made of.

    Examples
    --------
    >>> held = Held[set[int]]()
    >>> first = held.get("key", lambda: {1})
    >>> held.get("key", lambda: {2}) is first
    True
    """

    def __init__(self) -> None:
        self._held: weakref.WeakValueDictionary[Hashable, T] = weakref.WeakValueDictionary()
        self._lock = ext.CallLock("weight_path")

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The object of that key, made when nobody holds one."""
        with self._lock:
            found = self._held.get(key)
            if found is None:
                found = self._held[key] = make()
            return found
