"""The experts that a layer leaves to a GPU, computed on the CPU with NumPy, torch and JAX arrays."""

from __future__ import annotations

import doctest
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from gpu_cases import JAX, NUMPY, TORCH, Arrays, assert_sum_close, gpu_experts
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    ACTIVATIONS,
    Batch,
    assert_close,
    assert_same_bits,
    bf16,
    draw_batch,
    draw_layer,
    run_python,
)

import ktmoe_np.gpu.experts
from ktmoe_np import GPUExperts, MoEConfig, parse_activation
from ktmoe_np.arrays import library as _array_library
from ktmoe_np.reference import activate, round_bf16

E, I, H, P = 6, 24, 40, 3  # noqa: E741

NAMES = ("NumPy", *(pytest.param(name, marks=pytest.mark.crosscheck) for name in ("torch", "JAX")))
MASK = np.array([True, False, False, True, True, False])


def library(name: str) -> Arrays:
    """The arrays of that library; without it the test is skipped."""
    if name == "torch":
        pytest.importorskip("torch")
        return TORCH
    if name == "JAX":
        pytest.importorskip("jax")
        return JAX
    return NUMPY


@pytest.fixture(params=NAMES)
def arrays(request: pytest.FixtureRequest) -> Arrays:
    return library(request.param)


@pytest.fixture(scope="module")
def case() -> Any:
    """A layer, and a batch that has negative and repeated ids."""
    rng = np.random.default_rng(0)
    layer = draw_layer(rng, E, I, H)
    batch = draw_batch(rng, layer, 7, P)
    batch.ids[0] = -1
    batch.ids[1] = 0
    return layer, batch


def tiny(activation: str, num_experts_per_tok: int, arrays: Arrays) -> GPUExperts:
    """Two experts of width one, both here: g = u = x for the first, -x for the second, y = h."""
    config = MoEConfig(2, num_experts_per_tok, 1, 1, parse_activation(activation))
    first = arrays.take(np.array([1.0, -1.0], bf16)[:, None, None])
    last = arrays.take(np.ones((2, 1, 1), bf16))
    up = first if config.activation.gated else None
    return GPUExperts(config, np.ones(2, bool), first, up, last)


def forward(gpu: GPUExperts, arrays: Arrays, x: Any, ids: Any, weights: Any) -> Any:
    batch = Batch(np.array(x, bf16), np.array(ids), np.array(weights, np.float32))
    return arrays.give(gpu.forward(*arrays.batch(batch)))


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.gpu.experts).failed == 0


