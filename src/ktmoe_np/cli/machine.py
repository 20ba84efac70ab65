"""Machine information, read from the system, for `ktmoe info` and for the captions of the others."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import kt_kernel_ext as ext

__all__ = ["busy_note", "describe_machine", "memory_sizes", "number_ranges", "read_system"]

#: Runnable threads for each CPU from which times say little.
_BUSY = 0.6

#: Where control groups and their limits of memory are, of version 2 and of version 1.
_CGROUPS = (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"))


def describe_machine() -> dict[str, Any]:
    """Collect CPU, cores, nodes, caches, memory and instruction sets.

    Returns
    -------
    dict
        Of JSON values; None where the system does not say.
    """
    topology = ext.topology()
    return {
        "cpu": _cpu_model(),
        "cpus_allowed": topology["cpus"],
        "cpu_quota": topology["cpu_quota"],
        "numa_nodes": {str(node): cpus for node, cpus in topology["node_cpus"].items()},
        "caches": _caches(topology["cpus"][0]),
        "memory": memory_sizes(),
        "isa": ext.isa_info(),
    }


def number_ranges(numbers: Iterable[int]) -> str:
    """Write a list of numbers the short way.

    Examples
    --------
    >>> number_ranges([0, 1, 2, 7])
    '0-2,7'
    """
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def busy_note() -> str | None:
    """Print a note when other processes keep the machine busy. Call it before measuring."""
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load < _BUSY * cpus:
        return None
    return f"The machine was busy before this began (load {load:.1f} on {cpus} CPUs): expect times too long."


def read_system(path: str | Path) -> str:
    """Content of a file of the system; empty when there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _fields(path: str) -> dict[str, str]:
    """Read the first value of each "name : value" of a file."""
    fields: dict[str, str] = {}
    for line in read_system(path).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _cpu_model() -> str:
    fields = _fields("/proc/cpuinfo")
    names = [fields[key] for key in ("model name", "Model", "Hardware") if fields.get(key)]
    return names[0] if names else platform.processor() or platform.machine()


def _caches(cpu: int) -> dict[str, int]:
    """Name of each data cache that a CPU sees, to its size in bytes."""
    caches: dict[str, int] = {}
    for index in sorted(Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")):
        kind, level, size = (read_system(index / name).strip() for name in ("type", "level", "size"))
        if kind in ("Data", "Unified") and size[:-1].isdecimal():
            unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1], 1)
            caches[f"L{level}"] = int(size[:-1]) * unit
    return caches


def memory_sizes() -> dict[str, int | None]:
    """Bytes of memory: of the machine, still available, and the limit that a control group sets, if lower."""
    fields = _fields("/proc/meminfo")
    sizes = {
        name: int(fields[key].split()[0]) * 1024 if fields.get(key) else None
        for name, key in (("total_bytes", "MemTotal"), ("available_bytes", "MemAvailable"))
    }
    limits = [
        int(text) for text in (read_system(path).strip() for path in _limit_files()) if text.isdecimal()
    ]
    total = sizes["total_bytes"]
    limit = min(limits, default=None)
    sizes["limit_bytes"] = limit if limit is not None and total is not None and limit < total else None
    return sizes


def _limit_files() -> list[Path]:
    """List the files with the limits of this process's control groups and of those that they are in."""
    # A container may see its own group as the root, or only that one: the root is always looked at.
    groups = {Path("/")}
    for line in read_system("/proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if path.startswith("/") and (not controllers or "memory" in controllers.split(",")):
            groups |= {Path(path), *Path(path).parents}
    return [Path(f"{root}{group}", name) for root, name in _CGROUPS for group in sorted(groups)]
