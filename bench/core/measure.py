"""Timing: backends take turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .layer import Array
from .process import BackendError, BackendProcess

__all__ = ["Limits", "Spread", "compete", "measure_limits"]

#: Instruction sets whose product limit is the step with its loads: their dot alone cannot be fed.
_STEP_LIMITED = ("amx",)

#: Turns after which one that has had its time twice gets no further one; how often any may have had it.
_ENOUGH, _TOO_LONG = 3, 10.0


@dataclass(frozen=True)
class Spread:
    """A sample of durations in milliseconds."""

    ms: float  #: the median
    ms_p10: float
    ms_p90: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float] | Array) -> Spread:
        """Summarize durations in seconds."""
        p10, median, p90 = (round(float(ms), 5) for ms in np.percentile(seconds, (10, 50, 90)) * 1e3)
        return cls(median, p10, p90, len(seconds))


def compete(
    processes: Sequence[BackendProcess], seconds: float, rounds: int = 5
) -> dict[str, list[list[float]]]:
    """Time prepared processes: A, B, C, A, B, C, ... for about `seconds` each.

    Returns the seconds of the calls, until the end of each phase, by label. One that fails on the way is left
    out.
    """
    samples: dict[str, list[list[float]]] = {process.spec.label: [] for process in processes}
    for turn in range(rounds):
        for process in processes:
            label = process.spec.label
            if label not in samples:
                continue
            spent = sum(call[-1] for call in samples[label])
            if spent > (2.0 if turn >= _ENOUGH else _TOO_LONG) * seconds:
                continue
            try:
                samples[label] += process.ask("turn", seconds / rounds)
            except BackendError as error:
                process.facts["failed"] = str(error)
                del samples[label]
    return samples


@dataclass(frozen=True)
class Limits:
    """What the machine can do with an instruction set: the mean of several measurements around a timing."""

    isa: str
    threads: int
    read_gb_s: float
    tflop_s: float
    drift: float  #: the largest relative difference of a measurement from that mean

    @classmethod
    def mean(cls, measured: Sequence[dict[str, Any]]) -> Limits:
        """Summarize answers of ``measure_limits``."""
        isa = measured[0]["isa"]
        flop_key = "step_flop_per_s" if isa in _STEP_LIMITED else "dot_flop_per_s"
        values = np.array([[one["read_bytes_per_s"], one[flop_key]] for one in measured])
        means = values.mean(axis=0)
        drift = float(np.abs(values / means - 1).max())
        read, product = means / (1e9, 1e12)
        return cls(
            isa, measured[0]["threads"], round(float(read), 3), round(float(product), 5), round(drift, 3)
        )

    def least_seconds(self, num_bytes: float, flop: float) -> float:
        """Time that nothing on this machine can beat for that traffic and that arithmetic."""
        return max(num_bytes / (self.read_gb_s * 1e9), flop / (self.tflop_s * 1e12))


def measure_limits(processes: Sequence[BackendProcess], seconds: float) -> dict[str, dict[str, Any]]:
    """Ask those that can, one after the other; answers by label."""
    measured = {}
    for process in processes:
        if process.spec.gives_limits and "failed" not in process.facts:
            try:
                measured[process.spec.label] = process.ask("limits", seconds)
            except BackendError as error:
                process.facts["failed"] = str(error)
    return measured
