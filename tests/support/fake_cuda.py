"""The driver of fake_cuda.cpp as tests use it, in a process whose KTMOE_CUDA_DRIVER names it."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np

__all__ = ["DeviceArray", "Stream", "num_locked", "num_locks"]

_driver = ctypes.CDLL(os.environ["KTMOE_CUDA_DRIVER"])
_driver.fake_stream_create.restype = ctypes.c_void_p


class Stream:
    """A stream, as torch has them."""

    def __init__(self) -> None:
        self.cuda_stream = int(_driver.fake_stream_create())

    def synchronize(self) -> None:
        """Wait until all is done."""
        _driver.fake_stream_synchronize(ctypes.c_void_p(self.cuda_stream))

    def capture(self, begin: bool) -> None:
        """Begin or end to keep what the stream is given, for `replay`."""
        _driver.fake_capture(ctypes.c_void_p(self.cuda_stream), int(begin))

    def replay(self) -> None:
        """Do what was captured."""
        _driver.fake_replay(ctypes.c_void_p(self.cuda_stream))

    def stall(self, milliseconds: int) -> None:
        """Do nothing for some time."""
        _driver.fake_stall(ctypes.c_void_p(self.cuda_stream), milliseconds)

    def destroy(self) -> None:
        """Forget the stream: its handle is none any more."""
        _driver.fake_stream_destroy(ctypes.c_void_p(self.cuda_stream))

    def create_again(self) -> None:
        """Make the handle one of a stream again."""
        _driver.fake_stream_create_again(ctypes.c_void_p(self.cuda_stream))


class DeviceArray:
    """An array on the device, whose memory is the host's."""

    def __init__(self, value: Any, strides: Any = None) -> None:
        self.value = np.array(value)
        self._strides = strides

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Where it lies."""
        is_bf16 = self.value.dtype.name == "bfloat16"
        return {
            "data": (self.value.ctypes.data, False),
            "shape": self.value.shape,
            "typestr": "<V2" if is_bf16 else self.value.dtype.str,
            "strides": self._strides,
            "version": 3,
        }


def num_locks() -> int:
    """How many times pages were locked."""
    return int(_driver.fake_num_locks())


def num_locked() -> int:
    """Blocks of memory whose pages are locked."""
    return int(_driver.fake_num_locked())
