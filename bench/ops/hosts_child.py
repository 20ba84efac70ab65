"""A rank of `bench_hosts`: prints, on rank 0, a line of JSON for each number of tokens."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import ml_dtypes
import numpy as np
from mpi4py import MPI

from ktmoe_np import KTMoEWrapper
from ktmoe_np.distributed import ExpertParallel, SimulatedLink, owners_of

from ..core.measure import Spread
from ..core.shapes import SHAPES

_CHECKED = 64  # tokens of which every rank compares the bits with those of the whole layer


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser()
    p.add_argument("--shape", choices=SHAPES)
    p.add_argument("--experts", type=int)
    p.add_argument("--method")
    p.add_argument("--tokens")
    p.add_argument("--threads", type=int)
    p.add_argument("--seconds", type=float)
    p.add_argument("--combine")
    p.add_argument("--slice-tokens", type=int)
    p.add_argument("--gbit", type=float, help="of a simulated link; 0: none")
    p.add_argument("--latency", type=float, help="of it, in seconds")
    return p.parse_args()


def _weights(options: argparse.Namespace) -> list[Any]:
    """Gate, up and down of all experts, the same on every rank."""
    shape, rng = SHAPES[options.shape], np.random.default_rng(0)
    first = (options.experts, shape.inter, shape.hidden)
    arrays = []
    for size in (first, first, (options.experts, shape.hidden, shape.inter)):
        array = np.empty(size, ml_dtypes.bfloat16)
        for part in array:
            part[:] = rng.standard_normal(size[1:], np.float32) * size[-1] ** -0.5
        arrays.append(array)
    return arrays


def _layer(options: argparse.Namespace, weights: list[Any]) -> Any:
    shape = SHAPES[options.shape]
    sizes = (len(weights[0]), shape.per_token, shape.hidden, shape.inter)
    moe = KTMoEWrapper(0, *sizes, method=options.method, cpuinfer_threads=options.threads)
    moe.load_weights_from_tensors(*weights)
    return moe


def _batch(options: argparse.Namespace, tokens: int, rank: int, size: int) -> tuple[Any, Any, Any]:
    """This rank's part of a batch, whose tokens are dealt in order."""
    shape, rng = SHAPES[options.shape], np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, shape.hidden), np.float32).astype(ml_dtypes.bfloat16)
    ids = np.argsort(rng.random((tokens, options.experts)), axis=1)[:, : shape.per_token]
    weights = rng.random(ids.shape, np.float32)
    own = slice(tokens * rank // size, tokens * (rank + 1) // size)
    return x[own], np.ascontiguousarray(ids[own]), weights[own]


def _time(comm: Any, forward: Any, batch: Any, seconds: float) -> Spread:
    """Of the rank that takes longest."""
    forward(*batch)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        comm.Barrier()
        begin = time.perf_counter()
        forward(*batch)
        times.append(comm.allreduce(time.perf_counter() - begin, MPI.MAX))
    return Spread.of(times)


def main() -> int:
    options, comm = _parse(), MPI.COMM_WORLD
    weights = _weights(options)
    counts = [int(text) for text in options.tokens.split(",")]
    whole = _layer(options, weights)
    checks = {n: whole.forward(*_batch(options, n, comm.rank, comm.size)) for n in counts if n <= _CHECKED}
    link: Any = comm
    moe = whole
    if comm.size > 1:
        del whole
        mine = owners_of("contiguous", options.experts, comm.size) == comm.rank
        if options.gbit:
            link = SimulatedLink(comm, latency=options.latency, bandwidth=options.gbit * 1e9 / 8)
        part = _layer(options, [array[mine] for array in weights])
        moe = ExpertParallel(part, link, combine=options.combine, slice_tokens=options.slice_tokens)
    for tokens in counts:
        batch = _batch(options, tokens, comm.rank, comm.size)
        if tokens in checks and options.combine == "exact":
            got = moe.forward(*batch)
            if not np.array_equal(got.view(np.uint16), checks[tokens].view(np.uint16)):
                raise SystemExit(f"{tokens} tokens: got other bits than one process")
        before = getattr(link, "bytes_sent", 0)
        moe.forward(*batch)
        sent = comm.allreduce(getattr(link, "bytes_sent", 0) - before, MPI.SUM)
        spread = _time(comm, moe.forward, batch, options.seconds)
        if comm.rank == 0:
            sys.stdout.write(json.dumps({"tokens": tokens, "sent_bytes": sent, **vars(spread)}) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
