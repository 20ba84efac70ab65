"""The safetensors reader: what it reads, that it copies nothing, and that no file can fool it."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import header_bytes, write_checkpoint, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import ktmoe_np.io.safetensors.checkpoint
from ktmoe_np.io import SafetensorsFile

AnyArray = NDArray[Any]
fuzz = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


def test_doctests() -> None:
    assert (
        doctest.testmod(
            ktmoe_np.io.safetensors.checkpoint, optionflags=doctest.IGNORE_EXCEPTION_DETAIL
        ).failed
        == 0
    )


def same_bytes(a: AnyArray, b: AnyArray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_every_dtype_and_shape(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    dtype = np.dtype(DTYPES[name])
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 2 if name == "BOOL" else 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    entry = {"dtype": name, "shape": list(shape), "data_offsets": [0, raw.size]}
    (tmp_path / "x.safetensors").write_bytes(header_bytes({"a": entry}) + raw.tobytes())
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert same_bytes(file.tensor("a"), raw.view(dtype).reshape(shape))
    assert not file.tensor("a").flags.writeable
    assert file.info("a") == (name, shape, 0, raw.size)


def test_files_of_the_safetensors_package(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    tensors: dict[str, AnyArray] = {f"t{i}": rng.standard_normal((i, 3)).astype(np.float32) for i in range(5)}
    tensors |= {"b": rng.standard_normal((2, 5)).astype(ml_dtypes.bfloat16), "i": np.arange(3)}
    package.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.names()) == set(tensors)
    assert file.metadata == {"format": "np"}
    assert all(same_bytes(file.tensor(name), array) for name, array in tensors.items())


def test_files_written_here_are_read_by_the_safetensors_package(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors")
    write_checkpoint(tmp_path, "qwen3_moe", [0], 2, 3, 5)
    with package.safe_open(tmp_path / "model.safetensors", "np") as theirs:
        ours = SafetensorsFile(tmp_path / "model.safetensors")
        assert set(theirs.keys()) == set(ours.names())
        name = "model.layers.0.router.weight"
        assert same_bytes(theirs.get_tensor(name), ours.tensor(name))


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.ones(4, np.float32)})
    file = SafetensorsFile(path)
    tensor = file.tensor("a")
    assert not tensor.flags.owndata
    assert np.shares_memory(tensor, file.tensor("a"))
    assert not np.shares_memory(tensor, file.tensor("b"))
    with path.open("r+b") as raw:
        raw.seek(path.stat().st_size - 16 - 12)
        raw.write(np.int16(77).tobytes())
    assert tensor[0, 0] == 77


def test_tensors_outlive_the_file_object(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.arange(100_000)})
    tensor = SafetensorsFile(path).tensor("a")
    path.unlink()
    assert tensor.sum() == 99_999 * 50_000


def test_a_tensor_may_be_misaligned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.zeros(1, np.uint8), "b": np.arange(5, dtype=np.int32)})
    tensor = SafetensorsFile(path).tensor("b")
    assert not tensor.flags.aligned
    assert tensor.tolist() == [0, 1, 2, 3, 4]


def test_no_such_file_and_no_such_tensor(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        SafetensorsFile(tmp_path / "x.safetensors")
    write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(1)})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert "a" in file
    assert "b" not in file
    for read in (file.tensor, file.info):
        with pytest.raises(ValueError, match=r"x\.safetensors: no tensor 'b'"):
            read("b")


def test_a_dtype_that_numpy_has_not_is_an_error_of_its_tensor_alone(tmp_path: Path) -> None:
    entries = {
        "a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
    }
    (tmp_path / "x.safetensors").write_bytes(header_bytes(entries) + bytes([1, 2, 3, 4]))
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.tensor("b").tolist() == [3, 4]
    with pytest.raises(ValueError, match=r"tensor 'a': got dtype 'F4', expected one of F64, F32"):
        file.tensor("a")


def entry(**change: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **change}}


def without(key: str) -> dict[str, Any]:
    return {"a": {name: value for name, value in entry()["a"].items() if name != key}}


OTHER = {"dtype": "U8", "shape": [4], "data_offsets": [20, 24]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "the header: got list, expected a JSON object"),
        ("a", "the header: got str, expected a JSON object"),
        ({"a": 3}, "tensor 'a': got 3, expected dtype, shape and two data_offsets"),
        (without("dtype"), "tensor 'a': got .*, expected dtype, shape and two data_offsets"),
        (without("shape"), "tensor 'a': got .*, expected dtype, shape and two data_offsets"),
        (without("data_offsets"), "tensor 'a': got .*, expected dtype, shape and two data_offsets"),
        (entry(data_offsets=[0, 12, 24]), "tensor 'a': got .*, expected dtype, shape and two data_offsets"),
        (entry(dtype=7), "tensor 'a': got .*, expected dtype, shape and two data_offsets"),
        (entry(shape="23"), "tensor 'a': got .*, expected dtype, shape and two data_offsets"),
        (entry(shape=[-2, -3]), r"tensor 'a': got shape \[-2, -3\], expected numbers >= 0"),
        (entry(shape=[2, 3.0]), r"tensor 'a': got shape \[2, 3.0\], expected numbers >= 0"),
        (entry(shape=[2, 3, True]), r"tensor 'a': got shape \[2, 3, True\], expected numbers >= 0"),
        (entry(shape=[1] * 65), "tensor 'a': got 65 dimensions, expected at most 64"),
        (
            entry(shape=[0, 2**63], data_offsets=[0, 0]),
            "tensor 'a': got shape .*, expected one that an array",
        ),
        (entry(shape=[2**40] * 3), "tensor 'a': got shape .*, expected one that an array"),
        (entry(data_offsets=[24, 0]), r"tensor 'a': got data_offsets \[24, 0\], expected a range"),
        (entry(data_offsets=[-4, 20]), r"tensor 'a': got data_offsets \[-4, 20\], expected a range"),
        (entry(data_offsets=[0.0, 24.0]), "tensor 'a': got data_offsets .*, expected a range"),
        (entry(data_offsets=[1, 25]), "tensor 'a': got bytes 1 to 25, expected them in the 24 that follow"),
        (
            entry(data_offsets=[2**70, 2**70 + 24]),
            "tensor 'a': got bytes .*, expected them in the 24",
        ),
        (entry(data_offsets=[0, 20]), r"tensor 'a': got F32 of shape \[2, 3\], 24 bytes, expected 20, what"),
        (entry(dtype="BF16"), r"tensor 'a': got BF16 of shape \[2, 3\], 12 bytes, expected 24, what"),
        ({**entry(), "b": OTHER}, "tensors 'a' and 'b' overlap"),
        ({**entry(), "__metadata__": {"a": 1}}, "__metadata__: got .*, expected an object of strings"),
        ({**entry(), "__metadata__": [1]}, "__metadata__: got .*, expected an object of strings"),
    ],
)
def test_lying_headers(tmp_path: Path, header: Any, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(header_bytes(header) + bytes(24))
    with pytest.raises(ValueError, match=r"x\.safetensors: " + message):
        SafetensorsFile(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are too short for a safetensors file"),
        (bytes(7), "7 bytes are too short for a safetensors file"),
        (bytes(8), "the header is not JSON"),
        (b"\x01" + bytes(7), "the header's length is given as 1 bytes, but the file has 0 left"),
        (b"\xff" * 8 + b"{}", "the header's length is given as 18446744073709551615 bytes"),
        (header_bytes({}).replace(b"{}", b"{]"), "the header is not JSON"),
        (header_bytes({}).replace(b"{}", b"\xff}"), "the header is not JSON"),
        ((400_000).to_bytes(8, "little") + b"[" * 400_000, "the header is not JSON"),
        ((9).to_bytes(8, "little") + b'{"a" :NaN', "the header is not JSON"),
        ((15).to_bytes(8, "little") + b'{"a": 1,"a": 2}', "the header is not JSON: key 'a' occurs twice"),
    ],
)
def test_files_that_are_none(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.safetensors: " + message):
        SafetensorsFile(tmp_path / "x.safetensors")


def read_all(path: Path) -> None:
    """Read a file of unknown content to its last byte; ValueError is the one exception allowed."""
    try:
        file = SafetensorsFile(path)
        arrays = [file.tensor(name) for name in file.names()]
    except ValueError as error:
        if str(path) not in str(error):
            raise
        return
    assert all(len(array.tobytes()) == array.nbytes for array in arrays)


number = st.integers(-5, 40) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30, 2.5, True, None, "4"])
json_value = st.recursive(
    number | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner),
)
fuzzed_entry = json_value | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "X", "", 3]),
        "shape": st.lists(number, max_size=5) | json_value,
        "data_offsets": st.lists(number, min_size=2, max_size=2) | json_value,
    }
)


@given(st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), fuzzed_entry), st.integers(0, 40))
@fuzz
def test_fuzzed_headers(tmp_path: Path, header: Any, num_bytes: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(header_bytes(header) + bytes(num_bytes))
    read_all(tmp_path / "x.safetensors")


@given(st.data())
@fuzz
def test_damaged_files(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.arange(5, dtype=np.int32), "b": np.ones((2, 3), np.float16)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_all(path)
