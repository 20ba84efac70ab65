"""The error of a tensor whose type its place does not take."""

from __future__ import annotations

__all__ = ["TensorTypeError"]


class TensorTypeError(ValueError):
    """A tensor has another dtype, or type of GGUF, than what reads it takes; its file may be sound."""
