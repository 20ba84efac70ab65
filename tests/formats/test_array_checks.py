"""The one check of arrays, and the one way to tell which library an array is of."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ktmoe_np.arrays.library import find_library, is_of, library_of
from ktmoe_np.arrays.spec import ArraySpec
from ktmoe_np.arrays.summary import array_summary, arrays_summary

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


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
