"""Passes with adapters of the caller, who goes back through them in any order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import kt_kernel_ext as ext
from ..arrays.checks import Array
from ..arrays.spec import ArraySpec
from ..arrays.types import bfloat16
from ..config import ActivationDtype, MoEConfig
from .gradients import LORA_NAMES, lora_shapes

if TYPE_CHECKING:
    from .base import BaseSFTMoEWrapper

__all__ = ["ADAPTER_DTYPES", "NumberedBatch", "check_lora", "numbered_backward", "numbered_forward"]

#: What adapters may come in.
ADAPTER_DTYPES = (np.dtype(np.float32), bfloat16)


class NumberedBatch(NamedTuple):
    """The inputs of a pass, as the engine takes them, and what products take activations in."""

    hidden_states: Array  #: bfloat16 [T, H]
    ids: Array  #: int64 [T, P]
    weights: Array  #: float32 [T, P]
    lora: Mapping[str, Array]  #: float32 or bfloat16, by name
    activation_dtype: ActivationDtype | None = None  #: None for the layer's own

    @property
    def six(self) -> tuple[Array | None, ...]:
        """The adapters in the order of the engine, None for those that the layer does not have."""
        return six_of(self.lora)


def six_of(matrices: Mapping[str, Array]) -> tuple[Array | None, ...]:
    """Matrices in the order of the engine, None for those that there are not."""
    return tuple(matrices.get(name) for name in LORA_NAMES)


def check_lora(lora: Mapping[str, Any], config: MoEConfig, rank: int, dropout: float, expected: str) -> None:
    """Raise TypeError and ValueError unless there are the adapters that a layer has, and no others.

    Also for a layer with dropout, whose masks a repeated pass would not have. `expected` says where that must
    be 0.
    """
    if dropout:
        raise ValueError(f"sft: got lora_dropout {dropout}, expected 0 in {expected}")
    if not hasattr(lora, "keys"):  # torch's ParameterDict is no Mapping
        raise TypeError(f"lora: got {type(lora).__name__}, expected a mapping of names to adapters")
    shapes = lora_shapes(config, rank)
    unknown = sorted(lora.keys() - shapes.keys())
    if unknown:
        raise ValueError(f"lora: got {unknown[0]!r}, expected {', '.join(shapes) or 'none'}")
    for name, shape in shapes.items():
        if name not in lora:
            raise ValueError(f"lora: got no {name!r}, expected float32 or bfloat16 {list(shape)}")


def check_adapters(lora: Mapping[str, Any], config: MoEConfig, rank: int) -> None:
    """Raise TypeError and ValueError for adapters of another dtype or shape."""
    for name, shape in lora_shapes(config, rank).items():
        ArraySpec(ADAPTER_DTYPES, shape).check(name, lora[name])


def numbered_forward(sft: BaseSFTMoEWrapper, batch: NumberedBatch, out: Array, save: bool) -> int:
    """Compute a pass, and save it in the place of all before.

    Returns
    -------
    int
        Its number, 0 when it is not saved.
    """
    number = ext.moe.next_pass_number() if save else 0
    sft.cpu_infer.run(forward_task(sft, batch, out, number))
    return number


def forward_task(sft: BaseSFTMoEWrapper, batch: NumberedBatch, out: Array, number: int) -> ext.Task:
    """The task of a pass that is saved under a number above 0.

    Raises
    ------
    RuntimeError
        Nothing is loaded.
    OSError
        A file of the weights was truncated.
    """
    if not sft.loaded:
        raise RuntimeError(f"sft: layer {sft.layer_idx} has no weights yet")
    dtype = sft._dtype_of_call(batch.activation_dtype)
    sft._files.check()
    rows = batch.hidden_states, batch.ids, batch.weights
    return ext.moe.numbered_forward_task(
        sft._layer,
        *rows,
        out,
        batch.six,
        number,
        skip_experts=sft.gpu_experts_mask,
        activation_dtype=dtype,
    )


def numbered_backward(
    sft: BaseSFTMoEWrapper,
    batch: NumberedBatch,
    number: int,
    grad_output: Array,
    rows: tuple[Array, Array],
    grad_lora: Mapping[str, Array],
) -> None:
    """Go back through the pass of a number, which is computed again unless it is the last that is saved."""
    sft.cpu_infer.run(backward_task(sft, batch, number, grad_output, rows, grad_lora))


def backward_task(
    sft: BaseSFTMoEWrapper,
    batch: NumberedBatch,
    number: int,
    grad_output: Array,
    rows: tuple[Array, Array],
    grad_lora: Mapping[str, Array],
) -> ext.Task:
    """The task of `numbered_backward`: writes gradients of rows and, where given, of adapters."""
    dtype = sft._dtype_of_call(batch.activation_dtype)
    sft._files.check()
    return ext.moe.numbered_backward_task(
        sft._layer,
        batch.hidden_states,
        batch.ids,
        batch.weights,
        batch.six,
        number,
        grad_output,
        *rows,
        six_of(grad_lora),
        skip_experts=sft.gpu_experts_mask,
        activation_dtype=dtype,
    )
