"""Errors of calls on a GPU, which come when the calls have long returned."""

from __future__ import annotations

from .. import kt_kernel_ext as ext

__all__ = ["raise_pending_error"]


def raise_pending_error() -> None:
    """Raise the first error of calls on a GPU since the last time.

    Such a call has returned long before its error: its results are NaN, and the next call of the process
    fails with that error, or this does. Passes of layers in CUDA streams share the pending error: the first
    call raises it. Wait for the results first, by `jax.block_until_ready`.

    Raises
    ------
    IndexError, RuntimeError
        What a call on the CPU would have raised.

    Examples
    --------
    >>> raise_pending_error()  # there was none
    """
    ext.cuda.raise_error()