def test_libraries_are_not_imported() -> None:
    done = run_python("""
        import sys
        import numpy as np
        from gpu_cases import NUMPY, gpu_experts
        from layers import draw_batch, draw_layer
        rng = np.random.default_rng(0)
        layer = draw_layer(rng, 3, 8, 16)
        gpu = gpu_experts(layer.wrapper(2), layer, np.array([True, False, True]), NUMPY)
        gpu.forward(*draw_batch(rng, layer, 4, 2))
        print(sorted({"torch", "jax", "cupy"} & sys.modules.keys()))
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


# ---- the two parts are the whole ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@given(
    mask=st.lists(st.booleans(), min_size=E, max_size=E),
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.sampled_from([1, 7]),
    with_biases=st.booleans(),
    scale_inputs=st.booleans(),
)
@settings(max_examples=10)
def test_the_sum_is_that_of_all_experts(
    name: str,
    activation: Any,
    mask: list[bool],
    seed: int,
    num_tokens: int,
    with_biases: bool,
    scale_inputs: bool,
) -> None:
    arrays, rng, here = library(name), np.random.default_rng(seed), np.array(mask)
    layer = draw_layer(rng, E, I, H, activation, with_biases=with_biases)
    layer = replace(layer, scale_inputs=scale_inputs)
    batch = draw_batch(rng, layer, num_tokens, P)
    batch.ids[rng.random(batch.ids.shape) < 0.2] = -1
    moe = layer.wrapper(P, gpu_experts_mask=here)
    gpu = gpu_experts(moe, layer, here, arrays)
    moe.submit_forward(*batch)
    part = gpu.forward(*arrays.batch(batch))
    assert_close(arrays.give(part), layer, batch, gpu_experts_mask=~here)
    result = gpu.add(arrays.take(moe.sync_forward()), part)
    assert_sum_close(arrays.give(result), layer, batch, here)


def test_a_float32_result_is_rounded_once(case: Any, arrays: Arrays) -> None:
    layer, batch = case
    moe = layer.wrapper(P, gpu_experts_mask=MASK)
    gpu = gpu_experts(moe, layer, MASK, arrays)
    here = arrays.take(moe.forward(*batch, out=np.empty(batch.x.shape, np.float32)))
    result = gpu.add(here, gpu.forward(*arrays.batch(batch)))
    assert_close(arrays.give(result), layer, batch)


@pytest.mark.parametrize("mask", [None, np.zeros(E, bool)], ids=["None", "zeros"])
def test_no_experts_give_nothing(case: Any, arrays: Arrays, mask: Any) -> None:
    layer, batch = case
    nobody = layer.picked(np.zeros(E, bool))
    moe = layer.wrapper(P)
    gpu = GPUExperts(moe.config, mask, *(arrays.take(matrix) for matrix in nobody.matrices))
    part = gpu.forward(*arrays.batch(batch))
    assert_same_bits(arrays.give(part), np.zeros(batch.x.shape, np.float32))
    whole = moe.forward(*batch)
    assert_same_bits(arrays.give(gpu.add(arrays.take(whole), part)), whole)


def test_all_experts_leave_nothing(case: Any, arrays: Arrays) -> None:
    layer, batch = case
    everybody = np.ones(E, bool)
    moe = layer.wrapper(P, gpu_experts_mask=everybody)
    assert not moe.forward(*batch).astype(np.float32).any()
    gpu = gpu_experts(moe, layer, everybody, arrays)
    result = gpu.add(arrays.take(moe.forward(*batch)), gpu.forward(*arrays.batch(batch)))
    assert_close(arrays.give(result), layer, batch)


def test_an_empty_batch(case: Any, arrays: Arrays) -> None:
    layer, batch = case
    gpu = gpu_experts(layer.wrapper(P), layer, MASK, arrays)
    assert arrays.give(gpu.forward(*arrays.batch(batch.rows(slice(0))))).shape == (0, H)


# ---- numbers ----


def test_the_intermediate_and_the_sum_are_rounded_to_even(arrays: Arrays) -> None:
    gpu = tiny("relu2", 1, arrays)
    ulp = 2.0**-7
    x = [
        [1 + ulp],
        [-1 - 3 * ulp],
    ]  # squares: 1 + 2 ulp + a quarter, 1 + 6 ulp + nine quarters; ulp / 32 of them
    found = forward(gpu, arrays, x, [[0], [1]], [[1], [1]])
    assert found.tolist() == [[1 + 2 * ulp], [1 + 6 * ulp]]
    here, there = [1.0, 1.0 + ulp, np.inf, 3e38], [ulp / 2, ulp / 2, 1.0, 3e38]
    result = gpu.add(
        arrays.take(np.array(here, bf16)[:, None]), arrays.take(np.array(there, np.float32)[:, None])
    )
    assert arrays.give(result).astype(float).ravel().tolist() == [1.0, 1 + 2 * ulp, np.inf, np.inf]


@pytest.mark.parametrize("activation", ["silu", "swigluoai", "swiglustep", "situ", "gelu", "relu2"])
def test_large_numbers_and_small_results(arrays: Arrays, activation: str) -> None:
    gpu = tiny(activation, 1, arrays)
    x, ids = [[1e4], [-1e4], [1e19], [-1e19], [-5.0], [-11.0]], [[0]] * 6
    spec, g = gpu.config.activation, np.array(x, np.float32).astype(bf16).astype(np.float32)
    expected = round_bf16(activate(spec, g, g if spec.gated else None))
    np.testing.assert_allclose(forward(gpu, arrays, x, ids, [[1]] * 6), expected, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activation", ["silu", "swigluoai", "relu2"])
def test_a_token_that_is_not_finite(arrays: Arrays, activation: str, value: float) -> None:
    """It is NaN where an expert here has it, whatever clamps there are; elsewhere it is nothing."""
    gpu = tiny(activation, 2, arrays)
    found = forward(gpu, arrays, [[value]] * 3 + [[1.0]], [[0, -1], [-1, 1], [-1, 2], [0, 1]], [[1, 1]] * 4)
    assert np.isnan(found[:2]).all()
    assert found[2] == 0
    assert np.isfinite(found[3])


def test_what_is_not_routed_here_adds_nothing(arrays: Arrays) -> None:
    """Not even where the expert would overflow, or the weight is no number."""
    gpu = tiny("relu2", 2, arrays)
    x, ids, weights = (
        [[1e30], [1.0], [1.0]],
        [[1, -1], [0, -7], [0, 99]],
        [[1, np.nan], [2, np.nan], [3, np.inf]],
    )
    assert forward(gpu, arrays, x, ids, weights).tolist() == [[0.0], [2.0], [3.0]]
    assert np.isnan(forward(gpu, arrays, [[1.0]], [[0, 1]], [[1, np.nan]])).all()
    assert np.isnan(
        forward(gpu, arrays, [[1e30]], [[0, 1]], [[0, 1]])
    ).all()  # 0 x infinity, as the layer has it


def test_repeated_ids_count_each(arrays: Arrays) -> None:
    gpu = tiny("relu2", 3, arrays)
    assert forward(gpu, arrays, [[2.0]], [[0, 1, 0]], [[0.5, 8, 0.25]]).tolist() == [[3.0]]


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_ids_of_any_integer_dtype(case: Any, arrays: Arrays, dtype: str) -> None:
    layer, batch = case
    gpu = gpu_experts(layer.wrapper(P), layer, MASK, arrays)
    x, _, weights = arrays.batch(batch)
    ids = np.maximum(batch.ids, 1)  # 1 is not here
    expected = arrays.give(gpu.forward(x, arrays.take(ids), weights))
    assert_same_bits(arrays.give(gpu.forward(x, arrays.take(ids.astype(dtype)), weights)), expected)


# ---- programs ----


@pytest.mark.crosscheck
@pytest.mark.parametrize("scale_inputs", [False, True])
def test_in_a_program_of_jax(case: Any, scale_inputs: bool) -> None:
    jax = pytest.importorskip("jax")
    from ktmoe_np.jax import moe_forward

    layer, batch = replace(case[0], scale_inputs=scale_inputs), case[1]
    moe = layer.wrapper(P, gpu_experts_mask=MASK)
    gpu = gpu_experts(moe, layer, MASK, JAX)

    def whole(gpu: GPUExperts, *batch: Any) -> Any:
        return gpu.add(moe_forward(moe, *batch), gpu.forward(*batch))

    result = jax.jit(partial(whole, gpu))(*JAX.batch(batch))
    assert_sum_close(np.asarray(result), layer, batch, MASK)

    def of_arguments(weights: Any, *batch: Any) -> Any:
        return whole(GPUExperts(moe.config, MASK, *weights), *batch)

    weights = tuple(map(JAX.take, layer.picked(MASK).matrices))
    assert_same_bits(np.asarray(jax.jit(of_arguments)(weights, *JAX.batch(batch))), np.asarray(result))


@pytest.mark.crosscheck
def test_a_program_of_jax_leaves_no_rounding_out() -> None:
    jax = pytest.importorskip("jax")
    gpu = tiny("relu2", 1, JAX)
    batch = Batch(np.array([[1 + 2.0**-7]], bf16), np.array([[0]]), np.ones((1, 1), np.float32))
    assert float(jax.jit(gpu.forward)(*JAX.batch(batch))[0, 0]) == 1 + 2.0**-6
    twice = jax.jit(lambda here, there: gpu.add(here, there).astype(np.float32))
    found = twice(JAX.take(np.ones((1, 1), bf16)), JAX.take(np.array([[2.0**-8]], np.float32)))
    assert float(found[0, 0]) == 1.0


@pytest.mark.crosscheck
@pytest.mark.parametrize("has_mixed_product", [False, True])
@pytest.mark.parametrize("scale_inputs", [False, True])
def test_no_value_of_torch_is_read(
    case: Any, has_mixed_product: bool, scale_inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays that have no values give a result that has none."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(_array_library._Torch, "_has_mixed_product", lambda *_: has_mixed_product)
    layer, batch = replace(case[0], scale_inputs=scale_inputs), case[1]
    nowhere = Arrays("torch", lambda array: TORCH.take(array).to("meta"), lambda array: array)
    gpu = gpu_experts(layer.wrapper(P), layer, MASK, nowhere)
    part = gpu.forward(*nowhere.batch(batch))
    assert (part.shape, part.dtype) == ((7, H), torch.float32)
    result = gpu.add(nowhere.take(batch.x), part)
    assert (result.shape, result.dtype) == ((7, H), torch.bfloat16)


# ---- what is refused ----

G = int(MASK.sum())
CONFIG = MoEConfig(E, P, H, I)


def zeros(*shape: int, dtype: Any = bf16) -> Any:
    return np.zeros(shape, dtype)


FIRST, LAST = zeros(G, I, H), zeros(G, H, I)
GATED = {"gate_proj": FIRST, "up_proj": FIRST, "down_proj": LAST}
UNGATED = {**GATED, "config": replace(CONFIG, activation=parse_activation("relu2"))}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": E}, TypeError, r"config: got int, expected a MoEConfig"),
        (
            {"gpu_experts_mask": MASK.astype(int)},
            TypeError,
            r"gpu_experts_mask: got int64 \[6\], expected bool \[6\]",
        ),
        (
            {"gpu_experts_mask": MASK[1:]},
            ValueError,
            r"gpu_experts_mask: got bool \[5\], expected bool \[6\]",
        ),
        (
            {"gate_proj": [1.0]},
            TypeError,
            r"gate_proj: got list, expected a NumPy, CuPy, JAX or torch array",
        ),
        (
            {"gate_proj": None},
            TypeError,
            r"gate_proj: got NoneType, expected a NumPy, CuPy, JAX or torch array",
        ),
        (
            {"down_proj": None},
            TypeError,
            r"down_proj: got NoneType, expected a NumPy, CuPy, JAX or torch array",
        ),
        (
            {"up_proj": zeros(G, I, H, dtype=np.float32)},
            TypeError,
            r"up_proj: got float32 \[3, 24, 40\], expected bfloat16 \[3, 24, 40\]",
        ),
        (
            {"gate_proj": zeros(E, I, H)},
            ValueError,
            r"gate_proj: got bfloat16 \[6, 24, 40\], expected bfloat16 \[3, 24, 40\]",
        ),
        (
            {"down_proj": FIRST},
            ValueError,
            r"down_proj: got bfloat16 \[3, 24, 40\], expected bfloat16 \[3, 40, 24\]",
        ),
        (
            {"up_proj": None},
            ValueError,
            r"up_proj: got None, expected bfloat16 \[G, I, H\]: activation silu is gated",
        ),
        (UNGATED, ValueError, r"up_proj: got ndarray, expected None: activation relu2 is not gated"),
        (
            {**UNGATED, "up_proj": None, "up_bias": zeros(G, I)},
            ValueError,
            r"up_bias: got ndarray, expected None: activation relu2 is not gated",
        ),
        (
            {"gate_bias": zeros(G, I, dtype=np.float64)},
            TypeError,
            r"gate_bias: got float64 \[3, 24\], expected float32 or float16 or bfloat16 \[3, 24\]",
        ),
        (
            {"down_bias": zeros(G, I)},
            ValueError,
            r"down_bias: got bfloat16 \[3, 24\], expected float32 or float16 or bfloat16 \[3, 40\]",
        ),
    ],
)
def test_weights_that_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    given = {"config": CONFIG, "gpu_experts_mask": MASK, **GATED, **arguments}
    with pytest.raises(error, match=message):
        GPUExperts(**given)


X, IDS, WEIGHTS = zeros(2, H), zeros(2, P, dtype=np.int64), zeros(2, P, dtype=np.float32)
PART = zeros(2, H, dtype=np.float32)


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        (
            "forward",
            ([0.0], IDS, WEIGHTS),
            TypeError,
            r"hidden_states: got list, expected a NumPy, CuPy, JAX or torch array",
        ),
        (
            "forward",
            (PART, IDS, WEIGHTS),
            TypeError,
            r"hidden_states: got float32 \[2, 40\], expected bfloat16 \[T, 40\]",
        ),
        (
            "forward",
            (X[0], IDS, WEIGHTS),
            ValueError,
            r"hidden_states: got bfloat16 \[40\], expected bfloat16 \[T, 40\]",
        ),
        (
            "forward",
            (zeros(2, I), IDS, WEIGHTS),
            ValueError,
            r"hidden_states: got bfloat16 \[2, 24\], expected bfloat16 \[T, 40\]",
        ),
        (
            "forward",
            (X, WEIGHTS, WEIGHTS),
            TypeError,
            r"topk_ids: got float32 \[2, 3\], expected integers \[2, 3\]",
        ),
        (
            "forward",
            (X, IDS > 0, WEIGHTS),
            TypeError,
            r"topk_ids: got bool \[2, 3\], expected integers \[2, 3\]",
        ),
        (
            "forward",
            (X, IDS[1:], WEIGHTS),
            ValueError,
            r"topk_ids: got int64 \[1, 3\], expected integers \[2, 3\]",
        ),
        ("forward", (X, IDS, IDS), TypeError, r"topk_weights: got int64 \[2, 3\], expected float32 \[2, 3\]"),
        (
            "forward",
            (X, IDS, WEIGHTS[:, 1:]),
            ValueError,
            r"topk_weights: got float32 \[2, 2\], expected float32 \[2, 3\]",
        ),
        ("add", (X, X), TypeError, r"partial: got bfloat16 \[2, 40\], expected float32 \[T, 40\]"),
        ("add", (X, PART[:, 1:]), ValueError, r"partial: got float32 \[2, 39\], expected float32 \[T, 40\]"),
        (
            "add",
            (X.astype(np.float16), PART),
            TypeError,
            r"cpu_result: got float16 \[2, 40\], expected bfloat16 or float32 \[2, 40\]",
        ),
        (
            "add",
            (X[1:], PART),
            ValueError,
            r"cpu_result: got bfloat16 \[1, 40\], expected bfloat16 or float32 \[2, 40\]",
        ),
    ],
)
def test_batches_that_are_refused(method: str, arguments: Any, error: type[Exception], message: str) -> None:
    gpu = GPUExperts(CONFIG, MASK, **GATED)
    with pytest.raises(error, match=message):
        getattr(gpu, method)(*arguments)


@pytest.mark.parametrize("name", NAMES[1:])
def test_arrays_of_several_libraries_are_refused(name: str) -> None:
    take = library(name).take
    with pytest.raises(
        TypeError, match=f"up_proj: got an array of NumPy, expected one of {name}, as gate_proj is"
    ):
        GPUExperts(CONFIG, MASK, take(FIRST), FIRST, LAST)
    gpu = GPUExperts(CONFIG, MASK, FIRST, FIRST, LAST)
    for at, argument in enumerate(("hidden_states", "topk_ids", "topk_weights")):
        batch = [take(array) if at == i else array for i, array in enumerate((X, IDS, WEIGHTS))]
        with pytest.raises(TypeError, match=f"{argument}: got an array of {name}, expected one of NumPy"):
            gpu.forward(*batch)
    with pytest.raises(TypeError, match=f"cpu_result: got an array of {name}, expected one of NumPy"):
        gpu.add(take(X), PART)
