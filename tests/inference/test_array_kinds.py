"""Arrays of every kind go in, and results come out in the kind of the hidden states."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from array_kinds import KINDS, InterfaceOnly, Pinned, kind_of, numpy_of, of_jax, of_torch
from layers import AnyArray, Batch, Layer, assert_same_bits, bf16, draw_batch, draw_layer

from ktmoe_np import DeferralChain, GPUExperts, KTMoEWrapper, generate_gpu_experts_masks
from ktmoe_np.arrays.device import cast_array
from ktmoe_np.arrays.host import as_numpy
from ktmoe_np.arrays.library import find_library

E, P, H, I, T = 4, 2, 40, 33, 6  # noqa: E741

OTHERS = [pytest.param(name, marks=pytest.mark.crosscheck) for name in KINDS if name != "NumPy"]


@pytest.fixture(scope="module")
def layer() -> Layer:
    return draw_layer(np.random.default_rng(1), E, I, H)


@pytest.fixture(scope="module")
def batch(layer: Layer) -> Batch:
    return draw_batch(np.random.default_rng(2), layer, T, P)


@pytest.fixture(scope="module")
def moe(layer: Layer) -> Any:
    return layer.wrapper(P, chunked_prefill_size=4)


def leading(batch: Batch, *lead: int) -> list[AnyArray]:
    return [array.reshape(*lead, array.shape[-1]) for array in batch]


# ---- kind in, kind out ----


@pytest.mark.parametrize("kind", ["NumPy", *OTHERS])
@pytest.mark.parametrize("lead", [(T,), (2, 3), (1, T, 1)], ids=str)
def test_results_are_of_the_kind_of_the_hidden_states(
    layer: Layer, batch: Batch, moe: Any, kind: str, lead: tuple[int, ...]
) -> None:
    make, expected_kind = KINDS[kind]
    expected = layer.forward(batch).reshape(*lead, H)
    arrays = [make(array) for array in leading(batch, *lead)]
    for each in (moe.forward(*arrays), submitted(moe, arrays)):
        assert kind_of(each) == expected_kind
        assert_same_bits(numpy_of(each), expected)


def submitted(moe: Any, arrays: list[Any]) -> Any:
    moe.submit_forward(*arrays)
    return moe.sync_forward()


@pytest.mark.parametrize("kind", ["NumPy", *OTHERS])
def test_deferred_experts_come_in_the_kind_of_the_pass(layer: Layer, batch: Batch, kind: str) -> None:
    make, expected_kind = KINDS[kind]
    deferring = layer.wrapper(P, max_deferred_experts_per_token=1)
    expected, remaining = (deferring.forward(*batch), KTMoEWrapper.drain_deferred())
    chain = DeferralChain()
    found = deferring.forward(*(make(array) for array in leading(batch, 2, 3)), chain=chain)
    left = KTMoEWrapper.drain_deferred(chain=chain)
    for result, whole in ((found, expected), (left, remaining)):
        assert kind_of(result) == expected_kind
        assert_same_bits(numpy_of(result), whole.reshape(2, 3, H))


@pytest.mark.crosscheck
def test_a_tensor_shares_the_memory_of_the_engine(moe: Any, batch: Batch) -> None:
    torch = pytest.importorskip("torch")
    out = moe.forward(*(of_torch(array) for array in batch))
    assert out.dtype is torch.bfloat16
    assert not out.requires_grad
    memory = numpy_of(out)
    out.zero_()
    assert not memory.astype(np.float32).any()


def test_a_single_row_needs_no_axis(layer: Layer, batch: Batch, moe: Any) -> None:
    x, ids, weights = batch
    assert_same_bits(moe.forward(x[1], ids[1], weights[1]), layer.forward(batch)[1])


def test_no_rows_of_several_axes(moe: Any) -> None:
    found = moe.forward(np.zeros((2, 0, H), bf16), np.zeros((2, 0, P), int), np.zeros((2, 0, P), np.float32))
    assert_same_bits(found, np.zeros((2, 0, H), bf16))


# ---- dtypes ----


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ["NumPy", *OTHERS])
def test_other_floats_are_rounded_once(
    layer: Layer, batch: Batch, moe: Any, dtype: type[Any], kind: str
) -> None:
    make, expected_kind = KINDS[kind]
    x = np.random.default_rng(3).standard_normal((T, H)).astype(dtype)
    out = moe.forward(make(x), make(batch.ids), make(batch.weights))
    assert kind_of(out) == expected_kind
    assert_same_bits(numpy_of(out), layer.forward(batch._replace(x=x.astype(bf16))))


def test_values_beyond_bf16_are_infinite_without_a_warning(moe: Any, batch: Batch) -> None:
    x = batch.x.astype(np.float32)
    x[2, 3] = np.finfo(np.float32).max
    found = moe.forward(x, batch.ids, batch.weights)
    assert np.isnan(found[2].astype(np.float32)).all()
    assert_same_bits(found[3:], moe.forward(*batch)[3:])


def test_routing_weights_beyond_float32_are_infinite_without_a_warning(moe: Any, batch: Batch) -> None:
    x, ids, weights = batch
    wide = weights.astype(np.float64)
    wide[1] = 1e300
    out = moe.forward(x, ids, wide)
    assert not np.isfinite(out[1].astype(np.float32)).any()
    assert_same_bits(np.delete(out, 1, 0), np.delete(moe.forward(*batch), 1, 0))


def test_a_library_that_another_thread_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module is there before its classes are."""
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))

    class Exporter:
        __array_interface__ = np.arange(3).__array_interface__

    assert find_library(Exporter()) is None
    assert as_numpy(Exporter(), "x").shape == (3,)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, bf16, ">f4"], ids=str)
