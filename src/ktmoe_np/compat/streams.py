"""Where a call computes: kt-kernel's `cuda_stream`, a number, on tensors of the CPU or of a device."""

from __future__ import annotations

from typing import Any

import torch

from ..arrays.device import stream_handle
from ..arrays.types import StreamLike

__all__ = ["stream_of_call", "torch_stream"]


def stream_of_call(cuda_stream: StreamLike | None, device: torch.device) -> int | None:
    """The handle of the stream that a call goes into; None on the CPU.

    Parameters
    ----------
    cuda_stream : int, torch or CuPy stream, or None
        0 is the default stream of a device, and no stream on the CPU. None is torch's current one.
    device : torch.device
        That of the hidden states.

    Raises
    ------
    TypeError
        No stream.
    ValueError
        A stream for tensors on the CPU, or another device than those of CUDA.

    Examples
    --------
    >>> print(stream_of_call(0, torch.device("cpu")))
    None
    """
    handle = None if cuda_stream is None else stream_handle(cuda_stream)
    if device.type == "cpu":
        if handle:
            raise ValueError(f"cuda_stream: got {handle:#x}, expected 0 or None: tensors are on the CPU")
        return None
    if device.type != "cuda":
        raise ValueError(f"hidden_states: got a tensor on {device}, expected cpu or cuda")
    return int(torch.cuda.current_stream(device).cuda_stream) if handle is None else handle


def torch_stream(handle: int, device: torch.device) -> torch.cuda.Stream:
    """The stream of a handle as torch has it."""
    if handle == 0:
        return torch.cuda.default_stream(device)
    external: Any = torch.cuda.ExternalStream  # without types in torch
    stream: torch.cuda.Stream = external(handle, device=device)
    return stream
