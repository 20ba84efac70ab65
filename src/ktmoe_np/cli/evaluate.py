"""`ktmoe eval`: how well a model expects a text with its experts computed by one method or another."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..io.gguf.experts import is_gguf
from ..models import MoEDecoder, bits_per_token, load_tokenizer
from .arguments import Dtype
from .plot import check_plot, draw_bits
from .progress import Progress
from .ranks import communicator, is_first
from .terminal import say, say_json

__all__ = ["METHODS", "run"]

#: What is compared unless it is told.
METHODS = ("BF16", "AMXINT8", "AMXINT4", "MOE_INT4")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; always 0."""
    if arguments.plot:
        check_plot(arguments.plot)
    path, file = arguments.path, Path(arguments.text)
    text = _beginning(file, arguments.bytes)
    num_bytes = len(text.encode())
    tokens = np.array(load_tokenizer(path).encode(text))
    if len(tokens) < 2:
        raise ValueError(f"{file}: got {len(tokens)} tokens, expected at least 2")
    has_own = arguments.experts or is_gguf(path)
    methods = arguments.methods or ([None] if has_own else METHODS)
    rows = []
    with Progress(len(methods), "evaluating") as progress:
        for method in methods:
            progress.step(method or str(arguments.experts or path))
            model = _load(arguments, method)
            for dtype in _chosen(model, arguments.activation_dtype):
                model.set_activation_dtype(dtype)
                rows.append(_measure(model, tokens, num_bytes))
    value = {"model": str(path), "text": str(file), "bytes": num_bytes, "methods": rows}
    if arguments.plot and is_first():
        bits = {f"{row['method']}, {row['activation_dtype']}": row["bits_per_byte"] for row in rows}
        draw_bits(arguments.plot, bits, f"{num_bytes} bytes of {file.name}")
    if arguments.json:
        say_json(value)
    else:
        say(_table(value))
        if arguments.plot:
            say(f"The differences are drawn in {arguments.plot}")
    return 0


def _load(arguments: argparse.Namespace, method: str | None) -> MoEDecoder:
    return MoEDecoder.from_pretrained(
        arguments.path,
        method,
        adapter=arguments.adapter,
        experts_path=arguments.experts,
        cpuinfer_threads=arguments.threads,
        comm=communicator(),
    )


def _chosen(model: MoEDecoder, dtypes: list[Dtype]) -> list[Dtype]:
    """Of several dtypes those that a model has; a single one is refused by the model itself."""
    if len(dtypes) == 1:
        return dtypes
    return [
        d for d in dtypes if d is None or all(d in experts.activation_dtypes for experts in model.experts)
    ]


def _beginning(file: Path, num_bytes: int) -> str:
    """Read as much of a text, without half a letter at its end."""
    with file.open("rb") as opened:
        data = opened.read(num_bytes)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if error.start < len(data) - 3:
            raise ValueError(f"{file}: is not UTF-8: {error.reason} at byte {error.start}") from error
        return data[: error.start].decode()


def _measure(model: MoEDecoder, tokens: Any, num_bytes: int) -> dict[str, Any]:
    started = time.perf_counter()
    bits = bits_per_token(model, tokens)
    return {
        "method": model.experts[0].method,
        "activation_dtype": model.activation_dtypes[0],
        "bits_per_byte": bits * len(tokens) / num_bytes,
        "seconds": time.perf_counter() - started,
    }


def _table(value: dict[str, Any]) -> str:
    first = value["methods"][0]["bits_per_byte"]
    lines = [
        f"{value['bytes']} bytes of {value['text']}",
        f"{'method':<16}{'activations':<12}{'bits per byte':>14}{'vs first':>10}",
    ]
    for row in value["methods"]:
        excess, dtype = row["bits_per_byte"] - first, row["activation_dtype"]
        lines.append(f"{row['method']:<16}{dtype:<12}{row['bits_per_byte']:>14.4f}{excess:>+10.4f}")
    return "\n".join(lines)
