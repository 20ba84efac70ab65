"""Times the forward pass of a layer of experts beside its peers: `python -m bench.ops.bench_moe --help`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec

from ..core.comparison import Plan, note, run_comparison
from ..core.options import activation_dtypes, backend_specs, parse, parser, run
from ..core.records import Results
from ..core.shapes import SHAPES, Shape, cut
from ..core.spec import Spec
from ..peers import find_peer
from .loading import run_loading

__all__ = ["main"]


def _parse() -> argparse.Namespace:
    p = parser("bench_moe", __doc__, "forward", [1, 2, 4, 8, 16, 64, 256, 1024, 4096])
    p.add_argument(
        "--activation-dtype",
        type=activation_dtypes,
        help="ktmoe's rows: some of bfloat16 and int8, or both; default: the method's own",
    )
    p.add_argument("--thread-scan", action="store_true", help="ktmoe alone, with each number of threads")
    p.add_argument("--tiny", action="store_true", help="the cost of a call: the tiny layer, one token")
    p.add_argument(
        "--load", action="store_true", help="loading a checkpoint of the shape, and what memory it takes"
    )
    p.add_argument(
        "--checkpoint-dir", help="where --load writes its checkpoint; default: a temporary directory"
    )
    options = parse(p)
    if options.load and options.activation_dtype != [""]:
        p.error("--load: got it with --activation-dtype, expected one of the two")
    return options


def _base(shape: Shape, options: argparse.Namespace) -> Spec:
    return Spec("", "", options.method, shape, options.threads, max(options.tokens), gives_limits=True)


def _scan_specs(shape: Shape, options: argparse.Namespace) -> list[Spec]:
    """All threads, then every smaller number; limits are those of all threads."""
    full = find_peer("ktmoe").backend_specs(_base(shape, options), options)
    fewer = range(options.threads - 1, 0, -1)
    return [*full, *(spec.but(threads=n, gives_limits=False) for spec in full for n in fewer)]


def _tiny_specs(options: argparse.Namespace) -> list[Spec]:
    """Each way to call, with one thread and with all, and the peers."""
    shape = SHAPES["tiny"]
    specs, devices = [], jax_devices()
    for spec in backend_specs(_base(shape, options), options):
        if spec.peer != "ktmoe":
            specs.append(spec)
            continue
        ways: dict[str, dict[str, str]] = {call: {"call": call} for call in ("out", "forward", "submit")}
        ways |= {f"jax {device}": {"call": "jax", "device": device} for device in devices}
        for name, way in ways.items():
            called = spec.but(family=f"{spec.family} {name}", options=way, gives_limits=False)
            specs += [called.but(threads=n) for n in sorted({1, options.threads})]
    return specs


def jax_devices() -> list[str]:
    """Kinds of devices that JAX has here: cpu, and gpu where there is one; none without JAX.

    Asked in a process of its own: JAX takes most of a GPU's memory as soon as it knows it.
    """
    if find_spec("jax") is None:
        return []
    asked = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices('gpu')"], capture_output=True, check=False
    )
    return ["cpu"] if asked.returncode else ["cpu", "gpu"]


def _run(options: argparse.Namespace, results: Results) -> None:
    def plan(kind: str, tokens: list[int]) -> Plan:
        return Plan(kind, tokens, options.seconds, options.limit_seconds)

    if options.tiny:
        run_comparison(SHAPES["tiny"], _tiny_specs(options), plan("tiny", [1]), results)
        return
    for name in options.shape:
        shape = cut(SHAPES[name], options.most_experts or SHAPES[name].experts)
        specs = backend_specs(_base(shape, options), options)
        try:
            if options.load:
                run_loading(shape, specs, options, results)
            elif options.thread_scan:
                run_comparison(shape, _scan_specs(shape, options), plan("threads", options.tokens), results)
            else:
                run_comparison(shape, specs, plan("moe", options.tokens), results)
        except MemoryError as error:
            note(f"left out: {error}")


def main() -> int:
    options = _parse()
    return run(options, lambda results: _run(options, results))


if __name__ == "__main__":
    sys.exit(main())
