"""Layers of experts in JAX programs: under jit, grad, vmap, scan, checkpoint and shard_map.

On the CPU XLA hands its buffers to the engine and takes its results without a copy. A call occupies the
engine's threads and the one that calls, never XLA's pool. In a program on a GPU the arrays of a call are
copied to the host and back in the program's stream, which waits for the result; the program's other work, and
the thread that runs it, do not.

A program knows a layer by a number, which is an ordinary operand; so `jax.lax.scan` may go over layers. It
holds nothing of the layer else: the wrapper must live as long as programs that call it.
"""

from .calls import lora_parameters, moe_forward, moe_sft
from .deferred import moe_drain_deferred, moe_forward_deferred
from .errors import raise_pending_error

__all__ = [
    "lora_parameters",
    "moe_drain_deferred",
    "moe_forward",
    "moe_forward_deferred",
    "moe_sft",
    "raise_pending_error",
]
