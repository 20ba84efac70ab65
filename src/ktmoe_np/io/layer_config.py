"""The layer described by the files of a checkpoint, checked against the sizes of the files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import MoEConfig
from .gguf.checkpoint import GgufCheckpoint, is_gguf
from .gguf.config import gguf_config
from .json_text import naming_file
from .safetensors.checkpoint import checkpoint_files, hf_config_path, load_hf_config

__all__ = ["check_fits", "hf_layer_config", "layer_config"]


def layer_config(path: str | os.PathLike[str], layer_idx: int) -> MoEConfig:
    """Read what a layer of a checkpoint is, from its config.json or its GGUF header.

    Parameters
    ----------
    path : str or path-like
        A directory with a config.json or one of its files, or a GGUF model.
    layer_idx : int

    Returns
    -------
    MoEConfig

    Raises
    ------
    FileNotFoundError
        No checkpoint or no config.json there.
    ValueError
        Names the file: see `MoEConfig.from_hf_config` and `gguf_config`.
    """
    if is_gguf(path):
        return gguf_config(GgufCheckpoint.shared(path), layer_idx)
    return hf_layer_config(load_hf_config(path), layer_idx, path)


def hf_layer_config(config: Mapping[str, Any], layer_idx: int, path: str | os.PathLike[str]) -> MoEConfig:
    """Read what a layer is from the parsed config.json of the checkpoint at `path`; errors name that file."""
    with naming_file(hf_config_path(path)):
        return MoEConfig.from_hf_config(config, layer_idx)


def check_fits(config: MoEConfig, path: str | os.PathLike[str]) -> None:
    """Raise ValueError when the files of a checkpoint are too small for the experts of one layer.

    Asked before anything is allocated by the sizes of a configuration. A row of weights takes a byte at
    least, and a weight one bit.

    Parameters
    ----------
    config : MoEConfig
        What the layer is said to be.
    path : str or path-like
        The checkpoint: a file, or a directory of ``*.safetensors`` and ``*.gguf``, and of what its index
        names. What is not there is left to the loader, which can say what is missing.
    """
    hidden, inter = config.hidden_size, config.moe_intermediate_size
    least = config.num_experts * max(hidden + inter, 2 * hidden * inter // 8)
    num_bytes = _num_bytes(Path(path), least)
    if num_bytes is not None and num_bytes < least:
        raise ValueError(
            f"{path}: got num_experts {config.num_experts}, hidden_size {hidden} and moe_intermediate_size "
            f"{inter}, but the files have {num_bytes} bytes, too few for a layer of that size"
        )


def _num_bytes(path: Path, enough: int) -> int | None:
    """Bytes of a checkpoint's files, not all of them once they are `enough`; None when there are none."""
    files = [path]
    if path.is_dir():
        files = [file for pattern in ("*.safetensors", "*.gguf") for file in path.glob(pattern)]
    elif path.suffix == ".gguf":
        files = list(path.parent.glob("*.gguf"))  # it may be one of a split model
    num_bytes = _sum_sizes(files)
    if path.is_dir() and (num_bytes or 0) < enough:  # an index takes a while, and names files further down
        with contextlib.suppress(FileNotFoundError):
            num_bytes = _sum_sizes({*files, *checkpoint_files(path)})
    return num_bytes


def _sum_sizes(files: Iterable[Path]) -> int | None:
    """Bytes of those files that are there; None when none is."""
    sizes = [file.stat().st_size for file in files if file.is_file()]
    return sum(sizes) if sizes else None
