"""Writing safetensors files: alignment, and that others read them."""

from __future__ import annotations

import doctest
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import ktmoe_np.io.writer
from ktmoe_np.io import SafetensorsFile
from ktmoe_np.io.writer import remove_leftovers, replacing, write_safetensors


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


def write_half(path: Path) -> None:
    with replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path, link = tmp_path / "x.safetensors", tmp_path / "link"
    write_safetensors(path, {"a": np.arange(5)})
    mapped = SafetensorsFile(path).tensor("a")
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    np.testing.assert_array_equal(SafetensorsFile(path).tensor("a"), np.arange(5))
    link.symlink_to(path)
    write_safetensors(link, {"a": np.zeros(3)})
    np.testing.assert_array_equal(SafetensorsFile(path).tensor("a"), np.zeros(3))
    np.testing.assert_array_equal(mapped, np.arange(5))
    assert sorted(tmp_path.iterdir()) == [link, path]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_safetensors(tmp_path / "nowhere" / "x", {})


def test_leftovers_of_others_are_removed_when_they_are_gone(tmp_path: Path) -> None:
    for name in (".x.4194305.part", ".x.99999999999999999999999.part"):  # no such process
        (tmp_path / name).write_bytes(b"")
    kept = {".x.1.part", ".x.part", f".x.{os.getpid()}.part", "x.4194305.part"}
    for name in kept:
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_example() -> None:
    assert doctest.testmod(ktmoe_np.io.writer).failed == 0
