"""What is timed: a further operation, a backward pass say, is a further row, and a case in its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .cases import Case
from .layer import Array, Layer
from .shapes import Shape
from .truth import truth

__all__ = ["OPERATIONS", "Operation"]


@dataclass(frozen=True)
class Operation:
    """How much work an operation is, and what its answer is."""

    name: str
    flop: Callable[[Shape, int], float]  #: of a shape and a number of tokens
    weight_reads: int  #: how often each touched weight must come from memory
    truth: Callable[[Layer, Case, Array], Array]  #: of some rows


OPERATIONS = {op.name: op for op in (Operation("forward", Shape.flop, 1, truth),)}
