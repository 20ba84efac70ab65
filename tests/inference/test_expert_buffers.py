"""Experts cut into buffers, one for each GPU: the bytes that NumPy cuts from what was loaded."""

from __future__ import annotations

import doctest
import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from expert_slices import ENCODINGS, Encoding, Experts, draw_experts, empty_buffers, write
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    STORAGES,
    Layer,
    assert_same_bits,
    batch_taking,
    bf16,
    draw_batch,
    draw_layer,
    low_level_moe,
)
from quantized_layers import METHODS as QUANTIZED
from quantized_layers import quantized_layer

import ktmoe_np.inference.base
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.cpuinfer import _MoEBase
from ktmoe_np.formats.methods import METHODS
from ktmoe_np.reference import Int8GroupMatrix, pack_int4, pack_int8

AnyArray = Any

every_encoding = pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
BF16 = ENCODINGS[0]
BY_NAME = {str(encoding): encoding for encoding in ENCODINGS}


def assert_written(buffers: dict[str, Any], expected: dict[str, Any], what: str = "") -> None:
    """The buffers hold these bytes."""
    for name, arrays in expected.items():
        for i, array in enumerate(arrays):
            got = np.ascontiguousarray(buffers[name][i]).reshape(len(array), -1).view(np.uint8)
            wanted = np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
            assert_same_bits(got, wanted, f"{name}[{i}] {what}")


def assert_writes(moe: Any, experts: Experts, counts: tuple[int, ...] = (1, 2, 4)) -> None:
    for num in counts:
        for expert in range(experts.sizes[0]):
            expected = experts.slices(num, expert)
            buffers = empty_buffers(expected)
            write(moe, num, expert, buffers)
            assert_written(buffers, expected, f"{experts.encoding}, expert {expert} for {num}")


def test_doctests() -> None:
    found = doctest.testmod(ktmoe_np.inference.base)
    assert found.attempted
    assert found.failed == 0


def test_every_method_is_among_the_encodings() -> None:
    known = {method.name for method in METHODS if method.mode == "inference"}
    assert {encoding.method for encoding in ENCODINGS} == known


@every_encoding
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_slices(encoding: Encoding, activation: str) -> None:
    experts = draw_experts(encoding, activation=activation)
    assert_writes(experts.wrapper(), experts)


@every_encoding
def test_experts_are_counted_after_the_map(encoding: Encoding) -> None:
    experts = draw_experts(encoding, physical_to_logical_map=np.array([2, 0, 2]))
    assert_writes(experts.wrapper(), experts, (2,))


def _two_apart(array: AnyArray) -> AnyArray:
    pairs = np.zeros((array.shape[0], 2 * array.shape[1], *array.shape[2:]), array.dtype)
    pairs[:, ::2] = array
    return pairs[:, ::2]


@every_encoding
def test_rows_that_lie_apart(encoding: Encoding) -> None:
    experts = draw_experts(encoding)
    moe = experts.wrapper(load=False)
    for how in ("list", "rows backwards", "experts backwards", "experts inside", "read-only"):
        experts.load_into(moe, STORAGES[how])
        assert_writes(moe, experts, (2,))
    experts.load_into(moe, _two_apart)
    assert_writes(moe, experts, (1, 2))


@given(
    st.sampled_from(ENCODINGS),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 70),
    st.sampled_from(["silu", "relu2"]),
    st.integers(0, 2**32 - 1),
)
def test_any_sizes(encoding: Encoding, num: int, units: int, hidden: int, activation: str, seed: int) -> None:
    whole = encoding.sizes[1] if encoding.gguf or encoding.is_converted else hidden
    sizes = num * units * encoding.unit, whole
    experts = draw_experts(encoding, activation=activation, num_experts=1, sizes=sizes, seed=seed)
    assert_writes(experts.wrapper(), experts, (num,))


