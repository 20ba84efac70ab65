"""Layers whose weights stay as the checkpoint has them."""

from __future__ import annotations

from ..io import SafetensorsCheckpoint, load_experts
from .base import BaseMoEWrapper

__all__ = ["NativeMoEWrapper"]


class NativeMoEWrapper(BaseMoEWrapper):
    """Experts computed from a checkpoint's own encoding: method ``BF16``.

    Weights are referred to, never copied: arrays stay the caller's, files stay mapped.
    """

    def _load_from_path(self, physical_to_logical_map: object) -> None:
        assert self.weight_path is not None
        self._checkpoint = SafetensorsCheckpoint.shared(self.weight_path)
        experts = load_experts(self._checkpoint, self.layer_idx, self.config)
        self.load_weights_from_tensors(
            experts.gate,
            experts.up,
            experts.down,
            physical_to_logical_map,
            gate_bias=experts.gate_bias,
            up_bias=experts.up_bias,
            down_bias=experts.down_bias,
        )
