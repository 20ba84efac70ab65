"""Tables and plots of records; `python -m bench.core.report RECORDS [IMAGE]` shows saved ones."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot", "table"]

Record = dict[str, Any]


def table(records: Sequence[Record], against: str = "ktmoe") -> str:
    """Backends by batch sizes: time and, behind it, the fraction of the machine's limit.

    Records of anything but passes over batches, such as limits and loading, are left out.
    The last row of a shape says how many times longer the fastest other takes than the fastest of `against`.
    Of what has several passes, a line for each backend and batch size follows.
    """
    parts = []
    for group in _groups([record for record in records if {"tokens", "operation"} <= record.keys()]):
        parts.append(_table_of(group, against))
        if any("backward_ms" in record for record in group):
            parts.append(_steps(group))
    absent = [f"{r['contender']} on {r['shape']}: {r['reason']}" for r in records if r["kind"] == "absent"]
    return "\n\n".join([*parts, "\n".join(absent)] if absent else parts)


def _groups(records: Sequence[Record]) -> list[list[Record]]:
    """Sort records into one group for each run, shape, operation and method."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        key = tuple(record[name] for name in ("date", "kind", "shape", "operation", "method"))
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def _table_of(group: Sequence[Record], against: str) -> str:
    tokens = sorted({r["tokens"] for r in group})
    rows = [["tokens", *map(str, tokens)]]
    lines = _lines(group)
    rows += [[name, *(_cell(by_tokens.get(t)) for t in tokens)] for name, by_tokens in lines.items()]
    bits = _bits(group)
    ratios = [_ratio(lines, t, against) for t in tokens]
    if any(ratios):
        rows.append(["fastest other / " + against, *ratios])
    return "\n".join([_title(group), _aligned(rows), *([bits] if bits else [])])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of the same width, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


#: Columns of the lines about training steps, and what they hold of a record.
_STEP_COLUMNS: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("p10-p90", lambda r: f"{_time(r['ms_p10'])} - {_time(r['ms_p90'])}"),
    ("TFLOP/s", lambda r: f"{r['tflop_s']:.3g}"),
    ("backward", lambda r: _time(r["backward_ms"])),
    ("TFLOP/s", lambda r: f"{r['backward_tflop_s']:.3g}"),
    ("of forward's", lambda r: f"{r['backward_over_forward']:.2f}"),
    ("error y", lambda r: f"{r['rel_errs']['y']:.4f}"),
    ("grad x", lambda r: f"{r['rel_errs']['grad_input']:.4f}"),
    ("grad w", lambda r: f"{r['rel_errs']['grad_weights']:.4f}"),
    ("adapters'", lambda r: f"{max(e for name, e in r['rel_errs'].items() if '_lora_' in name):.4f}"),
    ("cache MB", lambda r: f"{r['memory']['cache_mb']:.1f}" if "cache_mb" in r["memory"] else "-"),
    ("beyond MB", lambda r: f"{r['memory']['beyond_mb']:.1f}"),
)


def _steps(group: Sequence[Record]) -> str:
    """A line for each backend and batch size of what was right."""
    rows = [["step", *(title for title, _ in _STEP_COLUMNS)]]
    lines = _lines(group)
    for tokens in sorted({record["tokens"] for record in group}):
        for by_tokens in lines.values():
            record = by_tokens.get(tokens, {})
            if "backward_ms" in record:
                name = f"{tokens} {record['contender']}"
                rows.append([name, *(show(record) for _, show in _STEP_COLUMNS)])
    return _aligned(rows)


def _bits(group: Sequence[Record]) -> str:
    """Of the library's backends with the same activations: whether their answers have the same bits."""
    ours = [r for r in group if "bits_of_first" in r]
    lines = []
    for dtype in dict.fromkeys(r.get("activation_dtype") for r in ours):
        same = [r for r in ours if r.get("activation_dtype") == dtype]
        names = dict.fromkeys(r["contender"] for r in same)
        if len(names) > 1:
            other = dict.fromkeys(r["contender"] for r in same if not r["bits_of_first"])
            lines.append(
                f"same bits as {next(iter(names))}: {'all but ' + ', '.join(other) if other else 'all'}"
            )
    return "\n".join(lines)


