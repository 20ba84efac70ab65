"""The extension quantizes to the bytes of the reference, and refuses what it cannot."""

from __future__ import annotations

import doctest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import bf16, engine_of, run_python

from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.formats.quantized import FORMATS
from ktmoe_np.reference import Int4Matrix, pack_int4, pack_int8, quantize_int4, quantize_int8

pytestmark = pytest.mark.kernels

AnyArray = Any
Arrays = dict[str, Any]

LARGEST = 2.0**128 - 2.0**120
SEEDS = st.integers(0, 2**32 - 1)
COLUMNS = st.one_of(st.integers(1, 200), st.sampled_from([512, 704, 2047]))
#: Powers of two by which weights are scaled: denormal numbers up to the largest.
POWERS = st.integers(-140, 127)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    made = ext.CPUInfer(2)
    yield made
    made.shutdown()


def draw(seed: int, *shape: int, power: int = 0, dtype: Any = bf16) -> AnyArray:
    """Weights of four kinds by row: normal, zeros, a power of two times nibbles, mostly zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    values[1::4] = 0
    values[2::4] = rng.integers(-8, 8, values[2::4].shape) / 4
    values[3::4] *= rng.random(values[3::4].shape) < 0.05
    return np.clip(np.ldexp(values, power), -LARGEST, LARGEST).astype(np.float32).astype(dtype)


def reference(format: str, weights: AnyArray) -> tuple[AnyArray, AnyArray | None]:
    """The bytes of the rows, and their scales."""
    kind, _, group = format.partition("_group")
    if kind == "int4":
        matrix: Int4Matrix = quantize_int4(weights, group_size=int(group))
        return pack_int4(matrix), matrix.channel_scale
    if group:
        return pack_int8(quantize_int8(weights, group_size=int(group))), None
    rows = quantize_int8(weights)
    return pack_int8(rows), rows.channel_scale


def arrays_for(format: str, weights: AnyArray) -> Arrays:
    """What `quantize_task` takes for a matrix."""
    num_rows, num_columns = weights.shape
    codes = np.full((num_rows, ext.quantized_row_bytes(format, num_columns)), 0xA5, np.uint8)
    channel_scale = None if format == "int8_group32" else np.full(num_rows, np.nan, np.float32)
    return {"format": format, "weights": weights, "codes": codes, "channel_scale": channel_scale}


def assert_is_reference(engine: Any, format: str, weights: AnyArray) -> None:
    a = arrays_for(format, weights)
    engine.run(ext.quantize_task(**a, pool=engine.backend_))
    codes, channel_scale = reference(format, weights)
    np.testing.assert_array_equal(a["codes"], codes)
    if channel_scale is None:
        assert a["channel_scale"] is None
    else:
        np.testing.assert_array_equal(a["channel_scale"].view(np.uint32), channel_scale.view(np.uint32))


def test_doctests() -> None:
    finder = doctest.DocTestFinder()
    for function in (ext.quantize_task, ext.quantized_row_bytes):
        (example,) = finder.find(function, function.__name__, module=False, globs={})
        assert example.examples
        assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("format", FORMATS)
@given(seed=SEEDS, K=COLUMNS, N=st.integers(1, 6), power=POWERS, dtype=st.sampled_from([bf16, np.float32]))
def test_bytes_are_those_of_the_reference(
    engine: Any, format: str, seed: int, K: int, N: int, power: int, dtype: Any
) -> None:
    assert_is_reference(engine, format, draw(seed, N, K, power=power, dtype=dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
def test_empty_matrices(engine: Any, format: str, shape: tuple[int, int]) -> None:
    assert_is_reference(engine, format, np.ones(shape, bf16))


@pytest.mark.parametrize("format", FORMATS)
def test_rows_may_lie_anyhow(engine: Any, format: str) -> None:
    for dtype in (bf16, np.dtype(np.float32)):
        plain = draw(0, 8, 101, dtype=dtype)
        apart = np.full((8, 250), np.nan, dtype)[:, 7:108]
        apart[...] = plain
        memory = np.zeros(plain.nbytes + 1, np.uint8)
        odd = memory[1:].view(dtype).reshape(8, 101)
        odd[...] = plain
        for weights in (
            apart,
            odd,
            plain[::-1],
            plain[::2],
            np.broadcast_to(plain[0], (5, 101)),
            plain.T[:1],
        ):
            if weights.shape[1] > 1 and weights.strides[1] == dtype.itemsize:
                assert_is_reference(engine, format, weights)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("threads", [(1,), (3,), (1, 2)])
def test_threads_change_no_bit(format: str, threads: tuple[int, ...]) -> None:
    pool_engine = engine_of(*threads)
    try:
        assert_is_reference(pool_engine, format, draw(1, 150, 1000))
    finally:
        pool_engine.shutdown()


@pytest.mark.parametrize("isa", ext.isa_info()["supported"])
def test_instruction_sets_change_no_bit(isa: str) -> None:
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_quantize_engine import FORMATS, assert_is_reference, draw, ext

        engine = ext.CPUInfer(1)
        for format in FORMATS:
            for K in (33, 300):
                assert_is_reference(engine, format, draw(K, 8, K))
        print(ext.isa_info()["active"])
    """
    result = run_python(script, env={"KTMOE_ISA": isa})
    assert result.stdout.strip() == isa, result.stderr


