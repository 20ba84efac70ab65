"""`ktmoe inspect`: the experts of a checkpoint, whether they fit, and how fast they can be read."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from ..io.inspect import CheckpointReport, LayerReport, inspect_checkpoint
from .info import measure_limits
from .machine import busy_note, memory_sizes, number_ranges
from .rank_plan import plan, plan_lines
from .table import amount, counted, rounded, wrap
from .terminal import say, say_json

__all__ = ["run"]

_KINDS = {
    "safetensors": "safetensors of Hugging Face",
    "converted": "files of ktmoe convert",
    "gguf": "GGUF",
}

#: Columns of the names of facts, and of all of a line.
_INDENT, _WIDTH = 18, 98

_Tell = Callable[[LayerReport], str]


def run(arguments: argparse.Namespace) -> int:
    """Print what a checkpoint has; always 0."""
    report = inspect_checkpoint(arguments.path)
    memory = memory_sizes()
    busy = limits = None
    if not arguments.no_measure:
        busy = busy_note()
        limits = measure_limits(arguments.seconds, arguments.threads)
    value = _as_json(report, memory, limits)
    value["plan"] = None
    if arguments.ranks is not None:
        value["plan"] = plan(report, arguments.ranks, arguments.placement, _room(memory))
    if arguments.json:
        say_json(value)
    else:
        say(_text(report, value, busy))
    return 0


def _as_json(
    report: CheckpointReport, memory: dict[str, int | None], limits: dict[str, Any] | None
) -> dict[str, Any]:
    """Put what the checkpoint has beside what the machine can do."""
    room = _room(memory)
    return {
        "path": str(report.path),
        "kind": report.kind,
        "model_type": report.model_type,
        "architecture": report.architecture,
        "num_layers": report.num_layers,
        "layers": [_layer_as_json(layer) for layer in report.layers],
        "further_layers": [_layer_as_json(layer) for layer in report.further_layers],
        "num_bytes": report.num_bytes,
        "token_bytes": report.token_bytes,
        "memory": memory,
        "fits_in_memory": None if room is None else report.num_bytes <= room,
        "limits": limits,
        "tokens_per_s": limits and report.token_bytes and limits["read_bytes_per_s"] / report.token_bytes,
    }


def _room(memory: dict[str, int | None]) -> int | None:
    """Bytes of memory that this process may use."""
    return memory["limit_bytes"] or memory["total_bytes"]


def _layer_as_json(layer: LayerReport) -> dict[str, Any]:
    config = layer.config
    return {
        "layer": config.layer_idx,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "hidden_size": config.hidden_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "activation": config.activation.name,
        "formats": dict(layer.formats),
        "method": layer.method,
        "problem": layer.problem,
        "group_size": layer.group_size,
        "int8_projections": list(layer.int8_projections),
        "activation_dtype": layer.activation_dtype,
        "model_activation_dtype": layer.model_activation_dtype,
        "num_bytes": layer.num_bytes,
        "token_bytes": layer.token_bytes,
    }


# ---- as text ----


def _text(report: CheckpointReport, value: dict[str, Any], busy: str | None) -> str:
    names = [name for name in (report.architecture, report.model_type) if name is not None]
    model = f"{names[0]} ({names[1]})" if len(names) == 2 else "".join(names) or "unknown model"
    lines = [str(report.path), f"{model}, {_KINDS[report.kind]}", ""]
    for name, said in _facts(report, value):
        lines += textwrap.wrap(
            said,
            _WIDTH,
            initial_indent=f"{name:<{_INDENT}}",
            subsequent_indent=" " * _INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
    if value["plan"] is not None:
        lines += ["", *plan_lines(value["plan"])]
    if value["tokens_per_s"]:
        lines += ["", wrap(_speed(value)), *([wrap(busy)] if busy else [])]
    return "\n".join(lines)


def _facts(report: CheckpointReport, value: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what is known without measuring."""
    layers = report.layers
    facts: list[tuple[str, _Tell]] = [
        ("Experts", _experts),
        ("Sizes", _sizes),
        ("Activation", lambda layer: layer.config.activation.name),
        ("Format", _format),
        ("Method", _method),
        ("Activation dtype", _activation_dtype),
        ("Bytes", lambda layer: f"{amount(layer.num_bytes)} per layer"),
        ("Read per token", lambda layer: f"{amount(layer.token_bytes)} per layer"),
    ]
    said = {name: _of_layers(layers, tell) for name, tell in facts}
    said["Bytes"] += f"; {amount(report.num_bytes)} in all"
    said["Read per token"] += f"; {amount(report.token_bytes)} in all"
    lines = [("Layers", _layers(report)), *said.items()]
    if report.further_layers:
        numbers = _numbered([layer.config.layer_idx for layer in report.further_layers])
        size = amount(sum(layer.num_bytes for layer in report.further_layers))
        lines.append(("Not counted", f"{size} of experts behind the model's last layer ({numbers})"))
    return [*lines, *_refused(layers), ("Memory", _memory(report, value))]


