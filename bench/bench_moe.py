"""Times the forward pass of a layer of experts beside its peers: `python -m bench.bench_moe --help`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from .contest import Plan, note, run_contest
from .loading import run_loading
from .methods import METHODS
from .peers import PEERS, find_peer
from .records import DEFAULT_PATH, Results
from .report import plot, table
from .shapes import SHAPES, Shape, cut
from .spec import Spec

__all__ = ["main"]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m bench.bench_moe", description=__doc__)
    p.add_argument("--shape", type=_names, default=["qwen3"], help=f"some of {', '.join(SHAPES)}")
    p.add_argument("--tokens", type=_numbers, default=[1, 4, 16, 64, 256, 1024, 4096])
    p.add_argument("--most-experts", type=int, help="cut the shapes to that many experts")
    p.add_argument("--threads", type=int, help="default: the CPUs that this process may use")
    p.add_argument(
        "--isa", type=_names, help="instruction sets, or all; default: the one that is chosen by itself"
    )
    p.add_argument("--method", choices=list(METHODS), default="BF16")
    p.add_argument("--peers", type=_names, default=[], help=f"some of {', '.join(list(PEERS)[1:])}")
    p.add_argument("--seconds", type=float, default=1.0, help="for each contender and batch size")
    p.add_argument(
        "--limit-seconds", type=float, default=0.5, help="for each limit, before and after each batch size"
    )
    p.add_argument("--out", type=Path, default=DEFAULT_PATH, help="JSON lines, appended to")
    p.add_argument("--plot", type=Path, help="an image to draw, with matplotlib")
    p.add_argument("--machine", help="the machine's name in the records; default: its CPU model")
    p.add_argument("--thread-scan", action="store_true", help="ktmoe alone, with each number of threads")
    p.add_argument("--tiny", action="store_true", help="the cost of a call: the tiny layer, one token")
    p.add_argument(
        "--load", action="store_true", help="loading a checkpoint of the shape, and what memory it takes"
    )
    p.add_argument(
        "--checkpoint-dir", help="where --load writes its checkpoint; default: a temporary directory"
    )
    p.add_argument(
        "--kt-ext", default=os.environ.get("KTMOE_BENCH_KT_EXT"), help="see peers/kt_kernel_peer.py"
    )
    p.add_argument("--kt-python", default=os.environ.get("KTMOE_BENCH_KT_PYTHON"))
    options = p.parse_args()
    unknown = [name for name in options.shape if name not in SHAPES]
    if unknown:
        p.error(f"--shape: got {unknown[0]!r}, expected some of {', '.join(SHAPES)}")
    try:
        _complete(options)
    except ValueError as error:
        p.error(str(error))
    return options


def _complete(options: argparse.Namespace) -> None:
    """Fill in what the machine decides."""
    from ktmoe_np import isa_info
    from ktmoe_np import kt_kernel_ext as ext

    options.threads = options.threads or ext.topology()["cpu_quota"]
    info = isa_info()
    if options.isa is None:
        options.isa = [info["active"]]
    elif options.isa == ["all"]:
        options.isa = [isa for isa in reversed(info["supported"]) if isa != "amx_emu"]
    for isa in options.isa:
        if isa not in info["supported"]:
            raise ValueError(f"--isa: got {isa!r}, expected some of {', '.join(info['supported'])}")
    for name in options.peers:
        find_peer(name)


def _specs(shape: Shape, options: argparse.Namespace) -> list[Spec]:
    """List the contenders of the usual bench: ktmoe, then the peers."""
    base = Spec("", "", options.method, shape, options.threads, max(options.tokens), gives_limits=True)
    specs = find_peer("ktmoe").contenders(base, options)
    for name in options.peers:
        if name == "ktmoe":
            continue
        try:
            specs += find_peer(name).contenders(base, options)
        except ValueError as error:
            note(str(error))
    return list(specs)


def _scan_specs(shape: Shape, options: argparse.Namespace) -> list[Spec]:
    """All threads, then every smaller number; limits are those of all threads."""
    base = Spec("", "", options.method, shape, options.threads, max(options.tokens), gives_limits=True)
    full = find_peer("ktmoe").contenders(base, options)
    fewer = range(options.threads - 1, 0, -1)
    return [*full, *(spec.but(threads=n, gives_limits=False) for spec in full for n in fewer)]


def _tiny_specs(options: argparse.Namespace) -> list[Spec]:
    """Each way to call, with one thread and with all, and the peers."""
    shape = SHAPES["tiny"]
    specs = []
    for spec in _specs(shape, options):
        if spec.peer != "ktmoe":
            specs.append(spec)
            continue
        for call in ("out", "forward", "submit"):
            way = spec.but(family=f"{spec.family} {call}", options={"call": call}, gives_limits=False)
            specs += [way.but(threads=n) for n in sorted({1, options.threads})]
    return specs


def _run(options: argparse.Namespace, results: Results) -> None:
    def plan(kind: str, tokens: list[int]) -> Plan:
        return Plan(kind, tokens, options.seconds, options.limit_seconds)

    if options.tiny:
        run_contest(SHAPES["tiny"], _tiny_specs(options), plan("tiny", [1]), results)
        return
    for name in options.shape:
        shape = cut(SHAPES[name], options.most_experts or SHAPES[name].experts)
        try:
            if options.load:
                run_loading(shape, _specs(shape, options), options, results)
            elif options.thread_scan:
                run_contest(shape, _scan_specs(shape, options), plan("threads", options.tokens), results)
            else:
                run_contest(shape, _specs(shape, options), plan("moe", options.tokens), results)
        except MemoryError as error:
            note(f"left out: {error}")


def main() -> int:
    options = _parse()
    results = Results(options.out, options.machine)

    def end(*_: Any) -> None:
        sys.exit("stopped; what was measured until now:")

    signal.signal(signal.SIGTERM, end)
    try:
        _run(options, results)
    except KeyboardInterrupt:
        return 130
    finally:
        print(table(results.records))
        if options.plot and not plot(results.records, options.plot):
            note("no plot: no matplotlib, or nothing to draw")
    return 0


if __name__ == "__main__":
    sys.exit(main())
