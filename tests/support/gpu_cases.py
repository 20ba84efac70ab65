"""What tests of the experts beside a layer begin with: arrays of a library, and a comparison of the sum."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from layers import AnyArray, Batch, Layer, bf16

from ktmoe_np import GPUExperts
from ktmoe_np.reference import assert_within, error_bound, moe_forward, round_bf16
from ktmoe_np.reference.rounding import TINY

__all__ = ["CUPY", "JAX", "NUMPY", "TORCH", "TORCH_CUDA", "Arrays", "assert_sum_close", "gpu_experts"]


class Arrays(NamedTuple):
    """A library's arrays: from NumPy, and back."""

    name: str
    take: Callable[[AnyArray], Any]
    give: Callable[[Any], AnyArray]

    def batch(self, batch: Batch) -> tuple[Any, Any, Any]:
        return self.take(batch.x), self.take(batch.ids), self.take(batch.weights)


def _to_torch(array: AnyArray) -> Any:
    torch = sys.modules["torch"]
    if array.dtype == bf16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _from_torch(tensor: Any) -> AnyArray:
    torch = sys.modules["torch"]
    is_bf16 = tensor.dtype == torch.bfloat16
    array: AnyArray = tensor.cpu().view(torch.uint16).numpy().view(bf16) if is_bf16 else tensor.cpu().numpy()
    return array


NUMPY = Arrays("NumPy", lambda array: array, lambda array: array)
TORCH = Arrays("torch", _to_torch, _from_torch)
TORCH_CUDA = Arrays("torch", lambda array: _to_torch(array).cuda(), _from_torch)
JAX = Arrays("JAX", lambda array: sys.modules["jax.numpy"].asarray(array), np.asarray)
CUPY = Arrays(
    "CuPy", lambda array: sys.modules["cupy"].asarray(array), lambda array: sys.modules["cupy"].asnumpy(array)
)


def gpu_experts(moe: Any, layer: Layer, mask: AnyArray, arrays: Arrays) -> GPUExperts:
    """The masked experts of a layer, in arrays of a library."""
    masked = layer.picked(mask)

    def taken(array: AnyArray | None) -> Any:
        return None if array is None else arrays.take(array)

    biases = {name: taken(bias) for name, bias in masked.biases.items()}
    return GPUExperts(moe.config, mask, *map(taken, masked.matrices), **biases)


def assert_sum_close(result: AnyArray, layer: Layer, batch: Batch, mask: AnyArray) -> None:
    """The sum of a layer's bfloat16 result and the float32 one of its masked experts is that of all experts.

    Unrounded, any two evaluations of the whole lie within its `error_bound` of each other, whatever the order
    of their sums. But the layer's part c has been rounded in between, which moves it by 2^-8 |c| at most, and
    |c| is at most the reference's plus the `error_bound` of this part. So the sum lies in an interval about
    the truth and, as rounding is monotone, the result between that interval's rounded ends.
    """
    arguments = (*batch, *layer.matrices)
    model = {"activation": layer.activation, "scale_inputs": layer.scale_inputs}
    options = {**model, **layer.biases, "out_dtype": np.float32}
    exact = {**options, "accumulate_dtype": np.float64}
    whole = moe_forward(*arguments, **exact).astype(np.float64)
    part = np.abs(moe_forward(*arguments, gpu_experts_mask=mask, **exact).astype(np.float64))
    assert result.dtype == bf16
    for sigmas in (None, 6.0):
        radius = error_bound(*arguments, sigmas=sigmas, **options)
        radius += 2.0**-8 * (part + error_bound(*arguments, sigmas=sigmas, gpu_experts_mask=mask, **options))
        with np.errstate(invalid="ignore"):
            ends = [round_bf16(whole + sign * (radius + TINY)).astype(np.float64) for sign in (-1, 1)]
            bound = ends[1] - ends[0] + TINY
        assert_within(result, round_bf16(whole), np.where(np.isnan(bound), np.inf, bound))
