"""What the machine can do, sustained: `python -m bench.ops.bench_limits --help`."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

from ..core.layer import Layer
from ..core.process import BackendProcess
from ..core.records import DEFAULT_PATH, Results
from ..core.shapes import SHAPES
from ..core.spec import Spec

__all__ = ["main"]

#: A method that multiplies in each product.
_METHODS = {"bfloat16": "BF16", "int8": "AMXINT8"}


def _parse() -> argparse.Namespace:
    from ktmoe_np import isa_info
    from ktmoe_np import kt_kernel_ext as ext

    info = isa_info()
    supported = info["supported"]
    usual = [isa for isa in supported if isa not in info["on_request"]]  # an emulator's rate says nothing
    p = argparse.ArgumentParser(prog="python -m bench.ops.bench_limits", description=__doc__)
    p.add_argument("--seconds", type=float, default=2.0, help="for each of read, dot and step")
    p.add_argument("--isa", default=",".join(usual), help=f"some of {', '.join(supported)}")
    p.add_argument(
        "--threads", default="1,all", help="numbers of threads; all: the CPUs that this process may use"
    )
    p.add_argument("--product", default="bfloat16", help="some of bfloat16, int8: what is multiplied")
    p.add_argument("--out", type=Path, default=DEFAULT_PATH, help="JSON lines, appended to")
    p.add_argument("--machine", help="the machine's name in the records; default: its CPU model")
    options = p.parse_args()
    every = ext.topology()["cpu_quota"]
    options.threads = dict.fromkeys(every if n == "all" else int(n) for n in options.threads.split(","))
    options.isa = options.isa.split(",")
    options.product = options.product.split(",")
    if unknown := set(options.product) - set(_METHODS):
        p.error(f"--product: got {', '.join(unknown)}, expected some of {', '.join(_METHODS)}")
    return options


def _measure(isa: str, product: str, threads: int, seconds: float, layer: Layer) -> dict[str, Any]:
    """Ask a process of its own, since instruction set and engine are a process's."""
    spec = Spec("ktmoe", f"ktmoe {isa}", _METHODS[product], layer.shape, threads, 1, isa=isa)
    process = BackendProcess(spec, layer.fd)
    try:
        facts = process.ask("load", spec, layer.fd)
        one = process.ask("limits", seconds)
    finally:
        process.close()
    return {
        "isa": one["isa"],
        "product": product,
        "threads": one["threads"],
        "version": facts["version"],
        "seconds": seconds,
        "read_gb_s": round(one["read_bytes_per_s"] / 1e9, 3),
        "dot_tflop_s": round(one["dot_flop_per_s"] / 1e12, 5),
        "step_tflop_s": round(one["step_flop_per_s"] / 1e12, 5),
    }


def main() -> int:
    options = _parse()
    results = Results(options.out, options.machine)
    layer = Layer.create(SHAPES["tiny"])
    print(f"{results.machine}\n{'':21} threads  read GB/s  dot TFLOP/s  step TFLOP/s")
    for threads in options.threads:
        for isa, product in itertools.product(options.isa, options.product):
            one = results.add("limits", **_measure(isa, product, threads, options.seconds, layer))
            read, dot, step = (one[name] for name in ("read_gb_s", "dot_tflop_s", "step_tflop_s"))
            name = f"{isa} {product}"
            print(f"{name:21} {threads:7} {read:10.1f} {dot:12.3f} {step:13.3f}", flush=True)
    layer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
