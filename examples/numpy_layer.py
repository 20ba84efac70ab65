"""Run one layer of a checkpoint with NumPy, check it against the reference, and time it.

    python examples/numpy_layer.py [CHECKPOINT] [--layer 0] [--method AMXINT4]

Without a checkpoint, the small model of the package is used.
"""

import argparse
import time

import ml_dtypes
import numpy as np

import ktmoe_np
from ktmoe_np import BaseMoEWrapper, KTMoEWrapper
from ktmoe_np.io import load_experts
from ktmoe_np.models import EMBEDDED_MODEL
from ktmoe_np.reference import error_bound, moe_forward


def draw_batch(config: ktmoe_np.MoEConfig, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states [T, H], expert ids [T, P] and routing weights [T, P], which a router would give."""
    rng = np.random.default_rng(num_tokens)
    x = rng.standard_normal((num_tokens, config.hidden_size)).astype(ml_dtypes.bfloat16)
    scores = rng.standard_normal((num_tokens, config.num_experts))
    ids = np.argsort(-scores, axis=1)[:, : config.num_experts_per_tok]
    weights = np.exp(np.take_along_axis(scores, ids, axis=1))
    return x, ids, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def error_of_bound(moe: BaseMoEWrapper, checkpoint: str, batch: tuple) -> float:
    """The largest difference from the reference, as a fraction of what rounding allows."""
    experts = load_experts(checkpoint, moe.layer_idx)
    matrices = [np.stack(projection.codes) for projection in (experts.gate, experts.up, experts.down)]
    options = {"activation": moe.config.activation, "out_dtype": np.float32}
    got = moe.forward(*batch, out=np.empty(batch[0].shape, np.float32))
    wanted = moe_forward(*batch, *matrices, **options)
    return float(np.max(np.abs(got - wanted) / error_bound(*batch, *matrices, **options)))


def milliseconds(call) -> float:
    """The fastest of several calls."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


def main() -> None:
    """Run, check and time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=EMBEDDED_MODEL)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--method", help="how weights are encoded; by default as in the checkpoint")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    arguments = parser.parse_args()

    moe = KTMoEWrapper.from_pretrained(arguments.checkpoint, arguments.layer, method=arguments.method)
    print(moe)
    print(f"instruction set: {ktmoe_np.isa_info()['active']}")

    x, ids, weights = draw_batch(moe.config, 16)
    y = moe.forward(x, ids, weights)
    if moe.method == "BF16":
        error = error_of_bound(moe, arguments.checkpoint, (x, ids, weights))
        print(f"error: {error:.2%} of what rounding allows")
    alone = moe.forward(x[3:4], ids[3:4], weights[3:4])
    print(f"token 3 alone and in a batch: {'equal' if (alone[0] == y[3]).all() else 'NOT equal'}")

    for tokens in arguments.tokens:
        batch = draw_batch(moe.config, tokens)
        out = np.empty_like(batch[0])  # written in place: no allocation while decoding
        print(f"{tokens:5d} tokens: {milliseconds(lambda: moe.forward(*batch, out=out)):8.3f} ms")  # noqa: B023


if __name__ == "__main__":
    main()
