"""Overhead per call of torch and JAX arrays over NumPy: `python -m bench.ops.bench_kinds --help`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..core.measure import Spread
from ..core.records import DEFAULT_PATH, Results

__all__ = ["main"]

_SIZES = {"num_experts": 8, "num_experts_per_tok": 8, "hidden_size": 64, "moe_intermediate_size": 32}
_ROUNDS = 20


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m bench.ops.bench_kinds", description=__doc__)
    p.add_argument("--tokens", type=int, default=1)
    p.add_argument("--calls", type=int, default=20000, help="calls per kind")
    p.add_argument("--kinds", default="NumPy,torch,JAX", help="some of NumPy, torch, JAX; NumPy is needed")
    p.add_argument("--out", type=Path, default=DEFAULT_PATH, help="JSON lines, appended to")
    p.add_argument("--machine", help="the machine's name in the records; default: its CPU model")
    return p.parse_args()


def _of_torch(array: Any) -> Any:
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _of_jax(array: Any) -> Any:
    import jax

    with jax.enable_x64(True):
        return jax.device_put(array, jax.devices("cpu")[0])


_MAKE: dict[str, Callable[[Any], Any]] = {"NumPy": lambda array: array, "torch": _of_torch, "JAX": _of_jax}


def _calls(kinds: list[str], tokens: int) -> dict[str, Callable[[], Any]]:
    """A call for each kind, which have given the same bits."""
    from ktmoe_np import KTMoEWrapper
    from ktmoe_np.arrays.host import as_numpy

    rng = np.random.default_rng(0)
    moe = KTMoEWrapper(0, **_SIZES)
    num, hidden, inter = _SIZES["num_experts"], _SIZES["hidden_size"], _SIZES["moe_intermediate_size"]
    shapes = (num, inter, hidden), (num, inter, hidden), (num, hidden, inter)
    moe.load_weights_from_tensors(*(rng.standard_normal(s).astype(ml_dtypes.bfloat16) for s in shapes))
    slots = tokens, _SIZES["num_experts_per_tok"]
    batch = (
        rng.standard_normal((tokens, hidden)).astype(ml_dtypes.bfloat16),
        rng.integers(0, num, slots),
        rng.random(slots, np.float32),
    )
    calls = {}
    expected = moe.forward(*batch)
    for kind in kinds:
        arrays = [_MAKE[kind](array) for array in batch]
        calls[kind] = lambda arrays=arrays: moe.forward(*arrays)
        answer = as_numpy(calls[kind](), kind)
        if not np.array_equal(answer.view(np.uint16), expected.view(np.uint16)):
            raise SystemExit(f"{kind}: got another result than NumPy's")
    return calls


def main() -> int:
    options = _parse()
    kinds = list(dict.fromkeys(["NumPy", *options.kinds.split(",")]))
    calls = _calls(kinds, options.tokens)
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(_ROUNDS):  # in turns, so that others on the machine hit all kinds alike
        for kind, call in calls.items():
            for _ in range(options.calls // _ROUNDS):
                begin = time.perf_counter()
                call()
                samples[kind].append(time.perf_counter() - begin)
    results = Results(options.out, options.machine)
    print(f"{results.machine}\n{'':8} us a call  more than NumPy")
    plain = Spread.of(samples["NumPy"]).ms
    for kind in kinds:
        spread = Spread.of(samples[kind])
        more = 1e3 * (spread.ms - plain)
        results.add("kinds", arrays=kind, tokens=options.tokens, more_us=round(more, 3), **vars(spread))
        print(f"{kind:8} {1e3 * spread.ms:9.1f} {more:15.1f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
