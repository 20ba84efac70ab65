"""The options that benches of a layer have in common, and what is done around them."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..peers import PEERS, find_peer
from .comparison import note
from .methods import METHODS
from .records import DEFAULT_PATH, Results
from .report import plot, table
from .shapes import SHAPES
from .spec import Spec

__all__ = ["ACTIVATION_DTYPES", "activation_dtypes", "backend_specs", "parse", "parser", "run"]

#: What ktmoe can be told to multiply weights with.
ACTIVATION_DTYPES = ("bfloat16", "int8")


def parser(name: str, description: str | None, operation: str, tokens: list[int]) -> argparse.ArgumentParser:
    """Make a parser of the common options; `tokens` are the default."""
    methods = [method.name for method in METHODS.values() if method.operation == operation]
    peers = list(PEERS[operation])[1:]
    p = argparse.ArgumentParser(prog=f"python -m bench.ops.{name}", description=description)
    p.set_defaults(operation=operation, activation_dtype=[""])  # the method's own
    p.add_argument("--shape", type=_names, default=["qwen3"], help=f"some of {', '.join(SHAPES)}")
    p.add_argument("--tokens", type=_numbers, default=tokens)
    p.add_argument("--most-experts", type=int, help="cut the shapes to that many experts")
    p.add_argument("--threads", type=int, help="default: the CPUs that this process may use")
    p.add_argument(
        "--isa", type=_names, help="instruction sets, or all; default: the one that is chosen by itself"
    )
    p.add_argument("--method", choices=methods, default=methods[0])
    p.add_argument("--peers", type=_names, default=[], help=f"some of {', '.join(peers)}")
    p.add_argument("--seconds", type=float, default=1.0, help="for each backend and batch size")
    p.add_argument(
        "--limit-seconds", type=float, default=0.5, help="for each limit, before and after each batch size"
    )
    p.add_argument("--out", type=Path, default=DEFAULT_PATH, help="JSON lines, appended to")
    p.add_argument("--plot", type=Path, help="an image to draw, with matplotlib")
    p.add_argument("--machine", help="the machine's name in the records; default: its CPU model")
    p.add_argument(
        "--kt-ext", default=os.environ.get("KTMOE_BENCH_KT_EXT"), help="see peers/ktkernel/inference.py"
    )
    p.add_argument(
        "--ggml", default=os.environ.get("KTMOE_BENCH_GGML"), help="see peers/llama_cpp/inference.py"
    )
    p.add_argument("--kt-python", default=os.environ.get("KTMOE_BENCH_KT_PYTHON"))
    return p


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def activation_dtypes(text: str) -> list[str]:
    """Argument type: names of dtypes with commas between them, or both."""
    names = list(ACTIVATION_DTYPES) if text == "both" else text.split(",")
    for name in names:
        if name not in ACTIVATION_DTYPES:
            known = ", ".join(ACTIVATION_DTYPES)
            raise argparse.ArgumentTypeError(f"got {name!r}, expected some of {known}, or both")
    return list(dict.fromkeys(names))


def parse(p: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, check, and fill in what the machine decides."""
    options = p.parse_args()
    try:
        _complete(options)
    except ValueError as error:
        p.error(str(error))
    return options


def _complete(options: argparse.Namespace) -> None:
    from ktmoe_np import isa_info
    from ktmoe_np import kt_kernel_ext as ext

    for name in options.shape:
        if name not in SHAPES:
            raise ValueError(f"--shape: got {name!r}, expected some of {', '.join(SHAPES)}")
    options.threads = options.threads or ext.topology()["cpu_quota"]
    info = isa_info()
    if options.isa is None:
        options.isa = [info["active"]]
    elif options.isa == ["all"]:
        options.isa = [isa for isa in reversed(info["supported"]) if isa not in info["on_request"]]
    for isa in options.isa:
        if isa not in info["supported"]:
            raise ValueError(f"--isa: got {isa!r}, expected some of {', '.join(info['supported'])}")
    for name in options.peers:
        find_peer(name, options.operation)


def backend_specs(base: Spec, options: argparse.Namespace) -> list[Spec]:
    """List ktmoe, then the peers."""
    specs = find_peer("ktmoe", base.operation).backend_specs(base, options)
    for name in options.peers:
        if name == "ktmoe":
            continue
        try:
            specs += find_peer(name, base.operation).backend_specs(base, options)
        except ValueError as error:
            note(str(error))
    return list(specs)


def run(options: argparse.Namespace, bench: Callable[[Results], None]) -> int:
    """Run a bench; whatever ends it, the table of what was measured until then is printed."""
    results = Results(options.out, options.machine)

    def end(*_: Any) -> None:
        sys.exit("stopped; what was measured until now:")

    signal.signal(signal.SIGTERM, end)
    try:
        bench(results)
    except KeyboardInterrupt:
        return 130
    finally:
        print(table(results.records))
        if options.plot and not plot(results.records, options.plot):
            note("no plot: no matplotlib, or nothing to draw")
    return 0
