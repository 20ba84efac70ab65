"""adapter_config.json of PEFT: ranks, scales, and the options that change what adapters compute."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...io.json_text import read_json_object, shown

__all__ = ["CONFIG_FILE", "TENSORS_FILE", "PeftConfig", "read_peft_config"]

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"

_Number = TypeVar("_Number", int, float)

#: Option -> the value of it with which adapters are alpha / r * B A and nothing else changes.
_PLAIN: dict[str, Any] = {
    **dict.fromkeys(("use_rslora", "use_dora", "use_qalora", "fan_in_fan_out", "lora_bias"), False),
    "bias": "none",
    **dict.fromkeys(("use_bdlora", "kasa_config", "monteclora_config", "arrow_config"), None),
    **dict.fromkeys(("alora_invocation_tokens", "layer_replication", "trainable_token_indices"), None),
    "modules_to_save": None,
}

#: First values that PEFT takes out of the base weights: the adapters are no good for those of the checkpoint.
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """The ranks and scales of the adapters of a directory.

    Parameters
    ----------
    path : Path
        The file, for messages.
    rank, alpha : int, float
        Of all modules that no pattern matches.
    rank_pattern, alpha_pattern : mapping
        Regular expression of the end of a name -> rank or alpha.
    base_model : str, optional
        What it says of the model: a directory, or a name on a hub.
    """

    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model: str | None

    def scale(self, name: str) -> tuple[int, float]:
        """Rank and alpha of the module or parameter `name`: as PEFT, the first pattern that matches."""
        rank = _first_match(self.rank_pattern, name)
        alpha = _first_match(self.alpha_pattern, name)
        return self.rank if rank is None else rank, self.alpha if alpha is None else alpha


def read_peft_config(path: Path) -> PeftConfig:
    """Read and check the file.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not such a file, numbers that are none, or an option that changes what adapters compute.
    """
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type: got {shown(config.get('peft_type'))}, expected 'LORA'")
    for name, value in _PLAIN.items():
        if config.get(name, value) not in (value, None) and config[name] not in ([], {}):
            raise ValueError(f"{path}: {name}: got {shown(config[name])}, expected {value!r}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_WEIGHTS):
        hint = "adapters for the base weights as they are (PEFT's path_initial_model_for_weight_conversion)"
        raise ValueError(f"{path}: init_lora_weights: got {shown(init)}, expected {hint}")
    base = config.get("base_model_name_or_path")
    return PeftConfig(
        path,
        _rank(path, "r", config.get("r")),
        _alpha(path, "lora_alpha", config.get("lora_alpha")),
        {key: _rank(path, "rank_pattern", value) for key, value in _pattern(path, config, "rank_pattern")},
        {key: _alpha(path, "alpha_pattern", value) for key, value in _pattern(path, config, "alpha_pattern")},
        base if isinstance(base, str) else None,
    )


def _rank(path: Path, name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: {name}: got {shown(value)}, expected a positive integer")
    return value


def _alpha(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{path}: {name}: got {shown(value)}, expected a number")
    return float(value)


def _pattern(path: Path, config: Mapping[str, Any], name: str) -> list[tuple[str, object]]:
    """The entries of a pattern, which may be absent."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {name}: got {shown(found)}, expected an object")
    for key in found:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{path}: {name}: got {shown(key)}, expected a pattern: {error}") from None
    return list(found.items())


def _first_match(patterns: Mapping[str, _Number], name: str) -> _Number | None:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return None
