"""Tables of records of experts beside a GPU, and on several ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .markdown import table
from .records import machine_name, milliseconds

__all__ = ["beside_a_gpu", "on_ranks"]

_RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"

#: What tells records of `bench_hosts` apart, in the order of the table.
_CASE = ("machine", "ranks", "threads", "tokens", "slice_tokens", "gbit", "combine")

_ROUND_TRIPS = {
    "host_pass_us": "a pass without experts, on the host",
    "stream_pass_us": "the same in a stream",
    "graph_pass_us": "the same in a CUDA graph",
    "submit_and_sync_us": "an empty task, submitted and awaited",
}


def _records(kind: str) -> list[dict[str, Any]]:
    lines = [line for path in sorted(_RESULTS.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def beside_a_gpu() -> str:
    """Render the latest run of `bench_stream` that timed another library too."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for record in _records("stream"):
        runs.setdefault(record["date"], []).append(record)
    run = runs[max(date for date, run in runs.items() if len({r["library"] for r in run}) > 1)]
    timed = [r for r in run if "tokens" in r]
    tokens = sorted({r["tokens"] for r in timed})
    first = timed[0]
    rows = [("attention and router alone", *_row(timed, tokens, "gpu_ms", library=first["library"]))]
    for library in dict.fromkeys(r["library"] for r in timed):
        rows.append((f"experts alone, {library}", *_row(timed, tokens, "cpu_ms", library=library)))
        for deferred in sorted({r["deferred"] for r in timed}):
            name = f"both, {library}" + (f", {deferred} experts of a token deferred" if deferred else "")
            rows.append((name, *_row(timed, tokens, "layer_ms", library=library, deferred=deferred)))
    trips = [r for r in run if "tokens" not in r]
    libraries = [r["library"] for r in trips]
    microseconds = [(name, *(f"{r[key]:.0f}" for r in trips)) for key, name in _ROUND_TRIPS.items()]
    return (
        f"{machine_name(first['machine'])}, {first['threads']} of them for experts; {first['context']} keys "
        f"per token; run of {first['date'][:10]}.\n\n"
        f"{table(('ms per layer for tokens', *map(str, tokens)), rows)}\n\n"
        f"{table(('microseconds', *libraries), microseconds)}\n"
    )


def _row(records: Sequence[dict[str, Any]], tokens: Sequence[int], key: str, **which: Any) -> list[str]:
    found = {r["tokens"]: r[key] for r in records if all(r[k] == v for k, v in which.items())}
    return [milliseconds(found[t]) for t in tokens]


def on_ranks() -> str:
    """Render the latest records of `bench_hosts`: one row per case."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in _records("hosts"):
        case = tuple(r[name] for name in _CASE)
        latest[case] = r if case not in latest or r["date"] > latest[case]["date"] else latest[case]
    head = (
        "machine",
        "ranks x threads",
        "tokens of all ranks",
        "slice",
        "link",
        "sums",
        "ms",
        "of one process",
    )
    rows = [
        (
            machine_name(r["machine"]),
            f"{r['ranks']} x {r['threads']}",
            str(r["tokens"]),
            str(r["slice_tokens"]),
            f"{r['gbit']:g} Gbit/s" if r["gbit"] else "memory",
            r["combine"],
            milliseconds(r["ms"]),
            f"{r['to_one_process']:.2f}",
        )
        for _, r in sorted(latest.items())
    ]
    return table(head, rows) + "\n"
