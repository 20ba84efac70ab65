"""What the fuzzer feeds: a target takes bytes, writes them as a file of a checkpoint, and reads it back.

A target returns when the file was read or refused properly. Anything else, an exception of another type or a
message that does not name the file, leaves it as an exception.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from ktmoe_np.io.converted.manifest import read_manifest
from ktmoe_np.io.experts import expert_layers, load_experts
from ktmoe_np.io.gguf.experts import GgufCheckpoint, gguf_config, gguf_layers, load_gguf
from ktmoe_np.io.inspect import inspect_checkpoint
from ktmoe_np.io.layer_config import check_fits, layer_config
from ktmoe_np.io.layouts.native_layer import find_native_layouts
from ktmoe_np.io.safetensors.checkpoint import SafetensorsCheckpoint, SafetensorsFile
from ktmoe_np.io.safetensors.writer import write_safetensors
from ktmoe_np.models.config import DecoderConfig
from ktmoe_np.models.tokenizer import load_stop_tokens

__all__ = ["CONFIG", "TARGETS", "Target", "make_target"]

Target = Callable[[bytes], None]

CONFIG = {
    "model_type": "qwen3_moe",
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "hidden_size": 4,
    "moe_intermediate_size": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "vocab_size": 8,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 7,
}


def _write_checkpoint(folder: Path, config: bool = True) -> None:
    """A checkpoint of one layer."""
    matrices = {"gate_proj": (2, 4), "up_proj": (2, 4), "down_proj": (4, 2)}
    tensors = {
        f"model.layers.0.mlp.experts.{e}.{name}.weight": np.zeros(shape, ml_dtypes.bfloat16)
        for e in range(2)
        for name, shape in matrices.items()
    }
    write_safetensors(folder / "part.safetensors", tensors)
    if config:
        (folder / "config.json").write_text(json.dumps(CONFIG))


def _attempt(folder: Path, *actions: Callable[[], object]) -> None:
    """Do all of it; ValueError and OSError are proper when they name a file."""
    for action in actions:
        try:
            action()
        except (ValueError, OSError) as error:
            if str(folder) not in str(error):
                raise AssertionError(f"a message names no file: {type(error).__name__}: {error}") from error


def _safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"

    def read_tensors() -> None:
        file = SafetensorsFile(path)
        for name in file.names():
            _attempt(folder, lambda: file.tensor(name).tobytes())  # noqa: B023

    def read_experts() -> None:
        checkpoint = SafetensorsCheckpoint(path)
        for layer in expert_layers(checkpoint)[:3]:
            _attempt(
                folder,
                lambda: load_experts(checkpoint, layer),  # noqa: B023
                lambda: find_native_layouts(checkpoint, layer),  # noqa: B023
            )

    _attempt(folder, read_tensors, read_experts)


def _gguf(folder: Path) -> None:
    path = folder / "model.gguf"

    def read_layers() -> None:
        checkpoint = GgufCheckpoint(path)
        for key in checkpoint.metadata_keys():
            _attempt(folder, lambda: checkpoint.metadata(key))  # noqa: B023
        for name in checkpoint.names():
            _attempt(folder, lambda: checkpoint.tensor(name).tobytes())  # noqa: B023
        for layer in gguf_layers(checkpoint)[:3]:
            config = gguf_config(checkpoint, layer)
            check_fits(config, path)
            load_gguf(checkpoint, layer, config)

    _attempt(folder, read_layers)


def _manifest(folder: Path) -> None:
    _attempt(folder, lambda: read_manifest(folder))


def _index(folder: Path) -> None:
    def read_tensors() -> None:
        checkpoint = SafetensorsCheckpoint(folder)
        for name in checkpoint.names():
            _attempt(folder, lambda: checkpoint.tensor(name))  # noqa: B023

    _attempt(folder, read_tensors)


def _config(folder: Path) -> None:
    _attempt(
        folder,
        lambda: check_fits(layer_config(folder, 0), folder),
        lambda: load_experts(folder, 0, layer_config(folder, 0)),
        lambda: DecoderConfig.from_pretrained(folder),
        lambda: load_stop_tokens(folder),
    )


#: Target -> the file that it reads, and what reads it.
_READERS: Mapping[str, tuple[str, Callable[[Path], None]]] = {
    "safetensors": ("model.safetensors", _safetensors),
    "gguf": ("model.gguf", _gguf),
    "manifest": ("ktmoe.json", _manifest),
    "index": ("model.safetensors.index.json", _index),
    "config": ("config.json", _config),
}

TARGETS = tuple(_READERS)


def make_target(name: str, folder: Path) -> Target:
    """A target that uses `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file, read = _READERS[name]
    if name == "safetensors":
        (folder / "config.json").write_text(json.dumps(CONFIG))
    elif name != "gguf":
        _write_checkpoint(folder, config=name != "config")

    def target(data: bytes) -> None:
        path = folder / file
        path.unlink(missing_ok=True)  # a mapped file keeps its bytes
        path.write_bytes(data)
        read(folder)
        if zlib.crc32(data) % 8 == 0:  # slow, and most of what it reads is read above
            _attempt(folder, lambda: inspect_checkpoint(path if name in ("safetensors", "gguf") else folder))

    return target
