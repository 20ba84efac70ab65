"""An expert's weights cut into buffers on the host, one for each GPU that shares its intermediate size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import kt_kernel_ext as ext
from ..arrays.checks import integer
from ..arrays.host import to_write
from ..passes.pending import BegunPass, PendingPass

__all__ = ["ExpertBuffers"]


class ExpertBuffers:
    """Writes the experts of a layer, one at a time: begun by `submit`, ended by `sync`.

    Parameters
    ----------
    layer : ext.moe.MoE_Interface
        The layer, which checks the arrays.
    layer_idx : int
        Its number, for messages.
    engine : ext.CPUInfer
    """

    def __init__(self, layer: ext.moe.MoE_Interface, layer_idx: int, engine: ext.CPUInfer) -> None:
        self._layer = layer
        self._pending: PendingPass[None] = PendingPass("write_weight_scale_to_buffer", layer_idx, engine)

    def submit(self, gpu_tp_count: Any, expert_id: Any, **buffers: Any) -> None:
        """Queue an expert; `buffers` are sequences of arrays under their names, None where there are none.

        Raises
        ------
        TypeError, ValueError
            An argument that is not as it should be.
        IndexError
            An expert that the layer does not have.
        RuntimeError
            Nothing is loaded, or an expert is being written.
        """

        def start(begun: BegunPass[None]) -> None:
            count, expert = integer("gpu_tp_count", gpu_tp_count), integer("expert_id", expert_id)
            lists = {name: _as_list(name, arrays) for name, arrays in buffers.items()}
            begun.queue(self._layer.write_expert_task(count, expert, **lists))

        self._pending.submit(start)

    def sync(self) -> None:
        """Wait until the expert has been written.

        Raises
        ------
        RuntimeError
            None is being written, or the layer has weights of another format by now.
        """
        self._pending.sync()


def _as_list(name: str, arrays: Any) -> Any:
    """A sequence of arrays, or the first axis of one, as a list of NumPy arrays; anything else as it is."""
    if isinstance(arrays, Sequence):
        return [to_write(array, f"{name}[{i}]") for i, array in enumerate(arrays)]
    is_stacked = arrays is not None and getattr(arrays, "ndim", 0) > 0
    return list(to_write(arrays, name)) if is_stacked else arrays
