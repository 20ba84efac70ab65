"""Compares backends on a shape and batch sizes: checked first, then timed in turns, with the limits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .cases import Case, make_cases, num_touched
from .layer import Array, Layer
from .measure import Limits, Spread, compete, measure_limits
from .methods import METHODS
from .operations import OPERATIONS, Phase
from .process import LOAD_TIMEOUT, BackendError, BackendProcess
from .records import Results
from .reference import reference_answer, relative_error
from .shapes import Shape, available_memory, fit
from .spec import Spec

__all__ = ["Plan", "fit_all", "note", "run_comparison"]

#: Of the memory that is free, what weights and their copies may take; the rest is for activations and limits.
_MEMORY_SHARE, _MEMORY_KEPT = 0.7, 3e9

#: Tokens from which on a call lasts long enough for the clock to come down, as it does under load.
_SUSTAINED = 1024


@dataclass(frozen=True)
class Plan:
    """How long to measure, and under which name."""

    kind: str  #: the kind of the records
    tokens: Sequence[int]
    seconds: float  #: for each backend and batch size
    limit_seconds: float  #: for each of the limits, each time
    sustained_seconds: float = 0.0  #: the same for large batches, if longer

    def limit_seconds_for(self, tokens: int) -> float:
        """Seconds for each of the limits beside that batch size."""
        return max(self.limit_seconds, self.sustained_seconds if tokens >= _SUSTAINED else 0.0)


def note(text: str) -> None:
    """Print a note to stderr."""
    print(text, file=sys.stderr, flush=True)


def fit_all(shape: Shape, specs: Sequence[Spec]) -> Shape:
    """`shape`, cut so that the shared weights and all the copies that backends make fit into memory."""
    memory = min(_MEMORY_SHARE * available_memory(), max(0.0, available_memory() - _MEMORY_KEPT))
    fitting = fit(shape, 2.0 * (1 + sum(spec.copies for spec in specs)), memory)
    if fitting.experts < shape.experts:
        note(f"{shape.name}: {fitting.experts} of {shape.experts} experts, as many as memory holds")
    return fitting


def run_comparison(shape: Shape, specs: Sequence[Spec], plan: Plan, results: Results) -> None:
    """Run it and write a record for each backend, batch size and phase."""
    shape = fit_all(shape, specs)
    layer = Layer.create(shape)
    METHODS[specs[0].method].replace_weights(layer)
    processes = [BackendProcess(spec.but(shape=shape), layer.fd) for spec in specs]
    try:
        running = [process for process in processes if _load(process, layer, results)]
        before: dict[str, dict[str, Any]] = {}
        seconds = 0.0
        for tokens in plan.tokens if running else ():
            note(f"{shape.name}, {tokens} tokens ...")
            if seconds != plan.limit_seconds_for(tokens):
                seconds = plan.limit_seconds_for(tokens)
                before = measure_limits(running, seconds)
            before = _run_tokens(running, layer, tokens, plan, before, results)
    finally:
        for process in processes:
            process.close()
        layer.close()


def _load(process: BackendProcess, layer: Layer, results: Results) -> bool:
    """Load a process; a record says what that took, or why it takes no part."""
    spec = process.spec
    weights_bytes = layer.shape.weights * METHODS[spec.method].bytes_per_weight
    try:
        process.facts = process.ask("load", spec, layer.fd, timeout=LOAD_TIMEOUT)
    except BackendError as error:
        note(f"{spec.label} takes no part: {error}")
        results.add("absent", **_what(process), operation=spec.operation, reason=str(error))
        return False
    facts = process.facts
    facts["load_ms"] = round(facts.pop("load_s") * 1e3, 3)
    facts["load_bytes_of_weights"] = round(facts.pop("load_bytes") / weights_bytes, 4)
    return True


def _what(process: BackendProcess) -> dict[str, Any]:
    """Give the fields that say what a record is about, but for the operation."""
    spec, shape = process.spec, process.spec.shape
    adapters = {"rank": shape.rank, "alpha": shape.alpha} if shape.rank else {}
    return {
        "shape": shape.name,
        "sizes": [shape.hidden, shape.inter, shape.experts, shape.per_token],
        "experts_of_model": shape.model_experts or shape.experts,
        **adapters,
        "method": spec.method,
        "contender": spec.label,
        "family": spec.family,
        "best_of_family": spec.best_of_family,
        "threads": spec.threads,
        **process.facts,
    }


class _Answers:
    """What the backends answer to the first case, and how far that is from the reference."""

    def __init__(self, processes: Sequence[BackendProcess], layer: Layer, case: Case, tokens: int) -> None:
        operation = OPERATIONS[processes[0].spec.operation]
        sample = operation.sample(layer, case)
        expected = operation.reference(layer, case, sample)
        in_int8: dict[str, Array] = {}
        if any(_in_int8(process.spec) for process in processes):
            block = METHODS[processes[0].spec.method].activation_block
            in_int8 = reference_answer(layer, case, sample, block)
        self.rows = len(sample.rows)
        self.errors: dict[str, dict[str, float]] = {}  #: by label and name
        self.int8_errors: dict[str, dict[str, float]] = {}  #: from what int8 activations give; likewise
        self._answers: dict[str, dict[str, Array]] = {}
        self._dtypes = {process.spec.label: process.spec.activation_dtype for process in processes}
        for process in processes:
            process.facts.pop("failed", None)
            try:
                process.ask("prepare", tokens)
                answer = process.ask("check", sample)
            except BackendError as error:
                process.facts["failed"] = str(error)
                continue
            self._answers[process.spec.label] = answer
            errors = {name: relative_error(answer[name], true) for name, true in expected.items()}
            self.errors[process.spec.label] = errors
            if _in_int8(process.spec):
                errors = {name: relative_error(answer[name], true) for name, true in in_int8.items()}
                self.int8_errors[process.spec.label] = errors

    def right(self, process: BackendProcess) -> bool:
        """Whether all of an answer is within the method's tolerance, from what its activations give."""
        label = process.spec.label
        errors = self.int8_errors.get(label, self.errors.get(label))
        return errors is not None and max(errors.values()) <= METHODS[process.spec.method].tolerance

    def fields(self, process: BackendProcess) -> dict[str, Any]:
        """Give the fields about an answer."""
        fields: dict[str, Any] = {"rows_checked": self.rows}
        label = process.spec.label
        if label in self.errors:
            errors = {name: float(f"{error:.3g}") for name, error in self.errors[label].items()}
            fields["rel_err"] = errors["y"]
            if len(errors) > 1:
                fields["rel_errs"] = errors
            if label in self.int8_errors:
                fields["rel_err_int8"] = float(f"{self.int8_errors[label]['y']:.3g}")
            if process.spec.peer == "ktmoe":
                answer, first = self._answers[label], self._first_like(process.spec)
                fields["bits_of_first"] = all(np.array_equal(answer[name], first[name]) for name in first)
        return fields

    def _first_like(self, spec: Spec) -> dict[str, Array]:
        """Find the first answer with the same activations."""
        dtype = spec.activation_dtype
        return next(answer for label, answer in self._answers.items() if self._dtypes[label] == dtype)


