"""Times training steps of a layer with adapters beside its peers: `python -m bench.ops.bench_sft --help`.

A step is a forward pass that keeps what the backward pass needs, and the backward pass, which gives gradients
of the input, of the routing weights and of the adapters; the layer's weights stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from ..core.comparison import Plan, note, run_comparison
from ..core.options import backend_specs, parse, parser, run
from ..core.records import Results
from ..core.shapes import SHAPES, cut
from ..core.spec import Spec

__all__ = ["main"]


def _parse() -> argparse.Namespace:
    p = parser("bench_sft", __doc__, "sft", [64, 512, 1024, 4096])
    p.add_argument("--rank", type=int, default=16, help="of the adapters")
    p.add_argument("--alpha", type=float, default=32.0, help="adapters are scaled by alpha / rank")
    p.add_argument(
        "--sustained-seconds",
        type=float,
        default=3.0,
        help="for each limit beside batches of 1024 tokens and more, which last while the clock comes down",
    )
    p.add_argument(
        "--reuse-buffers",
        action="store_true",
        help="also ktmoe with results in new arrays, and with those in the memory of the step before; "
        "its other rows are given arrays",
    )
    options = parse(p)
    if options.rank < 1:
        p.error(f"--rank: got {options.rank}, expected at least 1")
    return options


def _run(options: argparse.Namespace, results: Results) -> None:
    plan = Plan("sft", options.tokens, options.seconds, options.limit_seconds, options.sustained_seconds)
    for name in options.shape:
        shape = cut(SHAPES[name], options.most_experts or SHAPES[name].experts)
        shape = replace(shape, rank=options.rank, alpha=options.alpha)
        base = Spec("", "", options.method, shape, options.threads, max(options.tokens), "sft")
        base = base.but(gives_limits=True)
        try:
            run_comparison(shape, backend_specs(base, options), plan, results)
        except MemoryError as error:
            note(f"left out: {error}")


def main() -> int:
    options = _parse()
    return run(options, lambda results: _run(options, results))


if __name__ == "__main__":
    sys.exit(main())
