"""The table of `ktmoe demo` and `ktmoe verify`: a row for each instruction set and batch size."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .measure import Measured
from .sample import Expected

#: Columns of the text.
_WIDTH = 98

_BROKEN = (
    "Results outside the computed bound come from a bug, a damaged build or a faulty machine: please report "
    "this table together with the output of 'ktmoe info --json'."
)

_ABOVE = "More than 100%: the limits were measured at a busier moment, or the weights are still in a cache."

__all__ = [
    "Row",
    "amount",
    "as_json",
    "counted",
    "machine_limits",
    "make_rows",
    "rounded",
    "summary",
    "wrap",
]


@dataclass(frozen=True)
class Row:
    """A batch on an instruction set: right or not, and how fast; times are None where none was taken."""

    isa: str
    tokens: int
    error: float
    bound: float
    within_bound: bool
    problem: str | None
    ms: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    of_limit: float | None = None  # the least time that the limits allow, to the time taken
    limited_by: str | None = None  # which of them: "memory" or "arithmetic"


def machine_limits(runs: Iterable[Measured]) -> dict[str, Any]:
    """Collect the limits of a machine: memory as the fastest instruction set reads it, products of each."""
    timed = {run.isa: run.limits for run in runs if run.limits is not None}
    return {
        "read_gb_per_s": max(limits["read_bytes_per_s"] for limits in timed.values()) / 1e9,
        "tflop_per_s": {isa: limits["step_flop_per_s"] / 1e12 for isa, limits in timed.items()},
    }


def make_rows(runs: Sequence[Measured], expected: Expected, limits: dict[str, Any]) -> list[Row]:
    """Judge every result and set the times against `machine_limits`."""
    rows = []
    for run in runs:
        for tokens, result in run.results.items():
            verdict = expected.judge(result)
            row = Row(run.isa, tokens, verdict.error, verdict.bound, verdict.problem is None, verdict.problem)
            timing = run.timings.get(tokens)
            if timing is not None:
                gb, tflop = timing.weight_bytes / 1e9, timing.flop / 1e12
                reading, computing = gb / limits["read_gb_per_s"], tflop / limits["tflop_per_s"][run.isa]
                row = dataclasses.replace(
                    row,
                    ms=timing.seconds * 1e3,
                    gb_per_s=gb / timing.seconds,
                    tflop_per_s=tflop / timing.seconds,
                    of_limit=max(reading, computing) / timing.seconds,
                    limited_by="memory" if reading > computing else "arithmetic",
                )
            rows.append(row)
    return rows


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows as JSON values: null for what JSON has no number for."""
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(row).items()
        }
        for row in rows
    ]


def wrap(text: str) -> str:
    """Break a paragraph into lines."""
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def summary(
    rows: Sequence[Row], limits: dict[str, Any], isa: str, failures: dict[str, str], busy: str | None
) -> str:
    """Set the table, what it is measured against, what is wrong if anything is, and what it comes to.

    Parameters
    ----------
    rows : sequence of Row
    limits : dict
        Of `machine_limits`.
    isa : str
        The instruction set, with times, that the last sentence is about.
    failures : dict
        Instruction set -> why there are no rows of it.
    busy : str or None
        Of `busy_note`.
    """
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in limits["tflop_per_s"].items())
    notes = [
        wrap(
            "error: distance from the reference; bound: the computed allowance for rounding; both relative "
            "to the result, and checked element by element. GB/s: weights of the experts in use. Of the "
            "limit: the time that memory or arithmetic takes at least, to the time taken."
        ),
        wrap(
            f"Limits, measured in this run: memory {limits['read_gb_per_s']:.3g} GB/s; "
            f"arithmetic {rates} TFLOP/s."
        ),
    ]
    if any(row.of_limit is not None and row.of_limit > 1.05 for row in rows):
        notes.append(wrap(_ABOVE))
    if busy:
        notes.append(wrap(busy))
    wrong = [wrap(f"FAILED on {name}: {why}") for name, why in failures.items()]
    wrong += [
        wrap(f"WRONG on {row.isa}, {counted(row.tokens, 'token')}: {row.problem}")
        for row in rows
        if row.problem
    ]
    said = wrap(_BROKEN if wrong else _sentence([row for row in rows if row.isa == isa]))
    return "\n".join([_render(rows), "", *notes, "", *wrong, said])


def _sentence(rows: Sequence[Row]) -> str:
    """Say what the rows of an instruction set come to."""
    said = " and ".join(
        f"{counted(row.tokens, 'token')} at {row.of_limit:.0%} of what {row.limited_by} allows"
        for row in dict.fromkeys([rows[0], rows[-1]])
    )
    return f"Every result is within its bound; {rows[0].isa} runs {said}."


def counted(number: int, noun: str) -> str:
    """Write a number of things.

    Examples
    --------
    >>> counted(1, "token"), counted(2, "token")
    ('1 token', '2 tokens')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def rounded(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"


def amount(num_bytes: float) -> str:
    """Bytes in the unit that suits them.

    Examples
    --------
    >>> amount(1536), amount(9_437_184), amount(999_700_000)
    ('1.54 kB', '9.44 MB', '1 GB')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= 0.9995 * scale:
            return f"{rounded(num_bytes / scale)} {unit}"
    return f"{num_bytes:.0f} B"


def _render(rows: Sequence[Row]) -> str:
    """Set the rows as text, at most 100 columns wide."""
    cells = [("ISA", "tokens", "error", "bound", "within", "ms", "GB/s", "TFLOP/s", "of the limit")]
    for row in rows:
        right = "yes" if row.within_bound else "NO"
        checked = (
            row.isa,
            str(row.tokens),
            f"{row.error:.1e}" if row.error else "0",
            f"{row.bound:.1e}",
            right,
        )
        if row.ms is None or row.gb_per_s is None or row.tflop_per_s is None or row.of_limit is None:
            cells.append((*checked, "-", "-", "-", "only checked"))
        else:
            speed = (f"{row.ms:.3g}" if row.ms < 1000 else f"{row.ms:.0f}", f"{row.gb_per_s:.1f}")
            limit = f"{row.of_limit:>4.0%} {row.limited_by}"
            cells.append((*checked, *speed, f"{row.tflop_per_s:.3f}", limit))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        first, *middle, last = line
        numbers = "  ".join(f"{cell:>{width}}" for cell, width in zip(middle, widths[1:-1], strict=True))
        lines.append(f"{first:<{widths[0]}}  {numbers}  {last}".rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    for at in range(len(rows) - 1, 0, -1):  # a blank line where another instruction set begins
        if rows[at].isa != rows[at - 1].isa:
            lines.insert(2 + at, "")
    return "\n".join(lines)
