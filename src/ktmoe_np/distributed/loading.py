"""A rank's part of a layer of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..arrays.types import PathLike
from ..experts import KTMoEWrapper
from ..io.layer_config import layer_config
from .channel import Channel, attempt
from .placement import PlacementLike, owners_of

__all__ = ["load_own_experts"]


def load_own_experts(
    channel: Channel,
    path: PathLike,
    layer_idx: int,
    method: str | None,
    mode: str,
    placement: PlacementLike,
    overrides: Mapping[str, Any],
) -> Any:
    """Make a layer of this rank's experts, whose tensors alone are mapped. Collective.

    Raises
    ------
    RankError
        On all ranks: one of them cannot load its experts.
    """

    def load() -> Any:
        num_experts = overrides.get("num_experts") or layer_config(path, layer_idx).num_experts
        owners = owners_of(placement, num_experts, channel.size)
        mine = (owners == channel.rank).nonzero()[0]
        return KTMoEWrapper.from_pretrained(
            path, layer_idx, method, **{"mode": mode, **overrides, "experts": mine}
        )

    layer, error = attempt(load)
    with channel.call():
        channel.agree("make a layer", layer_idx, error)
    return layer
