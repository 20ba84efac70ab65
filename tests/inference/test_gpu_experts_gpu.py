"""A layer and its experts on a real GPU: torch and CuPy in streams, and a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_cases import CUPY, TORCH_CUDA, assert_sum_close, gpu_experts
from layers import ACTIVATIONS, Batch, assert_close, draw_batch, draw_layer

from ktmoe_np import KTMoEWrapper

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.crosscheck,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

E, I, H, P, T = 6, 24, 40, 3, 7  # noqa: E741
MASK = np.array([True, False, False, True, True, False])


def drawn(seed: int, activation: Any = "silu") -> Any:
    """A layer with biases, its wrapper, and a batch."""
    rng = np.random.default_rng(seed)
    layer = draw_layer(rng, E, I, H, activation, with_biases=True)
    return layer, layer.wrapper(P, gpu_experts_mask=MASK), draw_batch(rng, layer, T, P)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_arrays_of_torch(activation: Any) -> None:
    layer, moe, batch = drawn(1, activation)
    gpu = gpu_experts(moe, layer, MASK, TORCH_CUDA)
    on_gpu = TORCH_CUDA.batch(batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        moe.submit_forward(*on_gpu, stream)
        partial = gpu.forward(*on_gpu)
        result = gpu.add(moe.sync_forward(cuda_stream=stream), partial)
    stream.synchronize()
    assert result.is_cuda
    assert_close(TORCH_CUDA.give(partial), layer, batch, gpu_experts_mask=~MASK)
    assert_sum_close(TORCH_CUDA.give(result), layer, batch, MASK)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_waits_for_nothing() -> None:
    layer, moe, batch = drawn(2)
    gpu = gpu_experts(moe, layer, MASK, TORCH_CUDA)
    on_gpu = TORCH_CUDA.batch(batch)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.add(on_gpu[0], gpu.forward(*on_gpu))
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("mask", [np.zeros(E, bool), np.ones(E, bool)], ids=["none", "all"])
def test_no_experts_and_all(mask: Any) -> None:
    layer, moe, batch = drawn(3)
    moe.set_gpu_experts_mask(mask)
    gpu = gpu_experts(moe, layer, mask, TORCH_CUDA)
    on_gpu, stream = TORCH_CUDA.batch(batch), torch.cuda.current_stream()
    moe.submit_forward(*on_gpu, stream)
    partial = gpu.forward(*on_gpu)
    result = gpu.add(moe.sync_forward(cuda_stream=stream), partial)
    assert_sum_close(TORCH_CUDA.give(result), layer, batch, mask)
    assert gpu.forward(*(array[:0] for array in on_gpu)).shape == (0, H)


def test_a_token_that_is_not_finite() -> None:
    layer, moe, batch = drawn(4)
    gpu = gpu_experts(moe, layer, MASK, TORCH_CUDA)
    batch.x[:3, 0] = np.nan, np.inf, -np.inf
    partial = TORCH_CUDA.give(gpu.forward(*TORCH_CUDA.batch(batch)))
    assert_close(partial, layer, batch, gpu_experts_mask=~MASK)


def test_a_graph_of_torch() -> None:
    """Recorded once, replayed with other tokens and other routes."""
    layer, moe, batch = drawn(5)
    gpu = gpu_experts(moe, layer, MASK, TORCH_CUDA)
    KTMoEWrapper.set_capture_batch_sizes([T])
    try:
        static = TORCH_CUDA.batch(batch)
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            gpu.forward(*static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stream = torch.cuda.current_stream()
            moe.submit_forward(*static, stream)
            partial = gpu.forward(*static)
            result = gpu.add(moe.sync_forward(cuda_stream=stream), partial)
        for seed in range(3):
            new: Batch = draw_batch(np.random.default_rng(seed), layer, T, P)
            new.ids[seed] = -1
            for held, array in zip(static, TORCH_CUDA.batch(new), strict=True):
                held.copy_(array)
            graph.replay()
            torch.cuda.synchronize()
            assert_close(TORCH_CUDA.give(partial), layer, new, gpu_experts_mask=~MASK)
            assert_sum_close(TORCH_CUDA.give(result), layer, new, MASK)
    finally:
        KTMoEWrapper.set_capture_batch_sizes([])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_arrays_of_cupy(activation: Any) -> None:
    cupy = pytest.importorskip("cupy")
    layer, moe, batch = drawn(6, activation)
    try:
        CUPY.take(batch.x)
    except (TypeError, ValueError) as error:
        pytest.skip(f"this CuPy has no bfloat16: {error}")
    stream = cupy.cuda.Stream()
    with stream:
        gpu = gpu_experts(moe, layer, MASK, CUPY)
        on_gpu = CUPY.batch(batch)
        moe.submit_forward(*on_gpu, stream)
        partial = gpu.forward(*on_gpu)
        result = gpu.add(moe.sync_forward(cuda_stream=stream), partial)
    stream.synchronize()
    assert_close(CUPY.give(partial), layer, batch, gpu_experts_mask=~MASK)
    assert_sum_close(CUPY.give(result), layer, batch, MASK)
