"""Experts that cannot be written: what came and what was expected, and nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from expert_slices import ENCODINGS, draw_experts, empty_buffers, write
from gguf_blocks import GGUF_BLOCKS
from layers import bf16

from ktmoe_np import KTMoEWrapper

BY_NAME = {str(encoding): encoding for encoding in ENCODINGS}
ABSENT = dict.fromkeys(("w13_weights", "w13_scales", "w2_weights", "w2_scales"))
WEIGHTS = ("w13_weights", "w2_weights")

Buffers = dict[str, Any]


def assert_refused(
    name: str,
    change: Callable[[Buffers], Any],
    kind: type[Exception],
    message: str,
    *,
    num: Any = 2,
    expert: Any = 1,
    sizes: tuple[int, int] | None = None,
    whole: int | None = None,
) -> None:
    """With the buffers changed nothing is written, and the layer goes on.

    The buffers are those of `whole` slices, where there are not `num` of them.
    """
    experts = draw_experts(BY_NAME[name], sizes=sizes)
    moe, expected = experts.wrapper(), experts.slices(whole or num, 1)
    buffers = empty_buffers(expected)
    before = {argument: [array.copy() for array in arrays] for argument, arrays in buffers.items()}
    given = {**ABSENT, **buffers}
    change(given)
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        moe.submit_write_weight_scale_to_buffer(num, expert, **given)
    with pytest.raises(RuntimeError, match="no pass of layer 0 is pending"):
        moe.sync_write_weight_scale_to_buffer()
    for argument, arrays in before.items():
        assert all(np.array_equal(*pair) for pair in zip(arrays, buffers[argument], strict=True))
    write(moe, whole or num, 1, buffers)
    for argument, arrays in expected.items():
        for got, wanted in zip(buffers[argument], arrays, strict=True):
            assert np.ascontiguousarray(wanted).tobytes() == got.tobytes()


def keep(_: Buffers) -> None:
    """Change nothing."""


# ---- arguments ----


@pytest.mark.parametrize("num", [0, -1, 3, 8, 40, 2**62])
def test_slices_that_the_intermediate_size_does_not_have(num: int) -> None:
    message = f"gpu_tp_count: got {num}, expected a divisor of 20, the intermediate size"
    assert_refused("BF16", keep, ValueError, message, num=num, whole=2)


@pytest.mark.parametrize("expert", [-1, 3, 2**62])
def test_an_expert_that_is_not_there(expert: int) -> None:
    message = f"expert_id: got expert {expert}, expected 0 to 2"
    assert_refused("BF16", keep, IndexError, message, expert=expert)


@pytest.mark.parametrize("value", [None, "1", 1.0, True, [1]])
def test_what_is_no_integer(value: Any) -> None:
    for name, asked in (("gpu_tp_count", {"num": value}), ("expert_id", {"expert": value})):
        message = f"{name}: got {value!r}, expected an integer"
        assert_refused("BF16", keep, TypeError, message, whole=2, **asked)


@pytest.mark.parametrize(
    ("name", "format_name", "unit"),
    [
        ("FP8", "fp8", 128),
        ("MXFP8", "mxfp8", 32),
        ("RAWINT4", "rawint4_group32", 32),
        ("MXFP4", "mxfp4", 32),
        ("NVFP4", "nvfp4", 16),
        ("GPTQ_INT4", "q4_0", 32),
        ("INT4_ZP", "int4_zp_group32", 32),
        ("INT4_ZP-128", "int4_zp_group128", 128),
        ("MOE_INT8-32", "int8_group32", 32),
        ("AMXINT4-64", "int4_group64", 64),
        ("MOE_INT4-128", "int4_group128", 128),
        *((f"LLAMAFILE-{name}", name, block[0]) for name, block in GGUF_BLOCKS.items()),
    ],
)
def test_slices_that_cut_what_belongs_together(name: str, format_name: str, unit: int) -> None:
    encoding = BY_NAME[name]
    message = (
        f"gpu_tp_count: got 2, which cuts the intermediate size in slices of {unit // 2}, expected multiples "
        f"of {unit} with {format_name}"
    )
    assert_refused(name, keep, ValueError, message, sizes=(unit, encoding.sizes[1]), whole=1)


def test_the_rows_of_gate_and_up_are_not_cut_between_rows_that_share_scales() -> None:
    message = (
        "gpu_tp_count: got 4, which cuts the intermediate size in slices of 64, expected multiples of 128 "
        "with fp8"
    )
    assert_refused("FP8", keep, ValueError, message, num=4, sizes=(256, 96), whole=2)


def test_gate_and_up_in_different_formats() -> None:
    moe = KTMoEWrapper(0, 1, 1, 32, 32, method="LLAMAFILE")
    q4_0, q8_0 = (np.ones((1, 32, size), np.uint8) for size in (18, 34))
    moe.load_weights_from_tensors(q4_0, q8_0, q8_0, gate_format="Q4_0", up_format="Q8_0", down_format="Q8_0")
    message = "gate_proj: got q4_0, expected q8_0 as up_proj: both are written to one buffer"
    with pytest.raises(ValueError, match=f"^{message}$"):
        write(moe, 1, 0, {})


def test_down_may_be_of_another_format() -> None:
    moe = KTMoEWrapper(0, 1, 1, 32, 64, method="LLAMAFILE")
    first = np.ones((1, 64, 18), np.uint8)
    last = np.random.default_rng(0).integers(0, 256, (1, 32, 68), np.uint8)
    formats = {"gate_format": "Q4_0", "up_format": "Q4_0", "down_format": "Q8_0"}
    moe.load_weights_from_tensors(first, first, last, **formats)
    w13, w2 = np.zeros((2, 64, 18), np.uint8), np.zeros((2, 32, 34), np.uint8)
    write(moe, 2, 0, {"w13_weights": w13, "w2_weights": w2})
    assert w13.all()
    assert np.array_equal(np.concatenate(w2, axis=1), last[0])


# ---- buffers ----


@pytest.mark.parametrize("argument", ["w13_weights", "w13_scales", "w2_weights", "w2_scales"])
def test_no_sequence(argument: str) -> None:
    for num, plural in ((1, ""), (2, "s")):
        for value, kind in ((None, "NoneType"), (3, "int"), ({}, "dict"), (np.array(1), "ndarray")):
            message = f"{argument}: got {kind}, expected a list or tuple of {num} array{plural}"
            assert_refused("FP8", lambda b, v=value: b.update({argument: v}), TypeError, message, num=num)


@pytest.mark.parametrize("argument", WEIGHTS)
def test_another_number_of_arrays(argument: str) -> None:
    for change, got in ((lambda arrays: arrays[1:], 1), (lambda arrays: [*arrays, arrays[0]], 3)):
        message = f"{argument}: got {got}, expected a list or tuple of 2 arrays"
        assert_refused("BF16", lambda b, f=change: b.update({argument: f(b[argument])}), ValueError, message)


def replaced(argument: str, change: Callable[[Any], Any]) -> Callable[[Buffers], None]:
    """A change to the second array of an argument."""
    return lambda b: b.update({argument: [b[argument][0], change(b[argument][1])]})


@pytest.mark.parametrize("argument", WEIGHTS)
def test_what_is_no_array(argument: str) -> None:
    for value, kind in ((None, "NoneType"), ([1, 2], "list"), (np.array([{}]), "ndarray")):
        message = f"{argument}[1]: got {kind}, expected an array on the CPU (NumPy, or with __dlpack__)"
        assert_refused("BF16", replaced(argument, lambda _, v=value: v), TypeError, message)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("w13_weights", "512 rows of 150 bytes"),
        ("w13_scales", "4 rows of 8 bytes"),
        ("w2_weights", "150 rows of 256 bytes"),
        ("w2_scales", "2 rows of 8 bytes"),
    ],
)
@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda a: a[1:], "uint8 [{less}, {width}]"),
        (lambda a: a.T.copy(), "uint8 [{width}, {rows}]"),
        (lambda a: a.reshape(-1), "uint8 [{size}]"),
        (lambda a: np.zeros(a.shape, bf16), "bfloat16 [{rows}, {width}]"),
        (lambda a: np.zeros(a.shape, np.float32), "float32 [{rows}, {width}]"),
        (lambda a: np.zeros((), np.uint8), "uint8 []"),
    ],
    ids=["rows", "transposed", "flat", "bfloat16", "float32", "no axis"],
)
def test_another_size(argument: str, expected: str, change: Callable[[Any], Any], got: str) -> None:
    rows, width = int(expected.split()[0]), int(expected.split()[3])
    came = got.format(rows=rows, less=rows - 1, width=width, size=rows * width)
    message = f"{argument}[1]: got {came}, expected {expected}"
    assert_refused("FP8", replaced(argument, change), ValueError, message)


def test_gaps_and_another_order() -> None:
    for argument in WEIGHTS:
        rows, width = (20, 142) if argument == "w13_weights" else (71, 20)
        for change in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2], lambda a: a[::-1]):
            message = (
                f"{argument}[1]: got uint8 [{rows}, {width}] with gaps or in another order, "
                "expected it C-contiguous"
            )
            assert_refused("BF16", replaced(argument, change), TypeError, message)


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float8_e4m3fn"])
def test_arrays_that_cannot_be_written(dtype: str) -> None:
    def change(array: Any) -> Any:
        view = array.view(dtype)
        view.setflags(write=False)
        return view

    width = 142 if dtype != "bfloat16" else 71
    message = f"w13_weights[1]: got a read-only array {dtype} [20, {width}], expected one that can be written"
    assert_refused("BF16", replaced("w13_weights", change), ValueError, message)


def test_buffers_that_overlap() -> None:
    message = "w13_weights[1]: its memory overlaps that of w13_weights[0], expected memory of its own"
    assert_refused("BF16", lambda b: b.update(w13_weights=[b["w13_weights"][0]] * 2), ValueError, message)
    message = "w2_weights[0]: its memory overlaps that of w13_weights[1], expected memory of its own"

    def overlap(buffers: Buffers) -> None:
        flat = buffers["w13_weights"][1].reshape(-1)
        buffers["w2_weights"] = [flat[: 71 * 20].reshape(71, 20), buffers["w2_weights"][1]]

    assert_refused("BF16", overlap, ValueError, message)


# ---- scales that the method does not have ----


@pytest.mark.parametrize(
    ("name", "format_name"),
    [
        ("BF16", "bf16"),
        ("GPTQ_INT4", "q4_0"),
        ("INT4_ZP", "int4_zp_group32"),
        ("MOE_INT8-32", "int8_group32"),
        ("LLAMAFILE-q4_k", "q4_k"),
        ("LLAMAFILE-f16", "f16"),
    ],
)
def test_no_scales_outside_the_rows(name: str, format_name: str) -> None:
    for argument in ("w13_scales", "w2_scales"):
        message = f"{argument}: got some, expected None: {format_name} has no scales outside its rows"
        assert_refused(name, lambda b, a=argument: b.update({a: []}), ValueError, message)


@pytest.mark.parametrize(
    ("name", "format_name"),
    [
        ("BF16", "bf16"),
        ("FP8", "fp8"),
        ("FP8_PERCHANNEL", "fp8_perchannel"),
        ("MXFP4", "mxfp4"),
        ("AMXINT8", "int8"),
        ("MOE_INT4-32", "int4_group32"),
    ],
)
def test_no_scales_of_two_kinds(name: str, format_name: str) -> None:
    for argument in ("w13_global_scales", "w2_global_scales"):
        message = f"{argument}: got some, expected None: {format_name} has no scales of two kinds"
        assert_refused(name, lambda b, a=argument: b.update({a: []}), ValueError, message)


def test_nvfp4_must_have_both_kinds() -> None:
    for argument in ("w13_global_scales", "w2_global_scales", "w13_scales", "w2_scales"):
        message = f"{argument}: got NoneType, expected a list or tuple of 2 arrays"
        assert_refused("NVFP4", lambda b, a=argument: b.update({a: None}), TypeError, message)


# ---- order of calls ----


def test_nothing_loaded() -> None:
    experts = draw_experts(BY_NAME["BF16"])
    moe = KTMoEWrapper(5, 3, 2, *reversed(experts.encoding.sizes))
    message = "layer 5 has no weights, load them first"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        moe.submit_write_weight_scale_to_buffer(2, 0, None, None, None, None)
    experts.load_into(moe)
    write(moe, 2, 0, empty_buffers(experts.slices(2, 0)))


def test_submit_twice_and_sync_without_submit() -> None:
    experts = draw_experts(BY_NAME["BF16"])
    moe, name = experts.wrapper(), "write_weight_scale_to_buffer"
    message = f"sync_{name}: no pass of layer 0 is pending, call submit_{name} first"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        moe.sync_write_weight_scale_to_buffer()
    expected = experts.slices(2, 0)
    buffers, others = empty_buffers(expected), empty_buffers(expected)
    moe.submit_write_weight_scale_to_buffer(2, 0, **{**ABSENT, **buffers})
    twice = f"submit_{name}: a pass of layer 0 is pending, call sync_{name} first"
    before = [array.copy() for array in others["w2_weights"]]
    with pytest.raises(RuntimeError, match=f"^{twice}$"):
        moe.submit_write_weight_scale_to_buffer(2, 0, **{**ABSENT, **others})
    moe.sync_write_weight_scale_to_buffer()
    assert np.array_equal(buffers["w2_weights"][1], expected["w2_weights"][1])
    assert all(np.array_equal(*pair) for pair in zip(others["w2_weights"], before, strict=True))
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        moe.sync_write_weight_scale_to_buffer()
