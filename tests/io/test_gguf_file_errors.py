"""A GGUF file that is not what it should be is a ValueError that names it, whatever its bytes are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from struct import pack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf")

from gguf_checkpoints import LAYER, config_of, draw_layer, raw, raw_key, raw_string, raw_tensor, write

from ktmoe_np.io.gguf import values as _gguf_values
from ktmoe_np.io.gguf.experts import GgufCheckpoint, gguf_config, gguf_layers, load_gguf

E, I, H = 3, 32, 64  # noqa: E741

F32 = raw_tensor(b"a", (2,))
U32 = pack("<I", 1)
HUGE = 2**60

WRONG_FILES: list[tuple[bytes, str]] = [
    (b"", "0 bytes are too short for a GGUF file"),
    (b"GGUF" + bytes(19), "23 bytes are too short for a GGUF file"),
    (raw(magic=b"GGML"), r"the magic number: got b'GGML', expected b'GGUF': not a GGUF file"),
    (raw(version=3 << 24), "a big-endian GGUF file; only little-endian ones are read"),
    (raw(version=0), "the version of GGUF: got 0, expected 2 or 3"),
    (raw(version=1), "the version of GGUF: got 1, expected 2 or 3"),
    (raw(version=4), "the version of GGUF: got 4, expected 2 or 3"),
    # More than there is
    (raw(counts=(HUGE, 0)), rf"0 keys and {HUGE} tensors needs {24 * HUGE} bytes, but the header has 8 left"),
    (raw(counts=(0, HUGE)), rf"{HUGE} keys and 0 tensors needs {13 * HUGE} bytes, but the header has 8 left"),
    (
        raw([raw_string(b"key", HUGE) + bytes(8)]),
        f"key 0 of the metadata: got {HUGE} bytes, expected at most",
    ),
    (raw([raw_string(b"key", 999) + bytes(8)]), "key 0 of the metadata needs 999 bytes, but the header has"),
    (raw([raw_key(b"k", 8, raw_string(b"", 999))]), "metadata 'k' needs 1007 bytes, but the header has"),
    (raw([raw_key(b"k", 8, raw_string(b"", HUGE))]), "metadata 'k' needs .* bytes, but the header has"),
    (
        raw([raw_key(b"k", 9, pack("<IQ", 8, HUGE))]),
        f"metadata 'k' needs {8 * HUGE} bytes, but the header has",
    ),
    (
        raw([raw_key(b"k", 9, pack("<IQ", 4, HUGE))]),
        f"metadata 'k' needs {4 * HUGE} bytes, but the header has",
    ),
    (
        raw([raw_key(b"k", 9, pack("<IQQQ", 8, 2, HUGE, 0))]),
        "metadata 'k' needs .* bytes, but the header has",
    ),
    (
        raw([], [raw_string(b"a", 999) + bytes(16)]),
        "the name of tensor 0 needs 999 bytes, but the header has",
    ),
    (
        raw([], [raw_string(b"a", 2**16) + bytes(16)]),
        "the name of tensor 0: got 65536 bytes, expected at most 65535",
    ),
    # What there cannot be
    (raw([raw_key(b"\xff\xff", 4, U32)]), "key 0 of the metadata is not UTF-8: .* byte 0xff"),
    (raw([raw_key(b"k", 4, U32)] * 2), "key 'k' occurs twice"),
    (
        raw([raw_key(b"k", 13, U32)]),
        "metadata 'k': got a value of type 13, expected numbers or strings",
    ),
    (
        raw([raw_key(b"k", 9, pack("<IQ", 9, 1))]),
        "metadata 'k': got elements of type 9, expected numbers or strings",
    ),
    (
        raw([raw_key(b"general.alignment", 0, b"\x20")]),
        "metadata 'general.alignment': got type 0, expected a uint32",
    ),
    (
        raw([raw_key(b"general.alignment", 9, pack("<IQ", 4, 0))]),
        "'general.alignment': got an array, expected a uint32",
    ),
    (raw([raw_key(b"general.alignment", 4, pack("<I", 0))]), "alignment': got 0, expected a power of two"),
    (raw([raw_key(b"general.alignment", 4, pack("<I", 24))]), "alignment': got 24, expected a power of two"),
    (raw([], [raw_tensor(b"\xff", (2,))]), "the name of tensor 0 is not UTF-8"),
    (raw([], [F32, F32], data=64), "tensor 'a' occurs twice"),
    (raw([], [raw_tensor(b"a", (1,) * 5)], data=64), "tensor 'a': got 5 dimensions, expected at most 4"),
    (
        raw([], [raw_tensor(b"a", (4, 0, 2))], data=64),
        r"tensor 'a': got shape \[2, 0, 4\], expected no dimension",
    ),
    (
        raw([], [raw_tensor(b"a", (48, 2), 2)], data=64),
        "'a': got q4_0 with rows of 48, expected a multiple of 32",
    ),
    (
        raw([], [raw_tensor(b"a", (), 12)], data=512),
        "'a': got q4_k with rows of 1, expected a multiple of 256",
    ),
    (raw([], [raw_tensor(b"a", (2,), 0, 8)], data=64), "tensor 'a': got offset 8, expected a multiple of 32"),
    # Outside of the file
    (
        raw([], [F32], data=7),
        "tensor 'a': got bytes 64 to 72, expected them in the 71 of the file: it is cut off",
    ),
    (
        raw([], [raw_tensor(b"a", (2,), 0, 64)], data=64),
        "'a': got bytes 128 to 136, expected them in the 128 of",
    ),
    (
        raw([], [raw_tensor(b"a", (2,), 0, 2**63)], data=8),
        f"got bytes {64 + 2**63} to {72 + 2**63}, expected them in the ",
    ),
    (
        raw([], [raw_tensor(b"a", (HUGE, HUGE, HUGE))], data=8),
        f"got bytes 96 to {96 + 4 * HUGE**3}, expected them in the ",
    ),
    (
        raw([], [raw_tensor(b"a", (7,), 99, 32)], data=32),
        "'a': got bytes 96 to 96, expected them in the 96 of the file",
    ),
    (
        raw([], [raw_tensor(b"a", (9,)), raw_tensor(b"b", (1,), 0, 32)], data=64),
        "tensors 'a' and 'b' overlap",
    ),
    (raw([], [raw_tensor(b"b", (1,)), raw_tensor(b"a", (1,))], data=64), "tensors 'a' and 'b' overlap"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_FILES, ids=[message for _, message in WRONG_FILES])
def test_wrong_files(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message) as raised:
        GgufCheckpoint(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_a_header_ends_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gguf_values, "MAX_HEADER_BYTES", 64)
    path = tmp_path / "model.gguf"
    path.write_bytes(raw([raw_key(b"k", 8, raw_string(b"x" * 40))], data=1000))
    with pytest.raises(ValueError, match="metadata 'k' needs 48 bytes, but the header has 27 left"):
        GgufCheckpoint(path)


def test_a_text_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw([raw_key(b"k", 8, raw_string(b"\xff"))]))
    with pytest.raises(ValueError, match=rf"{path}: metadata 'k' is not UTF-8"):
        GgufCheckpoint(path).metadata("k")


def test_tensors_that_are_not_there_or_not_known(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw([], [raw_tensor(b"a", (7,), 99)], data=32))
    checkpoint = GgufCheckpoint(path)
    for ask in (checkpoint.info, checkpoint.tensor, checkpoint.file_of):
        with pytest.raises(ValueError, match=rf"{path}: no tensor 'b'"):
            ask("b")
    with pytest.raises(
        ValueError, match=rf"{path}: tensor 'a': got type 99, expected one of f32, f16, q4_0, .*q1_0$"
    ):
        checkpoint.tensor("a")


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/x: no such file or directory"):
        GgufCheckpoint(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/x: no such file or directory"):
        GgufCheckpoint.shared(tmp_path / "x")
    (tmp_path / "directory.gguf").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}: no \*\.gguf file"):
        GgufCheckpoint(tmp_path)
    for name in ("b.gguf", "a-00001-of-00002.gguf", "a-00002-of-00002.gguf"):
        (tmp_path / name).write_bytes(raw())
    message = "got the files of 2 GGUF models, expected those of one: a-00001-of-00002.gguf, b.gguf"
    with pytest.raises(ValueError, match=rf"{tmp_path}: {message}"):
        GgufCheckpoint(tmp_path)


def split_key(name: str, value: int) -> bytes:
    return raw_key(f"split.{name}".encode(), 4, pack("<I", value))


SPLIT: list[tuple[Mapping[str, bytes], type[Exception], str]] = [
    (
        {"1-of-00002": raw()},
        FileNotFoundError,
        r"m-00002-of-00002\.gguf: no such file, but m-00001-of-00002\.gguf is one of 2",
    ),
    ({"3-of-00002": raw()}, ValueError, r"m-00003-of-00002\.gguf: a name for file 3 of 2"),
    (
        {"1-of-00001": raw([split_key("count", 3)])},
        ValueError,
        "metadata 'split.count': got 3, expected 1, by the file's name",
    ),
    (
        {"1-of-00002": raw(), "2-of-00002": raw([split_key("no", 0)])},
        ValueError,
        r"m-00002-of-00002\.gguf: metadata 'split.no': got 0, expected 1, by the file's name",
    ),
    (
        {"1-of-00002": raw([split_key("tensors.count", 2)]), "2-of-00002": raw([], [F32], data=8)},
        ValueError,
        r"m-00001-of-00002\.gguf: metadata 'split.tensors.count': got 2, expected 1, the tensors of 2 files",
    ),
    (
        {"1-of-00002": raw([], [F32], data=8), "2-of-00002": raw([], [F32], data=8)},
        ValueError,
        r"m-00002-of-00002\.gguf: tensor 'a' is in .*m-00001-of-00002\.gguf too",
    ),
]


@pytest.mark.parametrize(("files", "error", "message"), SPLIT)
def test_split_models(
    tmp_path: Path, files: Mapping[str, bytes], error: type[Exception], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / f"m-0000{name}.gguf").write_bytes(text)
    with pytest.raises(error, match=message):
        GgufCheckpoint(tmp_path)


def test_a_file_of_several_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(raw([split_key("count", 3)]))
    with pytest.raises(ValueError, match=r"model\.gguf: metadata 'split\.count': got 3, expected 1"):
        GgufCheckpoint(tmp_path)


def ask(path: Path, request: Callable[[], Any]) -> Any:
    """The requested value, or None where a ValueError names the file."""
    try:
        return request()
    except ValueError as error:
        message = str(error)
    assert str(path) in message
    return None


def ask_everything(path: Path) -> None:
    """Read all there is of a file that may be rubbish."""
    checkpoint = ask(path, lambda: GgufCheckpoint(path))
    if checkpoint is None:
        return
    size = path.stat().st_size
    for name in checkpoint.names():
        info = checkpoint.info(name)
        assert 0 <= info.begin < size
        assert info.begin + info.num_bytes <= size
        if not info.type.startswith("type "):
            view = checkpoint.tensor(name)
            assert view.nbytes == info.num_bytes
            view.max()
    for key in checkpoint.metadata_keys():
        ask(path, lambda key=key: checkpoint.metadata(key))
    ask(path, lambda: gguf_config(checkpoint, LAYER))
    ask(path, lambda: gguf_layers(checkpoint))
    ask(path, lambda: load_gguf(checkpoint, LAYER, config_of(E, I, H)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A model with all that a header may have."""
    path = tmp_path_factory.mktemp("sound") / "model.gguf"
    sizes = {"expert_count": E, "expert_used_count": 2, "embedding_length": H, "feed_forward_length": [I] * 9}
    metadata = {f"x.{name}": value for name, value in sizes.items()}
    tokens = {"tokens": ["a", "bc", ""], "scores": [0.5, 1.0], "flag": True, "x.swiglu_clamp_exp": 7.0}
    layer = draw_layer("q8_0", E, I, H, bias="f32")
    write(path, layer.tensors, {**metadata, **tokens}, architecture="x", alignment=32)
    return path.read_bytes()


