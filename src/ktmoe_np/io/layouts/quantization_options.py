"""What a model's config.json says of how its weights were quantized."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..json_text import read_json_object
from ..safetensors.checkpoint import hf_config_path

__all__ = ["QuantizationOptions", "quantization_options"]

#: Where GPTQ's options are in files from before they were part of the config.json.
_OLDER_FILE = "quantize_config.json"


class QuantizationOptions(NamedTuple):
    """Those that tensors do not tell."""

    symmetric: bool = True
    version: int = 1  #: of GPTQ's format: the second one stores zero points as they are


def quantization_options(path: str | os.PathLike[str]) -> QuantizationOptions:
    """Read the options of the checkpoint at `path`; the defaults where no file says anything.

    Raises
    ------
    ValueError
        A file that is not a JSON object.
    """
    config = hf_config_path(path)
    found: Any = read_json_object(config).get("quantization_config") if config.is_file() else None
    older = config.with_name(_OLDER_FILE)
    if found is None and older.is_file():
        found = read_json_object(older)
    if not isinstance(found, Mapping):
        return QuantizationOptions()
    return QuantizationOptions(found.get("sym") is not False, 2 if _is_second(found) else 1)


def _is_second(options: Mapping[str, Any]) -> bool:
    """Whether zero points are stored as they are."""
    return options.get("checkpoint_format") == "gptq_v2"
