"""Layers of experts in JAX programs: under jit, grad, vmap, scan, checkpoint and shard_map.

On the CPU XLA hands its buffers to the engine and takes its results without a copy. A call occupies the
engine's threads and the one that calls, never XLA's pool. In a program on a GPU the arrays of a call are
copied to the host and back in the program's stream, which waits for the result; the program's other work, and
the thread that runs it, do not.

A program runs where its arrays were put, or, if none was put anywhere, on JAX's default device: a GPU where
there is one, even for a program of experts alone. A call of a small layer then takes hundreds of microseconds
instead of tens. To keep a program on the CPU, put its arrays there with ``jax.device_put``, or call it within
``jax.default_device``, or, for the whole process, set ``JAX_PLATFORMS=cpu`` before JAX is imported.

A program refers to a layer by a number, which is an ordinary operand; so `jax.lax.scan` can iterate over
layers. It does not keep the layer alive: the wrapper must live as long as programs that call it.

Examples
--------
A program that stays on the CPU, even if JAX finds a GPU:

>>> import jax, ml_dtypes, numpy as np
>>> from ktmoe_np import KTMoEWrapper
>>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
...                    moe_intermediate_size=2, activation="relu2")
>>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
>>> moe.load_weights_from_tensors(gate, None, down)
>>> cpu = jax.devices("cpu")[0]
>>> batch = (np.ones((3, 4), ml_dtypes.bfloat16), np.zeros((3, 1), np.int32), np.ones((3, 1), np.float32))
>>> program = jax.jit(lambda *batch: moe_forward(moe, *batch))
>>> y = program(*jax.device_put(batch, cpu))
>>> y.devices() == {cpu}
True
>>> with jax.default_device(cpu):
...     program(*batch).devices() == {cpu}
True
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
