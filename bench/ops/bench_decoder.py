"""Times decoding by a model with layers of Qwen3-30B-A3B: `python -m bench.ops.bench_decoder --help`.

Layers have all experts and heads, few of them, of random weights; the vocabulary is small. Looked at is
what becomes of the speed of experts inside a program in NumPy, and what that costs beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ktmoe_np import isa_info
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.io.safetensors.writer import write_safetensors
from ktmoe_np.models import MoEDecoder
from ktmoe_np.models.attention import Attention
from ktmoe_np.models.layer import DecoderLayer

from ..core.records import DEFAULT_PATH, Results
from ..core.shapes import SHAPES, Shape

_VOCABULARY = 1024
_HEADS, _KV_HEADS, _HEAD_DIM = 32, 4, 128
_WARM_UP = 8


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m bench.ops.bench_decoder", description=__doc__)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--tokens", type=int, default=96, help="to decode, one after the other")
    p.add_argument("--method", default="BF16")
    p.add_argument("--threads", type=int, help="default: the CPUs that this process may use")
    p.add_argument("--limit-seconds", type=float, default=0.5)
    p.add_argument("--checkpoint-dir", help="where the checkpoint is written; default: a temporary directory")
    p.add_argument("--out", type=Path, default=DEFAULT_PATH, help="JSON lines, appended to")
    p.add_argument("--machine", help="the machine's name in the records; default: its CPU model")
    return p.parse_args()


def _drawn(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, Any]:
    """Numbers of both signs whose sizes are about 1 / sqrt(columns), by their bits: gigabytes in seconds."""
    exponent = 127 - round(np.log2(shape[-1]) / 2)
    bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16).reshape(shape)
    return (bits & 0x807F | exponent << 7).view(ml_dtypes.bfloat16)


def write_checkpoint(directory: Path, shape: Shape, num_layers: int) -> None:
    """Write a Qwen3-MoE checkpoint, one file per layer."""
    rng = np.random.default_rng(0)
    hidden, inter, ones = shape.hidden, shape.inter, np.ones(shape.hidden, ml_dtypes.bfloat16)
    files = {"model.norm.weight": "rest", "model.embed_tokens.weight": "rest"}
    rest = {"model.norm.weight": ones, "model.embed_tokens.weight": _drawn(rng, _VOCABULARY, hidden)}
    write_safetensors(directory / "rest.safetensors", rest)
    head = np.ones(_HEAD_DIM, ml_dtypes.bfloat16)
    for i in range(num_layers):
        tensors = {
            "input_layernorm": ones,
            "post_attention_layernorm": ones,
            "self_attn.q_norm": head,
            "self_attn.k_norm": head,
            "self_attn.q_proj": _drawn(rng, _HEADS * _HEAD_DIM, hidden),
            "self_attn.k_proj": _drawn(rng, _KV_HEADS * _HEAD_DIM, hidden),
            "self_attn.v_proj": _drawn(rng, _KV_HEADS * _HEAD_DIM, hidden),
            "self_attn.o_proj": _drawn(rng, hidden, _HEADS * _HEAD_DIM),
            "mlp.gate": _drawn(rng, shape.experts, hidden),
        }
        for e in range(shape.experts):
            tensors |= {f"mlp.experts.{e}.{name}_proj": _drawn(rng, inter, hidden) for name in ("gate", "up")}
            tensors[f"mlp.experts.{e}.down_proj"] = _drawn(rng, hidden, inter)
        named = {f"model.layers.{i}.{name}.weight": value for name, value in tensors.items()}
        write_safetensors(directory / f"layer{i}.safetensors", named)
        files |= dict.fromkeys(named, f"layer{i}")
    index = {"weight_map": {name: f"{file}.safetensors" for name, file in files.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(_config(shape, num_layers)))


def _config(shape: Shape, num_layers: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "hidden_act": shape.activation,
        "vocab_size": _VOCABULARY,
        "hidden_size": shape.hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.per_token,
        "moe_intermediate_size": shape.inter,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
    }


@contextmanager
def _timed(owner: type, name: str, seconds: list[float]) -> Iterator[None]:
    """Add what a method takes to the last of some times."""
    method = getattr(owner, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*arguments, **named)
        finally:
            seconds[-1] += time.perf_counter() - started

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, method)


def _decode(model: MoEDecoder, num_tokens: int) -> dict[str, list[float]]:
    """Seconds of each token: in all, in the layers, in their attention and in their experts."""
    times: dict[str, list[float]] = {name: [] for name in ("all", "layers", "attention", "experts")}
    cache, token = model.new_cache(), 1
    layers, attention = times["layers"], times["attention"]
    with _timed(DecoderLayer, "forward", layers), _timed(Attention, "forward", attention):
        for _ in range(num_tokens):
            layers.append(0.0)
            attention.append(0.0)
            before, started = model.seconds_in_experts, time.perf_counter()
            (logits,) = model.forward([[token]], [cache])
            times["all"].append(time.perf_counter() - started)
            times["experts"].append(model.seconds_in_experts - before)
            token = int(logits[-1].argmax())
    return {name: values[_WARM_UP:] for name, values in times.items()}


def _alone(model: MoEDecoder, shape: Shape, num_tokens: int) -> list[float]:
    """Seconds of the same layers' experts with nothing between their calls."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, shape.hidden)).astype(ml_dtypes.bfloat16)
    weights, out = np.full((1, shape.per_token), 1 / shape.per_token, np.float32), np.empty_like(x)
    times = []
    for _ in range(num_tokens):
        ids = [rng.permutation(shape.experts)[None, : shape.per_token] for _ in model.experts]
        started = time.perf_counter()
        for experts, chosen in zip(model.experts, ids, strict=True):
            experts.forward(x, chosen, weights, out=out)
        times.append(time.perf_counter() - started)
    return times[_WARM_UP:]


def main() -> int:
    options = _parse()
    shape = SHAPES["qwen3"]
    results = Results(options.out, options.machine)
    with tempfile.TemporaryDirectory(dir=options.checkpoint_dir) as directory:
        write_checkpoint(Path(directory), shape, options.layers)
        model = MoEDecoder.from_pretrained(directory, options.method, cpuinfer_threads=options.threads)
        engine = model.experts[0].cpu_infer
        limits = [float(ext.measure_limits(engine, options.limit_seconds)["read_bytes_per_s"])]
        alone = _alone(model, shape, options.tokens + _WARM_UP)
        times = _decode(model, options.tokens + _WARM_UP)
        limits.append(float(ext.measure_limits(engine, options.limit_seconds)["read_bytes_per_s"]))
    limit = statistics.mean(limits)
    ms = {name: 1e3 * statistics.median(values) / options.layers for name, values in times.items()}
    read_bytes = 2 * shape.per_token * shape.weights_per_expert
    python = ms["layers"] - ms["attention"] - ms["experts"]
    record = results.add(
        "decoder",
        shape=shape.name,
        method=options.method,
        isa=isa_info()["active"],
        layers=options.layers,
        experts_ms=round(ms["experts"], 4),
        experts_alone_ms=round(1e3 * statistics.median(alone) / options.layers, 4),
        experts_of_read_limit=round(read_bytes / limit / ms["experts"] * 1e3, 3),
        read_gb_per_s=[round(value / 1e9, 1) for value in limits],
        python_ms=round(python, 4),
        python_of_experts=round(python / ms["experts"], 3),
        attention_ms=round(ms["attention"], 4),
        token_ms=round(ms["all"] * options.layers, 3),
    )
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
