"""`ktmoe doctor`: what of this machine and installation is in the way, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .. import __version__
from .. import kt_kernel_ext as ext
from .machine import busy_note, memory_sizes, number_ranges, read_system
from .table import counted, wrap
from .terminal import say, say_json

__all__ = ["CHECKS", "Finding", "Machine", "run"]

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one check found: fine, worth knowing, or in the way."""

    name: str
    state: State
    found: str
    advice: str = ""  # what to do, where it is not fine


@dataclass(frozen=True)
class Machine:
    """What checks look at."""

    isa: Mapping[str, Any]
    topology: Mapping[str, Any]
    memory: Mapping[str, int | None]
    environment: Mapping[str, str]
    flags: frozenset[str]  # of the processor, as the kernel names them
    system: Callable[[str], str] = read_system  # the text of a file in /proc or /sys; empty without one

    @classmethod
    def here(cls) -> Machine:
        """Read this machine."""
        flags: frozenset[str] = frozenset()
        for line in read_system("/proc/cpuinfo").splitlines():
            if line.startswith("flags"):
                flags = frozenset(line.partition(":")[2].split())
                break
        return cls(ext.isa_info(), ext.topology(), memory_sizes(), os.environ, flags)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 when there is a problem."""
    machine = Machine.here()
    findings = [check(machine) for check in CHECKS]
    if arguments.json:
        say_json({"ktmoe_np": __version__, "findings": [asdict(finding) for finding in findings]})
    else:
        say(_text(findings))
    return int(any(finding.state == "problem" for finding in findings))


# ---- checks ----


def instruction_set(machine: Machine) -> Finding:
    """Whether the best kernels are in use."""
    isa = machine.isa
    asked = set(isa["on_request"])
    best = [name for name in isa["known"] if name in isa["supported"] and name not in asked][-1]
    name, active = "kernels", isa["active"]
    not_built = [other for other in isa["known"] if other not in isa["compiled"] and other not in asked]
    if active != best:
        advice = f"{best} is faster here: unset KTMOE_ISA"
        return Finding(name, "note", f"{active}, which KTMOE_ISA asks for", advice)
    if not_built:
        return Finding(
            name,
            "note",
            f"{active}; built without {', '.join(not_built)}",
            "install without KTMOE_ISAS, so that every processor has its kernels",
        )
    if "amx_bf16" in machine.flags and best != "amx":
        advice = "Linux 5.16 or newer lets processes use AMX; in a virtual machine, the host must pass it on"
        return Finding(name, "problem", f"{active}, though the processor has AMX", advice)
    if active == "scalar" and {"sse2", "avx"} & machine.flags:
        advice = "kernels for AVX2 and FMA are much faster; a virtual machine may hide these"
        return Finding(name, "note", "scalar: the processor has no AVX2", advice)
    return Finding(name, "ok", f"{active}, the best of this processor")


def processors(machine: Machine) -> Finding:
    """Whether the process may use the processors that there are."""
    allowed, quota = machine.topology["cpus"], machine.topology["cpu_quota"]
    online = len(machine.system("/proc/cpuinfo").split("processor\t")) - 1
    if quota < len(allowed):
        return Finding(
            "processors",
            "note",
            f"a quota of {quota}, on {len(allowed)} processors",
            f"the engine takes {counted(quota, 'thread')}; threads of others count too",
        )
    if len(allowed) < online:
        found = f"{len(allowed)} of {online} ({number_ranges(allowed)})"
        advice = "taskset, a cpuset or mpiexec --bind-to restricts the process; fine if that is meant"
        return Finding("processors", "note", found, advice)
    return Finding("processors", "ok", f"all {len(allowed)}")


def load(machine: Machine) -> Finding:
    """Whether other processes compute."""
    del machine
    busy = busy_note()
    if busy is None:
        return Finding("load", "ok", "no other work")
    average = f"load {os.getloadavg()[0]:.1f}"
    return Finding("load", "note", average, "threads wait for each other: pass fewer (--threads), or wait")


def clock(machine: Machine) -> Finding:
    """Whether the frequency is kept low."""
    folder = f"/sys/devices/system/cpu/cpu{machine.topology['cpus'][0]}/cpufreq"
    governor = machine.system(f"{folder}/scaling_governor").strip()
    driver = machine.system(f"{folder}/scaling_driver").strip()
    # These two drivers raise the frequency by themselves under any governor.
    if governor == "powersave" and driver not in ("intel_pstate", "amd-pstate-epp"):
        advice = "cpupower frequency-set -g performance (as root)"
        return Finding("clock", "note", f"governor powersave, driver {driver or 'unknown'}", advice)
    return Finding("clock", "ok", f"governor {governor}" if governor else "set by the host")


def memory(machine: Machine) -> Finding:
    """Whether memory is left for weights."""
    total, available, limit = (
        machine.memory[name] for name in ("total_bytes", "available_bytes", "limit_bytes")
    )
    if total is None or available is None:
        return Finding("memory", "note", "unknown", "mount /proc")
    size = f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
    if available < total / 10:
        advice = "mapped weights are read from the disk again and again: end what uses the memory"
        return Finding("memory", "problem", size, advice)
    if limit is not None:
        found = f"{size}; this process may use {limit / 2**30:.1f} GiB"
        return Finding("memory", "note", found, "raise the container's limit above the size of the experts")
    return Finding("memory", "ok", size)


def huge_pages(machine: Machine) -> Finding:
    """Whether large buffers get huge pages."""
    text = machine.system("/sys/kernel/mm/transparent_hugepage/enabled")
    if "[never]" in text:
        advice = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root)"
        return Finding("huge pages", "note", "never: large buffers lie in small pages", advice)
    chosen = text.partition("[")[2].partition("]")[0]
    return Finding("huge pages", "ok", chosen or "not offered by this kernel")


def numa(machine: Machine) -> Finding:
    """Whether the kernel moves pages between nodes."""
    nodes = machine.topology["node_cpus"]
    balancing = machine.system("/proc/sys/kernel/numa_balancing").strip()
    if len(nodes) > 1 and balancing not in ("", "0"):
        advice = "the engine places its memory itself: echo 0 > /proc/sys/kernel/numa_balancing (as root)"
        return Finding("NUMA", "note", f"{len(nodes)} nodes, and the kernel moves pages between them", advice)
    return Finding("NUMA", "ok", counted(len(nodes), "node"))


def blas_threads(machine: Machine) -> Finding:
    """Whether NumPy's threads and the engine's take turns."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    given = [f"{name}={machine.environment[name]}" for name in names if machine.environment.get(name)]
    if given:
        return Finding("NumPy's threads", "ok", ", ".join(given))
    found = "as many as processors"
    if len(machine.topology["cpus"]) < 4:
        return Finding("NumPy's threads", "ok", found)
    advice = "for programs whose own products are small, OPENBLAS_NUM_THREADS=1 saves their waiting"
    return Finding("NumPy's threads", "note", found, advice)


