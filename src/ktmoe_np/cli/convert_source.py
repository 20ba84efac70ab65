"""Models that `ktmoe convert` reads: Hugging Face checkpoints and GGUF models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from ..arrays.checks import Array
from ..config import MoEConfig
from ..formats.weights import ExpertWeights
from ..io import SafetensorsCheckpoint, expert_layers, load_experts, load_hf_config
from ..io.converted.rest import (
    Rest,
    copy_file,
    copy_rest,
    is_part_of,
    is_written_copy,
    link_rest,
    write_rest,
    write_text,
)
from ..io.gguf.checkpoint import GgufCheckpoint, is_gguf
from ..io.gguf.experts import gguf_layers, load_gguf
from ..io.layer_config import hf_layer_config, layer_config
from ..io.safetensors.checkpoint import checkpoint_files, hf_config_path
from ..models.config import DecoderConfig
from ..models.gguf_model import GgufTensors, decode_rows, gguf_hf_config
from ..models.gguf_tokenizer import tokenizer_files
from ..models.reading import dense_names

__all__ = ["ConvertSource", "open_source"]


class ConvertSource(Protocol):
    """A model whose experts are quantized to files."""

    @property
    def path(self) -> Path:
        """Where it is."""

    def layers(self) -> Sequence[int]:
        """The layers that have experts."""

    def config(self, layer: int) -> MoEConfig:
        """What a layer is."""

    def experts(self, config: MoEConfig) -> ExpertWeights:
        """The numbers of a layer: each matrix is there when it is asked for."""

    def own_files(self) -> list[Path]:
        """The files of the model; none of them may be where the converted ones go."""

    def is_part_of(self, path: Path) -> bool:
        """Whether a file of the target is one that `write_rest` writes or links."""

    def write_config(self, target: Path) -> None:
        """Write the config.json of the converted model."""

    def write_rest(self, target: Path, link: bool) -> Rest:
        """Write or link all that the model needs but its experts."""


def open_source(path: Path, link: bool = False) -> ConvertSource:
    """Open a model.

    Raises
    ------
    FileNotFoundError
        There is none.
    ValueError
        Files that are not what they should be; or with `link` GGUF, whose tensors have other names.
    """
    if not (path.exists() and is_gguf(path)):
        return _HuggingFace(path)
    if link:
        raise ValueError(f"{path}: got GGUF with --link, expected it without: its dense tensors are decoded")
    return _Gguf(path)


class _HuggingFace:
    """A Hugging Face checkpoint, in numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoint = SafetensorsCheckpoint(path)

    @cached_property
    def _hf_config(self) -> dict[str, Any]:
        return load_hf_config(self.path)

    def layers(self) -> Sequence[int]:
        return expert_layers(self._checkpoint)

    def config(self, layer: int) -> MoEConfig:
        return hf_layer_config(self._hf_config, layer, self.path)

    def experts(self, config: MoEConfig) -> ExpertWeights:
        return load_experts(self._checkpoint, config.layer_idx, config)

    def own_files(self) -> list[Path]:
        return [*checkpoint_files(self.path), hf_config_path(self.path)]

    def is_part_of(self, path: Path) -> bool:
        return is_part_of(path, self._checkpoint)

    def write_config(self, target: Path) -> None:
        copy_file(hf_config_path(self.path), target / "config.json")

    def write_rest(self, target: Path, link: bool) -> Rest:
        return (link_rest if link else copy_rest)(self._checkpoint, target)


class _Gguf:
    """A GGUF model of a family that the decoder has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoint = GgufCheckpoint.shared(path)
        self._hf_config = gguf_hf_config(self._checkpoint)

    def layers(self) -> Sequence[int]:
        return gguf_layers(self._checkpoint)

    def config(self, layer: int) -> MoEConfig:
        return layer_config(self.path, layer)

    def experts(self, config: MoEConfig) -> ExpertWeights:
        found = load_gguf(self._checkpoint, config.layer_idx, config)
        decoded = {
            name: replace(p, codes=_Decoded(p.codes, str(p.format)), format=None)
            for name, p in found.projections.items()
        }
        return ExpertWeights.of(decoded)

    def own_files(self) -> list[Path]:
        return list(self._checkpoint.files)

    def is_part_of(self, path: Path) -> bool:
        return is_written_copy(path)

    def write_config(self, target: Path) -> None:
        write_text(target / "config.json", json.dumps(self._hf_config, indent=2) + "\n")

    def write_rest(self, target: Path, link: bool) -> Rest:
        config = DecoderConfig.from_pretrained(self.path)
        tensors = GgufTensors(self._checkpoint, config.num_heads, config.num_kv_heads)
        dense: dict[str, Array] = {}
        for name, shape in dense_names(config):
            values = tensors.read(name, *shape)
            kind = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}.get(tensors.type_of(name), np.float32)
            dense[name] = values.astype(kind)  # which changes no number: they were decoded from it
        return write_rest(target, dense, {"config.json": None, **tokenizer_files(self._checkpoint)})


class _Decoded(Sequence[Array]):
    """Matrices [N, K] of E experts in GGUF's blocks, each decoded to float32 when it is asked for."""

    def __init__(self, rows: Any, kind: str) -> None:
        self._rows, self._kind = rows, kind
        self.shape = (len(rows), *decode_rows(rows[0], kind).shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, e: Any) -> Any:
        return decode_rows(self._rows[e], self._kind)

    def __iter__(self) -> Iterator[Array]:
        return (self[e] for e in range(len(self)))
