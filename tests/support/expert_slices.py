"""Experts of any bytes in every encoding, and their slices as NumPy cuts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from gguf_blocks import GGUF_BLOCKS
from layers import bf16

from ktmoe_np import KTMoEWrapper
from ktmoe_np.formats.gptq import q4_0_rows
from ktmoe_np.formats.zero_points import int4_zp_rows

__all__ = ["ENCODINGS", "Encoding", "Experts", "Matrix", "draw_experts", "empty_buffers", "write"]

AnyArray = Any
Slices = dict[str, list[AnyArray]]  # the arguments of a call, those that are not None


@dataclass(frozen=True)
class Encoding:
    """Where the values of a row are, and its scales."""

    method: str
    #: A row is runs of bytes: (values, bytes that hold so many), again and again.
    runs: tuple[tuple[int, int], ...]
    #: Rows and columns that share a scale beside the rows, and its bytes.
    scale_block: tuple[int, int, int] | None = None
    has_channel_scale: bool = False
    dtype: Any = np.uint8  #: as which codes are given
    scale_dtype: Any = np.uint8
    group_size: int | None = None
    gguf: str | None = None

    def __str__(self) -> str:
        return "-".join(str(part) for part in (self.method, self.group_size, self.gguf) if part is not None)

    @property
    def unit(self) -> int:
        """What slices are multiples of."""
        return max(*(values for values, _ in self.runs), *(self.scale_block or (1,))[:2])

    @property
    def sizes(self) -> tuple[int, int]:
        """I, which may be cut in four, and an H that is as odd as can be."""
        whole_blocks = self.gguf is not None or self.is_converted
        return 4 * max(self.unit, 5), max(self.unit, 32) if whole_blocks else 150 if self.unit == 128 else 71

    @property
    def is_converted(self) -> bool:
        """Whether the layer holds rows that are made of its arguments."""
        return self.method in ("GPTQ_INT4", "INT4_ZP")

    @property
    def options(self) -> dict[str, Any]:
        return {"method": self.method, "group_size": self.group_size}

    def row_bytes(self, num_columns: int) -> int:
        return sum(-(-num_columns // values) * size for values, size in self.runs)

    def columns(self, rows: AnyArray, num_columns: int, begin: int, end: int) -> AnyArray:
        """Some columns of rows of bytes."""
        parts, at = [], 0
        for values, size in self.runs:
            parts.append(rows[..., at + begin // values * size : at + -(-end // values) * size])
            at += -(-num_columns // values) * size
        return np.concatenate(parts, axis=-1)


ENCODINGS = (
    Encoding("BF16", ((1, 2),), dtype=bf16),
    Encoding("FP8", ((1, 1),), (128, 128, 4), scale_dtype=np.float32),
    Encoding("FP8_PERCHANNEL", ((1, 1),), has_channel_scale=True),
    Encoding("MXFP8", ((1, 1),), (1, 32, 1), dtype=ml_dtypes.float8_e4m3fn),
    Encoding("RAWINT4", ((2, 1),), (1, 32, 2), scale_dtype=bf16),
    Encoding("MXFP4", ((2, 1),), (1, 32, 1)),
    Encoding("NVFP4", ((2, 1),), (1, 16, 1), has_channel_scale=True),
    Encoding("GPTQ_INT4", ((32, 18),)),
    Encoding("INT4_ZP", ((32, 19),)),
    Encoding("INT4_ZP", ((128, 67),), group_size=128),
    Encoding("AMXINT8", ((1, 1),), has_channel_scale=True),
    Encoding("MOE_INT8", ((1, 1),), has_channel_scale=True),
    Encoding("MOE_INT8", ((1, 1), (32, 4)), group_size=32),
    *(
        Encoding(method, ((2, 1), (size, 1)), has_channel_scale=True, group_size=size)
        for method in ("AMXINT4", "MOE_INT4")
        for size in (32, 64, 128)
    ),
    *(
        Encoding("LLAMAFILE", ((values, size),), gguf=name)
        for name, values, size in (
            ("f32", 1, 4),
            ("f16", 1, 2),
            ("bf16", 1, 2),
            *((name, *block[:2]) for name, block in GGUF_BLOCKS.items()),
        )
    ),
)


@dataclass(frozen=True)
class Matrix:
    """A projection of all experts in bytes, as the layer holds it, and the arguments it was loaded from."""

    rows: AnyArray  # uint8 [E, N, bytes]
    scales: AnyArray | None  # uint8 [E, rows, bytes]
    channel_scale: AnyArray | None  # float32 [E, N]
    arguments: dict[str, AnyArray]


def _draw_matrix(rng: np.random.Generator, encoding: Encoding, e: int, n: int, k: int) -> Matrix:
    if encoding.method == "GPTQ_INT4":
        qweight = rng.integers(-(2**31), 2**31, (e, k // 8, n), np.int32)
        scale = rng.standard_normal((e, k // 32, n), np.float32).astype(np.float16)
        return Matrix(q4_0_rows(qweight, scale), None, None, {"proj": qweight, "scale": scale})
    if encoding.method == "INT4_ZP":
        codes = rng.integers(0, 256, (e, n, k // 2), np.uint8)
        scale = rng.standard_normal((e, n, k // encoding.unit), np.float32).astype(np.float16)
        zero = rng.integers(0, 17, scale.shape).astype(np.uint8)
        given = {"proj": codes, "scale": scale, "zero": zero}
        return Matrix(int4_zp_rows(codes, scale, zero, encoding.unit), None, None, given)
    rows = rng.integers(0, 256, (e, n, encoding.row_bytes(k)), np.uint8)
    arguments = {"proj": rows.view(encoding.dtype)}
    scales = channel_scale = None
    if encoding.scale_block is not None:
        high, wide, size = encoding.scale_block
        scales = rng.integers(0, 256, (e, -(-n // high), -(-k // wide) * size), np.uint8)
        arguments["scale"] = scales.view(encoding.scale_dtype)
    if encoding.method == "NVFP4":
        arguments["global_scale"] = rng.standard_normal(e, np.float32)
        channel_scale = np.repeat(arguments["global_scale"][:, None], n, axis=1)
    elif encoding.has_channel_scale:
        arguments["scale"] = channel_scale = rng.standard_normal((e, n), np.float32)
    return Matrix(rows, scales, channel_scale, arguments)


@dataclass(frozen=True)
class Experts:
    """The experts of a layer."""

    encoding: Encoding
    matrices: dict[str, Matrix]
    activation: str = "silu"
    physical_to_logical_map: AnyArray | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, I and H."""
        down = self.matrices["down"].rows
        return len(down), self.matrices["gate"].rows.shape[1], down.shape[1]

    def load_into(self, moe: Any, change: Callable[[AnyArray], Any] = lambda array: array) -> None:
        """Load the experts, after a change to every matrix, of codes or scales."""
        arguments: dict[str, Any] = {"up_proj": None}
        for name, matrix in self.matrices.items():
            for role, array in matrix.arguments.items():
                arguments[f"{name}_{role}"] = change(array) if array.ndim == 3 else array
            if self.encoding.gguf is not None:
                arguments[f"{name}_format"] = self.encoding.gguf
        moe.load_weights_from_tensors(physical_to_logical_map=self.physical_to_logical_map, **arguments)

    def wrapper(self, *, load: bool = True, **options: Any) -> Any:
        """A `KTMoEWrapper` of the layer."""
        e, i, h = self.sizes
        moe = KTMoEWrapper(0, e, 2, h, i, activation=self.activation, **self.encoding.options, **options)
        if load:
            self.load_into(moe)
        return moe

    def slices(self, num: int, expert: int) -> Slices:
        """What the buffers shall hold."""
        e = expert if self.physical_to_logical_map is None else int(self.physical_to_logical_map[expert])
        size = self.sizes[1] // num
        cut = [self._slice(e, i * size, (i + 1) * size) for i in range(num)]
        return {name: [one[name] for one in cut] for name in cut[0]}

    def _slice(self, e: int, begin: int, end: int) -> dict[str, AnyArray]:
        encoding, inter_size = self.encoding, self.sizes[1]
        first = [self.matrices[name] for name in ("gate", "up") if name in self.matrices]
        last, found = self.matrices["down"], {}
        found["w13_weights"] = np.concatenate([matrix.rows[e, begin:end] for matrix in first])
        found["w2_weights"] = encoding.columns(last.rows[e], inter_size, begin, end)
        if encoding.scale_block is not None:
            high, wide, size = encoding.scale_block
            rows = slice(begin // high, -(-end // high))
            found["w13_scales"] = np.concatenate([matrix.scales[e, rows] for matrix in first])
            found["w2_scales"] = last.scales[e, :, begin // wide * size : -(-end // wide) * size]
        if encoding.has_channel_scale:
            name = "scales" if encoding.scale_block is None else "global_scales"
            found[f"w13_{name}"] = np.concatenate([matrix.channel_scale[e, begin:end] for matrix in first])
            found[f"w2_{name}"] = last.channel_scale[e]
        return found


def draw_experts(
    encoding: Encoding,
    *,
    activation: str = "silu",
    num_experts: int = 3,
    sizes: tuple[int, int] | None = None,
    physical_to_logical_map: AnyArray | None = None,
    seed: int = 0,
) -> Experts:
    """Experts of any bytes, of sizes I and H."""
    rng = np.random.default_rng(seed)
    i, h = sizes or encoding.sizes
    shapes = {"gate": (i, h), "up": (i, h), "down": (h, i)}
    if activation == "relu2":
        del shapes["up"]
    matrices = {name: _draw_matrix(rng, encoding, num_experts, *shape) for name, shape in shapes.items()}
    return Experts(encoding, matrices, activation, physical_to_logical_map)


def empty_buffers(slices: Slices) -> Slices:
    """Arrays for slices, which hold something else."""
    return {
        name: [~np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8) for array in arrays]
        for name, arrays in slices.items()
    }


def write(moe: Any, num: int, expert: int, buffers: dict[str, Any]) -> None:
    """Write an expert by the two calls; what is not among `buffers` is None."""
    absent = dict.fromkeys(("w13_weights", "w13_scales", "w2_weights", "w2_scales"))
    moe.submit_write_weight_scale_to_buffer(num, expert, **{**absent, **buffers})
    assert moe.sync_write_weight_scale_to_buffer() is None