@given(st.sampled_from([e for e in ENCODINGS if e.gguf is None and e.unit > 1]), st.integers(1, 300))
def test_one_slice_of_sizes_that_are_no_multiples(encoding: Encoding, inter_size: int) -> None:
    inter_size = -(-inter_size // encoding.unit) * encoding.unit if encoding.is_converted else inter_size
    experts = draw_experts(encoding, num_experts=1, sizes=(inter_size, encoding.sizes[1]))
    assert_writes(experts.wrapper(), experts, (1,))


def test_an_expert_that_takes_many_tasks() -> None:
    experts = draw_experts(BY_NAME["AMXINT4-32"], num_experts=2, sizes=(768, 1024))
    assert_writes(experts.wrapper(), experts, (1, 3, 8))


# ---- engines ----


@pytest.mark.parametrize("name", ["BF16", "FP8", "NVFP4", "MOE_INT8-32"])
def test_every_number_of_sub_pools(name: str, engines: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    experts = draw_experts(BY_NAME[name])
    for engine in engines:
        monkeypatch.setattr(_MoEBase, "_get_cpu_infer", lambda *_, made=engine: made)
        moe = experts.wrapper()
        assert moe.cpu_infer is engine
        assert_writes(moe, experts)


def test_the_task_of_the_extension(engines: list[Any]) -> None:
    layer = draw_layer(np.random.default_rng(0), 2, 6, 5)
    moe = low_level_moe(engines[0], layer, 1)
    w13, w2 = [np.zeros((6, 5), bf16) for _ in range(2)], [np.zeros((5, 3), bf16) for _ in range(2)]
    task = moe.write_expert_task(
        gpu_tp_count=2,
        expert_id=1,
        w13_weights=w13,
        w13_scales=None,
        w2_weights=w2,
        w2_scales=None,
        w13_global_scales=None,
        w2_global_scales=None,
    )
    assert not w2[0].any()  # made, not run
    engines[0].run(task)
    for i, rows in enumerate((slice(0, 3), slice(3, 6))):
        both = np.concatenate([layer.gate_proj[1, rows], layer.up_proj[1, rows]])
        assert_same_bits(w13[i], both)
        assert_same_bits(w2[i], layer.down_proj[1][:, rows])


def test_weights_of_another_format_in_the_meantime(engines: list[Any]) -> None:
    config = ext.moe.MOEConfig(1, 1, 32, 32, 7, engines[0].backend_)
    config.set_activation("relu2", False)
    moe = ext.moe.Llamafile_MOE(config)

    def load(name: str, row_bytes: int) -> None:
        rows = np.ones((1, 32, row_bytes), np.uint8)
        projection = ext.moe.Projection(rows, format=name)
        engines[0].run(moe.load_weights_task(projection, None, projection))

    load("q4_0", 18)
    buffers = [np.zeros((32, 18), np.uint8)], [np.zeros((32, 18), np.uint8)]
    first, second = (moe.write_expert_task(1, 0, buffers[0], None, buffers[1], None) for _ in range(2))
    load("q8_0", 34)
    message = "layer 7 was given weights of another format after the task was made"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        engines[0].run(first)
    assert not buffers[0][0].any()
    load("q4_0", 18)
    engines[0].run(second)
    assert buffers[0][0].all()


# ---- buffers ----


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (bf16, (6, 8)),
        (np.float16, (6, 2, 4)),
        (np.uint32, (6, 4)),
        (np.complex64, (6, 1, 2, 1)),
        (np.bool_, (6, 16)),
        (ml_dtypes.float8_e4m3fn, (6, 16)),
        (ml_dtypes.float8_e8m0fnu, (6, 4, 4)),
        (ml_dtypes.int4, (6, 16)),
        ("V8", (6, 2)),
    ],
)
def test_buffers_are_of_any_dtype_and_shape(dtype: Any, shape: tuple[int, ...]) -> None:
    experts = draw_experts(BF16, sizes=(6, 8))
    expected = experts.slices(2, 1)
    buffers = empty_buffers(expected)
    buffers["w13_weights"] = [np.zeros(shape, dtype) for _ in range(2)]
    write(experts.wrapper(), 2, 1, buffers)
    assert_written(buffers, expected)


def test_buffers_are_given_as_any_sequence() -> None:
    experts = draw_experts(BF16)
    moe, expected = experts.wrapper(), experts.slices(2, 0)
    for kind in (list, tuple, np.stack):
        buffers = {name: kind(arrays) for name, arrays in empty_buffers(expected).items()}
        write(moe, 2, 0, buffers)
        assert_written(buffers, expected)


