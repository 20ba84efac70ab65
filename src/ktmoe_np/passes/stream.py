"""The state shared by passes in a CUDA stream: their order, buffers and deferred outputs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from .. import kt_kernel_ext as ext
from ..buffers import BatchBuffers, KExpertsCPUBuffer
from ..config import MoEConfig
from .deferral import LayerOutput, OutputChain

__all__ = ["BufferUser", "Stream", "StreamOutput", "stream_at"]


class BufferUser(Protocol):
    """Who has submitted a pass and not waited for it yet."""

    def buffers_in_use(self) -> Iterable[BatchBuffers]:
        """Those that must not be written to before."""


@dataclass(frozen=True)
class StreamOutput(LayerOutput):
    """The deferred output of a layer in a stream."""

    buffers: BatchBuffers  #: where it is
    runner: Any  #: the layer's StreamRunner
    like: Any  #: an array such as the result of a drain shall be
    lead: tuple[int, ...]  #: its leading axes


class Stream:
    """A CUDA stream that passes are put into.

    Parameters
    ----------
    handle : int
        CUDA's.
    key : int
        A number that no other stream has.
    """

    def __init__(self, handle: int, key: int) -> None:
        self.handle, self.key = handle, key
        #: A pass is several things in the stream, which those of other threads must not come between.
        self.order = ext.CallLock("cuda_stream", of_engine=True)
        self.chain: OutputChain[StreamOutput] = OutputChain()
        self.pending: weakref.WeakSet[Any] = weakref.WeakSet()  # of BufferUser

    def free_buffers(self, config: MoEConfig, num_tokens: int, received: LayerOutput | None) -> BatchBuffers:
        """The layer's staging buffers, the other ones while a pass needs these, or new ones.

        What comes before in the stream is done by then. Buffers are needed when their result has not been
        copied yet, when the output begins with the deferred output in them, and when a pass has begun with
        that and is not waited for yet.

        Raises
        ------
        RuntimeError
            There is no CUDA driver, or it refuses.
        """
        both: tuple[BatchBuffers, ...] = KExpertsCPUBuffer.get_buffer(
            num_tokens, config.hidden_size, config.num_experts_per_tok, self.key
        )
        taken = [buffers for user in self.pending for buffers in user.buffers_in_use()]
        if isinstance(received, StreamOutput):
            taken.append(received.buffers)
        in_turn = (both[(config.layer_idx + i) % len(both)] for i in range(len(both)))
        free = (buffers for buffers in in_turn if not any(buffers is other for other in taken))
        buffers = next(free, None)
        if buffers is None:  # for this pass alone
            buffers = BatchBuffers.allocate(num_tokens, config.hidden_size, config.num_experts_per_tok)
        buffers.lock_pages()
        return buffers


def stream_at(streams: dict[int, Stream], handle: int) -> Stream:
    """The state that passes in a stream share, by its handle."""
    key = ext.cuda.stream_key(handle)
    stream = streams.get(key)
    return streams.setdefault(key, Stream(handle, key)) if stream is None else stream
