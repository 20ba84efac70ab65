"""The one check of arrays, and the one way to tell which library an array is of."""

from __future__ import annotations

import doctest
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import ktmoe_np.arrays.spec
from ktmoe_np.arrays.checks import expert_arrays
from ktmoe_np.arrays.library import find_library, is_of, library_of
from ktmoe_np.arrays.spec import ArraySpec
from ktmoe_np.arrays.summary import array_summary, arrays_summary

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
UINT8, INT32 = np.dtype(np.uint8), np.dtype(np.int32)


def arrays_of(library: str) -> Any:
    """float32 zeros of a shape, of a library."""
    if library == "NumPy":
        return lambda *shape: np.zeros(shape, np.float32)
    if library == "torch":
        torch = pytest.importorskip("torch")
        return lambda *shape: torch.zeros(shape)
    jnp = pytest.importorskip("jax.numpy")
    return lambda *shape: jnp.zeros(shape)


LIBRARIES = (
    "NumPy",
    pytest.param("torch", marks=pytest.mark.crosscheck),
    pytest.param("JAX", marks=pytest.mark.crosscheck),
)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_spec_takes_arrays_of_any_library(library: str) -> None:
    make = arrays_of(library)
    spec = ArraySpec((FLOAT32, BFLOAT16), ("T", 8))
    assert spec.fits(make(3, 8))
    spec.check("x", make(0, 8))
    with pytest.raises(ValueError, match=r"^x: got float32 \[3, 4\], expected float32 or bfloat16 \[T, 8\]$"):
        spec.check("x", make(3, 4))
    with pytest.raises(TypeError, match=r"^x: got float32 \[3, 8\], expected bfloat16 \[3, 8\]$"):
        ArraySpec((BFLOAT16,), (3, 8)).check("x", make(3, 8))


def test_another_dtype_comes_before_another_shape() -> None:
    with pytest.raises(
        TypeError, match=r"^x: got int64 \[2\] for expert 3, expected float32 \[1\] on a GPU$"
    ):
        ArraySpec((FLOAT32,), (1,)).check("x", np.zeros(2, np.int64), of=" for expert 3", where=" on a GPU")


def test_the_byte_order_counts() -> None:
    assert not ArraySpec((FLOAT32,), (2,)).fits(np.zeros(2, ">f4"))


@pytest.mark.parametrize(
    ("expected", "right", "wrong"),
    [
        ((), [()], [(1,)]),
        ((2,), [(2,)], [(), (3,), (2, 1), (1, 2)]),
        (("T", 4), [(0, 4), (9, 4)], [(4,), (9, 5), (1, 9, 4)]),
        (("...", 4), [(4,), (9, 4), (2, 9, 4)], [(), (4, 5), (2, 9)]),
        (("...", 3, 4), [(3, 4), (5, 3, 4)], [(4,), (), (3, 5), (4, 3)]),
    ],
)
def test_shapes(expected: tuple[int | str, ...], right: list[Any], wrong: list[Any]) -> None:
    spec = ArraySpec((), expected)
    for shape in right:
        spec.check("x", np.empty(shape))
    for shape in wrong:
        with pytest.raises(ValueError, match=r"^x: got shape \[.*\], expected \[.*\]$"):
            spec.check("x", np.empty(shape))


def test_dtypes_may_have_a_name_of_their_own() -> None:
    spec = ArraySpec((np.dtype(np.int32), np.dtype(np.int64)), ("T", "P"), "integers")
    assert str(spec) == "integers [T, P]"
    with pytest.raises(TypeError, match=r"^ids: got float32 \[1, 2\], expected integers \[T, P\]$"):
        spec.check("ids", np.zeros((1, 2), np.float32))


def test_named_sizes_may_be_one_of_a_few() -> None:
    spec = ArraySpec((FLOAT32,), ("T", "G", 4), sizes={"G": (3, 1)})
    assert str(spec) == "float32 [T, G, 4] with G = 3 or 1"
    for num_groups in range(5):
        assert spec.fits(np.zeros((7, num_groups, 4), np.float32)) == (num_groups in (3, 1))
    message = "x: got float32 [7, 2, 4], expected float32 [T, G, 4] with G = 3 or 1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        spec.check("x", np.zeros((7, 2, 4), np.float32))


# ---- bytes ----

CODES = ArraySpec((UINT8, INT32), (2, 8), as_bytes=True)


def test_bytes_are_those_of_the_array_in_any_of_the_dtypes() -> None:
    numbers = np.arange(4, dtype=np.int32).reshape(2, 2)
    for array in (numbers, numbers.view(np.uint8)):
        found = CODES.checked("codes", array)
        assert (found.dtype, found.shape) == (UINT8, (2, 8))
        assert np.shares_memory(found, array)
        assert found.tobytes() == numbers.tobytes()
    rows_apart = np.zeros((4, 4), np.int32)[::2, :2]
    assert np.shares_memory(CODES.checked("codes", rows_apart), rows_apart)


