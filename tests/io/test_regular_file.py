"""Readers of files take regular files alone, and wait for nothing."""

from __future__ import annotations

import doctest
import gc
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import ktmoe_np.io.regular_file
from ktmoe_np.io import SafetensorsCheckpoint, SafetensorsFile, load_hf_config
from ktmoe_np.io.converted.manifest import read_manifest
from ktmoe_np.io.gguf.experts import GgufCheckpoint
from ktmoe_np.io.regular_file import open_regular, read_regular
from ktmoe_np.models import load_stop_tokens, load_tokenizer
from ktmoe_np.sft import peft_scale

#: The file that a reader reads -> the reader, of its directory.
READERS: dict[str, Callable[[Path], object]] = {
    "x.safetensors": lambda folder: SafetensorsFile(folder / "x.safetensors"),
    "model.safetensors": SafetensorsCheckpoint,
    "model.safetensors.index.json": SafetensorsCheckpoint,
    "x.gguf": lambda folder: GgufCheckpoint(folder / "x.gguf"),
    "config.json": load_hf_config,
    "ktmoe.json": read_manifest,
    "adapter_config.json": peft_scale,
    "tokenizer.json": load_tokenizer,
    "generation_config.json": load_stop_tokens,
}


def make(kind: str, path: Path) -> None:
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a character device":
        path.symlink_to("/dev/zero")
    else:
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.close()


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.io.regular_file).failed == 0


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["a FIFO", "a directory", "a character device", "a socket"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    if (name, kind) == ("x.gguf", "a directory"):
        pytest.skip("a directory is a model of its own")
    make(kind, tmp_path / name)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: got {kind}.*, expected a regular file"):
        READERS[name](tmp_path)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"1234")
    (tmp_path / "x").symlink_to(tmp_path / "blob")
    assert read_regular(tmp_path / "x", 4) == b"1234"


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_names_that_no_file_has(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(repr(name))}: not a file name"):
        open_regular(name)


def test_no_descriptor_is_inherited(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with open_regular(tmp_path / "x") as file:
        assert not os.get_inheritable(file.fileno())


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="x"):
        open_regular(tmp_path / "x")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupted_anywhere(tmp_path: Path) -> None:
    """An interrupt at any instruction stays one, and closes the file."""
    path = tmp_path / "x"
    path.write_bytes(b"1")
    before = len(os.listdir("/proc/self/fd"))
    code = open_regular.__code__
    earlier = sys.gettrace()

    def interrupt_after(count: int) -> bool:
        """Whether there were so many instructions."""
        left = count

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            if frame.f_code is not code:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            open_regular(path).close()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(earlier)
        return False

    count = 1
    while interrupt_after(count):
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before, count
        count += 1
    assert count > 20
