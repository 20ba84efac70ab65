"""Options of a layer for training, beyond those of every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, TypedDict

import numpy as np
from numpy.typing import DTypeLike

from ..arrays.checks import at_least, bfloat16
from ..formats.methods import Method

__all__ = ["SFTKeywords", "SFTOptions"]

_LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class SFTOptions:
    """Options of mode ``sft``.

    Parameters
    ----------
    lora_rank : int
        R; 0 is no adapters.
    lora_alpha : float
        Adapters are scaled by lora_alpha / R.
    lora_dropout : float
        Probability that an element of an adapter's input is dropped in a pass that is saved: from 0 to
        below 1.
    max_cache_depth : int
        Forward passes that may wait for their backward pass.
    full_weight_grad : bool
        Also compute gradients of the base weights, where these are bf16.
    recompute : bool
        Keep input and routing only, and repeat the forward pass in the backward pass: the same bits, less
        memory.
    seed : int
        Of the first adapters and of the dropout masks, 0 to 2^64 - 1.
    cache_dtype : dtype
        bfloat16 or float32: what the results of gate and up are kept in for the backward pass.
    reuse_buffers : bool
        Where no arrays are given, write the results of a step to the memory of the step before; see the
        notes. Only with a `max_cache_depth` of 1.

    Raises
    ------
    TypeError, ValueError
        An option of another kind or out of its range: named, with what came and what was expected.

    Notes
    -----
    The results of a step are new arrays by default, which later steps do not change. With `reuse_buffers`

    - outputs, `grad_input` and `grad_weights` come from buffers ``layer_idx % 2`` of `KExpertsSFTBuffer`.
      They are valid until the next pass of the same kind, forward or backward, with the same T, H and P, by
      this layer or another with those buffers: layer 2 overwrites the results of layer 0, layer 1 does not.
    - gradients of matrices are arrays of the layer, valid until its next backward pass without `gradients`.
    - every thread has its own buffers and its own arrays of each layer.
    - inputs of a pass, and results that wait for their ``sync_*``, are not overwritten: such a pass gets new
      arrays. Tensors of torch share the memory of results; JAX arrays are copies.
    - a batch of another T has other arrays, and does not overwrite earlier results.
      `KTMoEWrapper.clear_sft_buffer_cache` releases all of this memory; results still in use remain valid.
    - `out`, `gradients`, `grad_input` and `grad_weights` of a call take precedence.
    - compiled JAX programs (`ktmoe_np.jax`) write XLA's arrays: the option has no effect there.

    Copy results that must last:

    >>> import ml_dtypes, numpy as np
    >>> from ktmoe_np import KTMoEWrapper
    >>> sft = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2", mode="sft", method="AMXBF16_SFT",
    ...                    reuse_buffers=True)
    >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
    >>> sft.load_weights_from_tensors(gate, None, down)
    >>> x, ids, weights = np.ones((1, 4), ml_dtypes.bfloat16), np.array([[1]]), np.ones((1, 1), np.float32)
    >>> y = sft.forward_sft(x, ids, weights, save_for_backward=False)
    >>> kept = y.copy()
    >>> _ = sft.forward_sft(2 * x, ids, weights, save_for_backward=False)
    >>> kept[0, 0].item(), y[0, 0].item()
    (32.0, 128.0)

    Examples
    --------
    >>> SFTOptions(lora_rank=8).lora_alpha
    32.0
    """

    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    max_cache_depth: int = 1
    full_weight_grad: bool = False
    recompute: bool = False
    seed: int = 0
    cache_dtype: DTypeLike = bfloat16
    reuse_buffers: bool = False

    def __post_init__(self) -> None:
        values: dict[str, Any] = {
            "lora_rank": at_least("lora_rank", self.lora_rank, 0),
            "lora_alpha": _finite_float("lora_alpha", self.lora_alpha),
            "lora_dropout": _finite_float("lora_dropout", self.lora_dropout),
            "max_cache_depth": at_least("max_cache_depth", self.max_cache_depth, 1),
            "full_weight_grad": _bool("full_weight_grad", self.full_weight_grad),
            "recompute": _bool("recompute", self.recompute),
            "seed": at_least("seed", self.seed, 0, _LARGEST_SEED),
            "cache_dtype": _cache_dtype(self.cache_dtype),
            "reuse_buffers": _bool("reuse_buffers", self.reuse_buffers),
        }
        if not 0.0 <= values["lora_dropout"] < 1.0:
            raise ValueError(f"lora_dropout: got {self.lora_dropout}, expected at least 0 and below 1")
        if values["reuse_buffers"] and values["max_cache_depth"] != 1:
            raise ValueError(
                f"reuse_buffers: got True with max_cache_depth {self.max_cache_depth}, expected False: the "
                "results of passes that wait would overwrite each other"
            )
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, method: Method, given: Mapping[str, Any]) -> SFTOptions:
        """The options of a method, from keyword arguments.

        Raises
        ------
        TypeError, ValueError
            As the class; also for a name that is no option, or an option that the method does not have.
        """
        check_known(given)
        options = cls(**given)
        options.check(method)
        return options

    def check(self, method: Method) -> None:
        """Raise ValueError for gradients of base weights where the method has none."""
        if not self.full_weight_grad:
            return
        expected = "full_weight_grad: got True, expected False"
        if method.skip_lora:
            raise ValueError(f"{expected}: method {method.name!r} has no gradients of weights")
        if method.weights != "bf16":
            raise ValueError(
                f"{expected}: the base weights of method {method.name!r} are {method.weights}, and only "
                "those in bf16 have gradients"
            )


class SFTKeywords(TypedDict, total=False):
    """The fields of `SFTOptions` as keyword arguments."""

    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    max_cache_depth: int
    full_weight_grad: bool
    recompute: bool
    seed: int
    cache_dtype: DTypeLike
    reuse_buffers: bool


#: What to write instead of keywords that callers of other libraries know.
_OTHER_NAMES = {
    "num_gpu_experts": "; which experts are on a GPU is told by gpu_experts_mask, which "
    "generate_gpu_experts_masks makes for a number of them",
}


def check_known(given: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword that is no option."""
    known = [field.name for field in fields(SFTOptions)]
    for name in given:
        if name not in known:
            hint = _OTHER_NAMES.get(name, "")
            raise TypeError(
                f"{name}: got an unknown keyword, expected one of {', '.join(known)} in mode 'sft'{hint}"
            )


def check_no_options(mode: str, given: Mapping[str, Any]) -> None:
    """Raise for options of training given in another mode.

    Raises
    ------
    ValueError
        An option of training.
    TypeError
        No option at all.
    """
    check_known(given)
    for name, value in given.items():
        raise ValueError(f"{name}: got {value!r} in mode {mode!r}, expected it in mode 'sft' only")


def _finite_float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {number!r}, expected a finite number")
    return number


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {value!r}, expected a bool")
    return bool(value)


def _cache_dtype(value: Any) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except TypeError:
        raise TypeError(f"cache_dtype: got {value!r}, expected bfloat16 or float32") from None
    if value is None or dtype not in (bfloat16, np.dtype(np.float32)):
        raise ValueError(f"cache_dtype: got {value!r}, expected bfloat16 or float32")
    return dtype