def test_buffers_are_parts_of_others_and_nothing_beside_them_is_written() -> None:
    experts = draw_experts(BY_NAME["NVFP4"])
    expected = experts.slices(4, 2)
    memory, buffers, at = np.full(1 << 17, 77, np.uint8), {}, 1
    used = np.zeros(memory.shape, bool)
    for name, arrays in expected.items():
        buffers[name] = []
        for array in arrays:
            size = array.nbytes
            buffers[name].append(memory[at : at + size].reshape(len(array), -1))
            used[at : at + size] = True
            at += size + 3
    write(experts.wrapper(), 4, 2, buffers)
    assert_written(buffers, expected)
    assert (memory[~used] == 77).all()


def test_the_engine_holds_the_buffers() -> None:
    heavy = draw_layer(np.random.default_rng(1), 4, 64, 64)
    batch, busy = batch_taking(0.2, heavy, 2), heavy.wrapper(2)
    experts = draw_experts(BF16)
    moe, expected = experts.wrapper(), experts.slices(1, 0)
    buffers = empty_buffers(expected)
    w13, w2 = (buffers[name][0] for name in ("w13_weights", "w2_weights"))
    memory = weakref.ref(w2)
    busy.submit_forward(*batch)
    moe.submit_write_weight_scale_to_buffer(1, 0, [w13], None, [w2], None)
    del buffers, w2
    gc.collect()
    assert memory() is not None
    moe.sync_write_weight_scale_to_buffer()
    busy.sync_forward()
    assert_written({"w13_weights": [w13]}, {"w13_weights": expected["w13_weights"]})


def test_a_forward_pass_may_be_pending() -> None:
    layer = draw_layer(np.random.default_rng(2), 3, 24, 40)
    batch, moe = draw_batch(np.random.default_rng(3), layer, 9, 2), layer.wrapper(2)
    w13, w2 = np.zeros((1, 48, 40), bf16), np.zeros((1, 40, 24), bf16)
    moe.submit_forward(*batch)
    moe.submit_write_weight_scale_to_buffer(1, 2, w13, None, w2, None)
    assert_same_bits(moe.sync_forward(), layer.forward(batch))
    moe.sync_write_weight_scale_to_buffer()
    assert_same_bits(w2[0], layer.down_proj[2])


# ---- what the bytes are ----


@pytest.mark.parametrize(("method", "group_size"), QUANTIZED)
def test_what_was_quantized_is_written_as_it_is_packed(method: str, group_size: int | None) -> None:
    layer = draw_layer(np.random.default_rng(4), 2, 256, 40)
    moe = layer.wrapper(1, method=method, group_size=group_size)
    matrices = quantized_layer(layer, method, group_size)
    pack = pack_int4 if "INT4" in method else pack_int8
    gate, up, down = (pack(matrix) for matrix in matrices.matrices)
    expected = {"w13_weights": [np.concatenate([gate[1], up[1]])], "w2_weights": [down[1]]}
    if not isinstance(matrices.down_proj, Int8GroupMatrix):
        first = np.concatenate([matrices.gate_proj.channel_scale[1], matrices.up_proj.channel_scale[1]])
        expected |= {"w13_scales": [first], "w2_scales": [matrices.down_proj.channel_scale[1]]}
    buffers = empty_buffers(expected)
    write(moe, 1, 1, buffers)
    assert_written(buffers, expected)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_slices_put_together_are_the_layer(num: int, width: int, hidden: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer = draw_layer(rng, 3, num * width, hidden)
    moe, batch = layer.wrapper(2), draw_batch(rng, layer, 7, 2)
    gate, up, down = (np.zeros(matrix.shape, bf16) for matrix in layer.matrices)
    for e in range(3):
        w13, w2 = np.zeros((num, 2, width, hidden), bf16), np.zeros((num, hidden, width), bf16)
        write(moe, num, e, {"w13_weights": w13.reshape(num, 2 * width, hidden), "w2_weights": w2})
        gate[e], up[e] = w13.swapaxes(0, 1).reshape(2, -1, hidden)
        down[e] = np.concatenate(w2, axis=1)
    again = Layer(gate, up, down)
    assert_same_bits(again.forward(batch), moe.forward(*batch))
