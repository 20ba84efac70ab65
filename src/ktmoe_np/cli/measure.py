"""Running batches on the instruction set of this process, or of a child process: results and times."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .. import kt_kernel_ext as ext
from ..arrays.checks import Array
from ..experts import KTMoEWrapper
from ..inference import BaseMoEWrapper
from .sample import Batch, Sample, draw_batch, draw_routings, draw_sample
from .terminal import say_json

__all__ = ["Measured", "Timing", "measure", "measure_in_child", "run_child"]

#: Time for each of the three limits, before the batches.
_LIMIT_SECONDS = 0.1

#: Calls that are averaged, at least.
_LEAST_CALLS = 2


@dataclass(frozen=True)
class Timing:
    """One forward pass: its time, averaged as limits are, and what it has to do."""

    seconds: float
    weight_bytes: float  # of the experts that it uses, on average
    flop: float


@dataclass(frozen=True)
class Measured:
    """Results of one instruction set."""

    isa: str
    threads: int
    limits: dict[str, float] | None  # of `measure_limits`; None where nothing was timed
    results: dict[int, Array]  # tokens -> bf16 rows of the sample
    timings: dict[int, Timing]  # tokens -> time; empty where nothing was timed


def measure(
    layers: Sequence[BaseMoEWrapper],
    sample: Sample,
    num_tokens: Sequence[int],
    seconds: float,
    tell: Callable[[str], None] = lambda label: None,
) -> Measured:
    """Run batches with the sample in them, and time the like.

    Parameters
    ----------
    layers : sequence of BaseMoEWrapper
        Of the same sizes. The first gives the results; for the times they take turns, so that little of the
        weights is still in a cache.
    sample : Sample
    num_tokens : sequence of int
        The sizes of the batches.
    seconds : float
        Time for each size; 0 measures nothing and only gives results.
    tell : callable, optional
        Is told what comes next.
    """
    first = layers[0]
    limits = None
    if seconds > 0:
        tell("measuring the limits")
        limits = _limits(first)
        tell("reading the weights")
        for layer in layers:
            _touch(layer)
    results: dict[int, Array] = {}
    timings: dict[int, Timing] = {}
    for size in num_tokens:
        tell(f"a batch of {size}")
        batch = draw_batch(sample, first.config, size)
        results[size] = first.forward(batch.hidden_states, batch.ids, batch.weights)[batch.rows]
        if seconds > 0:
            timings[size] = _time(layers, batch, seconds)
    isa, threads = ext.isa_info()["active"], first.cpu_infer.backend_.config.subpool_thread_count
    return Measured(isa, sum(threads), limits, results, timings)


def _limits(layer: BaseMoEWrapper) -> dict[str, float]:
    """Rates that the machine allows at this moment."""
    limits = ext.measure_limits(layer.cpu_infer, _LIMIT_SECONDS, product=layer.activation_dtype)
    return {name: rate for name, rate in limits.items() if name.endswith("_per_s")}


def _touch(layer: BaseMoEWrapper) -> None:
    """Use every expert once, so that what is mapped is in memory."""
    config = layer.config
    per_token = config.num_experts_per_tok
    num_tokens = -(-config.num_experts // per_token)
    ids = np.arange(num_tokens * per_token).reshape(num_tokens, per_token) % config.num_experts
    states = np.zeros((num_tokens, config.hidden_size), ml_dtypes.bfloat16)
    layer.forward(states, ids, np.ones(ids.shape, np.float32))


def _time(layers: Sequence[BaseMoEWrapper], batch: Batch, seconds: float) -> Timing:
    config = layers[0].config
    routings = draw_routings(config, len(batch.ids))
    num_used = [len(np.unique(ids)) for ids, _ in routings]
    used: list[int] = []
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _LEAST_CALLS or time.perf_counter() < end:
        layer = layers[len(times) % len(layers)]
        turn = len(times) // len(layers) % len(routings)
        ids, weights = routings[turn]
        start = time.perf_counter()
        layer.forward(batch.hidden_states, ids, weights)
        times.append(time.perf_counter() - start)
        used.append(num_used[turn])
    values = config.hidden_size * config.moe_intermediate_size * (3 if config.activation.gated else 2)
    weight_bytes = layers[0].expert_bytes * float(np.mean(used))
    return Timing(float(np.mean(times)), weight_bytes, 2.0 * values * batch.ids.size)


# ---- in a child process, since an instruction set is chosen once, at import ----


def measure_in_child(
    isa: str,
    path: Path,
    layers: Sequence[int],
    num_tokens: Sequence[int],
    seconds: float,
    num_experts: int,
    threads: int | None,
) -> Measured:
    """Do what `measure` does, with `draw_sample(config, num_experts)`, on an instruction set.

    Raises
    ------
    RuntimeError
        The child failed: says how.
    """
    command = [sys.executable, "-P", "-m", __package__, "_measure", str(path.absolute())]
    command += [f"--layers={_joined(layers)}", f"--tokens={_joined(num_tokens)}", f"--seconds={seconds}"]
    command += [f"--experts={num_experts}", *([] if threads is None else [f"--threads={threads}"])]
    modules = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    environment = {**os.environ, "KTMOE_ISA": isa, "PYTHONPATH": modules}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise RuntimeError(f"ended by {signal.Signals(-done.returncode).name}")
    if done.returncode == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return _decode(json.loads(done.stdout))


def run_child(arguments: argparse.Namespace) -> int:
    """Print what `measure` finds, for `measure_in_child`; the command ``_measure``."""
    layers = [
        KTMoEWrapper.from_pretrained(arguments.path, layer, cpuinfer_threads=arguments.threads)
        for layer in arguments.layers
    ]
    sample = draw_sample(layers[0].config, arguments.experts)
    say_json(_encode(measure(layers, sample, arguments.tokens, arguments.seconds)))
    return 0


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _encode(measured: Measured) -> dict[str, Any]:
    results = {
        size: {"shape": rows.shape, "bfloat16": base64.b64encode(rows.tobytes()).decode()}
        for size, rows in measured.results.items()
    }
    return {**dataclasses.asdict(dataclasses.replace(measured, results={})), "results": results}


def _decode_rows(shape: list[int], bfloat16: str) -> Array:
    return np.frombuffer(base64.b64decode(bfloat16), ml_dtypes.bfloat16).reshape(shape)


def _decode(value: dict[str, Any]) -> Measured:
    results = {int(size): _decode_rows(**rows) for size, rows in value.pop("results").items()}
    timings = {int(size): Timing(**timing) for size, timing in value.pop("timings").items()}
    return Measured(**value, results=results, timings=timings)