def test_routing_weights_of_any_float_dtype(layer: Layer, batch: Batch, moe: Any, dtype: Any) -> None:
    weights = batch.weights.astype(dtype)
    expected = layer.forward(batch._replace(weights=weights.astype(np.float32)))
    assert_same_bits(moe.forward(batch.x, batch.ids, weights), expected)


@pytest.mark.crosscheck
def test_what_is_on_the_cpu_is_not_cast_in_a_stream() -> None:
    """So that it is refused by its own name."""
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 3)
    assert cast_array(x, bf16, ("float32",), 0x1234) is x


@pytest.mark.crosscheck
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_routing_weights_of_torch(layer: Layer, batch: Batch, moe: Any, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    x, ids, weights = (of_torch(array) for array in batch)
    rounded = weights.to(getattr(torch, dtype))
    expected = layer.forward(batch._replace(weights=rounded.float().numpy()))
    assert_same_bits(numpy_of(moe.forward(x, ids.to(torch.int32), rounded)), expected)


#: Which argument is changed, how, and what is told.
REFUSED: dict[str, tuple[str, Callable[[AnyArray], AnyArray], type[Exception], str]] = {
    "float64": (
        "hidden_states",
        lambda x: x.astype(np.float64),
        TypeError,
        f"hidden_states: got float64 [{T}, {H}], expected bfloat16 or float32 or float16 [..., {H}]",
    ),
    "bits": (
        "hidden_states",
        lambda x: x.view(np.uint16),
        TypeError,
        f"hidden_states: got uint16 [{T}, {H}], expected bfloat16 or float32 or float16 [..., {H}]; bits of "
        "bfloat16 are given as array.view(ml_dtypes.bfloat16)",
    ),
    "other leading axes": (
        "hidden_states",
        lambda x: x.reshape(2, T // 2, H),
        ValueError,
        f"topk_ids: got shape [{T}, {P}], expected [2, {T // 2}, {P}]",
    ),
    "gaps between leading axes": (
        "hidden_states",
        lambda x: np.stack([x, x], 1).transpose(1, 0, 2),
        TypeError,
        f"hidden_states: got gaps or another order of [2, {T}, {H}], expected it C-contiguous",
    ),
    "weights that are integers": (
        "topk_weights",
        lambda w: w.astype(np.int32),
        TypeError,
        f"topk_weights: got int32 [{T}, {P}], expected floats [..., {P}]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("call", ["forward", "submit_forward"])
def test_what_is_refused(moe: Any, batch: Batch, case: str, call: str) -> None:
    name, change, error, message = REFUSED[case]
    arguments = dict(zip(("hidden_states", "topk_ids", "topk_weights"), batch, strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        getattr(moe, call)(**arguments)


# ---- out ----


@pytest.mark.parametrize("kind", ["NumPy", *[name for name in OTHERS if name.values[0] != "JAX"]])
@pytest.mark.parametrize("dtype", [bf16, np.float32], ids=str)
def test_out_of_another_kind(layer: Layer, batch: Batch, moe: Any, kind: str, dtype: Any) -> None:
    expected = layer.forward(batch, out=np.empty((T, H), dtype))
    memory = np.full((2, 3, H), 3.0, dtype)
    out = InterfaceOnly(memory) if kind == "interface" else KINDS[kind][0](memory)
    assert moe.forward(*leading(batch, 2, 3), out=out) is out
    assert_same_bits(numpy_of(out).reshape(T, H), expected)


@pytest.mark.crosscheck
def test_out_that_cannot_be_written(moe: Any, batch: Batch) -> None:
    torch = pytest.importorskip("torch")
    zeros = np.zeros((T, H), bf16)
    message = "out: got a JAX array, which cannot be written, expected None or another array"
    with pytest.raises(TypeError, match=f"^{message}$"):
        moe.forward(*batch, out=of_jax(zeros))
    with pytest.raises(TypeError, match=r"^out: got a torch tensor that requires grad"):
        moe.forward(*batch, out=torch.zeros((T, H), requires_grad=True))
    zeros.setflags(write=False)
    with pytest.raises(ValueError, match=r"^out: got a read-only array bfloat16 "):
        moe.forward(*batch, out=InterfaceOnly(zeros))
    three = [np.stack([array, array]) for array in batch]
    with pytest.raises(
        TypeError, match=r"^out: got gaps or another order of \[2, 6, 40\], expected it C-con"
    ):
        moe.forward(*three, out=np.empty((T, 2, H), bf16).transpose(1, 0, 2))


# ---- gradients ----


@pytest.mark.crosscheck
@pytest.mark.parametrize("name", ["hidden_states", "topk_weights"])
def test_a_tensor_that_requires_grad_is_refused(moe: Any, batch: Batch, name: str) -> None:
    torch = pytest.importorskip("torch")
    arrays = dict(zip(("hidden_states", "topk_ids", "topk_weights"), map(of_torch, batch), strict=True))
    expected = numpy_of(moe.forward(**arrays))
    arrays[name].requires_grad_()
    message = (
        f"{name}: got a torch tensor that requires grad, expected one without gradient: "
        "ktmoe_np.torch.moe_sft is differentiable, and this call may be made within torch.no_grad()"
    )
    for call in (moe.forward, moe.submit_forward):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            call(**arrays)
    with torch.no_grad():
        assert_same_bits(numpy_of(moe.forward(**arrays)), expected)


@pytest.mark.crosscheck
def test_a_traced_array_names_the_calls_of_programs(moe: Any, batch: Batch) -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"^hidden_states: got .*ktmoe_np\.jax"):
        jax.jit(lambda x: moe.forward(x, batch.ids, batch.weights))(of_jax(batch.x))


# ---- every other argument ----


@pytest.mark.crosscheck
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "NumPy"])
def test_weights_masks_and_maps_of_another_kind(batch: Batch, kind: str) -> None:
    make = KINDS[kind][0]
    rng = np.random.default_rng(5)
    layer = draw_layer(rng, E, I, H, with_biases=True)
    mask, order = np.array([True, False, False, True]), np.array([2, 0, 3, 1])
    expected = layer.wrapper(P, order, gpu_experts_mask=mask).forward(*batch)
    theirs = layer.wrapper(P, gpu_experts_mask=make(mask))
    biases = {name: make(bias) for name, bias in layer.biases.items() if bias is not None}
    theirs.load_weights_from_tensors(*map(make, layer.matrices), make(order), **biases)
    assert_same_bits(theirs.forward(*batch), expected)
    frequencies = rng.random((2, E))
    np.testing.assert_array_equal(
        generate_gpu_experts_masks(make(frequencies), 3), generate_gpu_experts_masks(frequencies, 3)
    )


@pytest.mark.crosscheck
def test_weights_of_torch_are_used_in_place(layer: Layer, batch: Batch) -> None:
    torch = pytest.importorskip("torch")
    theirs = layer.with_matrices(lambda matrix: torch.nn.Parameter(of_torch(matrix)))
    moe = theirs.wrapper(P)
    assert_same_bits(moe.forward(*batch), layer.forward(batch))
    with torch.no_grad():
        theirs.down_proj.zero_()
    assert not moe.forward(*batch).astype(np.float32).any()


@pytest.mark.crosscheck
@pytest.mark.parametrize("kind", ["torch", "DLPack", "pinned", "interface"])
def test_buffers_of_an_expert_of_another_kind(layer: Layer, kind: str) -> None:
    moe = layer.wrapper(P)
    shapes = {"w13_weights": (2 * I, H), "w2_weights": (H, I)}
    buffers = {name: [np.zeros(shape, bf16)] for name, shape in shapes.items()}
    moe.submit_write_weight_scale_to_buffer(1, 2, buffers["w13_weights"], None, buffers["w2_weights"], None)
    moe.sync_write_weight_scale_to_buffer()
    theirs = {name: [KINDS[kind][0](np.zeros(shape, bf16))] for name, shape in shapes.items()}
    moe.submit_write_weight_scale_to_buffer(1, 2, theirs["w13_weights"], None, theirs["w2_weights"], None)
    moe.sync_write_weight_scale_to_buffer()
    for name, (array,) in buffers.items():
        assert_same_bits(numpy_of(theirs[name][0]), array)


@pytest.mark.crosscheck
@pytest.mark.parametrize("kind", ["DLPack", "pinned", "interface"])
def test_experts_of_the_gpu_take_what_only_exports_memory(batch: Batch, kind: str) -> None:
    make = KINDS[kind][0]
    layer, mask = draw_layer(np.random.default_rng(6), E, I, H), np.array([True, False, True, True])
    config = layer.wrapper(P).config
    matrices = [np.ascontiguousarray(matrix[mask]) for matrix in layer.matrices]
    expected = GPUExperts(config, mask, *matrices).forward(*batch)
    theirs = GPUExperts(config, make(mask), *map(make, matrices))
    assert_same_bits(theirs.forward(*map(make, batch)), expected)


def test_bits_of_weights_are_refused_with_the_way_out(layer: Layer) -> None:
    bits = layer.with_matrices(lambda matrix: matrix.view(np.uint16))
    hint = r"; bits of bfloat16 are given as array\.view\(ml_dtypes\.bfloat16\)$"
    with pytest.raises(TypeError, match=r"^gate_proj: got uint16 .*" + hint):
        bits.wrapper(P)


# ---- the one place that decides ----


@pytest.mark.crosscheck
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "NumPy"])
@pytest.mark.parametrize(
    "dtype", [bf16, np.float32, np.float16, np.int64, np.uint8, np.bool_], ids=lambda d: np.dtype(d).name
)
def test_numpy_arrays_of_the_same_memory(kind: str, dtype: Any) -> None:
    numbers = np.arange(12).reshape(3, 4).astype(dtype)
    made = KINDS[kind][0](numbers)
    found = as_numpy(made, "x")
    assert_same_bits(found, numbers)
    assert np.shares_memory(found, as_numpy(made, "x"))
    assert_same_bits(as_numpy(KINDS[kind][0](numbers[:0]), "x"), numbers[:0])


@pytest.mark.crosscheck
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_eight_bits_of_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    found = as_numpy(torch.arange(6, dtype=torch.uint8).view(getattr(torch, name)), "x")
    assert found.dtype.name == name
    assert found.view(np.uint8).tolist() == list(range(6))


@pytest.mark.crosscheck
def test_strides_come_through(batch: Batch) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(24.0).bfloat16().reshape(4, 6)[::2, ::3]
    assert as_numpy(tensor, "x").astype(int).tolist() == [[0, 3], [12, 15]]


@pytest.mark.parametrize("device_type", [1, 3, 11, 13, 2])
def test_memory_that_the_cpu_can_read(moe: Any, batch: Batch, device_type: int) -> None:
    arrays = [Pinned(array, device_type) for array in batch]
    if device_type != 2:  # of a GPU; the others are memory of the host, pinned or not, and managed memory
        assert_same_bits(moe.forward(*arrays), moe.forward(*batch))
        return
    with pytest.raises(TypeError, match=r"^hidden_states: got Pinned, expected an array on the CPU"):
        moe.forward(*arrays)


def test_a_read_only_array_of_dlpack(moe: Any, batch: Batch) -> None:
    class OfNumPy:
        def __init__(self, array: AnyArray) -> None:
            self.array = array

        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.array.__dlpack_device__()

    out = np.zeros((T, H), np.float32)
    assert moe.forward(*batch, out=OfNumPy(out)) is not None
    assert out.any()
    assert_same_bits(as_numpy(OfNumPy(out), "x"), out)
    assert not as_numpy(OfNumPy(out), "x").flags.writeable
    out.setflags(write=False)
    with pytest.raises(
        ValueError, match=r"^out: got a read-only array .*, expected one that can be written$"
    ):
        moe.forward(*batch, out=OfNumPy(out))


def test_objects_that_are_no_arrays() -> None:
    class Broken:
        def __dlpack__(self, **_: Any) -> Any:
            raise BufferError("not today")

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    for wrong in (object(), "text", None, Broken()):
        expected = f"x: got {type(wrong).__name__}, expected an array on the CPU (NumPy, or with __dlpack__)"
        with pytest.raises(TypeError, match=f"^{re.escape(expected)}$"):
            as_numpy(wrong, "x")


@pytest.mark.crosscheck
def test_an_array_on_a_device_says_so() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"^x: got Tensor, expected an array that NumPy can read: .*meta"):
        as_numpy(torch.zeros(3, device="meta"), "x")
