"""The tokens whose results are checked, what the reference says of them, and the verdict."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import Array
from ..config import MoEConfig
from ..reference import assert_within, error_bound, moe_forward
from .expert_source import ExpertSource

__all__ = [
    "Batch",
    "Expected",
    "Sample",
    "Verdict",
    "draw_batch",
    "draw_routings",
    "draw_sample",
    "experts_in_time",
]

#: Experts of each token, and their weights.
Routing = tuple[NDArray[np.int64], NDArray[np.float32]]

_NUM_TOKENS = 8
_NUM_ROUTINGS = 8
_SEED = 0

#: Rounding errors within six standard deviations: see `ktmoe_np.reference.error_bound`.
_SIGMAS = 6.0


@dataclass(frozen=True)
class Sample:
    """Tokens that stand in every batch, so that one run of the slow reference serves for all."""

    hidden_states: Array  # bf16 [S, H]
    ids: NDArray[np.int64]  # [S, P]
    weights: NDArray[np.float32]  # [S, P]


@dataclass(frozen=True)
class Batch:
    """Arguments of a forward pass, and which of its rows are the sample's first ones."""

    hidden_states: Array
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    rows: NDArray[np.intp]


@dataclass(frozen=True)
class Verdict:
    """Distance of results from the reference, and its bound, relative to the norm; and errors."""

    error: float
    bound: float
    problem: str | None  # None within the bound


def draw_sample(config: MoEConfig, num_experts: int) -> Sample:
    """Draw tokens that use `num_experts` experts only; the same ones in every process.

    With fewer experts than a token has slots, the other slots are empty.
    """
    rng = np.random.default_rng(_SEED)
    experts = rng.permutation(config.num_experts)[:num_experts]
    ids = np.full((_NUM_TOKENS, config.num_experts_per_tok), -1, np.int64)
    slots = min(ids.shape[1], len(experts))
    for token in ids:
        token[:slots] = rng.permutation(experts)[:slots]
    return Sample(_draw_states(config, _NUM_TOKENS, rng), ids, _draw_weights(ids, rng))


def draw_batch(sample: Sample, config: MoEConfig, num_tokens: int) -> Batch:
    """Draw a batch with the sample, or as much of it as fits, spread over its rows."""
    rng = np.random.default_rng(_SEED + num_tokens)
    count = min(num_tokens, len(sample.ids))
    rows = np.linspace(0, num_tokens - 1, count).astype(np.intp)
    states = _draw_states(config, num_tokens, rng)
    ids, weights = _draw_routing(config, num_tokens, rng)
    states[rows], ids[rows], weights[rows] = (
        values[:count] for values in (sample.hidden_states, sample.ids, sample.weights)
    )
    return Batch(states, ids, weights, rows)


def draw_routings(config: MoEConfig, num_tokens: int) -> list[Routing]:
    """Draw routings for calls to go through in turn.

    A batch that cannot use all experts uses those that were used longest ago, so that, as in a model
    of many layers, no weights are still in a cache. Larger batches are drawn at random.
    """
    rng = np.random.default_rng(_SEED + num_tokens)
    num_experts, slots = config.num_experts, num_tokens * config.num_experts_per_tok
    if slots >= num_experts:
        return [_draw_routing(config, num_tokens, rng) for _ in range(_NUM_ROUTINGS)]
    order = rng.permutation(num_experts)
    starts = range(0, math.lcm(slots, num_experts), slots)
    turns = [order[(start + np.arange(slots)) % num_experts].reshape(num_tokens, -1) for start in starts]
    return [(ids, _draw_weights(ids, rng)) for ids in turns]


def _draw_routing(config: MoEConfig, num_tokens: int, rng: np.random.Generator) -> Routing:
    """Draw distinct experts for every token, all equally likely, and weights that sum to 1."""
    order = rng.random((num_tokens, config.num_experts)).argsort(axis=1)
    ids = np.ascontiguousarray(order[:, : config.num_experts_per_tok])
    return ids, _draw_weights(ids, rng)


def _draw_states(config: MoEConfig, num_tokens: int, rng: np.random.Generator) -> Array:
    values = rng.standard_normal((num_tokens, config.hidden_size), np.float32)
    states: Array = values.astype(ml_dtypes.bfloat16)
    return states


def _draw_weights(ids: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
    weights = rng.random(ids.shape, np.float32) + np.float32(0.1)
    result: NDArray[np.float32] = weights / weights.sum(axis=1, keepdims=True)
    return result


class Expected:
    """The reference results of a sample, and the bound for correct results.

    Parameters
    ----------
    sample : Sample
    config : MoEConfig
    experts : ExpertSource
    """

    def __init__(self, sample: Sample, config: MoEConfig, experts: ExpertSource) -> None:
        # Only the experts in use are decoded or quantized, so they get new numbers.
        used, ids = np.unique(sample.ids, return_inverse=True)
        used, ids = used[used >= 0], ids.reshape(sample.ids.shape) - int((used < 0).any())
        layer = (sample.hidden_states, ids, sample.weights)
        model = {"activation": config.activation, "scale_inputs": config.scale_inputs}
        options = {**model, **experts.arguments(used.tolist())}
        self.num_experts = len(used)
        values = moe_forward(*layer, accumulate_dtype=np.float64, **options)
        self._values = values.astype(np.float64)
        self._bound = error_bound(*layer, sigmas=_SIGMAS, **options)

    def judge(self, actual: Array) -> Verdict:
        """Compare the results of the sample's first tokens."""
        values, bound = self._values[: len(actual)], self._bound[: len(actual)]
        norm = np.linalg.norm(values) or math.nan
        with np.errstate(invalid="ignore"):
            error = np.linalg.norm(actual.astype(np.float64) - values) / norm
        problem = None
        try:
            assert_within(actual, values, bound)
        except AssertionError as found:
            problem = str(found)
        return Verdict(float(error), float(np.linalg.norm(bound) / norm), problem)


def experts_in_time(config: MoEConfig, experts: ExpertSource, seconds: float) -> int:
    """Count the experts, at least one, that the reference can do in that time, from trials with one."""
    sample = draw_sample(config, 1)
    times = []
    for _ in range(2):  # the first one is slow: its weights are still on the disk
        start = time.perf_counter()
        Expected(sample, config, experts)
        times.append(time.perf_counter() - start)
    each = min(times)
    return min(config.num_experts, max(1, int(seconds / each)))
