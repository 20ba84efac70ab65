"""Counting what a model has beside its experts, in every naming and encoding."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
from checkpoints import NAMINGS, write_checkpoint
from native_checkpoints import ENCODINGS, LAYER, draw_layer, put_layer

import ktmoe_np.io.rest_bytes
from ktmoe_np.io.rest_bytes import rest_bytes


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.io.rest_bytes).failed == 0


@pytest.mark.parametrize("naming", NAMINGS)
def test_numbers(tmp_path: Path, naming: str) -> None:
    write_checkpoint(tmp_path, naming, [1, 2], E=6, I=32, H=64, num_shards=2)
    assert rest_bytes(tmp_path, [1, 2]) == 2 * 8 * 64 + 2 * (4 * 6 * 64 + 4 * 64)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(tmp_path: Path, encoding: str) -> None:
    put_layer(tmp_path, draw_layer(encoding, 3, 96, 160, biases=encoding == "fp8"))
    assert rest_bytes(tmp_path, [LAYER]) == 2 * 8  # a dense projection, and one of shared experts


def test_gguf_with_biases(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import gguf_checkpoints
    import numpy as np

    layer = gguf_checkpoints.draw_layer("q8_0", 3, 32, 64, bias="f32")
    router = {f"blk.{gguf_checkpoints.LAYER}.ffn_gate_inp.weight": ("f32", np.zeros((3, 256), np.uint8))}
    gguf_checkpoints.write(tmp_path / "model.gguf", {**layer.tensors, **router})
    assert rest_bytes(tmp_path / "model.gguf", [gguf_checkpoints.LAYER]) == 3 * 256