def _title(group: Sequence[Record]) -> str:
    first = group[0]
    hidden, inter, experts, per_token = first["sizes"]
    if experts != first["experts_of_model"]:
        experts = f"{experts} of {first['experts_of_model']}"
    sizes = f"H {hidden}, I {inter}, E {experts}, P {per_token}"
    sizes += f", R {first['rank']}" if "rank" in first else ""
    title = f"{_heading(first)} ({sizes}), {first['method']}"
    limits = [r["limits"] for r in group if "limits" in r]
    said = [
        f"{name} x{one['threads']} {one['read_gb_s']:.1f} GB/s {one['tflop_s']:.3g} TFLOP/s"
        for name, one in _limits_by_name(group).items()
    ]
    drift = f", drift up to {max(one['drift'] for one in limits):.0%}" if limits else ""
    machine = f"{first['cpus']} CPUs, {first['machine']}"
    return f"{title} on {machine}\nlimits: {'; '.join(said) or 'not measured'}{drift}"


def _limits_by_name(group: Sequence[Record]) -> dict[str, Record]:
    """The first limits of each instruction set, and of each activation dtype where there are several."""
    dtypes = {r["activation_dtype"] for r in group if "activation_dtype" in r}
    named: dict[str, Record] = {}
    for record in group:
        if "limits" in record and (len(dtypes) < 2 or "activation_dtype" in record):
            dtype = f" {record['activation_dtype']}" if len(dtypes) > 1 else ""
            named.setdefault(record["limits"]["isa"] + dtype, record["limits"])
    return named


def _heading(record: Record) -> str:
    """Kind, operation where a kind has several, and shape."""
    kind, operation = record["kind"], record["operation"]
    return f"{operation if operation.startswith(kind + '_') else kind}: {record['shape']}"


def _lines(group: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """Name of a row -> tokens -> record; of a family of which only the best counts, its fastest."""
    lines: dict[str, dict[int, Record]] = {}
    for record in group:
        name = record["family"] + " (best)" if record["best_of_family"] else record["contender"]
        line = lines.setdefault(name, {})
        other = line.get(record["tokens"])
        if other is None or record.get("ms", float("inf")) < other.get("ms", float("inf")):
            line[record["tokens"]] = record
    return lines


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    if record["status"] != "ok":
        return str(record["status"]).upper()
    of_limit = f" {record['of_limit']:4.0%}" if "of_limit" in record else ""
    return f"{_time(record['ms'])}{of_limit}"


def _time(ms: float) -> str:
    if ms < 0.1:
        return f"{ms * 1e3:.1f} us"
    return f"{ms:.3f} ms" if ms < 1 else f"{ms:.2f} ms" if ms < 100 else f"{ms:.0f} ms"


def _ratio(lines: dict[str, dict[int, Record]], tokens: int, against: str) -> str:
    times: dict[bool, list[float]] = {True: [], False: []}
    for name, line in lines.items():
        if tokens in line and "ms" in line[tokens]:
            times[name.startswith(against)].append(line[tokens]["ms"])
    if not times[True] or not times[False]:
        return ""
    return f"{min(times[False]) / min(times[True]):.2f}"


def plot(records: Sequence[Record], path: str | os.PathLike[str]) -> bool:
    """Draw time and fraction of the limit over the tokens, a column a shape; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    groups = _groups([record for record in records if "tokens" in record and record["status"] == "ok"])
    if not groups:
        return False
    figure, axes = plt.subplots(2, len(groups), figsize=(5 * len(groups), 8), squeeze=False, sharex="col")
    for column, group in enumerate(groups):
        for name, line in _lines(group).items():
            points = sorted(line.items())
            tokens = [t for t, _ in points]
            axes[0, column].plot(tokens, [r["ms"] for _, r in points], "o-", label=name)
            axes[1, column].plot(tokens, [r.get("of_limit", 0) for _, r in points], "o-")
        title = f"{_heading(group[0])} {group[0]['method']}"
        axes[0, column].set(title=title, ylabel="ms", xscale="log", yscale="log")
        axes[1, column].set(xlabel="tokens", ylabel="fraction of the machine's limit", ylim=(0, 1.1))
        axes[0, column].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m bench.core.report RECORDS [IMAGE]")
    records = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    print(table(records))
    if len(sys.argv) == 3 and not plot(records, sys.argv[2]):
        sys.exit("no plot: no matplotlib, or nothing to draw")


if __name__ == "__main__":
    main()
