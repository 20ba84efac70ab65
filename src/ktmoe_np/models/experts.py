"""The experts of a decoder, from its checkpoint or from a file of their own."""

from __future__ import annotations

from typing import Any

from ..arrays.types import PathLike
from ..distributed.expert_parallel import ExpertParallel
from ..distributed.expert_parallel_sft import ExpertParallelSFT
from ..distributed.placement import PlacementLike
from ..experts import KTMoEWrapper, Overrides
from .config import DecoderConfig
from .ranks import Experts

__all__ = ["load_experts"]


def load_experts(
    path: PathLike,
    config: DecoderConfig,
    layer_idx: int,
    method: str | None,
    mode: str,
    overrides: Overrides,
    comm: object = None,
    placement: PlacementLike = "contiguous",
) -> Experts:
    """Load the experts of a layer, on several ranks with a communicator.

    An option of the other mode is an error that names it.

    Raises
    ------
    ValueError
        Experts of another model: other sizes than those of the decoder.
    """
    experts: Experts
    options: dict[str, Any] = dict(overrides)
    if comm is None:
        experts = KTMoEWrapper.from_pretrained(path, layer_idx, method, **{"mode": mode, **options})
    else:
        kind = ExpertParallelSFT if mode == "sft" else ExpertParallel
        experts = kind.from_pretrained(path, layer_idx, method, comm=comm, placement=placement, **options)
    for name in ("hidden_size", "num_experts", "num_experts_per_tok"):
        got, expected = getattr(experts.config, name), getattr(config, name)
        if got != expected:
            raise ValueError(f"{path}: {name} of layer {layer_idx}: got {got}, expected {expected}")
    return experts
