"""Drawings of the bytes of formats, checked against the sizes that the registry of the extension states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ktmoe_np import kt_kernel_ext as ext

from .markdown import table

__all__ = ["BLOCKS", "page"]


class Field(NamedTuple):
    """Bytes that belong together."""

    name: str
    size: int
    meaning: str


_D = Field("d", 2, "float16, the scale of the block")
_DMIN = Field("dmin", 2, "float16, the scale of the minima")
_M = Field("m", 2, "float16, the minimum")


def _codes(size: int, meaning: str) -> Field:
    return Field("qs", size, meaning)


_NIBBLES = "4-bit codes, two per byte: low nibbles first"

#: GGUF type -> the fields of a block.
BLOCKS: dict[str, tuple[Field, ...]] = {
    "Q4_0": (_D, _codes(16, _NIBBLES)),
    "Q4_1": (_D, _M, _codes(16, _NIBBLES)),
    "Q5_0": (_D, Field("qh", 4, "fifth bits"), _codes(16, _NIBBLES)),
    "Q5_1": (_D, _M, Field("qh", 4, "fifth bits"), _codes(16, _NIBBLES)),
    "Q8_0": (_D, _codes(32, "int8 codes")),
    "Q2_K": (
        Field("scales", 16, "4-bit scale and 4-bit minimum of each 16"),
        _codes(64, "2-bit codes"),
        _D,
        _DMIN,
    ),
    "Q3_K": (
        Field("hmask", 32, "third bits"),
        _codes(64, "2 low bits"),
        Field("scales", 12, "16 scales of 6 bits"),
        _D,
    ),
    "Q4_K": (_D, _DMIN, Field("scales", 12, "8 scales and 8 minima of 6 bits"), _codes(128, "4-bit codes")),
    "Q5_K": (
        _D,
        _DMIN,
        Field("scales", 12, "8 scales and 8 minima of 6 bits"),
        Field("qh", 32, "fifth bits"),
        _codes(128, "4 low bits"),
    ),
    "Q6_K": (
        Field("ql", 128, "4 low bits"),
        Field("qh", 64, "2 high bits"),
        Field("scales", 16, "int8, of each 16"),
        _D,
    ),
    "IQ2_XXS": (_D, _codes(64, "points of a grid, signs, scales of each 32")),
    "IQ2_XS": (_D, _codes(64, "points of a grid, signs"), Field("scales", 8, "4-bit scales of each 16")),
    "IQ2_S": (
        _D,
        _codes(32, "points of a grid, low bits"),
        Field("signs", 32, "one bit per value"),
        Field("qh", 8, "points, high bits"),
        Field("scales", 8, "4-bit scales of each 16"),
    ),
    "IQ3_XXS": (_D, _codes(64, "points of a grid"), Field("gas", 32, "signs and scales of each 32")),
    "IQ3_S": (
        _D,
        _codes(64, "points of a grid, low bits"),
        Field("qh", 8, "points, high bits"),
        Field("signs", 32, "one bit per value"),
        Field("scales", 4, "4-bit scales of each 32"),
    ),
    "IQ1_S": (
        _D,
        _codes(32, "points of a grid, low bits"),
        Field("qh", 16, "high bits, scales and shifts of each 32"),
    ),
    "IQ1_M": (
        _codes(32, "points of a grid, low bits"),
        Field("qh", 16, "high bits and shifts"),
        Field("scales", 8, "3-bit scales of each 16, and the float16 scale in their top bits"),
    ),
    "IQ4_NL": (_D, _codes(16, "4-bit codes into a table of 16 numbers")),
    "IQ4_XS": (
        _D,
        Field("scales_h", 2, "2 high bits of 8 scales"),
        Field("scales_l", 4, "4 low bits of 8 scales"),
        _codes(128, "4-bit codes into a table of 16 numbers"),
    ),
    "TQ1_0": (_codes(48, "five base-3 digits per byte"), Field("qh", 4, "four base-3 digits per byte"), _D),
    "TQ2_0": (_codes(64, "2-bit codes"), _D),
    "MXFP4": (Field("e", 1, "E8M0, a power of two"), _codes(16, "E2M1 codes, two per byte")),
    "NVFP4": (Field("d", 4, "a scale in 8 bits for each 16"), _codes(32, "E2M1 codes, two per byte")),
    "Q1_0": (_D, _codes(16, "one bit per value: its sign")),
}

_WIDTH, _HEIGHT, _LEAST = 720, 46, 42


def page() -> str:
    """Render a section for each type of GGUF blocks; sizes that differ from the registry's are an error."""
    return "\n".join(line for info in ext.formats() if info.gguf_type is not None for line in _section(info))


def _section(info: ext.FormatInfo) -> Iterator[str]:
    if info.block == 1:
        return  # plain numbers
    fields, size = BLOCKS[info.name.upper()], info.row_bytes(info.block)
    drawn = sum(field.size for field in fields)
    if drawn != size:
        raise ValueError(f"BLOCKS[{info.name!r}]: got {drawn} bytes, expected {size}")
    bits = 8 * size / info.block
    yield f"### {info.name.upper()}\n"
    yield f"{info.block} weights in {size} bytes, {bits:.4g} bits per weight.\n"
    yield "```{raw} html\n" + _strip(info.name.upper(), fields) + "\n```\n"
    starts = [sum(f.size for f in fields[:i]) for i in range(len(fields))]
    rows = [
        (f"`{f.name}`", str(start), str(f.size), f.meaning) for f, start in zip(fields, starts, strict=True)
    ]
    yield table(("field", "first byte", "bytes", "content"), rows) + "\n"


def _strip(name: str, fields: tuple[Field, ...]) -> str:
    """Draw the fields side by side, in the colors of the page; small ones are wide enough for their names."""
    total = sum(field.size for field in fields)
    spare = _WIDTH - _LEAST * len(fields)
    parts, x = [], 0.0
    for i, field in enumerate(fields):
        width = _LEAST + spare * field.size / total
        opacity = (0.10, 0.25)[i % 2]
        parts.append(
            f'<rect x="{x + 0.5:.1f}" y="0.5" width="{width:.1f}" height="{_HEIGHT}" stroke="currentColor" '
            f'fill="currentColor" fill-opacity="{opacity}"/>'
            f'<text x="{x + width / 2:.1f}" y="20" text-anchor="middle" font-size="12" fill="currentColor">'
            f"{field.name}</text>"
            f'<text x="{x + width / 2:.1f}" y="37" text-anchor="middle" font-size="11" fill="currentColor">'
            f"{field.size} B</text>"
        )
        x += width
    return (
        f'<svg viewBox="0 0 {_WIDTH + 1} {_HEIGHT + 1}" role="img" aria-label="Bytes of {name}" '
        f'style="width: 100%; max-width: {_WIDTH}px">' + "".join(parts) + "</svg>"
    )
