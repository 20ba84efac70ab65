"""Write docs/registry.md: the tables of methods, formats and activations, from what the extension lists.

    python tools/write_tables.py

A test compares the file with what this writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.config import activation_names, parse_activation
from ktmoe_np.formats.encodings import NATIVE_FORMATS, NativeFormat
from ktmoe_np.formats.gguf import GGUF_NUMBERS
from ktmoe_np.formats.methods import METHODS, Method

__all__ = ["PAGE", "page"]

_TYPE_HEAD = ("type", "number", "weights per block", "bytes per block", "int8 activations per scale")

PAGE = Path(__file__).resolve().parents[1] / "docs" / "registry.md"


def page() -> str:
    """Render the page."""
    tables = {
        "Methods": _table(("method", "weights", "activations", "group sizes", "training"), _methods()),
        "Arrays of encoded weights": _table(("encoding", "codes", "block or channel scales"), _encodings()),
        "Tensor types of GGUF": _table(_TYPE_HEAD, _types()),
        "Activations": _table(("name", "gated", "parameters"), _activations()),
    }
    notes = {
        "Methods": (
            "Weights: `native` are used in the encoding of the checkpoint (`GPTQ_INT4` and `INT4_ZP` are "
            "converted once at load), `quantized` are made from float weights at load or read from "
            "converted files, `gguf` are blocks of a GGUF file, each projection with a tensor type of its "
            "own. Group sizes are listed where there is a choice; that of `GPTQ_INT4` is the checkpoint's. "
            "Activations: the first dtype is the default, `activation_dtype` chooses another, for "
            "`LLAMAFILE` where tensor types have one."
        ),
        "Arrays of encoded weights": (
            "[N, K] is [I, H] of gate and up, [H, I] of down; 8-bit dtypes separated by `or` hold the same "
            "bytes; g, the GPTQ group size, is K or a power of two >= 32."
        ),
    }
    parts = [
        "# Methods, formats and activations",
        "Written by `tools/write_tables.py` from the registry of the extension.",
    ]
    for title, table in tables.items():
        parts += [f"## {title}", *([notes[title]] if title in notes else []), table]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _methods() -> Iterator[tuple[str, ...]]:
    for info in ext.methods():
        if info.mode != "inference":
            continue
        (method,) = (found for found in METHODS if found.name == info.names[0] and found.mode == info.mode)
        yield (
            f"`{method.name}`",
            info.weights,
            _activation_dtypes(info),
            _group_sizes(method),
            _trained(method),
        )


def _activation_dtypes(info: ext.MethodInfo) -> str:
    has_choice = info.weights == "gguf" or any(fmt.activation_block for fmt in info.formats)
    return "bfloat16, int8" if info.product == "bfloat16" and has_choice else info.product


def _group_sizes(method: Method) -> str:
    sizes = list(method.formats or method.encodings)
    if method.name == "GPTQ_INT4":
        return "K, or a power of two >= 32"
    if len(sizes) < 2:
        return ""
    shown = ["per row" if size is None else str(size) for size in sizes]
    return ", ".join([f"{shown[0]} (default)", *shown[1:]])


def _trained(method: Method) -> str:
    layer = method.layer.replace("_MOE", "_SFT_MOE")
    names = [found.name for found in METHODS if found.layer == layer and not found.skip_lora]
    return ", ".join(f"`{name}`" for name in names)


def _encodings() -> Iterator[tuple[str, str, str]]:
    for fmt in NATIVE_FORMATS.values():
        if fmt.info.gguf_type is not None:  # packed along N, and converted
            shapes = "[K / 8, N]", "[ceil(K / g), N]"
        elif fmt.has_zero_points:
            shapes = "[N, K / 2]", "[N, ceil(K / g)]; uint8 zero points of the same shape"
        else:
            shapes = _shape_of_codes(fmt), _shape_of_scales(fmt)
        yield (
            f"`{fmt.name}`",
            _codes(fmt, shapes[0]),
            f"{_dtypes(fmt.scale_dtypes)} {shapes[1]}"
            + ("; a float32 global scale of each matrix" if fmt.has_global_scale else ""),
        )


def _dtypes(dtypes: Iterable[np.dtype[np.generic]]) -> str:
    return " or ".join(map(str, dtypes))


def _codes(fmt: NativeFormat, shape: str) -> str:
    """The dtypes of codes and their shape; wider dtypes have the bytes of the first."""
    first, *others = fmt.code_dtypes
    same = [dtype for dtype in others if dtype.itemsize == first.itemsize]
    wider = [dtype for dtype in others if dtype.itemsize != first.itemsize]
    return f"{_dtypes([first, *same])} {shape}" + (
        f", or {_dtypes(wider)} with the same bytes" if wider else ""
    )


def _shape_of_codes(fmt: NativeFormat) -> str:
    return "[N, K]" if fmt.row_bytes(2) == 2 else "[N, ceil(K / 2)]"


def _shape_of_scales(fmt: NativeFormat) -> str:
    rows = "N" if fmt.scale_rows == 1 else f"ceil(N / {fmt.scale_rows})"
    return f"[{rows}, ceil(K / {fmt.group_size})]" if fmt.group_size else f"[{rows}] or [{rows}, 1]"


def _types() -> Iterator[tuple[object, ...]]:
    shared = {info.gguf_type: info.activation_block for info in ext.formats()}
    for number, fmt in sorted(GGUF_NUMBERS.items()):
        yield f"`{fmt.name.upper()}`", number, fmt.block, fmt.block_bytes, shared[number] or ""


def _activations() -> Iterator[tuple[str, ...]]:
    parameters = {info.name: info.parameters for info in ext.activations()}
    for name in activation_names():
        spec = parse_activation(name)
        used = parameters[spec.kind] if spec.gated else {}
        shown = ", ".join(f"`{key}` {getattr(spec, key):g}" for key in sorted(used))
        yield f"`{name}`", "yes" if spec.gated else "no", shown


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
