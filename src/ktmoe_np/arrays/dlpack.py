"""JAX arrays on a GPU, by DLPack, which synchronizes two streams.

JAX runs its programs in a private stream. When it exports an array, the given stream waits for the array;
when it imports one, it requests the same from the exporter.
"""

from __future__ import annotations

import sys
from typing import Any

from .. import kt_kernel_ext as ext

__all__ = ["exported", "handed_over", "is_on_cuda"]

#: DLPack's number of CUDA devices, and what it calls the default stream.
_CUDA, _DEFAULT_STREAM = 2, 1


def is_on_cuda(value: Any) -> bool:
    """Whether an array says by DLPack that it is on a CUDA device."""
    return hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) == _CUDA


def exported(value: Any, stream: int) -> tuple[int, str, tuple[int, ...], bool, object]:
    """Address, dtype, shape, contiguity and owner of an array. The stream waits for it."""
    return ext.cuda.exported_array(value.__dlpack__(stream=stream or _DEFAULT_STREAM))


def handed_over(array: Any, stream: int) -> Any:
    """A JAX array that is ready when a stream reaches this point."""
    return sys.modules["jax"].dlpack.from_dlpack(_WrittenIn(array, stream))


class _WrittenIn:
    """An array that a stream writes to, as DLPack exports one."""

    def __init__(self, array: Any, stream: int) -> None:
        self._array, self._stream = array, stream

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        if stream != -1:  # which stands for: do not wait
            waiting = 0 if stream in (None, _DEFAULT_STREAM) else int(stream or 0)
            ext.cuda.wait(waiting, self._stream)
        return self._array.__dlpack__(**options)