HEADER_BYTES = 850


def test_the_fuzzed_header_is_all_of_it(sound: bytes) -> None:
    assert HEADER_BYTES - 100 < sound.index(b"down_exps.bias") < HEADER_BYTES


NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2**8, 2**16, 2**31 - 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1)
).map(lambda number: pack("<I", number))
LENGTHS = st.sampled_from([0, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]).map(
    lambda number: pack("<Q", number)
)
PATCHES = st.tuples(
    st.integers(0, HEADER_BYTES), st.one_of(st.binary(min_size=1, max_size=4), NUMBERS, LENGTHS)
)


@given(st.lists(PATCHES, min_size=1, max_size=4))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_headers_with_other_bytes(sound: bytes, tmp_path: Path, patches: list[tuple[int, bytes]]) -> None:
    text = bytearray(sound)
    for place, patch in patches:
        text[place : place + len(patch)] = patch
    path = tmp_path / "model.gguf"
    path.write_bytes(text)
    ask_everything(path)


@given(st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_that_are_cut_or_grown(sound: bytes, tmp_path: Path, data: st.DataObject) -> None:
    size = data.draw(st.one_of(st.integers(0, HEADER_BYTES), st.integers(0, len(sound))))
    gap = data.draw(st.integers(0, 9))
    path = tmp_path / "model.gguf"
    path.write_bytes(sound[:size] + bytes(gap) + sound[size:][: data.draw(st.sampled_from([0, len(sound)]))])
    ask_everything(path)


def test_every_byte_of_a_header_flipped(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for place in range(HEADER_BYTES):
        text = bytearray(sound)
        text[place] ^= 0xFF
        path.write_bytes(text)
        ask_everything(path)


def test_every_cut_is_seen(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for size in [*range(HEADER_BYTES), len(sound) - 33]:
        path.write_bytes(sound[:size])
        with pytest.raises(ValueError, match=str(path)):
            GgufCheckpoint(path)
