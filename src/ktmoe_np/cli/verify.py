"""`ktmoe verify`: a layer of the user's own checkpoint, against the reference."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..experts import KTMoEWrapper
from ..inference import BaseMoEWrapper
from ..io.converted.manifest import manifest_path
from ..io.gguf.experts import is_gguf
from . import digest, verify_quantized
from .expert_source import open_layer
from .machine import busy_note
from .measure import measure
from .progress import Progress
from .sample import Expected, draw_sample, experts_in_time
from .table import Row, as_json, counted, machine_limits, make_rows, summary, wrap
from .terminal import say, say_json

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Check a layer, or what was converted; 0 when all is right, else 1."""
    if arguments.digest:
        return digest.run(arguments)
    if arguments.path is None:
        raise ValueError("path: got none, expected a checkpoint; with --digest it may be left out")
    path = Path(arguments.path)
    if not is_gguf(path) and manifest_path(path).exists():
        return verify_quantized.run(arguments)
    busy, dtype = busy_note(), arguments.activation_dtype
    config, experts = open_layer(path, arguments.layer, arguments.method, dtype)
    if dtype is not None:
        _load(arguments, config.layer_idx)  # it refuses what the layer does not have, before the reference
    with Progress(3 + len(arguments.tokens)) as progress:
        progress.step("asking the reference")
        sample = draw_sample(config, experts_in_time(config, experts, arguments.check_seconds))
        expected = Expected(sample, config, experts)
        del experts  # where a layout had to be copied, one copy is enough
        moe = _load(arguments, config.layer_idx)
        run = measure([moe], sample, arguments.tokens, arguments.seconds, progress.step)
    about = _describe(moe, path) | {"threads": run.threads, "checked_experts": expected.num_experts}
    limits = machine_limits([run])
    rows = make_rows([run], expected, limits)
    right = all(row.within_bound for row in rows)
    if arguments.json:
        say_json({"within_bound": right, **about, "rows": as_json(rows), "limits": limits})
    else:
        say(_text(about, rows, limits, busy))
    return 0 if right else 1


def _load(arguments: argparse.Namespace, layer_idx: int) -> BaseMoEWrapper:
    return KTMoEWrapper.from_pretrained(
        arguments.path,
        layer_idx,
        arguments.method,
        cpuinfer_threads=arguments.threads,
        activation_dtype=arguments.activation_dtype,
    )


def _describe(moe: BaseMoEWrapper, path: Path) -> dict[str, Any]:
    config = moe.config
    return {
        "path": str(path),
        "layer": config.layer_idx,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "hidden_size": config.hidden_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "activation": config.activation.name,
        "weight_bytes": moe.expert_bytes * config.num_experts,  # as they are computed with, scales included
        "method": moe.method,
        "activation_dtype": moe.activation_dtype,
    }


def _text(about: dict[str, Any], rows: Sequence[Row], limits: dict[str, Any], busy: str | None) -> str:
    sizes = (
        f"{about['num_experts']} experts, {about['num_experts_per_tok']} per token, hidden size "
        f"{about['hidden_size']}, intermediate size {about['moe_intermediate_size']}, {about['activation']}; "
        f"{about['weight_bytes'] / 1e6:.3g} MB. Method {about['method']} with {about['activation_dtype']} "
        "activations, "
        f"{counted(about['threads'], 'thread')}; results of {about['checked_experts']} experts compared with "
        "the NumPy reference."
    )
    title = f"Layer {about['layer']} of {about['path']}"
    return "\n".join([title, wrap(sizes), "", summary(rows, limits, rows[0].isa, {}, busy)])
