"""Checks of what kt-kernel's callers give: tensors, not pointers, and streams by number."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["buffers_of", "on_device", "stream_of", "tensor_of"]


def tensor_of(value: object, name: str) -> torch.Tensor:
    """Return a tensor as it is.

    Raises
    ------
    TypeError
        Something else; of a number it is said that it is taken for a pointer.
    """
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        raise TypeError(
            f"{name}: got the number {value}, expected a tensor: a pointer has no size to be checked and "
            "nothing that keeps its memory alive; give the tensor itself"
        )
    raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")


def buffers_of(values: Sequence[object] | None, name: str) -> list[torch.Tensor] | None:
    """Tensors to write to, or None for none; errors are those of `tensor_of`."""
    if values is None:
        return None
    return [tensor_of(value, f"{name}[{i}]") for i, value in enumerate(values)]


def on_device(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on a GPU."""
    return tensor.device.type != "cpu"


def stream_of(tensor: torch.Tensor, cuda_stream: object) -> object:
    """The stream that a pass on tensors like `tensor` goes by; None on the CPU.

    Raises
    ------
    ValueError
        A stream for tensors on the CPU.
    """
    if on_device(tensor):
        return 0 if cuda_stream is None else cuda_stream
    if cuda_stream not in (None, 0):
        raise ValueError(f"cuda_stream: got {cuda_stream!r}, expected 0 or None: the tensors are on the CPU")
    return None
