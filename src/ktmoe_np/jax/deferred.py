"""Deferred experts in programs: what a layer has deferred is an operand of the next call."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from ..arrays.spec import ArraySpec
from ..arrays.summary import array_summary
from ..arrays.types import bfloat16
from ..config import ActivationDtype
from ..inference.base import BaseMoEWrapper
from .operands import Array, called, checked
from .primitives import drain_deferred_p, forward_deferred_p

__all__ = ["moe_drain_deferred", "moe_forward_deferred"]

_CARRY = ArraySpec((np.dtype(np.uint32),), ())


def moe_forward_deferred(
    moe: BaseMoEWrapper | Sequence[BaseMoEWrapper],
    hidden_states: Array,
    topk_ids: Array,
    topk_weights: Array,
    carry: Array | None = None,
    *,
    index: Array | None = None,
    activation_dtype: ActivationDtype | None = None,
) -> tuple[Array, Array]:
    """The immediate experts of a layer, and the deferred experts of the previous layer.

    Of each token `max_deferred_experts_per_token` slots, those with the smallest weights, are computed while
    the program continues, and are added to the result of the next layer, which takes the carry. Results are
    bit-identical to those of `BaseMoEWrapper.submit_forward` on the host.

    Parameters
    ----------
    moe, hidden_states, topk_ids, topk_weights, index, activation_dtype
        As in `moe_forward`, without `jax.vmap`.
    carry : array of uint32 [], optional
        What the call of the layer before has returned, to be used once; None or zero for the first layer.

    Returns
    -------
    out : array of bfloat16 [..., H]
    carry : array of uint32 []
        For the next layer, or for `moe_drain_deferred`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `moe_forward`. From the running program also: another batch size than the carry's, or a carry that
        was used before, or waited while 64 others came.
    NotImplementedError
        Under `jax.vmap`, or differentiated.

    Examples
    --------
    >>> import jax, ml_dtypes, numpy as np
    >>> from ktmoe_np import KTMoEWrapper
    >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=2, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2", max_deferred_experts_per_token=1)
    >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
    >>> moe.load_weights_from_tensors(gate, None, down)
    >>> @jax.jit
    ... def two_layers(x, ids, weights):
    ...     out, carry = moe_forward_deferred(moe, x, ids, weights)
    ...     return out, moe_drain_deferred(carry, x)
    >>> x = jnp.ones((1, 4), jnp.bfloat16)
    >>> out, remaining = two_layers(x, jnp.array([[0, 1]]), jnp.array([[0.75, 0.25]]))
    >>> float(out[0, 0]), float(remaining[0, 0])
    (24.0, 8.0)
    """
    number, config = called(moe, index, activation_dtype, BaseMoEWrapper, "moe")
    operands = checked(config, hidden_states, topk_ids, topk_weights)
    out, next_carry = forward_deferred_p.bind(number, *operands, _carry(carry))
    return out, next_carry


def moe_drain_deferred(carry: Array, hidden_states: Array) -> Array:
    """The deferred experts of the last layer, to be added to its output.

    Parameters
    ----------
    carry : array of uint32 []
        What its call has returned, to be used once.
    hidden_states : array of bfloat16 [..., H]
        Of the shape of the result.

    Returns
    -------
    array of bfloat16 [..., H]
        Zeros when nothing was deferred.

    Raises
    ------
    TypeError
        A carry or hidden states of another dtype.
    RuntimeError
        From the running program, as JAX's error: a carry that was used before, or of another shape.

    Examples
    --------
    Nothing was deferred:

    >>> moe_drain_deferred(jnp.zeros((), jnp.uint32), jnp.ones((1, 2), jnp.bfloat16)).tolist()
    [[0.0, 0.0]]
    """
    x = jnp.asarray(hidden_states)
    ArraySpec((bfloat16,), ("...", "H")).check("hidden_states", x)
    (remaining,) = drain_deferred_p.bind(_carry(carry), shape=x.shape)
    return remaining


def _carry(carry: Array | None) -> Array:
    if carry is None:
        return jnp.zeros((), jnp.uint32)
    carry = jnp.asarray(carry)
    if not _CARRY.fits(carry):  # the message names its source: callers do not make carries
        raise TypeError(f"carry: got {array_summary(carry)}, expected what a call has returned")
    return carry
