"""What passes in a CUDA stream share: their order, the buffers they use, what they leave for each other."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from .. import kt_kernel_ext as ext
from ..buffers import BufferSlot, KExpertsCPUBuffer
from ..config import MoEConfig
from .deferral import Carry, CarryChain

__all__ = ["SlotUser", "Stream", "StreamCarry"]


class SlotUser(Protocol):
    """Who has submitted a pass and not waited for it yet."""

    def slots_in_use(self) -> Iterable[BufferSlot]:
        """Those that must not be written to before."""


@dataclass(frozen=True)
class StreamCarry(Carry):
    """What a layer left over in a stream."""

    slot: BufferSlot  #: where that lies
    left_by: Any  #: the layer's StreamRunner
    like: Any  #: an array such as the result shall be


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
        self.chain: CarryChain[StreamCarry] = CarryChain()
        self.pending: weakref.WeakSet[Any] = weakref.WeakSet()  # of SlotUser

    def free_slot(self, config: MoEConfig, num_tokens: int, carry: Carry | None) -> BufferSlot:
        """The layer's slot, or the other one when a pass before it is not done with that, or a new one.

        What was done before in the stream is: a slot is taken when its result has not been copied yet, when
        the output begins with what is deferred in it, and when a pass has begun with that and is not waited
        for yet.

        Raises
        ------
        RuntimeError
            There is no CUDA driver, or it refuses.
        """
        slots: tuple[BufferSlot, ...] = KExpertsCPUBuffer.get_buffer(
            num_tokens, config.hidden_size, config.num_experts_per_tok, self.key
        )
        taken = [slot for user in self.pending for slot in user.slots_in_use()]
        if isinstance(carry, StreamCarry):
            taken.append(carry.slot)
        in_turn = (slots[(config.layer_idx + i) % len(slots)] for i in range(len(slots)))
        free = (slot for slot in in_turn if not any(slot is other for other in taken))
        slot = next(free, None)
        if slot is None:  # for this pass alone
            slot = BufferSlot.allocate(num_tokens, config.hidden_size, config.num_experts_per_tok)
        slot.lock_pages()
        return slot
