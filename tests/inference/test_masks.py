"""Which experts go to the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from layers import assert_same_bits, draw_batch, draw_layer

from ktmoe_np import generate_gpu_experts_masks

pytestmark = pytest.mark.kernels

frequencies = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=6),
    elements=st.sampled_from([0.0, -0.0, 1.0, 2.5, 3.0, -1.0, 1e300, np.inf, -np.inf]),
)


@given(frequencies, st.data())
def test_the_most_frequent_are_chosen(freq: Any, data: st.DataObject) -> None:
    num = data.draw(st.integers(0, freq.size))
    masks = generate_gpu_experts_masks(freq, num)
    assert (masks.shape, masks.dtype, masks.sum()) == (freq.shape, np.bool_, num)
    places = [
        (-freq[at], at) for at in np.ndindex(*freq.shape)
    ]  # ties: the lower layer, then the lower expert
    assert sorted(map(tuple, np.argwhere(masks).tolist())) == sorted(at for _, at in sorted(places)[:num])


@pytest.mark.parametrize("dtype", ["i1", "u1", "u8", "f2", "f4"])
def test_frequencies_of_any_real_dtype(dtype: str) -> None:
    freq = np.array([[5, 1, 3], [4, 9, 0]], dtype)
    assert generate_gpu_experts_masks(freq, 3).tolist() == [[True, False, False], [True, True, False]]


def test_frequencies_in_any_memory() -> None:
    freq = np.random.default_rng(0).integers(0, 5, (4, 6))
    expected = generate_gpu_experts_masks(freq, 7)
    for other in (np.asfortranarray(freq), freq.tolist(), np.repeat(freq, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(generate_gpu_experts_masks(other, 7), expected)


@pytest.mark.parametrize(
    ("freq", "num", "error", "message"),
    [
        ([["a"]], 0, TypeError, r"activation_freq: got <U1, expected real numbers \[L, E\]"),
        ([[1j]], 0, TypeError, r"activation_freq: got complex128, expected real numbers \[L, E\]"),
        ([[True]], 0, TypeError, r"activation_freq: got bool, expected real numbers \[L, E\]"),
        ([1.0, 2.0], 0, ValueError, r"activation_freq: got shape \[2\], expected \[L, E\]"),
        (np.zeros((1, 2, 3)), 0, ValueError, r"activation_freq: got shape \[1, 2, 3\], expected \[L, E\]"),
        ([[1.0, np.nan]], 1, ValueError, r"activation_freq: got a NaN, expected numbers"),
        (
            [[1.0, 2.0]],
            3,
            ValueError,
            r"num_gpu_experts: got 3, expected 0 to 2: the number of experts on the GPU in all 1 layers",
        ),
        ([[1.0, 2.0]], 1.5, TypeError, r"num_gpu_experts: got 1.5, expected an integer"),
        ([[1.0, 2.0]], -1, ValueError, r"num_gpu_experts: got -1, expected 0 to 2"),
    ],
)
def test_what_is_refused(freq: Any, num: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate_gpu_experts_masks(freq, num)


def test_the_two_parts_of_a_layer_add_up() -> None:
    """What the mask leaves out here is what the GPU computes."""
    rng = np.random.default_rng(1)
    layer = draw_layer(rng, 6, 16, 24)
    batch = draw_batch(rng, layer, 20, 1)
    freq = np.bincount(batch.ids.ravel(), minlength=6)[None]
    (mask,) = generate_gpu_experts_masks(freq, 2)
    assert mask.sum() == 2
    here = layer.forward(batch, gpu_experts_mask=mask, out=np.empty(batch.x.shape, np.float32))
    there = layer.forward(batch, gpu_experts_mask=~mask, out=np.empty(batch.x.shape, np.float32))
    assert_same_bits(
        here + there, layer.forward(batch, out=np.empty(batch.x.shape, np.float32)) + np.float32(0)
    )
