"""Forward passes of layers in programs, and those that are differentiated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ..config import ActivationDtype
from ..distributed.expert_parallel import ExpertParallel
from ..distributed.expert_parallel_sft import ExpertParallelSFT
from ..inference.base import BaseMoEWrapper
from ..sft.base import BaseSFTMoEWrapper
from ..sft.gradients import lora_shapes
from ..sft.numbered import check_lora
from .operands import Array, adapter, called, check_no_index, checked
from .parallel import parallel_forward, parallel_sft
from .primitives import backward_p, forward_p, forward_saved_p, forward_sft_p

__all__ = ["lora_parameters", "moe_forward", "moe_sft"]


def moe_forward(
    moe: BaseMoEWrapper | Sequence[BaseMoEWrapper] | ExpertParallel,
    hidden_states: Array,
    topk_ids: Array,
    topk_weights: Array,
    *,
    index: Array | None = None,
    activation_dtype: ActivationDtype | None = None,
) -> Array:
    """The experts of a layer on a batch of tokens, bit-identical to `BaseMoEWrapper.forward`.

    Parameters
    ----------
    moe : BaseMoEWrapper, or a sequence of them
        Of mode ``inference``, loaded. `gpu_experts_mask` is read when the program is traced. Of a sequence,
        all of the same sizes, `index` says which. With an `ExpertParallel` each rank runs the program on its
        tokens, on the CPU and without `jax.vmap`; calls have the order of the program.
    hidden_states : array of bfloat16 [..., H]
        All leading axes count as rows, as does one of `jax.vmap`: a token's result does not depend on others.
    topk_ids : array of integers [..., P]
        Negative ids are skipped.
    topk_weights : array of float32 [..., P]
    index : integer, optional
        Which layer of a sequence; may be traced.
    activation_dtype : {"bfloat16", "int8"} or dtype, optional
        What products take activations in, for this call; None for the layer's own. Fixed in the program.

    Returns
    -------
    array of bfloat16 [..., H]

    Raises
    ------
    TypeError, ValueError
        While tracing: an argument of another kind, dtype or shape, or an `activation_dtype` that the layer
        does not have. Also when it is differentiated: use `moe_sft` for that.
    RuntimeError
        While tracing: nothing is loaded. From the running program, as JAX's error: the layer is gone, or an
        id of E or above. On a GPU the results are NaN then, and the error is that of a later call, or of
        `raise_pending_error`.
    OSError
        While tracing, or outside of compiled programs: a file of the weights was truncated. A running
        program does not check; see `BaseMoEWrapper.load_weights`.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> from ktmoe_np import KTMoEWrapper
    >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2")
    >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
    >>> moe.load_weights_from_tensors(gate, None, down)
    >>> x = jnp.ones((3, 4), jnp.bfloat16)
    >>> ids, w = jnp.zeros((3, 1), int), jnp.ones((3, 1))
    >>> y = jax.jit(lambda *batch: moe_forward(moe, *batch))(x, ids, w)
    >>> y.shape, float(y[0, 0])
    ((3, 4), 32.0)
    """
    if isinstance(moe, ExpertParallel):
        check_no_index(index)
        return parallel_forward(moe, hidden_states, topk_ids, topk_weights, activation_dtype)
    number, config = called(moe, index, activation_dtype, BaseMoEWrapper, "moe")
    return _forward(number, *checked(config, hidden_states, topk_ids, topk_weights))


def moe_sft(
    sft: BaseSFTMoEWrapper | Sequence[BaseSFTMoEWrapper] | ExpertParallelSFT,
    lora: Mapping[str, Array],
    hidden_states: Array,
    topk_ids: Array,
    topk_weights: Array,
    *,
    index: Array | None = None,
    activation_dtype: ActivationDtype | None = None,
) -> Array:
    """The experts of a layer with adapters, to be differentiated by these, the input and the routing weights.

    The layer's own adapters and saved passes become those of the last call: a layer that a program calls
    should be called by programs alone. A backward pass uses the saved forward pass if it is the layer's last,
    and recomputes it bit-identically otherwise.

    Parameters
    ----------
    sft : BaseSFTMoEWrapper, or a sequence of them
        Of mode ``sft``, loaded, without dropout. With an `ExpertParallelSFT`, see `moe_forward`, `lora` has
        the adapters of this rank's experts, and their gradients are by the tokens of all ranks.
    lora : mapping of str to array of float32 or bfloat16
        The adapters, under the names and in the shapes of `BaseSFTMoEWrapper.lora_weights`;
        `lora_parameters` gives first ones. Computed with as bfloat16.
    hidden_states, topk_ids, topk_weights, index, activation_dtype
        See `moe_forward`.

    Returns
    -------
    array of bfloat16 [..., H]

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `moe_forward`; also for adapters that are missing, or a layer with dropout.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> from ktmoe_np import KTMoEWrapper
    >>> sft = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2", mode="sft",
    ...                    method="AMXBF16_SFT", lora_rank=1)
    >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
    >>> sft.load_weights_from_tensors(gate, None, down)
    >>> x, ids, w = jnp.ones((3, 4), jnp.bfloat16), jnp.zeros((3, 1), int), jnp.ones((3, 1))
    >>> loss = lambda lora: moe_sft(sft, lora, x, ids, w).astype(jnp.float32).sum()
    >>> gradients = jax.grad(loss)(lora_parameters(sft))
    >>> sorted(gradients)
    ['down_lora_a', 'down_lora_b', 'gate_lora_a', 'gate_lora_b']
    """
    if isinstance(sft, ExpertParallelSFT):
        check_no_index(index)
        return parallel_sft(sft, lora, hidden_states, topk_ids, topk_weights, activation_dtype)
    number, config = called(sft, index, activation_dtype, BaseSFTMoEWrapper, "sft")
    first = sft if isinstance(sft, BaseSFTMoEWrapper) else sft[0]
    rank, shapes = first.options.lora_rank, lora_shapes(config, first.options.lora_rank)
    check_lora(lora, config, rank, first.options.lora_dropout, "a JAX program")
    adapters = tuple(adapter(lora, name, shape) for name, shape in shapes.items())
    return _sft(number, adapters, *checked(config, hidden_states, topk_ids, topk_weights))


def lora_parameters(sft: BaseSFTMoEWrapper | ExpertParallelSFT) -> dict[str, jax.Array]:
    """Copy the adapters of a layer to JAX arrays; see `BaseSFTMoEWrapper.lora_weights`.

    Parameters
    ----------
    sft : BaseSFTMoEWrapper
        Of mode ``sft``; or an `ExpertParallelSFT`, for this rank's experts. Adapters that have no values
        yet get those of `init_lora_weights`.

    Returns
    -------
    dict of str to array of float32 or bfloat16
        In the dtypes that the layer was given them in, float32 by default: ``gate_lora_a``, ``up_lora_a``
        [E, R, H], ``gate_lora_b``, ``up_lora_b`` [E, I, R], ``down_lora_a`` [E, R, I] and ``down_lora_b``
        [E, H, R]. No ``up`` when the activation is not gated; empty when `lora_rank` is 0.

    Examples
    --------
    >>> from ktmoe_np import KTMoEWrapper
    >>> sft = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2", mode="sft",
    ...                    method="AMXBF16_SFT", lora_rank=1)
    >>> lora_parameters(sft)["gate_lora_a"].shape
    (2, 1, 4)
    """
    return {name: jnp.array(value) for name, value in sft.lora_weights.items()}


# ---- derivatives ----


@jax.custom_vjp
def _forward(number: Array, x: Array, ids: Array, weights: Array) -> Array:
    return forward_p.bind(number, x, ids, weights)[0]


def _forward_fwd(*operands: Array) -> tuple[Array, None]:
    return _forward(*operands), None


def _forward_bwd(_: None, __: Array) -> Any:
    raise TypeError("moe_forward: has no derivative; moe_sft has, with a layer of mode 'sft'")


_forward.defvjp(_forward_fwd, _forward_bwd)


#: A structure without arrays.
_WANTED: tuple[()] = ()


@jax.custom_vjp
def _sft(number: Array, lora: tuple[Array, ...], x: Array, ids: Array, weights: Array) -> Array:
    return forward_sft_p.bind(number, x, ids, weights, *lora)[0]


def _sft_fwd(number: Any, lora: Any, x: Any, ids: Any, weights: Any) -> tuple[Array, Any]:
    operands = [each.value for each in (number, x, ids, weights, *lora)]
    # What is kept may be arrays and their structure: gradients of adapters are wanted where this is no None.
    wanted = _WANTED if any(each.perturbed for each in lora) else None
    out, number_of_pass = forward_saved_p.bind(*operands)
    return out, (operands, number_of_pass, wanted)


def _sft_bwd(kept: Any, grad: Any) -> tuple[Any, ...]:
    (number, x, ids, weights, *lora), number_of_pass, wanted = kept
    if isinstance(grad, SymbolicZero):
        return None, None, None, None, None
    operands = number, x, ids, weights, *lora, number_of_pass, grad
    grad_x, grad_weights, *grad_lora = backward_p.bind(*operands, with_lora=wanted is not None)
    by_lora = tuple(found.astype(given.dtype) for found, given in zip(grad_lora, lora, strict=False))
    return None, by_lora if wanted is not None else None, grad_x, None, grad_weights


_sft.defvjp(_sft_fwd, _sft_bwd, symbolic_zeros=True)
