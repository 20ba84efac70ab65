"""The adapters of one layer in files of any kind, without a layer that trains them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..arrays.checks import Array, as_numpy
from ..arrays.types import ArrayLike, PathLike
from ..config import MoEConfig
from ..io import SafetensorsFile
from .adapters import load_lora_weights
from .gradients import LORA_NAMES
from .options import SFTOptions
from .peft import import_peft, peft_scale

__all__ = ["StoredAdapter", "read_adapter"]


@dataclass
class StoredAdapter:
    """The adapters of a layer, as files have them.

    It takes what readers of adapters give to a layer (`AdaptedLayer`).
    """

    config: MoEConfig
    options: SFTOptions  #: rank and alpha
    weight_path: PathLike | None
    lora_weights: dict[str, Array] = field(default_factory=dict)

    @property
    def layer_idx(self) -> int:
        """The layer's number in the model."""
        return self.config.layer_idx

    def update_lora_weights(
        self,
        gate_lora_a: ArrayLike | None = None,
        gate_lora_b: ArrayLike | None = None,
        up_lora_a: ArrayLike | None = None,
        up_lora_b: ArrayLike | None = None,
        down_lora_a: ArrayLike | None = None,
        down_lora_b: ArrayLike | None = None,
    ) -> None:
        """Take arrays that were read."""
        given = (gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        for name, value in zip(LORA_NAMES, given, strict=True):
            if value is not None:
                self.lora_weights[name] = as_numpy(value, name)


def read_adapter(path: PathLike, config: MoEConfig, weight_path: PathLike | None = None) -> StoredAdapter:
    """Read the adapters of a layer.

    Parameters
    ----------
    path : str or path-like
        A directory of adapters of PEFT, as `import_peft` takes it, or a file of `save_lora_weights`.
    config : MoEConfig
        The layer.
    weight_path : str or path-like, optional
        Its checkpoint, whose family says how modules are named.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    ValueError
        Not such files, or of another layer; see `import_peft` and `load_lora_weights`.
    """
    if Path(path).is_dir():
        rank, alpha = peft_scale(path)
        found = StoredAdapter(config, SFTOptions(lora_rank=rank, lora_alpha=alpha), weight_path)
        import_peft(path, [found], strict=False)  # those of other layers and modules are for others
        return found
    found = StoredAdapter(config, _options_of(SafetensorsFile(path)), weight_path)
    load_lora_weights(path, found)
    return found


def _options_of(file: SafetensorsFile) -> SFTOptions:
    """Rank and alpha of a file of `save_lora_weights`; of another, which its reader refuses, any."""
    try:
        rank, alpha = int(file.metadata["lora_rank"]), float(file.metadata["lora_alpha"])
        return SFTOptions(lora_rank=rank, lora_alpha=alpha)
    except (KeyError, ValueError):
        return SFTOptions()
