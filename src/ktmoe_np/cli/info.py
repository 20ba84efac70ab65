"""`ktmoe info`: the machine, and its limits measured now."""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

import ml_dtypes
import numpy as np

from .. import __version__
from .. import kt_kernel_ext as ext
from ..cpuinfer import _MoEBase
from .machine import busy_note, describe_machine, number_ranges
from .progress import Progress
from .table import counted, wrap
from .terminal import say, say_json

__all__ = ["measure_limits", "run"]

#: Rounds of measuring, of which the best counts: others may use the machine too.
_ROUNDS = 3

_LIMITS = ("read_bytes_per_s", "dot_flop_per_s", "step_flop_per_s")


def run(arguments: argparse.Namespace) -> int:
    """Print machine information; always 0."""
    busy = busy_note()
    report = {
        "ktmoe_np": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "ml_dtypes": ml_dtypes.__version__,
        **describe_machine(),
        "limits": measure_limits(arguments.seconds, arguments.threads),
    }
    if arguments.json:
        say_json(report)
    else:
        say(_text(report, busy))
    return 0


def measure_limits(seconds: float, threads: int | None) -> dict[str, Any]:
    """Take the best of a few rounds, which last `seconds` in all, without the preparations."""
    with Progress(_ROUNDS) as progress:
        engine = _MoEBase._get_cpu_infer(threads)
        rounds = []
        for _ in range(_ROUNDS):
            progress.step("measuring the limits")
            rounds.append(ext.measure_limits(engine, seconds / _ROUNDS / len(_LIMITS)))
    best = {name: max(measured[name] for measured in rounds) for name in _LIMITS}
    return {"isa": rounds[0]["isa"], "threads": rounds[0]["threads"], **best}


def _text(report: dict[str, Any], busy: str | None) -> str:
    limits = report["limits"]
    read, alone, step = (limits[name] for name in _LIMITS)
    versions = f"Python {report['python']}, NumPy {report['numpy']}, ml_dtypes {report['ml_dtypes']}"
    lines = [f"ktmoe_np {report['ktmoe_np']} ({versions})", ""]
    lines += [f"{name:<20}{value}" for name, value in _facts(report)]
    lines += ["", f"Limits with {limits['isa']} on {counted(limits['threads'], 'thread')}, measured now:"]
    lines += [
        f"{name:<30}{value:>7.3g} {unit}"
        for name, value, unit in (
            ("  reading memory", read / 1e9, "GB/s"),
            ("  products alone", alone / 1e12, "TFLOP/s"),
            ("  products with their loads", step / 1e12, "TFLOP/s"),
        )
    ]
    rows = step / read  # a bf16 weight is two bytes and, for each row, two operations
    meaning = (
        f"Up to about {max(rows, 1):.0f} tokens for each expert, memory limits a layer of bf16 experts (a GB "
        f"of weights takes {1e12 / read:.3g} ms to read); beyond that, arithmetic does "
        f"({1e12 / step:.3g} s for a TFLOP)."
    )
    return "\n".join([*lines, *([busy] if busy else []), "", wrap(meaning)])


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what is known without measuring."""
    cpus, nodes, isa, memory = (report[key] for key in ("cpus_allowed", "numa_nodes", "isa", "memory"))
    caches = [f"{name} {_size(size)}" for name, size in report["caches"].items()]
    sizes = [f"{_size(memory['total_bytes'])}, {_size(memory['available_bytes'])} available"]
    if memory["limit_bytes"] is not None:
        sizes.append(f"limited to {_size(memory['limit_bytes'])} for this process")
    forced = " (forced by KTMOE_ISA)" if os.environ.get("KTMOE_ISA") else ""
    facts = [
        ("CPU", report["cpu"]),
        ("Cores", f"{len(cpus)} allowed ({number_ranges(cpus)}), quota {report['cpu_quota']}"),
        ("NUMA nodes", "; ".join(f"{node} with cores {number_ranges(at)}" for node, at in nodes.items())),
        ("Caches", ", ".join(caches) or "unknown"),
        ("Memory", ", ".join(sizes)),
        ("Instruction sets", f"{isa['active']} is used{forced}"),
        ("  runs here", " ".join(isa["supported"])),
    ]
    missing = [name for name in isa["compiled"] if name not in isa["supported"]]
    if missing:
        facts.append(("  not on this CPU", " ".join(missing)))
    return facts


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "unknown"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes / 2**10:.3g} KiB"