def test_sizes_are_those_in_the_first_dtype() -> None:
    assert str(CODES) == "uint8 [2, 8]"
    spec = ArraySpec((INT32, UINT8), ("N", 2), as_bytes=True)
    assert str(spec) == "int32 [N, 2]"
    assert spec.fits(np.zeros((5, 8), np.uint8))
    assert not spec.fits(np.zeros((5, 2), np.uint8))


@pytest.mark.parametrize(
    ("array", "kind", "got"),
    [
        (np.zeros((2, 8), np.int8), TypeError, "int8 [2, 8]"),
        (np.zeros((2, 8), np.int32), ValueError, "int32 [2, 8]"),
        (np.zeros((8, 2), np.int32), ValueError, "int32 [8, 2]"),
        (np.zeros((2, 7), np.uint8), ValueError, "uint8 [2, 7]"),
        (np.zeros(8, np.uint8), ValueError, "uint8 [8]"),
        (np.zeros((), np.uint8), ValueError, "uint8 []"),
    ],
    ids=str,
)
def test_bytes_of_other_arrays(array: Any, kind: type[Exception], got: str) -> None:
    with pytest.raises(kind, match=f"^codes: got {re.escape(got)}, expected uint8 \\[2, 8\\]$"):
        CODES.checked("codes", array)


def test_bytes_of_an_axis_with_gaps() -> None:
    apart = np.zeros((2, 4), np.int32)[:, ::2]
    with pytest.raises(TypeError, match=r"^codes: got strides \[16, 8\], expected a contiguous last axis$"):
        CODES.checked("codes", apart)
    one_column = np.zeros((2, 4), np.int32)[:, ::4]
    assert ArraySpec((INT32,), (2, 1), as_bytes=True).checked("codes", one_column).shape == (2, 4)
    ArraySpec((UINT8, INT32), (2, 2)).checked("numbers", apart)  # not looked at as bytes


# ---- one array for all experts, or one for each ----


def test_arrays_of_experts() -> None:
    of_all = np.zeros((3, 2, 2), np.int32)
    spec = ArraySpec((UINT8, INT32), (3, 2, 8), as_bytes=True)
    found = expert_arrays("codes", of_all, spec)
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (UINT8, (3, 2, 8))
    assert [one.shape for one in expert_arrays("codes", list(of_all), spec)] == [(2, 8)] * 3


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (np.zeros((2, 8), np.float32), ValueError, "x: got float32 [2, 8], expected float32 [3, 8]"),
        ([np.zeros(8, np.float32)] * 2, ValueError, "x: got 2 arrays, expected 3"),
        (
            [np.zeros(8, np.float32)] * 2 + [np.zeros(7, np.float32)],
            ValueError,
            "x: got float32 [7], expected float32 [8]",
        ),
        ([np.zeros(8)] * 3, TypeError, "x: got float64 [8], expected float32 [8]"),
        (None, TypeError, "x: got NoneType, expected an array on the CPU (NumPy, or with __dlpack__)"),
    ],
    ids=["rows", "number", "one shape", "dtype", "no array"],
)
def test_other_arrays_of_experts(source: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        expert_arrays("x", source, ArraySpec((FLOAT32,), (3, 8)))


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.arrays.spec).failed == 0


# ---- which library ----


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_library_of_an_array(library: str) -> None:
    array = arrays_of(library)(2)
    assert library_of(array, "x").name == library
    assert [name for name in ("NumPy", "torch", "JAX", "CuPy") if is_of(name, array)] == [library]
    made = library_of(array, "x").empty_like(array)
    assert is_of(library, made)
    assert array_summary(made).endswith("float32 [2]")


def test_a_subclass_is_of_its_library(tmp_path: Any) -> None:
    assert is_of("NumPy", np.memmap(tmp_path / "x", np.float32, "w+", shape=(2,)))


@pytest.mark.crosscheck
def test_a_traced_array_is_of_jax() -> None:
    jax = pytest.importorskip("jax")
    found = []
    jax.jit(lambda x: found.append(is_of("JAX", x)))(1.0)
    assert found == [True]


def test_other_objects_are_of_no_library() -> None:
    assert find_library([1.0]) is None
    with pytest.raises(TypeError, match=r"^x: got list, expected a NumPy, CuPy, JAX or torch array$"):
        library_of([1.0], "x")


def test_summaries() -> None:
    rows = np.zeros((2, 3), np.int8)
    assert array_summary(rows) == "int8 [2, 3]"
    assert (
        arrays_summary({"a": rows, "b": [rows, rows], "c": None, "d": []})
        == "a int8 [2, 3], b 2 x int8 [2, 3], d empty"
    )
