"""Measures what encoding costs, in bits per byte of a text: `python -m bench.ops.bench_loss --help`.

The experts of the packaged model are encoded as in the other benches; each row is measured with activations
in bf16 and in int8. Nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ktmoe_np import KTMoEWrapper
from ktmoe_np.io import load_experts
from ktmoe_np.models import EMBEDDED_MODEL, EMBEDDED_TEXT, MoEDecoder, bits_per_token

from ..core.encoders_gguf import GGUF_FORMATS, GgufFormat
from ..core.layer import Array, Layer, to_float32
from ..core.methods import METHODS
from ..core.options import ACTIVATION_DTYPES
from ..core.records import DEFAULT_PATH, Results
from ..core.shapes import Shape

__all__ = ["main"]

#: The type of rows that are not whole blocks of 256 values, as llama.cpp chooses it.
_FALLBACK = {
    "Q6_K": "Q8_0",
    "Q5_K": "Q5_1",
    "Q4_K": "Q5_0",
    "Q3_K": "IQ4_NL",
    "Q2_K": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
}

_WEIGHTS = (
    *("BF16", "AMXINT8", "AMXINT4", "MOE_INT8", "MOE_INT4", "RAWINT4", "MXFP4", "NVFP4"),
    *(f"LLAMAFILE-{name}" for name in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_XS", "Q3_K", "Q2_K")),
)


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m bench.ops.bench_loss", description=__doc__)
    p.add_argument("--bytes", type=int, default=16384, help="of Alice in Wonderland")
    p.add_argument(
        "--weights", type=lambda text: text.split(","), default=_WEIGHTS, help="methods of the benches"
    )
    p.add_argument("--out", type=Path, default=DEFAULT_PATH, help="JSON lines, appended to")
    p.add_argument("--machine", help="the machine's name in the records; default: its CPU model")
    options = p.parse_args()
    for name in options.weights:
        if name not in METHODS or METHODS[name].operation != "forward":
            p.error(f"--weights: got {name!r}, expected a method of bench_moe")
    return options


def _bench_layer(experts: Any, weights: tuple[Array, Array, Array]) -> Layer:
    """See the experts of a layer of the model as a layer of the benches."""
    c = experts.config
    shape = Shape("packaged", c.hidden_size, c.moe_intermediate_size, c.num_experts, c.num_experts_per_tok)
    return Layer(shape, -1, *weights, None, None, None)


def _blocks(fmt: GgufFormat, weights: Array) -> tuple[Array, str]:
    """Encode matrices [E, N, K] in a GGUF type, or in the next one that has whole blocks; with its name."""
    if weights.shape[2] % fmt.block:
        fmt = GGUF_FORMATS[_FALLBACK[fmt.name]]
    fields = fmt.encode_blocks(to_float32(weights).reshape(-1, fmt.block))
    return np.concatenate(fields, axis=1).reshape(*weights.shape[:2], -1), fmt.name


def _encoded(name: str, layer: Layer) -> dict[str, Any]:
    """Encode a layer to the arguments it is loaded from."""
    if not name.startswith("LLAMAFILE-"):
        return METHODS[name].encode(layer)
    arguments: dict[str, Any] = {}
    for role in ("gate", "up", "down"):
        fmt = GGUF_FORMATS[name.removeprefix("LLAMAFILE-")]
        arguments[f"{role}_proj"], arguments[f"{role}_format"] = _blocks(fmt, getattr(layer, role))
    return arguments


def _model_with(name: str, matrices: list[tuple[Array, Array, Array]]) -> MoEDecoder:
    """Make the packaged model with its experts in that encoding."""
    model = MoEDecoder.from_pretrained()
    for layer, weights in zip(model._layers, matrices, strict=True):
        c = layer.experts.config
        sizes = (c.num_experts, c.num_experts_per_tok, c.hidden_size, c.moe_intermediate_size)
        experts = KTMoEWrapper(layer.index, *sizes, method=METHODS[name].library_name)
        experts.load_weights_from_tensors(**_encoded(name, _bench_layer(experts, weights)))
        layer.experts = experts
    return model


def _matrices(model: MoEDecoder) -> Iterator[tuple[Array, Array, Array]]:
    """Yield gate, up and down [E, N, K] of each layer."""
    for i, experts in enumerate(model.experts):
        held = load_experts(EMBEDDED_MODEL, i, experts.config).projections
        gate, up, down = (np.stack(held[f"{role}_proj"].codes) for role in ("gate", "up", "down"))
        yield gate, up, down


def main() -> int:
    options = _parse()
    results = Results(options.out, options.machine)
    tokens = np.frombuffer(EMBEDDED_TEXT.read_bytes()[: options.bytes], np.uint8)
    matrices = list(_matrices(MoEDecoder.from_pretrained()))
    print(f"| weights | {' | '.join(ACTIVATION_DTYPES)} |\n|---|---|---|")
    for name in options.weights:
        model, cells = _model_with(name, matrices), []
        for dtype in ACTIVATION_DTYPES:
            if any(dtype not in experts.activation_dtypes for experts in model.experts):
                cells.append("")
                continue
            model.set_activation_dtype(dtype)
            bits = bits_per_token(model, tokens)
            results.add("loss", weights=name, activation_dtype=dtype, bytes=len(tokens), bits_per_byte=bits)
            cells.append(f"{bits:.4f}")
        print(f"| {name.removeprefix('LLAMAFILE-')} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
