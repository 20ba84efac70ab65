"""A contest: contenders on a shape and several batch sizes, checked, then timed in turns, with the limits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .cases import make_cases, num_touched
from .contestant import LOAD_TIMEOUT, Contestant, ContestantError
from .harness import Limits, Spread, compete, measure_limits
from .layer import Array, Layer
from .methods import METHODS
from .operations import OPERATIONS
from .records import Results
from .shapes import Shape, available_memory, fit
from .spec import Spec
from .truth import relative_error, sample_rows

__all__ = ["Plan", "fit_all", "note", "run_contest"]

#: Of the memory that is free, what weights and their copies may take; the rest is for activations and limits.
_MEMORY_SHARE, _MEMORY_KEPT = 0.7, 3e9


@dataclass(frozen=True)
class Plan:
    """How long to measure, and under which name."""

    kind: str  #: the kind of the records
    tokens: Sequence[int]
    seconds: float  #: for each contender and batch size
    limit_seconds: float  #: for each of the limits, each time


def note(text: str) -> None:
    """Tell whoever watches."""
    print(text, file=sys.stderr, flush=True)


def fit_all(shape: Shape, specs: Sequence[Spec]) -> Shape:
    """`shape`, cut so that the shared weights and all the copies that contenders make fit into memory."""
    memory = min(_MEMORY_SHARE * available_memory(), max(0.0, available_memory() - _MEMORY_KEPT))
    fitting = fit(shape, 2.0 * (1 + sum(spec.copies for spec in specs)), memory)
    if fitting.model_experts:
        note(f"{shape.name}: {fitting.experts} of {shape.experts} experts, as many as memory holds")
    return fitting


def run_contest(shape: Shape, specs: Sequence[Spec], plan: Plan, results: Results) -> None:
    """Run it and write a record for each contender and batch size."""
    shape = fit_all(shape, specs)
    layer = Layer.create(shape)
    contestants = [Contestant(spec.but(shape=shape), layer.fd) for spec in specs]
    try:
        running = [contestant for contestant in contestants if _load(contestant, layer, results)]
        before = measure_limits(running, plan.limit_seconds)
        for tokens in plan.tokens if running else ():
            note(f"{shape.name}, {tokens} tokens ...")
            before = _run_tokens(running, layer, tokens, plan, before, results)
    finally:
        for contestant in contestants:
            contestant.stop()
        layer.close()


def _load(contestant: Contestant, layer: Layer, results: Results) -> bool:
    """Load a contestant; a record says what that took, or why it takes no part."""
    spec = contestant.spec
    weights_bytes = layer.shape.weights * METHODS[spec.method].bytes_per_weight
    try:
        contestant.facts = contestant.ask("load", spec, layer.fd, timeout=LOAD_TIMEOUT)
    except ContestantError as error:
        note(f"{spec.label} takes no part: {error}")
        results.add("absent", **_what(contestant), reason=str(error))
        return False
    facts = contestant.facts
    facts["load_ms"] = round(facts.pop("load_s") * 1e3, 3)
    facts["load_bytes_of_weights"] = round(facts.pop("load_bytes") / weights_bytes, 4)
    return True


def _what(contestant: Contestant) -> dict[str, Any]:
    """Give the fields that say what a record is about."""
    spec, shape = contestant.spec, contestant.spec.shape
    return {
        "shape": shape.name,
        "sizes": [shape.hidden, shape.inter, shape.experts, shape.per_token],
        "experts_of_model": shape.model_experts or shape.experts,
        "operation": spec.operation,
        "method": spec.method,
        "contender": spec.label,
        "family": spec.family,
        "best_of_family": spec.best_of_family,
        "threads": spec.threads,
        **contestant.facts,
    }


def _run_tokens(
    contestants: list[Contestant],
    layer: Layer,
    tokens: int,
    plan: Plan,
    before: dict[str, dict[str, Any]],
    results: Results,
) -> dict[str, dict[str, Any]]:
    """One batch size: check, time, measure the limits again (returned), write."""
    cases = make_cases(layer.shape, tokens)
    touched = num_touched(cases)
    rows = sample_rows(layer, cases[0])
    expected = OPERATIONS[contestants[0].spec.operation].truth(layer, cases[0], rows)
    del cases
    answers: dict[str, Array] = {}
    for contestant in contestants:
        contestant.facts.pop("failed", None)
        try:
            contestant.ask("prepare", tokens)
            answers[contestant.spec.label] = contestant.ask("check", rows)
        except ContestantError as error:
            contestant.facts["failed"] = str(error)
    errors = {label: relative_error(answer, expected) for label, answer in answers.items()}
    right = [c for c in contestants if errors.get(c.spec.label, 2) <= METHODS[c.spec.method].tolerance]
    samples = compete(right, plan.seconds)
    after = measure_limits(contestants, plan.limit_seconds)
    measured = {label: Limits.mean([before[label], one]) for label, one in after.items()}
    for contestant in contestants:
        label = contestant.spec.label
        record: dict[str, Any] = {
            "tokens": tokens,
            "experts_touched": round(touched, 1),
            "rows_checked": len(rows),
        }
        if label in errors:
            record["rel_err"] = float(f"{errors[label]:.3g}")
            if contestant.spec.peer == "ktmoe":
                record["bits_of_first"] = np.array_equal(answers[label], next(iter(answers.values())))
        if label in samples:
            spread = Spread.of(samples[label])
            record |= {
                "status": "ok",
                **asdict(spread),
                **_rates(contestant, tokens, touched, spread, measured),
            }
        else:
            record["status"] = "failed" if "failed" in contestant.facts else "wrong"
            note(f"{label}: {record['status']} {contestant.facts.get('failed', errors.get(label))}")
        results.add(plan.kind, **_what(contestant), **record)
    return after


def _rates(
    contestant: Contestant, tokens: int, touched: float, spread: Spread, measured: dict[str, Limits]
) -> dict[str, Any]:
    """Traffic and arithmetic a second, alone and as fractions of the limits."""
    spec, operation = contestant.spec, OPERATIONS[contestant.spec.operation]
    num_weights = touched * spec.shape.weights_per_expert * operation.weight_reads
    num_bytes = num_weights * METHODS[spec.method].bytes_per_weight
    flop, seconds = operation.flop(spec.shape, tokens), spread.ms / 1e3
    rates = {
        "weight_gb_s": round(num_bytes / seconds / 1e9, 3),
        "tflop_s": round(flop / seconds / 1e12, 5),
    }
    if not measured:
        return rates
    limits = _limits_for(spec, measured)
    return rates | {
        "of_read": round(num_bytes / seconds / (limits.read_gb_s * 1e9), 4),
        "of_flop": round(flop / seconds / (limits.tflop_s * 1e12), 4),
        "of_limit": round(limits.least_seconds(num_bytes, flop) / seconds, 4),
        "limits": asdict(limits),
    }


def _limits_for(spec: Spec, measured: dict[str, Limits]) -> Limits:
    """Limits of the contender's own instruction set; for a peer, those of the first contender."""
    same = [limits for limits in measured.values() if spec.isa and limits.isa == spec.isa]
    return (same or list(measured.values()))[0]
