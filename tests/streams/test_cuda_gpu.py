"""CUDA streams on a real GPU: torch and CuPy arrays, and graphs."""

from __future__ import annotations

import textwrap
import time
from typing import Any

import numpy as np
import pytest
from layers import assert_same_bits, bf16, draw, draw_batch, draw_layer, run_python

from ktmoe_np import KTMoEWrapper

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.crosscheck,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

E, I, H, P, T = 5, 24, 40, 2, 6  # noqa: E741


def on_gpu(array: Any) -> Any:
    if array.dtype == bf16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16).cuda()
    return torch.from_numpy(array).cuda()


def on_cpu(tensor: Any) -> Any:
    return tensor.cpu().view(torch.uint16).numpy().view(bf16)


@pytest.fixture(scope="module")
def case() -> Any:
    rng = np.random.default_rng(0)
    layer = draw_layer(rng, E, I, H)
    return layer.wrapper(P), draw_batch(rng, layer, T, P)


def test_arrays_of_torch(case: Any) -> None:
    moe, batch = case
    x, ids, weights = map(on_gpu, batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = moe.forward(x, ids, weights, cuda_stream=stream)
        doubled = result * 2
    stream.synchronize()
    assert result.is_cuda
    assert_same_bits(on_cpu(result), moe.forward(*batch))
    assert_same_bits(on_cpu(doubled), moe.forward(*batch) * bf16.type(2))


def test_many_passes_one_after_the_other(case: Any) -> None:
    moe, batch = case
    x, ids, weights = map(on_gpu, batch)
    stream = torch.cuda.current_stream()
    found = x
    for _ in range(20):
        found = moe.forward(found, ids, weights, cuda_stream=stream)
    expected = batch.x
    for _ in range(20):
        expected = moe.forward(expected, *batch[1:])
    assert_same_bits(on_cpu(found), expected)


def test_a_graph_of_torch(case: Any) -> None:
    moe, batch = case
    KTMoEWrapper.set_capture_batch_sizes([T])
    try:
        x, ids, weights = map(on_gpu, batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = moe.forward(x * 2, ids, weights, cuda_stream=torch.cuda.current_stream())
        for seed in range(3):
            new = draw(np.random.default_rng(seed), T, H)
            x.copy_(on_gpu(new))
            graph.replay()
            torch.cuda.synchronize()
            assert_same_bits(on_cpu(result), moe.forward(new * bf16.type(2), *batch[1:]))
    finally:
        KTMoEWrapper.set_capture_batch_sizes([])


def test_exceptions_of_a_stream(case: Any) -> None:
    moe, batch = case
    x, ids, weights = map(on_gpu, batch)
    moe.submit_forward(x, ids + E, weights, torch.cuda.current_stream())
    torch.cuda.synchronize()
    while moe.cpu_infer.num_completed < moe.cpu_infer.num_submitted:
        time.sleep(0.001)
    with pytest.raises(IndexError, match="topk_ids: got expert"):
        moe.sync_forward(cuda_stream=torch.cuda.current_stream())
    moe.cpu_infer.sync()


def test_arrays_of_the_gpu_are_refused_without_a_stream(case: Any) -> None:
    moe, batch = case
    for i, name in enumerate(("hidden_states", "topk_ids", "topk_weights")):
        arrays = [on_gpu(array) if at == i else array for at, array in enumerate(batch)]
        with pytest.raises(TypeError, match=f"{name}: got"):
            moe.forward(*arrays)


def test_arrays_of_cupy(case: Any) -> None:
    cupy = pytest.importorskip("cupy")
    moe, batch = case
    try:
        x = cupy.asarray(batch.x)
    except (TypeError, ValueError) as error:
        pytest.skip(f"this CuPy has no bfloat16: {error}")
    stream = cupy.cuda.Stream()
    with stream:
        ids, weights = cupy.asarray(batch.ids), cupy.asarray(batch.weights)
        result = moe.forward(x, ids, weights, cuda_stream=stream)
    stream.synchronize()
    assert type(result) is type(x)
    assert_same_bits(cupy.asnumpy(result), moe.forward(*batch))


def test_deferred_experts_in_a_graph_of_torch() -> None:
    rng = np.random.default_rng(1)
    layers = [draw_layer(rng, E, I, H) for _ in range(3)]
    moes = [layer.wrapper(4, layer_idx=i, max_deferred_experts_per_token=2) for i, layer in enumerate(layers)]
    batches = [draw_batch(rng, layer, T, 4) for layer in layers]
    expected = [moe.forward(*batch) for moe, batch in zip(moes, batches, strict=True)]
    expected.append(KTMoEWrapper.drain_deferred())
    there = [list(map(on_gpu, batch)) for batch in batches]
    there[0][1] = there[0][1].to(torch.int32)
    number = torch.tensor([T], device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream()
        found = [
            moe.forward(*batch, stream, num_tokens=number) for moe, batch in zip(moes, there, strict=True)
        ]
        found.append(KTMoEWrapper.drain_deferred(stream))
    for used in (T, 3):
        number.fill_(used)
        graph.replay()
        torch.cuda.synchronize()
        for one, want in zip(found, expected, strict=True):
            assert_same_bits(on_cpu(one)[:used], want[:used])
            assert not on_cpu(one)[used:].any()


def test_arrays_of_jax() -> None:
    """In a process of its own, as others keep JAX on the CPU."""
    script = """
        import os
        os.environ["JAX_PLATFORMS"] = "cuda"
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        import jax, jax.numpy as jnp, numpy as np, torch
        from layers import assert_same_bits, draw_batch, draw_layer
        rng = np.random.default_rng(0)
        layer = draw_layer(rng, 5, 24, 40)
        moe, batch = layer.wrapper(2), draw_batch(rng, layer, 6, 2)
        x, ids, weights = map(jnp.asarray, batch)
        assert ids.dtype == jnp.int32
        stream = torch.cuda.Stream()
        found, expected = x, batch.x
        for _ in range(20):
            found = moe.forward(found * 2, ids, weights, cuda_stream=stream)
            assert isinstance(found, jax.Array)
            expected = moe.forward(expected * batch.x.dtype.type(2), *batch[1:])
        assert_same_bits(np.asarray(found), expected)
        try:
            moe.forward(x, ids, weights, cuda_stream=stream, out=x)
        except TypeError as error:
            print(error)
        try:
            moe.forward(x, ids, weights)
        except TypeError as error:
            print(error)
        """
    pytest.importorskip("jax")
    done = run_python(textwrap.dedent(script))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "out: got a JAX array, which cannot be written, expected None"
    assert second.startswith("hidden_states: got")