def _refused(layers: Sequence[LayerReport]) -> list[tuple[str, str]]:
    """Why the first of the layers has no method that has none, and how many have none either."""
    problems = [layer.problem for layer in layers if layer.problem is not None]
    if not problems:
        return []
    more = len(problems) - 1
    return [("Refused", problems[0] + (f"; and {counted(more, 'layer')} more" if more else ""))]


def _of_layers(layers: Sequence[LayerReport], tell: _Tell) -> str:
    """Describe all layers at once or, where they differ, each group of equal ones."""
    found: dict[str, list[int]] = {}
    for layer in layers:
        found.setdefault(tell(layer), []).append(layer.config.layer_idx)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{said} ({_numbered(numbers)})" for said, numbers in found.items())


def _numbered(numbers: Sequence[int]) -> str:
    return f"layer{'' if len(numbers) == 1 else 's'} {number_ranges(numbers)}"


def _layers(report: CheckpointReport) -> str:
    numbers = [layer.config.layer_idx for layer in report.layers]
    if report.num_layers is None:
        return f"{number_ranges(numbers)} with experts"
    if len(numbers) == report.num_layers:
        return f"{report.num_layers}, all with experts"
    return f"{report.num_layers}, of which {number_ranges(numbers)} with experts"


def _experts(layer: LayerReport) -> str:
    return f"{layer.config.num_experts}, {layer.config.num_experts_per_tok} per token"


def _sizes(layer: LayerReport) -> str:
    return f"hidden {layer.config.hidden_size}, intermediate {layer.config.moe_intermediate_size}"


def _format(layer: LayerReport) -> str:
    """Say what the weights are encoded in, of each projection where that differs."""
    of: dict[str, list[str]] = {}
    for name, fmt in layer.formats.items():
        of.setdefault(fmt, []).append(name.removesuffix("_proj"))
    if len(of) == 1:
        return next(iter(of))
    return ", ".join(f"{fmt} of {' and '.join(names)}" for fmt, names in of.items())


def _method(layer: LayerReport) -> str:
    if layer.method is None:
        return "none"
    return layer.method if layer.group_size is None else f"{layer.method}, groups of {layer.group_size}"


def _activation_dtype(layer: LayerReport) -> str:
    """Say what products can take activations in, and what they do by default."""
    projections = layer.int8_projections
    if layer.activation_dtype is None:
        return "none"
    if layer.activation_dtype == "int8" or not projections:
        return layer.activation_dtype
    said = "int8"
    if len(projections) < len(layer.formats):
        said += f" in {' and '.join(name.removesuffix('_proj') for name in projections)}"
    if layer.model_activation_dtype == "int8":
        return f"bfloat16 (default of a layer) or {said} (default of generate and eval)"
    return f"bfloat16 (default) or {said}"


def _memory(report: CheckpointReport, value: dict[str, Any]) -> str:
    memory = value["memory"]
    room = _room(memory)
    if room is None:
        return "unknown"
    whose = "this process may use" if memory["limit_bytes"] else "this machine has"
    if value["fits_in_memory"]:
        return f"all experts fit in the {amount(room)} that {whose}"
    return (
        f"the experts do not fit in the {amount(room)} that {whose}: the rest is read from the disk, "
        "for every token"
    )


def _speed(value: dict[str, Any]) -> str:
    limits = value["limits"]
    rate, speed = limits["read_bytes_per_s"], value["tokens_per_s"]
    said = (
        f"Reading memory at {amount(rate)}/s, measured now on {counted(limits['threads'], 'thread')}, "
        f"allows {rounded(speed)} tokens/s: the experts alone, one token at a time"
    )
    return f"{said}." if value["fits_in_memory"] is not False else f"{said}, if they did fit in memory."
