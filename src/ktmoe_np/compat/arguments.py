"""What kt-kernel's arguments mean to this library: methods, activations, masks, groups, tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch

from ..arrays.checks import at_least
from ..config import ActivationSpec, parse_activation
from ..formats.methods import Method, find_method
from ..io.native import native_group_size

__all__ = [
    "activation_of",
    "as_tensor",
    "gpu_mask",
    "group_size_of",
    "method_of",
    "number",
    "refused_pointer",
]

#: kt-kernel's methods that have another name here.
_OTHER_NAMES = {
    "INT8_SFT": "AMXINT8_SFT",
    "AMXINT4_KGroup_SFT": "AMXINT4_SFT",
    "AMXINT4_KGroup_SFT_SkipLoRA": "AMXINT4_SFT_SkipLoRA",
}

_NO_ZERO_POINTS = (
    "AMXINT4_SFT: weights that are quantized at load have no zero points here; INT4_ZP_SFT reads those of "
    "AWQ and GPTQ checkpoints"
)

#: Those that there are not, and what to take instead.
_REFUSED = {
    "SYCL_GPTQ_INT4": "GPTQ_INT4: experts are computed on the CPU, there are no SYCL devices",
    **{
        f"{name}_SFT{suffix}": _NO_ZERO_POINTS
        for name in ("AMXINT4_1", "AMXINT4_1KGroup")
        for suffix in ("", "_SkipLoRA")
    },
}

#: Why an address is no argument.
_WHY_NO_POINTERS = "an address says neither size nor dtype, and keeps nothing alive"


def method_of(name: str, mode: str) -> Method:
    """The method that serves a method of kt-kernel, or one of this library.

    Raises
    ------
    ValueError
        An unknown mode or method, or a method that this library has no equal of.

    Examples
    --------
    >>> method_of("AMXINT4_KGroup_SFT", "sft").name
    'AMXINT4_SFT'
    """
    if name in _REFUSED:
        raise ValueError(f"method: got {name!r}, expected {_REFUSED[name]}")
    return find_method(_OTHER_NAMES.get(name, name), mode)


def group_size_of(
    name: str, method: Method, group_size: int, zero_point: bool, weight_path: Any, layer_idx: int
) -> int | None:
    """The group size of a layer: the argument's where kt-kernel uses that, else the checkpoint's or None.

    Raises
    ------
    ValueError
        Zero points for weights that are quantized at load, or a size that the method does not have.
    """
    if "_KGroup_" in name:
        if zero_point:
            raise ValueError(
                f"zero_point: got True with method {name!r}, expected False or {_NO_ZERO_POINTS}"
            )
        return method.resolve_group_size(group_size)
    if method.encodings and weight_path is not None and os.path.exists(weight_path):
        found = native_group_size(weight_path, layer_idx)
        return found if found in method.encodings else None
    return None


def activation_of(swiglu_limit: float, swiglu_alpha: float) -> ActivationSpec:
    """The activation that kt-kernel chooses by two numbers, of which 0 is none.

    Raises
    ------
    TypeError, ValueError
        Not numbers, or not 0 or above.

    Examples
    --------
    >>> activation_of(10.0, 0.0).name, activation_of(0.0, 1.702).limit
    ('silu', inf)
    """
    limit = number("swiglu_limit", swiglu_limit) or math.inf
    alpha = number("swiglu_alpha", swiglu_alpha)
    given: Mapping[str, Any] = {"kind": "silu", "limit": limit}
    if alpha:
        given = {"kind": "swigluoai", "limit": limit, "alpha": alpha}
    return parse_activation(given)


def number(name: str, value: Any, *, positive: bool = False) -> float:
    """A finite number of 0 or above, or above 0.

    Raises
    ------
    TypeError, ValueError
        Something else.
    """
    what = "a finite number above 0" if positive else "0 for none, or a finite number above"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected {what}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not 0 <= found < math.inf or (positive and found == 0):
        raise ValueError(f"{name}: got {value!r}, expected {what}")
    return found


def gpu_mask(gpu_experts_mask: Any, num_gpu_experts: Any, num_experts: int) -> torch.Tensor:
    """The mask of a layer, bool [E] in new memory on the host: as given, or of the first experts.

    Raises
    ------
    TypeError
        A mask that is no bool tensor, or a number that is no integer.
    ValueError
        Another shape, more experts than there are, or a mask of another number of experts.
    """
    count = at_least("num_gpu_experts", num_gpu_experts, 0)
    if count > num_experts:
        raise ValueError(f"num_gpu_experts: got {count}, expected at most num_experts, {num_experts}")
    mask = torch.zeros(num_experts, dtype=torch.bool)
    if gpu_experts_mask is None:
        mask[:count] = True
        return mask
    if isinstance(gpu_experts_mask, int) and not isinstance(gpu_experts_mask, bool):
        expected = f"a mask, or None and num_gpu_experts={gpu_experts_mask} for the first experts"
        raise TypeError(f"gpu_experts_mask: got {gpu_experts_mask}, expected {expected}")
    given = as_tensor("gpu_experts_mask", gpu_experts_mask)
    if given.dtype != torch.bool or list(given.shape) != [num_experts]:
        got, kind = (
            f"{given.dtype} {list(given.shape)}",
            (TypeError if given.dtype != torch.bool else ValueError),
        )
        raise kind(f"gpu_experts_mask: got {got}, expected torch.bool [{num_experts}]")
    mask.copy_(given)
    if count not in (0, int(mask.sum())):
        raise ValueError(
            f"num_gpu_experts: got {count} with a gpu_experts_mask of {int(mask.sum())}, expected the same "
            "number"
        )
    return mask


def as_tensor(name: str, value: Any) -> torch.Tensor:
    """A tensor outside of autograd; NumPy arrays become tensors of the same memory.

    Raises
    ------
    TypeError
        Neither, as an address.
    """
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, int | np.integer):
        raise refused_pointer(name, value)
    raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")


def refused_pointer(name: str, value: Any) -> TypeError:
    """The exception for a number where a tensor is expected."""
    return TypeError(f"{name}: got the number {value}, expected a tensor: {_WHY_NO_POINTERS}")
