"""Objects that several users share at a time: made once, freed with the last of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from .. import kt_kernel_ext as ext

__all__ = ["SharedCache"]

T = TypeVar("T")


class SharedCache(Generic[T]):
    """Objects that are in use, by a key that says what they were made of.

    Examples
    --------
    >>> cache = SharedCache[set[int]]()
    >>> first = cache.get("key", lambda: {1})
    >>> cache.get("key", lambda: {2}) is first
    True
    """

    def __init__(self) -> None:
        self._objects: weakref.WeakValueDictionary[Hashable, T] = weakref.WeakValueDictionary()
        self._lock = ext.CallLock("weight_path")

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The object of that key, made when none is in use."""
        with self._lock:
            found = self._objects.get(key)
            if found is None:
                found = self._objects[key] = make()
            return found
