"""A layer of a decoder: attention, then experts, each on its normed input and added to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np

from ..config import ActivationDtype
from ..sft.gradients import SFTGradients
from ._arithmetic import Floats, rms_norm, rms_norm_backward
from .activation_dtypes import SequenceDtypes
from .attention import Attention, AttentionPass, Place
from .cache import KVCache
from .ranks import Experts, TrainedExperts
from .router import Route, Router

__all__ = ["DecoderLayer", "LayerPass"]


@dataclass(frozen=True)
class LayerPass:
    """The values of a forward pass for the backward pass, one entry per sequence; experts keep their own."""

    inputs: list[Floats]
    attention: list[AttentionPass]
    middles: list[Floats]  #: between attention and experts
    routes: list[Route]


@dataclass
class DecoderLayer:
    """The weights of a layer and its experts."""

    index: int
    eps: float  #: of the norms
    input_norm: Floats
    attention: Attention
    expert_norm: Floats
    router: Router
    experts: Experts
    dtypes: SequenceDtypes
    seconds_in_experts: float = 0.0

    def forward(
        self,
        hidden: Sequence[Floats],
        places: Sequence[Place],
        caches: Sequence[KVCache],
        tape: list[LayerPass] | None = None,
    ) -> list[Floats]:
        """Carry sequences [T, H] on; with a tape, to which what was done is added, to go back afterwards."""
        middles, passes = [], []
        for x, place, cache in zip(hidden, places, caches, strict=True):
            normed = rms_norm(x, self.input_norm, self.eps)
            attended, kept = self.attention.forward(
                normed, place, partial(cache.append, self.index), keeps_chances=tape is not None
            )
            middles.append(x + attended)
            if kept is not None:
                passes.append(kept)
        normed_middles = [rms_norm(x, self.expert_norm, self.eps) for x in middles]
        routes = [self.router.forward(x) for x in normed_middles]
        begins = [cache.length == 0 for cache in caches]
        parts = self._experts(normed_middles, routes, begins, saved=tape is not None)
        if tape is not None:
            tape.append(LayerPass(list(hidden), passes, middles, routes))
        return [x + part for x, part in zip(middles, parts, strict=True)]

    def _experts(
        self, hidden: list[Floats], routes: list[Route], begins: list[bool], saved: bool
    ) -> list[Floats]:
        """The outputs of the experts for the rows of all sequences, in one call for each activation dtype."""
        dtypes = [self.dtypes.prefill if begin else self.dtypes.steps for begin in begins]
        outputs: dict[int, Floats] = {}
        # A rank without sequences takes part in what the others call.
        for dtype in dict.fromkeys(dtypes or [self.dtypes.steps]):
            which = [i for i, other in enumerate(dtypes) if other == dtype]
            parts = self._call([hidden[i] for i in which], [routes[i] for i in which], dtype, saved)
            outputs |= dict(zip(which, parts, strict=True))
        return [outputs[i] for i in range(len(hidden))]

    def _call(
        self, hidden: list[Floats], routes: list[Route], dtype: ActivationDtype, saved: bool
    ) -> list[Floats]:
        config = self.experts.config
        slots = config.num_experts_per_tok
        rows = _together(hidden, config.hidden_size).astype(ml_dtypes.bfloat16)
        ids = _together([route.ids for route in routes], slots).astype(np.int64, copy=False)
        weights = _together([route.weights for route in routes], slots)
        out = np.empty(rows.shape, np.float32)
        started = time.perf_counter()
        if saved:
            assert isinstance(self.experts, TrainedExperts)
            self.experts.forward_sft(rows, ids, weights, out=out, activation_dtype=dtype)
        else:
            self.experts.forward(rows, ids, weights, out=out, activation_dtype=dtype)
        self.seconds_in_experts += time.perf_counter() - started
        return _split(out, hidden)

    def backward(
        self, kept: LayerPass, grads: Sequence[Floats], to_input: bool
    ) -> tuple[list[Floats], SFTGradients]:
        """Go back: gradients by the inputs, of those by the results, and those of the adapters.

        Without `to_input` the former are left out.
        """
        assert isinstance(self.experts, TrainedExperts)
        rows = _together(grads, self.experts.config.hidden_size).astype(ml_dtypes.bfloat16)
        started = time.perf_counter()
        found = self.experts.backward(rows)
        self.seconds_in_experts += time.perf_counter() - started
        if not to_input:
            return [], found
        by_rows = _split(found.grad_input.astype(np.float32), kept.middles)
        by_weights = _split(found.grad_weights, kept.middles)
        results = []
        for i, grad in enumerate(grads):
            by_normed = by_rows[i] + self.router.backward(kept.routes[i], by_weights[i])
            grad = grad + rms_norm_backward(kept.middles[i], self.expert_norm, self.eps, by_normed)
            by_normed = self.attention.backward(kept.attention[i], grad)
            results.append(grad + rms_norm_backward(kept.inputs[i], self.input_norm, self.eps, by_normed))
        return results, found


def _together(parts: Sequence[Floats], width: int) -> Floats:
    """The rows of all sequences; those of a single one as they are."""
    if not parts:
        return np.empty((0, width), np.float32)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _split(rows: Floats, like: Sequence[Floats]) -> list[Floats]:
    """Rows of all sequences, split by the lengths of others."""
    if len(like) < 2:
        return [rows][: len(like)]
    return np.split(rows, np.cumsum([len(x) for x in like])[:-1])
