"""A library's process of `bench.ops.bench_stream`: prints what it has measured as one line of JSON."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..core.layer import Layer
from ..core.shapes import SHAPES
from .bench_stream import parser
from .stream_experts import LIBRARIES
from .stream_model import GpuLayers

_WARM_UP = 5
_CHECKED = 4  # tokens
_MAX_ERROR = 0.02  # of bf16 weights and intermediates


def _quantiles(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of a call and the wait for the GPU behind it: the median, and what one in ten exceeds."""
    times = []
    for i in range(_WARM_UP + repeats):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if i >= _WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times), statistics.quantiles(times, n=10)[-1]


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    return _quantiles(call, repeats)[0]


def _error(experts: Any, layer: Layer, batch: tuple[Any, Any, Any]) -> float:
    """Of the first tokens of a batch in layer 0: relative error against float32, by that one's size."""
    x, ids, weights = batch
    experts.begin(0, *batch)
    found = experts.end(0)[:_CHECKED].float()
    expected = torch.zeros_like(found)
    for t in range(len(found)):
        chosen = ids[t].cpu().numpy()
        gate, up, down = (
            torch.from_numpy(part[chosen].view(np.int16)).cuda().view(torch.bfloat16).float()
            for part in (layer.gate, layer.up, layer.down)
        )
        intermediate = torch.nn.functional.silu(gate @ x[t].float()) * (up @ x[t].float())
        expected[t] = (weights[t][:, None] * (down @ intermediate[:, :, None])[:, :, 0]).sum(0)
    return float((found - expected).abs().mean() / expected.abs().mean())


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of a call."""
    call()  # what is made when first needed
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def main() -> int:
    options = parser().parse_args(sys.argv[2:])
    shape = SHAPES[options.shape]
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) - 1)
    weights = [Layer.create(shape, seed) for seed in range(options.layers)]
    experts = LIBRARIES[sys.argv[1]](shape, weights, threads, options.kt_ext)
    rows = []
    for tokens in map(int, options.tokens.split(",")):
        gpu = GpuLayers(shape, options.layers, tokens, options.context)
        routed = gpu.routed()
        on_host = [[experts.on_host(array) for array in batch] for batch in routed]
        experts.prepare(tokens, 0)
        error = _error(experts, weights[0], routed[0])
        if not error < _MAX_ERROR:
            raise RuntimeError(f"{sys.argv[1]}: an error of {error:.3f} at {tokens} tokens")
        cpu_s = _seconds(lambda: experts.run_on_host(on_host), options.repeats)  # noqa: B023
        gpu_s = _seconds(_captured(lambda: gpu.run(None)), options.repeats)  # noqa: B023
        for deferred in map(int, options.deferred.split(",")):
            experts.prepare(tokens, deferred)
            together, slow = _quantiles(_captured(lambda: gpu.run(experts)), options.repeats)  # noqa: B023
            rows.append(
                {
                    "library": sys.argv[1],
                    "tokens": tokens,
                    "deferred": deferred,
                    "threads": threads,
                    "gpu_ms": 1e3 * gpu_s / options.layers,
                    "cpu_ms": 1e3 * cpu_s / options.layers,
                    "layer_ms": 1e3 * together / options.layers,
                    "layer_p90_ms": 1e3 * slow / options.layers,
                    "error": error,
                }
            )
    rows.append({"library": sys.argv[1], "threads": threads, **_round_trips(experts, shape, options.repeats)})
    print(json.dumps(rows))
    return 0


def _round_trips(experts: Any, shape: Any, repeats: int) -> dict[str, float]:
    """Microseconds of a pass in a stream beyond one on the host, when no expert is routed to."""
    batch = (
        torch.zeros(1, shape.hidden, dtype=torch.bfloat16, device="cuda"),
        torch.full((1, shape.per_token), -1, device="cuda"),
        torch.zeros(1, shape.per_token, device="cuda"),
    )
    experts.prepare(1, 0)
    num = 50

    def in_stream() -> None:
        for _ in range(num):
            experts.begin(0, *batch)
            experts.end(0)

    on_host = [[experts.on_host(array) for array in batch]]
    alone = _seconds(lambda: [experts.run_on_host(on_host) for _ in range(num)], repeats)
    empty = _seconds(lambda: None, repeats)
    eager, graph = _seconds(in_stream, repeats), _seconds(_captured(in_stream), repeats)
    bare = _seconds(lambda: [experts.round_trip() for _ in range(num)], repeats)

    def each(seconds: float) -> float:
        return 1e6 * (seconds - empty) / num

    return {
        "host_pass_us": each(alone),
        "stream_pass_us": each(eager),
        "graph_pass_us": each(graph),
        "submit_and_sync_us": each(bare),
    }


if __name__ == "__main__":
    raise SystemExit(main())
