"""What autograd costs a step of training, beside NumPy's: `python -m bench.ops.bench_autograd --help`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.cases import make_cases
from ..core.layer import Layer
from ..core.measure import Spread
from ..core.records import DEFAULT_PATH, Results
from ..core.shapes import SHAPES, available_memory, fit

__all__ = ["main"]


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m bench.ops.bench_autograd", description=__doc__)
    p.add_argument("--shape", default="qwen3", help=f"one of {', '.join(SHAPES)}")
    p.add_argument("--tokens", default="512", help="batch sizes")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--seconds", type=float, default=10.0, help="for each of NumPy and autograd")
    p.add_argument("--out", type=Path, default=DEFAULT_PATH, help="JSON lines, appended to")
    p.add_argument("--machine", help="the machine's name in the records; default: its CPU model")
    return p.parse_args()


def _steps(layer: Layer, tokens: int) -> dict[str, Callable[[], Any]]:
    """A step of each kind on its own layer object: new adapters, forward, backward."""
    import torch

    from ktmoe_np import KTMoEWrapper
    from ktmoe_np.arrays.host import as_numpy
    from ktmoe_np.torch import lora_parameters, moe_sft

    s = layer.shape
    sizes: Any = (0, s.experts, s.per_token, s.hidden, s.inter)
    options: Any = {"activation": s.activation, "lora_rank": s.rank, "lora_alpha": s.alpha}
    plain, autograd = (KTMoEWrapper(*sizes, mode="sft", method="BF16_SFT", **options) for _ in range(2))
    biases = {name: getattr(layer, name) for name in ("gate_bias", "up_bias", "down_bias")}
    given = {name: bias for name, bias in biases.items() if bias is not None}
    lora = {name: matrix.astype(np.float32) for name, matrix in layer.lora.items()}
    for sft in (plain, autograd):
        sft.load_weights_from_tensors(layer.gate, layer.up, layer.down, **given)
        sft.init_lora_weights(**lora)
    case = make_cases(s, tokens)[0]
    grad_output = case.grad
    assert grad_output is not None
    parameters = lora_parameters(autograd)

    def by_numpy() -> Any:
        plain.update_lora_weights(**lora)
        out = plain.forward_sft(case.x, case.ids, case.weights)
        return out, plain.backward(grad_output)

    of_torch = [torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for a in (case.x, grad_output)]
    ids, weights = torch.from_numpy(case.ids), torch.from_numpy(case.weights)

    def by_autograd() -> Any:
        x = of_torch[0].detach().requires_grad_()
        for p in parameters.values():
            p.grad = None
        out = moe_sft(autograd, parameters, x, ids, weights)
        out.backward(of_torch[1])
        return out, x.grad

    (out, gradients), (y, grad_x) = by_numpy(), by_autograd()
    pairs = ((as_numpy(y.detach(), "y"), out), (as_numpy(grad_x, "grad"), gradients.grad_input))
    if not all(np.array_equal(a.view(np.uint16), b.view(np.uint16)) for a, b in pairs):
        raise SystemExit("autograd: got other results than NumPy's")
    return {"NumPy": by_numpy, "autograd": by_autograd}


def main() -> int:
    options = _parse()
    results = Results(options.out, options.machine)
    shape = replace(SHAPES[options.shape], rank=options.rank)
    layer = Layer.create(fit(shape, 4.0, available_memory()))
    print(f"{results.machine}\n{'tokens':>6} {'':9} ms/step  vs NumPy")
    for tokens in map(int, options.tokens.split(",")):
        steps = _steps(layer, tokens)
        samples: dict[str, list[float]] = {name: [] for name in steps}
        while sum(samples["NumPy"]) < options.seconds:  # in turns: others on the machine hit both alike
            for name, step in steps.items():
                begin = time.perf_counter()
                step()
                samples[name].append(time.perf_counter() - begin)
        plain = Spread.of(samples["NumPy"])
        for name, times in samples.items():
            spread = Spread.of(times)
            ratio = round(spread.ms / plain.ms, 4)
            results.add("autograd", by=name, shape=options.shape, tokens=tokens, ratio=ratio, **vars(spread))
            print(f"{tokens:6} {name:9} {spread.ms:9.1f} {ratio:11.3f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
