"""Time of batches whose tokens have different adapters: `python -m bench.ops.bench_adapters --help`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..core.measure import Spread
from ..core.records import DEFAULT_PATH, Results
from ..core.shapes import SHAPES

__all__ = ["main"]


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m bench.ops.bench_adapters", description=__doc__)
    p.add_argument("--shape", choices=SHAPES, default="qwen3")
    p.add_argument("--experts", type=int, help="fewer experts than the shape has")
    p.add_argument("--method", choices=("BF16", "AMXINT8", "AMXINT4", "MOE_INT8", "MOE_INT4"), default="BF16")
    p.add_argument("--tokens", default="1,16,64,512")
    p.add_argument("--adapters", default="1,2,8", help="numbers of adapters in a batch")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--threads", type=int)
    p.add_argument("--rounds", type=int, default=30, help="passes of each kind, in turns")
    p.add_argument("--out", type=Path, default=DEFAULT_PATH, help="JSON lines, appended to")
    p.add_argument("--machine", help="the machine's name in the records; default: its CPU model")
    return p.parse_args()


def _normal(rng: np.random.Generator, *shape: int) -> Any:
    numbers = np.empty(shape, ml_dtypes.bfloat16)
    for part in numbers:  # float32 of all would take twice the memory
        part[:] = rng.standard_normal(shape[1:], np.float32) * shape[-1] ** -0.5
    return numbers


def _layer(options: argparse.Namespace, num_adapters: int) -> Any:
    """A layer with that many adapters."""
    from ktmoe_np import KTMoEWrapper

    shape, rng = SHAPES[options.shape], np.random.default_rng(0)
    num, slots = options.experts or shape.experts, shape.per_token
    hidden, inter = shape.hidden, shape.inter
    moe = KTMoEWrapper(0, num, slots, hidden, inter, method=options.method, cpuinfer_threads=options.threads)
    projections = _normal(rng, num, inter, hidden), _normal(rng, num, inter, hidden)
    moe.load_weights_from_tensors(*projections, _normal(rng, num, hidden, inter))
    rank = options.rank
    for i in range(num_adapters):
        matrices = {
            "down_lora_a": _normal(rng, num, rank, inter),
            "down_lora_b": _normal(rng, num, hidden, rank),
        }
        for name in ("gate", "up"):
            matrices[f"{name}_lora_a"] = _normal(rng, num, rank, hidden)
            matrices[f"{name}_lora_b"] = _normal(rng, num, inter, rank)
        moe.add_adapter(str(i), matrices)
    return moe


def _batch(moe: Any, tokens: int) -> tuple[Any, Any, Any]:
    rng, c = np.random.default_rng(1), moe.config
    ids = np.argsort(rng.random((tokens, c.num_experts)), axis=1)[:, : c.num_experts_per_tok]
    x = rng.standard_normal((tokens, c.hidden_size), np.float32).astype(ml_dtypes.bfloat16)
    return x, np.ascontiguousarray(ids), rng.random(ids.shape, np.float32)


def _time(moe: Any, tokens: int, counts: list[int], rounds: int) -> dict[int, Spread]:
    """Passes without adapters (0) and with so many, in turns, when the bits were those of each alone."""
    batch = _batch(moe, tokens)
    chosen: dict[int, Any] = {0: None, **{n: np.arange(tokens) % n for n in counts}}
    samples: dict[int, list[float]] = {n: [] for n in chosen}
    mixed = moe.forward(*batch, adapters=chosen[counts[-1]])
    for number in range(counts[-1]):
        alone = moe.forward(*batch, adapters=np.full(tokens, number))
        rows = chosen[counts[-1]] == number
        if not np.array_equal(mixed[rows].view(np.uint16), alone[rows].view(np.uint16)):
            raise SystemExit(f"adapter {number}: got other bits than alone")
    for _ in range(rounds):
        for n, adapters in chosen.items():
            begin = time.perf_counter()
            moe.forward(*batch, adapters=adapters)
            samples[n].append(time.perf_counter() - begin)
    return {n: Spread.of(times) for n, times in samples.items()}


def main() -> int:
    options = _parse()
    counts = sorted({int(text) for text in options.adapters.split(",")})
    moe = _layer(options, counts[-1])
    results = Results(options.out, options.machine)
    print(f"{results.machine}: {options.shape}, {options.method}, rank {options.rank}")
    print("tokens  adapters        ms  to one adapter")
    for tokens in (int(text) for text in options.tokens.split(",")):
        spreads = _time(moe, tokens, counts, options.rounds)
        for n, spread in spreads.items():
            ratio = spread.ms / spreads[counts[0]].ms
            case = {"shape": options.shape, "method": options.method, "experts": moe.config.num_experts}
            results.add(
                "adapters",
                **case,
                rank=options.rank,
                tokens=tokens,
                adapters=n,
                to_one=round(ratio, 3),
                **vars(spread),
            )
            print(f"{tokens:6} {n or 'none':>9} {spread.ms:9.3f} {ratio:15.2f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
