"""What a layer has counted and measured of its passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import kt_kernel_ext as ext
from ..arrays.summary import object_summary

__all__ = ["LayerStats"]


@dataclass(frozen=True, eq=False, repr=False)
class LayerStats:
    """The passes of a layer since `collect_stats`, as its `stats` returns them.

    Attributes
    ----------
    forward_calls, backward_calls : int
        Passes; one that is computed in chunks, or whose deferred experts are computed later, is one.
    tokens : int
        Tokens of the forward calls.
    rows : int
        Tokens times the experts that computed them in this layer.
    expert_readings : int
        Experts with rows, summed over passes: each of them read its weights once. A chunk, a deferred part
        and a backward pass are passes of their own here.
    weight_bytes : int
        `expert_readings` times the bytes of an expert's weights: divided by `seconds` it is the rate at which
        weights were read.
    seconds : float
        Wall time of all passes.
    phase_seconds : mapping of str to float
        That of each phase: ``route`` sorts tokens by expert; ``scale_inputs`` and ``quantize`` prepare
        activations; ``gate_up`` and ``down`` are the products, the former with the activation function;
        ``combine`` sums the experts of a token. Of training also ``save_inputs``, ``adapters``,
        ``backward_output`` and others. What is missing to `seconds` is scratch memory and waiting.
    expert_tokens : ndarray of int64 [E]
        How often each expert was routed to, also where the layer skipped it because of `gpu_experts_mask`.
        Rows for `generate_gpu_experts_masks`.
    """

    forward_calls: int
    backward_calls: int
    tokens: int
    rows: int
    expert_readings: int
    weight_bytes: int
    seconds: float
    phase_seconds: Mapping[str, float]
    expert_tokens: NDArray[np.int64]

    @classmethod
    def of_engine(cls, stats: ext.moe.PassStats, expert_bytes: int) -> LayerStats:
        """Convert what the engine's layer has counted."""
        return cls(
            forward_calls=stats.forward_calls,
            backward_calls=stats.backward_calls,
            tokens=stats.tokens,
            rows=stats.rows,
            expert_readings=stats.expert_readings,
            weight_bytes=stats.expert_readings * expert_bytes,
            seconds=stats.nanoseconds / 1e9,
            phase_seconds={phase: ns / 1e9 for phase, ns in stats.phase_ns.items()},
            expert_tokens=np.array(stats.expert_tokens, np.int64),
        )

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        calls = f"{self.forward_calls} forward and {self.backward_calls} backward calls"
        rate = self.weight_bytes / self.seconds / 1e9 if self.seconds else 0.0
        return f"{calls}, {self.tokens} tokens, {self.seconds:.3g} s, {rate:.3g} GB/s of weights"
