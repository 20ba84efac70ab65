"""Sizes of the layer and the batch that tests of the extension and its engine share."""

__all__ = ["E", "H", "I", "P", "T"]

E, I, H, P, T = 4, 24, 40, 2, 6  # noqa: E741