def test_the_arrays_live_as_long_as_the_task(engine: Any) -> None:
    weights = draw(2, 64, 512)
    a = arrays_for("int8", weights.copy())
    codes, channel_scale = a["codes"], a["channel_scale"]
    task = ext.quantize_task(**a, pool=engine.backend_)
    del a
    engine.submit(task)
    engine.sync()
    expected = reference("int8", weights)
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(channel_scale, expected[1])


# ---- refusals ----


@pytest.mark.parametrize("dtype", [bf16, np.dtype(np.float32)])
@pytest.mark.parametrize(("value", "what"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_the_first_row_that_is_not_finite(
    engine: Any, format: str, value: float, what: str, dtype: Any
) -> None:
    weights = draw(3, 40, 99, dtype=dtype)
    weights[17, 98] = weights[30, 0] = value
    a = arrays_for(format, weights)
    engine.submit(ext.quantize_task(**a, pool=engine.backend_))
    with pytest.raises(ValueError, match=rf"^weights: row 17: got {what}, expected finite weights$"):
        engine.sync()
    assert (a["codes"][17] == 0xA5).all()
    if a["channel_scale"] is not None:
        assert np.isnan(a["channel_scale"][17])
    assert_is_reference(engine, format, draw(3, 4, 99, dtype=dtype))  # the engine stays usable


def read_only(array: AnyArray) -> AnyArray:
    copy = array.copy()
    copy.setflags(write=False)
    return copy


N, K = 3, 40
NAMES = ", ".join(FORMATS)
Change = Callable[[Arrays], Arrays]
#: Changes to the arguments for an int8 matrix, and what is raised.
REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    "format": (
        lambda a: {"format": "int4"},
        ValueError,
        rf"^format: got 'int4', expected one of {NAMES}$",
    ),
    "weights, a list": (
        lambda a: {"weights": [[1.0]]},
        TypeError,
        "^weights: got list, expected an array on the CPU",
    ),
    "weights, None": (lambda a: {"weights": None}, TypeError, "^weights: got NoneType, expected an array"),
    "weights, float64": (
        lambda a: {"weights": a["weights"].astype(np.float64)},
        TypeError,
        rf"^weights: got float64 \[{N}, {K}\], expected bfloat16 or float32 \[N, K\]$",
    ),
    "weights, three axes": (
        lambda a: {"weights": a["weights"][None]},
        ValueError,
        rf"^weights: got bfloat16 \[1, {N}, {K}\], expected bfloat16 or float32 \[N, K\]$",
    ),
    "weights, strided columns": (
        lambda a: {"weights": np.repeat(a["weights"], 2, axis=1)[:, ::2]},
        TypeError,
        r"^weights: got strides \[.*\], expected a contiguous last axis$",
    ),
    "weights, too many rows": (
        lambda a: {"weights": np.broadcast_to(np.ones((1, 1), np.float32), (2**31, 1))},
        ValueError,
        r"^weights: got \[2147483648, 1\], expected at most 2147483647 rows and columns$",
    ),
    "codes, int8": (
        lambda a: {"codes": a["codes"].view(np.int8)},
        TypeError,
        rf"^codes: got int8 \[{N}, {K}\], expected uint8 \[{N}, {K}\]$",
    ),
    "codes, bool": (
        lambda a: {"codes": a["codes"].astype(bool)},
        TypeError,
        rf"^codes: got bool \[{N}, {K}\], expected uint8 \[{N}, {K}\]$",
    ),
    "codes, rows": (
        lambda a: {"codes": a["codes"][:2]},
        ValueError,
        rf"^codes: got uint8 \[2, {K}\], expected uint8 \[{N}, {K}\]$",
    ),
    "codes, bytes of another format": (
        lambda a: {"format": "int4_group32"},
        ValueError,
        rf"^codes: got uint8 \[{N}, {K}\], expected uint8 \[{N}, 22\]$",
    ),
    "codes, gaps": (
        lambda a: {"codes": np.repeat(a["codes"], 2, axis=0)[::2]},
        TypeError,
        rf"^codes: got uint8 \[{N}, {K}\] with gaps or in another order, expected it C-contiguous$",
    ),
    "codes, read-only": (
        lambda a: {"codes": read_only(a["codes"])},
        ValueError,
        rf"^codes: got a read-only array uint8 \[{N}, {K}\], expected one that can be written$",
    ),
    "codes over weights": (
        lambda a: {"codes": a["weights"].view(np.uint8).reshape(-1)[5 : 5 + N * K].reshape(N, K)},
        ValueError,
        "^codes: its memory overlaps that of weights, expected memory of its own$",
    ),
    "channel_scale, None": (
        lambda a: {"channel_scale": None},
        ValueError,
        rf"^channel_scale: got None, expected float32 \[{N}\] for int8$",
    ),
    "channel_scale, one too many": (
        lambda a: {"format": "int8_group32", "codes": np.empty((N, K + 8), np.uint8)},
        ValueError,
        "^channel_scale: got one, expected None: rows of int8_group32 contain their scales$",
    ),
    "channel_scale, float64": (
        lambda a: {"channel_scale": a["channel_scale"].astype(np.float64)},
        TypeError,
        rf"^channel_scale: got float64 \[{N}\], expected float32 \[{N}\]$",
    ),
    "channel_scale, length": (
        lambda a: {"channel_scale": a["channel_scale"][1:]},
        ValueError,
        rf"^channel_scale: got float32 \[{N - 1}\], expected float32 \[{N}\]$",
    ),
    "channel_scale, gaps": (
        lambda a: {"channel_scale": np.repeat(a["channel_scale"], 2)[::2]},
        TypeError,
        rf"^channel_scale: got float32 \[{N}\] with gaps or in another order, expected it C-contiguous$",
    ),
    "channel_scale, read-only": (
        lambda a: {"channel_scale": read_only(a["channel_scale"])},
        ValueError,
        rf"^channel_scale: got a read-only array float32 \[{N}\], expected one that can be written$",
    ),
    "channel_scale over codes": (
        lambda a: {"channel_scale": a["codes"].reshape(-1).view(np.float32)[:N]},
        ValueError,
        "^channel_scale: its memory overlaps that of codes, expected memory of its own$",
    ),
    "channel_scale over weights": (
        lambda a: {"channel_scale": a["weights"].view(np.float32).reshape(-1)[:N]},
        ValueError,
        "^channel_scale: its memory overlaps that of weights, expected memory of its own$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(engine: Any, case: str) -> None:
    change, error, message = REFUSED[case]
    a = arrays_for("int8", draw(4, N, K))
    kept = {name: np.copy(value) for name, value in a.items() if name != "format"}
    with pytest.raises(error, match=message):
        ext.quantize_task(**{**a, **change(a)}, pool=engine.backend_)
    for name, value in kept.items():
        np.testing.assert_array_equal(a[name], value)


def test_a_pool_is_needed(engine: Any) -> None:
    a = arrays_for("int8", draw(5, N, K))
    for options in ({}, {"pool": None}, {"pool": engine}):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            ext.quantize_task(**a, **options)


def test_row_bytes() -> None:
    sizes = [ext.quantized_row_bytes(format, 77) for format in FORMATS]
    assert sizes == [77, 77 + 12, 39 + 3, 39 + 2, 39 + 1] == [fmt.row_bytes(77) for fmt in FORMATS.values()]
    with pytest.raises(ValueError, match=rf"^format: got 'bf16', expected one of {NAMES}$"):
        ext.quantized_row_bytes("bf16", 1)
    for k in (-1, 2**31):
        with pytest.raises(ValueError, match=rf"^k: got {k}, expected 0 to 2147483647$"):
            ext.quantized_row_bytes("int8", k)
