"""Masks of the experts on the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import integer
from ..arrays.host import as_numpy
from ..arrays.spec import ArraySpec
from ..arrays.types import ArrayLike, MaskLike

__all__ = ["checked_mask", "generate_gpu_experts_masks"]


def generate_gpu_experts_masks(
    activation_freq: ArrayLike | Sequence[Sequence[float]], num_gpu_experts: int
) -> NDArray[np.bool_]:
    """Mask of the most frequently routed experts of a model, over all its layers.

    Parameters
    ----------
    activation_freq : array of numbers [L, E]
        How often each expert of each layer is routed to.
    num_gpu_experts : int
        How many experts to choose, over all layers together.

    Returns
    -------
    ndarray of bool [L, E]
        True for the chosen ones; ties go to the lower layer, then to the lower expert.

    Raises
    ------
    TypeError
        Frequencies that are not real numbers, or a number of experts that is no integer.
    ValueError
        Not two axes, a NaN, or more experts than there are.

    Examples
    --------
    >>> generate_gpu_experts_masks([[5, 1, 3], [4, 9, 0]], 3).tolist()
    [[True, False, False], [True, True, False]]
    """
    given = activation_freq
    freq = np.asarray(given) if isinstance(given, Sequence) else as_numpy(given, "activation_freq")
    if freq.dtype.kind not in "iuf":
        raise TypeError(f"activation_freq: got {freq.dtype}, expected real numbers [L, E]")
    if freq.ndim != 2:
        raise ValueError(f"activation_freq: got shape {list(freq.shape)}, expected [L, E]")
    if np.isnan(freq).any():
        raise ValueError("activation_freq: got a NaN, expected numbers")
    most = freq.size
    if not 0 <= (num_gpu_experts := integer("num_gpu_experts", num_gpu_experts)) <= most:
        layers, experts = freq.shape
        raise ValueError(
            f"num_gpu_experts: got {num_gpu_experts}, expected 0 to {most}: the number of experts on the GPU "
            f"in all {layers} layers of {experts} together"
        )
    masks = np.zeros(freq.shape, np.bool_)
    chosen = np.argsort(-freq.astype(np.float64), axis=None, kind="stable")[:num_gpu_experts]
    masks.reshape(-1)[chosen] = True
    return masks


def checked_mask(gpu_experts_mask: MaskLike | None, num_experts: int) -> NDArray[np.bool_]:
    """A copy of a layer's mask [E], read-only; None is one without experts.

    Raises
    ------
    ValueError
        Another shape.
    TypeError
        Another dtype.
    """
    given = np.zeros(num_experts, np.bool_) if gpu_experts_mask is None else gpu_experts_mask
    mask = np.array(given if isinstance(given, Sequence) else as_numpy(given, "gpu_experts_mask"))
    ArraySpec((np.dtype(np.bool_),), (num_experts,)).check("gpu_experts_mask", mask)
    mask.setflags(write=False)
    return mask
