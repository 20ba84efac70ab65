"""Time of a layer on several ranks against one process: `python -m bench.ops.bench_hosts --help`.

Ranks are processes of this machine under mpiexec, with as many threads in all as the one process; their links
are the machine's memory, or slower ones that are simulated. Kinds take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ktmoe_np.distributed.volume import expert_counts, mean_volume

from ..core.records import DEFAULT_PATH, Results
from ..core.shapes import SHAPES

__all__ = ["main"]


#: What exchanges have to take of a pass for the part that is hidden to be more than noise.
_MEASURABLE = 0.05


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m bench.ops.bench_hosts", description=__doc__)
    p.add_argument("--shape", choices=SHAPES, default="qwen3")
    p.add_argument("--experts", type=int, help="fewer experts than the shape has")
    p.add_argument("--method", choices=("BF16", "AMXINT8", "AMXINT4"), default="BF16")
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--threads", type=int, default=1, help="of each rank")
    p.add_argument("--tokens", default="1,16,256,4096", help="of all ranks together")
    p.add_argument("--combine", default="exact,fast")
    p.add_argument("--slice-tokens", type=int, default=2048)
    p.add_argument("--gbit", default="0,100,25", help="bandwidths of links; 0: this machine's memory")
    p.add_argument("--latency", type=float, default=5e-6, help="seconds, of simulated links")
    p.add_argument("--seconds", type=float, default=1.0, help="for each measurement and turn")
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--mpiexec", default="", help="more options of mpiexec, in one word with blanks")
    p.add_argument("--out", type=Path, default=DEFAULT_PATH, help="JSON lines, appended to")
    p.add_argument("--machine", help="the machine's name in the records; default: its CPU model")
    return p.parse_args()


def _run(options: argparse.Namespace, ranks: int, combine: str, gbit: float) -> list[dict[str, Any]]:
    """The measurements of one job, by number of tokens."""
    threads = options.threads * options.ranks // ranks
    command = [
        *(["mpiexec", "-n", str(ranks), *_flags(options)] if ranks > 1 else []),
        sys.executable,
        *(["-m", "mpi4py"] if ranks > 1 else []),
        *("-m", "bench.ops.hosts_child"),
        f"--shape={options.shape}",
        f"--experts={options.experts}",
        f"--method={options.method}",
        f"--tokens={options.tokens}",
        f"--threads={threads}",
        f"--seconds={options.seconds}",
        f"--combine={combine}",
        f"--slice-tokens={options.slice_tokens}",
        f"--gbit={gbit}",
        f"--latency={options.latency}",
    ]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _flags(options: argparse.Namespace) -> list[str]:
    given = options.mpiexec.split()
    said = subprocess.run(["mpiexec", "--version"], capture_output=True, text=True, check=False).stdout
    if given or not ("Open MPI" in said or "OpenRTE" in said):
        return given
    flags = ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
    return [*flags, "--allow-run-as-root"] if os.getuid() == 0 else flags


def main() -> int:
    options = _parse()
    if shutil.which("mpiexec") is None:
        raise SystemExit("mpiexec: not installed")
    shape = SHAPES[options.shape]
    options.experts = options.experts or shape.experts
    kinds = [
        (combine, float(gbit)) for combine in options.combine.split(",") for gbit in options.gbit.split(",")
    ]
    samples: dict[Any, dict[int, list[dict[str, Any]]]] = {}
    for _ in range(options.turns):
        for kind in [None, *kinds]:
            found = _run(options, 1, "exact", 0) if kind is None else _run(options, options.ranks, *kind)
            for each in found:
                samples.setdefault(kind, {}).setdefault(each["tokens"], []).append(each)
    results = Results(options.out, options.machine)
    counts = expert_counts(options.experts, options.ranks)
    volume = mean_volume(counts, shape.per_token, shape.hidden)
    what = f"{options.shape}, {options.experts} experts, {options.method}"
    total = options.ranks * options.threads
    print(f"{results.machine}: {what}, {options.ranks} ranks, {total} threads in all, as one process has")
    print("tokens  combine  Gbit/s         ms  to one process   MB sent  of expected  hidden")
    for tokens in sorted(samples[None]):
        ms_of = {kind: _median(found[tokens]) for kind, found in samples.items()}
        for combine, gbit in kinds:
            ms = ms_of[combine, gbit]
            sent = samples[combine, gbit][tokens][0]["sent_bytes"]
            expected = tokens * (
                volume.sent_bytes + (volume.exact_bytes if combine == "exact" else volume.fast_bytes)
            )
            hidden = None
            if gbit and (combine, 0.0) in ms_of:
                # What the link takes beyond memory, of what its exchanges take one after the other.
                wire = 1e3 * (sent / options.ranks * 8 / (gbit * 1e9) + 4 * options.latency)
                if wire > _MEASURABLE * ms:
                    hidden = 1 - max(ms - ms_of[combine, 0.0], 0) / wire
            record = results.add(
                "hosts",
                shape=options.shape,
                experts=options.experts,
                method=options.method,
                ranks=options.ranks,
                threads=options.threads,
                tokens=tokens,
                combine=combine,
                slice_tokens=options.slice_tokens,
                gbit=gbit,
                ms=round(ms, 4),
                to_one_process=round(ms / ms_of[None], 3),
                sent_bytes=sent if gbit else None,
                of_expected=round(sent / expected, 3) if gbit else None,
                hidden=None if hidden is None else round(hidden, 3),
            )
            print(_line(record), flush=True)
    return 0


def _median(found: list[dict[str, Any]]) -> float:
    return statistics.median(one["ms"] for one in found)


def _line(record: dict[str, Any]) -> str:
    gbit = record["gbit"]
    line = f"{record['tokens']:6} {record['combine']:>8} {gbit or 'memory':>7} {record['ms']:10.3f}"
    line += f" {record['to_one_process']:15.2f}"
    if gbit:
        line += f" {record['sent_bytes'] / 1e6:9.3f} {record['of_expected']:12.2f}"
    return line if record["hidden"] is None else f"{line} {record['hidden']:7.0%}"


if __name__ == "__main__":
    raise SystemExit(main())
