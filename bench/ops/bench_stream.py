"""Times layers with attention on a GPU and experts on the CPU: `python -m bench.ops.bench_stream --help`.

Layers are those of Qwen3-30B-A3B, attention by torch over a cache of keys and values, experts by ktmoe or
kt-kernel, all in one CUDA graph. Looked at is what a layer takes beside what its two parts take alone, with
and without deferred experts. A library has a process of its own; processes take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..core.records import DEFAULT_PATH, Results
from ..core.shapes import SHAPES

_LIBRARIES = ("ktmoe", "kt-kernel")


def parser() -> argparse.ArgumentParser:
    """The options, which a child process has too."""
    p = argparse.ArgumentParser(prog="python -m bench.ops.bench_stream", description=__doc__)
    p.add_argument("--layers", type=int, default=8)
    p.add_argument(
        "--tokens", default="1,2,4,8,16,256", help="batch sizes, each token of a sequence of its own"
    )
    p.add_argument("--context", type=int, default=1024, help="keys and values of each sequence")
    p.add_argument("--deferred", default="0,2,3", help="experts of a token that are deferred")
    p.add_argument("--shape", default="qwen3", choices=sorted(SHAPES))
    p.add_argument("--threads", type=int, help="of the engine; default: the CPUs of this process, less one")
    p.add_argument("--repeats", type=int, default=40, help="passes through all layers that are timed")
    p.add_argument("--turns", type=int, default=2, help="processes of each library")
    p.add_argument("--kt-ext", help="kt-kernel's extension, or a directory that holds its unpacked wheel")
    p.add_argument("--out", type=Path, default=DEFAULT_PATH, help="JSON lines, appended to")
    p.add_argument("--machine", help="the machine's name in the records; default: its CPU model")
    return p


def _measured(library: str, arguments: list[str]) -> list[dict[str, Any]]:
    """The rows of one process."""
    command = [sys.executable, "-m", "bench.ops.stream_child", library, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{library}: {done.stderr.strip()[-2000:]}")
    # A library may print too.
    (line,) = (line for line in done.stdout.splitlines() if line.startswith('[{"library"'))
    rows: list[dict[str, Any]] = json.loads(line)
    return rows


def _medians(turns: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The median of every number over the turns."""
    rows = []
    for same in zip(*turns, strict=True):
        row = dict(same[0])
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = round(statistics.median(one[name] for one in same), 5)
        rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> str:
    larger = max(row["gpu_ms"], row["cpu_ms"])
    cells = [row["gpu_ms"], row["cpu_ms"], row["gpu_ms"] + row["cpu_ms"], larger, row["layer_ms"]]
    numbers = "".join(f"{value:10.3f}" for value in cells)
    return f"{row['library']:10}{row['tokens']:7}{row['deferred']:9}{numbers}{row['layer_ms'] / larger:8.2f}"


def main() -> int:
    options = parser().parse_args()
    libraries = [name for name in _LIBRARIES if name == "ktmoe" or options.kt_ext]
    turns: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in libraries}
    for _ in range(options.turns):
        for name in libraries:
            turns[name].append(_measured(name, sys.argv[1:]))
    results = Results(options.out, options.machine)
    print(f"{results.machine}; milliseconds a layer")
    heads = "".join(f"{head:>10}" for head in ("GPU", "CPU", "sum", "larger", "together"))
    print(f"{'':10}{'tokens':>7}{'deferred':>9}{heads}{'ratio':>8}")
    for name in libraries:
        for row in _medians(turns[name]):
            results.add("stream", shape=options.shape, layers=options.layers, context=options.context, **row)
            if "layer_ms" in row:
                print(_line(row))
            else:
                print(f"{name:10} {json.dumps({k: v for k, v in row.items() if k != 'library'})}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
