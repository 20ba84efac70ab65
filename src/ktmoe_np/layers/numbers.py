"""Numbers of layers: operators of other libraries take numbers, not objects."""

from __future__ import annotations

import itertools
import weakref
from typing import Generic, TypeVar

__all__ = ["Numbers"]

LayerT = TypeVar("LayerT")


class Numbers(Generic[LayerT]):
    """Objects under numbers that are given once, as long as they live.

    Examples
    --------
    >>> class Layer: ...
    >>> numbers, layer = Numbers("layer"), Layer()
    >>> number = numbers.add(layer)
    >>> numbers.at(number) is layer
    True
    >>> del layer
    >>> numbers.at(number)
    Traceback (most recent call last):
    RuntimeError: layer: got the number of one that was deleted, expected one that lives
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._next = itertools.count(1)
        self._found: weakref.WeakValueDictionary[int, LayerT] = weakref.WeakValueDictionary()

    def add(self, layer: LayerT) -> int:
        """The number of an object, which is not kept alive."""
        number = next(self._next)
        self._found[number] = layer
        return number

    def at(self, number: int) -> LayerT:
        """The object of a number.

        Raises
        ------
        RuntimeError
            It was deleted.
        """
        found = self._found.get(number)
        if found is None:
            raise RuntimeError(
                f"{self._name}: got the number of one that was deleted, expected one that lives"
            )
        return found
