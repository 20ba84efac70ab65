"""What is timed: a further operation is a further row, and a module in its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .cases import Case
from .layer import Array, Layer
from .reference import Sample, reference_answer, sample_rows
from .reference_sft import reference_step, sample_step
from .shapes import Shape

__all__ = ["OPERATIONS", "Operation", "Phase"]


@dataclass(frozen=True)
class Phase:
    """A part of a call; records are about the time from the beginning of the call to the end of a phase."""

    name: str  #: in the records, of all from the beginning on
    method: str  #: of `bench.peers.Backend`
    flop: Callable[[Shape, int], float]  #: from the beginning on, of a shape and a number of tokens
    weight_reads: int  #: how often each touched weight must come from memory, from the beginning on


@dataclass(frozen=True)
class Operation:
    """What a call does, how much work that is, and what its answer is."""

    name: str
    phases: tuple[Phase, ...]
    sample: Callable[[Layer, Case], Sample]  #: what of the answer is checked
    reference: Callable[[Layer, Case, Sample], dict[str, Array]]  #: that part of the answer, by name


OPERATIONS = {
    op.name: op
    for op in (
        Operation("forward", (Phase("forward", "run", Shape.flop, 1),), sample_rows, reference_answer),
        Operation(
            "sft",
            (Phase("sft_forward", "run", Shape.flop, 1), Phase("sft_step", "backward", Shape.step_flop, 2)),
            sample_step,
            reference_step,
        ),
    )
}
