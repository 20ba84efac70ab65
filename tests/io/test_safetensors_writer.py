"""Writing safetensors files: alignment, and that others read them."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import ktmoe_np.io.safetensors.writer
from ktmoe_np.io import SafetensorsFile
from ktmoe_np.io.safetensors.writer import write_safetensors


def test_writer_aligns(tmp_path: Path) -> None:
    tensors: dict[str, NDArray[Any]] = {
        "odd": np.arange(3, dtype=np.int8),
        "float": np.ones((5, 3), np.float32),
        "scalar": np.array(3.5),
        "matrix": np.arange(64, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(4, 16).T,
        "empty": np.empty((0, 4), np.float16),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    for name, array in tensors.items():
        assert file.tensor(name).flags.aligned
        np.testing.assert_array_equal(file.tensor(name), array)
    assert file.tensor("matrix").ctypes.data % 64 == 0
    with pytest.raises(TypeError, match="tensor 'x': got <U1, expected one of F64"):
        write_safetensors(tmp_path / "x.safetensors", {"x": np.array(["a"])})


def test_others_read_what_is_written(tmp_path: Path) -> None:
    numpy_reader = pytest.importorskip("safetensors.numpy")
    write_safetensors(tmp_path / "x.safetensors", {"b": np.arange(5.0), "a": np.ones((2, 8), np.float32)})
    read = numpy_reader.load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(read["b"], np.arange(5.0))
    np.testing.assert_array_equal(read["a"], np.ones((2, 8)))


def test_example() -> None:
    assert doctest.testmod(ktmoe_np.io.safetensors.writer).failed == 0
