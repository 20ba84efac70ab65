"""Tables of the records in bench/results: times of one run stand beside each other, never those of two."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .markdown import table

__all__ = ["Run", "alone", "compared", "machine_name", "milliseconds", "read_runs", "slower", "tables"]

_RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
_OPERATIONS = {"moe": "forward", "sft": "sft_step"}
_KINDS = {"moe": "forward pass", "sft": "training step"}


@dataclass
class Run:
    """What one run measured of one operation: family of backends -> tokens -> the record of the fastest."""

    machine: str
    kind: str
    shape: str
    method: str
    date: str
    times: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    current: list[str] = field(default_factory=list)  # the other libraries that no later run compares

    @property
    def tokens(self) -> list[int]:
        """The batch sizes."""
        return sorted({t for times in self.times.values() for t in times})

    @property
    def ours(self) -> list[str]:
        """The rows of this library."""
        return [family for family in self.times if family.startswith("ktmoe")]

    @property
    def peers(self) -> list[str]:
        """Those of other libraries."""
        return [family for family in self.times if not family.startswith("ktmoe")]

    def fastest(self, families: Sequence[str], tokens: int) -> float | None:
        """The least time of families for a batch size, in ms."""
        return min((self.times[f][tokens]["ms"] for f in families if tokens in self.times[f]), default=None)

    @property
    def title(self) -> str:
        """What was measured."""
        return f"{self.method}, {self.shape}, {_KINDS[self.kind]}, {self.machine}"


def machine_name(name: str) -> str:
    """Write the name of a machine as tables have it: records have had more than one for the same."""
    processor = re.fullmatch(r".*: (Zen \d)\)(.*)", name)
    return "".join(processor.groups()) if processor else name.removesuffix(", AMX")


def read_runs() -> list[Run]:
    """Read all records of layers, by run."""
    runs: dict[tuple[str, ...], Run] = {}
    for path in sorted(_RESULTS.glob("*.jsonl")):
        for record in map(json.loads, path.read_text().splitlines()):
            if record.get("operation") != _OPERATIONS.get(record["kind"], ""):
                continue
            if record.get("status") != "ok" or "ms" not in record:
                continue
            case = (record[name] for name in ("kind", "shape", "method", "date"))
            key = (machine_name(record["machine"]), *case)
            times = runs.setdefault(key, Run(*key)).times.setdefault(record["family"], {})
            before = times.get(record["tokens"])
            if before is None or record["ms"] < before["ms"]:
                times[record["tokens"]] = record
    return list(runs.values())


def compared(runs: Iterable[Run], kind: str) -> list[Run]:
    """The runs that are the latest to compare a case with some other library."""
    latest: dict[tuple[str, ...], Run] = {}
    for run in runs:
        if run.kind == kind and run.ours:
            for peer in run.peers:
                key = (*_case(run), peer)
                latest[key] = max(latest.get(key, run), run, key=_worth)
    found: dict[int, Run] = {}
    for key in sorted(latest):
        run = found.setdefault(id(latest[key]), replace(latest[key], current=[]))
        run.current.append(key[-1])
    return list(found.values())


def alone(runs: Sequence[Run]) -> list[Run]:
    """The latest run of each case that no run compares with another library."""
    cases = {_case(run) for run in runs if run.ours and run.peers}
    latest: dict[tuple[str, ...], Run] = {}
    for run in runs:
        if run.ours and _case(run) not in cases:
            latest[_case(run)] = max(latest.get(_case(run), run), run, key=_worth)
    return [latest[case] for case in sorted(latest)]


def _case(run: Run) -> tuple[str, ...]:
    return run.machine, run.kind, run.shape, run.method


def _worth(run: Run) -> tuple[str, int, str]:
    """The latest day first, and of it the run with most batch sizes."""
    return run.date[:10], len(run.tokens), run.date


def tables(runs: Sequence[Run]) -> str:
    """Render a section for each machine and a table for each run."""
    lines: list[str] = []
    for machine in dict.fromkeys(run.machine for run in runs):
        lines += [f"### {machine}\n"]
        for run in runs:
            if run.machine == machine:
                lines += [f"**{run.method}**, {run.shape}, run of {run.date[:10]}:\n", _table(run), ""]
    return "\n".join(lines) + "\n"


def _table(run: Run) -> str:
    rows = [
        (name, *(milliseconds(times[t]["ms"]) if t in times else "" for t in run.tokens))
        for name, times in run.times.items()
    ]
    for name in run.ours:
        limits = [run.times[name].get(t, {}).get("of_limit") for t in run.tokens]
        if any(limits):
            rows.append((f"{name}, % of the limit", *("" if x is None else f"{100 * x:.0f}" for x in limits)))
    return table(("ms for tokens", *map(str, run.tokens)), rows)


def milliseconds(ms: float) -> str:
    """Write a time in ms with three digits."""
    return f"{ms:.2f}" if ms < 1 else f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def slower(runs: Sequence[Run]) -> str:
    """Render the cases in which another library was faster in the same run."""
    return table(("case", "tokens", "ktmoe ms", "other", "its ms"), _slower(runs)) + "\n"


def _slower(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    for run in runs:
        for tokens in run.tokens:
            mine, theirs = run.fastest(run.ours, tokens), run.fastest(run.current, tokens)
            if mine is None or theirs is None or theirs >= mine:
                continue
            name = min(run.current, key=lambda f: run.times[f].get(tokens, {"ms": float("inf")})["ms"])
            yield run.title, str(tokens), milliseconds(mine), name, milliseconds(theirs)