def _in_int8(spec: Spec) -> bool:
    """Whether a backend was asked for int8 activations that are not the method's own."""
    return spec.activation_dtype == "int8" and METHODS[spec.method].activation_block > 0


def _run_tokens(
    processes: list[BackendProcess],
    layer: Layer,
    tokens: int,
    plan: Plan,
    before: dict[str, dict[str, Any]],
    results: Results,
) -> dict[str, dict[str, Any]]:
    """One batch size: check, time, measure the limits again (returned), write."""
    cases = make_cases(layer.shape, tokens)
    touched = num_touched(cases)
    answers = _Answers(processes, layer, cases[0], tokens)
    del cases
    right = [process for process in processes if answers.right(process)]
    phases = OPERATIONS[processes[0].spec.operation].phases
    memory = _measure_memory(right) if len(phases) > 1 else {}
    right = [process for process in right if "failed" not in process.facts]
    samples = compete(right, plan.seconds)
    after = measure_limits(processes, plan.limit_seconds_for(tokens))
    measured = {label: Limits.mean([before.get(label, one), one]) for label, one in after.items()}
    for process in processes:
        label = process.spec.label
        what = {"tokens": tokens, "experts_touched": round(touched, 1), **answers.fields(process)}
        calls = np.array(samples.get(label, []))
        if not len(calls):
            what["status"] = "failed" if "failed" in process.facts else "wrong"
            note(f"{label}: {what['status']} {process.facts.get('failed', answers.errors.get(label))}")
        for i, phase in enumerate(phases):
            record = _what(process) | {"operation": phase.name} | what
            if len(calls):
                spread = Spread.of(calls[:, i])
                rates = _rates(process.spec, phase, tokens, touched, spread, measured)
                record |= {"status": "ok", **asdict(spread), **rates}
            if len(calls) and i:
                record |= _backward_alone(layer.shape, phases[i - 1 : i + 1], tokens, calls[:, i - 1 : i + 1])
                record["memory"] = memory[label]
            results.add(plan.kind, **record)
    return after


def _measure_memory(processes: Sequence[BackendProcess]) -> dict[str, dict[str, Any]]:
    """Ask each what a call takes at the most, MB, and how much of that is documented; by label."""
    measured: dict[str, dict[str, Any]] = {}
    for process in processes:
        try:
            documented = process.ask("memory")
        except BackendError as error:
            process.facts["failed"] = str(error)
            continue
        resident = documented.pop("resident")
        sizes = {"resident": resident, **documented, "beyond": resident - sum(documented.values())}
        measured[process.spec.label] = {f"{name}_mb": round(n / 1e6, 3) for name, n in sizes.items()}
    return measured


def _backward_alone(shape: Shape, phases: Sequence[Phase], tokens: int, calls: Array) -> dict[str, Any]:
    """Give time and rate of the backward pass alone, and that rate over the forward pass's."""
    before, whole = phases
    alone = Spread.of(calls[:, 1] - calls[:, 0])
    first_rate = before.flop(shape, tokens) / Spread.of(calls[:, 0]).ms
    rate = (whole.flop(shape, tokens) - before.flop(shape, tokens)) / alone.ms
    return {
        "backward_ms": alone.ms,
        "backward_tflop_s": round(rate / 1e9, 5),
        "backward_over_forward": round(rate / first_rate, 3),
    }


def _rates(
    spec: Spec, phase: Phase, tokens: int, touched: float, spread: Spread, measured: dict[str, Limits]
) -> dict[str, Any]:
    """Traffic and arithmetic a second, alone and as fractions of the limits."""
    num_weights = touched * spec.shape.weights_per_expert * phase.weight_reads
    num_bytes = num_weights * METHODS[spec.method].bytes_per_weight
    flop, seconds = phase.flop(spec.shape, tokens), spread.ms / 1e3
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
    """Limits of the backend itself or of its instruction set; for a peer, those of the first backend."""
    if spec.label in measured:
        return measured[spec.label]
    same = [limits for limits in measured.values() if spec.isa and limits.isa == spec.isa]
    return (same or list(measured.values()))[0]