def temporary_files(machine: Machine) -> Finding:
    """Whether `ktmoe demo` can write its checkpoint."""
    del machine
    try:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("temporary files", "problem", str(error), "set TMPDIR to a folder that is writable")
    found = f"{free / 2**30:.1f} GiB free in {folder}"
    if free < 500 * 2**20:
        return Finding("temporary files", "problem", found, "free some, or set TMPDIR: the demo needs 100 MB")
    return Finding("temporary files", "ok", found)


def packages(machine: Machine) -> Finding:
    """Whether the command has what its options need."""
    del machine
    wanted = {"tqdm": "cli", "matplotlib": "cli", "tokenizers": "cli", "jinja2": "cli", "gguf": "gguf"}
    missing = {name: extra for name, extra in wanted.items() if importlib.util.find_spec(name) is None}
    if not missing:
        return Finding("optional packages", "ok", "all that the command can use")
    extras = ",".join(dict.fromkeys(missing.values()))
    return Finding("optional packages", "note", f"without {', '.join(missing)}", f"pip install '.[{extras}]'")


#: All checks, in the order of the output.
CHECKS: tuple[Callable[[Machine], Finding], ...] = (
    instruction_set,
    processors,
    load,
    clock,
    memory,
    huge_pages,
    numa,
    blas_threads,
    temporary_files,
    packages,
)


# ---- text ----

_MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}


def _text(findings: list[Finding]) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{finding.name:<20}{_MARKS[finding.state]:<9}{finding.found}")
        if finding.advice:
            lines.append(f"{'':<29}-> {finding.advice}")
    counts = [sum(f.state == state for f in findings) for state in ("problem", "note")]
    summary = f"{counted(counts[0], 'problem')}, {counted(counts[1], 'note')}."
    more = "'ktmoe demo' checks that results are right, 'ktmoe info' measures the machine's limits."
    return "\n".join([*lines, "", wrap(f"{summary} {more}")])
