"""What most tests begin with: random layers of experts and batches, the engine on them, and comparisons."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import ktmoe_np
from ktmoe_np import KTMoEWrapper
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.config import activation_names, parse_activation
from ktmoe_np.reference import assert_within, error_bound, moe_forward

__all__ = [
    "ACTIVATIONS",
    "ISA",
    "IS_SLOW",
    "MANY_TOKENS",
    "POOLS",
    "STORAGES",
    "Batch",
    "Layer",
    "assert_close",
    "assert_same_bits",
    "batch_taking",
    "bf16",
    "draw",
    "draw_batch",
    "draw_layer",
    "engine_of",
    "low_level_moe",
    "num_examples",
    "run_python",
    "stored",
]

AnyArray = NDArray[Any]

bf16 = np.dtype(ml_dtypes.bfloat16)

#: The instruction set under test; an emulator is about a hundred times slower than the fast ones.
ISA = str(ktmoe_np.isa_info()["active"])
IS_SLOW = ISA in ktmoe_np.isa_info()["on_request"]

#: Whether an emulator or the short profile asks for less; the kernels' own tests leave nothing out.
_IS_SHORT = IS_SLOW or os.environ.get("KTMOE_HYPOTHESIS_PROFILE") == "short"

#: Tokens of more than one block of rows, and of many where there is time.
MANY_TOKENS = 40 if _IS_SHORT else 150


def num_examples(most: int) -> int:
    """How many examples a property test of the kernels draws: all, or a fifth."""
    return -(-most // 5) if _IS_SHORT else most


#: Parameters that no function has by default.
_OTHER_PARAMETERS = {"limit": 1.25, "alpha": 0.75, "beta1": 0.75, "beta2": 1.5}

#: Every function, and those that have parameters with others.
ACTIVATIONS: tuple[Any, ...] = (
    *activation_names(),
    *(
        {"kind": info.name, **{name: _OTHER_PARAMETERS[name] for name in info.parameters}}
        for info in ext.activations()
        if info.parameters
    ),
)


#: Threads of each sub-pool of the engines that must all give the same bits.
POOLS = ([1], [2], [3], [1, 1], [1, 2, 1], [2, 2], [1] * 6)


class Batch(NamedTuple):
    """The inputs of a forward pass, in the order of its arguments."""

    x: AnyArray
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]

    def rows(self, which: Any) -> Batch:
        """Some tokens of the batch, in arrays of their own."""
        return Batch(*(np.ascontiguousarray(array[which]) for array in self))


@dataclass(frozen=True)
class Layer:
    """Weights under the names of the arguments of `moe_forward`, biases None where there are none."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    gate_bias: AnyArray | None = None
    up_bias: AnyArray | None = None
    down_bias: AnyArray | None = None
    activation: Any = "silu"
    scale_inputs: bool = False

    @property
    def num_experts(self) -> int:
        return len(self.down_proj)

    @property
    def hidden_size(self) -> int:
        return int(self.down_proj[0].shape[0])

    @property
    def inter_size(self) -> int:
        return int(self.down_proj[0].shape[1])

    @property
    def matrices(self) -> tuple[Any, Any, Any]:
        return self.gate_proj, self.up_proj, self.down_proj

    @property
    def biases(self) -> dict[str, AnyArray | None]:
        return {"gate_bias": self.gate_bias, "up_bias": self.up_bias, "down_bias": self.down_bias}

    def with_matrices(self, change: Callable[[AnyArray], Any]) -> Layer:
        """The layer with other arrays in the place of its weights."""
        gate, up, down = (None if matrix is None else change(matrix) for matrix in self.matrices)
        return replace(self, gate_proj=gate, up_proj=up, down_proj=down)

    def picked(self, experts: Any) -> Layer:
        """The layer of some experts, biases included."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **{name: array[experts] for name, array in arrays.items()})

    def load_into(self, moe: Any, physical_to_logical_map: Any = None) -> None:
        moe.load_weights_from_tensors(*self.matrices, physical_to_logical_map, **self.biases)

    def wrapper(self, num_experts_per_tok: int, physical_to_logical_map: Any = None, **options: Any) -> Any:
        """A `KTMoEWrapper` of the layer, loaded."""
        sizes = (self.num_experts, num_experts_per_tok, self.hidden_size, self.inter_size)
        model = {"activation": self.activation, "scale_inputs": self.scale_inputs}
        moe = KTMoEWrapper(options.pop("layer_idx", 0), *sizes, **model, **options)
        self.load_into(moe, physical_to_logical_map)
        return moe

    def forward(self, batch: Batch, **options: Any) -> AnyArray:
        """The engine's result; `out` and `incremental` go to the call, other options to the wrapper."""
        call = {name: options.pop(name) for name in ("out", "incremental") if name in options}
        result: AnyArray = self.wrapper(batch.ids.shape[1], **options).forward(*batch, **call)
        return result


def draw(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> AnyArray:
    """Normal bfloat16 numbers."""
    return (scale * rng.standard_normal(shape, np.float32)).astype(bf16)


def draw_layer(
    rng: np.random.Generator,
    num_experts: int,
    inter_size: int,
    hidden_size: int,
    activation: Any = "silu",
    *,
    with_biases: bool = False,
    scale: float = 1.5,
) -> Layer:
    """Weights that bring gate and up to a standard deviation of `scale`."""
    first, last = (num_experts, inter_size, hidden_size), (num_experts, hidden_size, inter_size)
    gated = parse_activation(activation).gated
    gate, up = (draw(rng, *first, scale=scale * hidden_size**-0.5) for _ in range(2))
    biases: dict[str, Any] = {}
    if with_biases:
        biases = {
            "gate_bias": rng.standard_normal(first[:2], np.float32),
            "up_bias": draw(rng, *first[:2]) if gated else None,
            "down_bias": rng.standard_normal(last[:2], np.float32),
        }
    down = draw(rng, *last, scale=inter_size**-0.5)
    return Layer(gate, up if gated else None, down, **biases, activation=activation)


def draw_batch(rng: np.random.Generator, layer: Layer, num_tokens: int, num_experts_per_tok: int) -> Batch:
    """Every slot routed at random, so that ids may occur twice in a token."""
    routes = (num_tokens, num_experts_per_tok)
    return Batch(
        draw(rng, num_tokens, layer.hidden_size),
        rng.integers(0, layer.num_experts, routes),
        rng.standard_normal(routes, np.float32),
    )


def assert_close(actual: AnyArray, layer: Layer, batch: Batch, **options: Any) -> None:
    """`actual` is what the reference says, to the roundings; options are those of `moe_forward`."""
    arguments = (*batch, *layer.matrices)
    model = {"activation": layer.activation, "scale_inputs": layer.scale_inputs, **layer.biases}
    options = {"out_dtype": actual.dtype, **model, **options}
    truth = moe_forward(*arguments, accumulate_dtype=np.float64, **options)
    assert actual.dtype == truth.dtype
    # The strict bound always holds; the sharp one is what finds a wrong sum among thousands of terms.
    assert_within(actual, truth, error_bound(*arguments, **options))
    assert_within(actual, truth, error_bound(*arguments, sigmas=6.0, **options))


def assert_same_bits(actual: AnyArray, expected: AnyArray, what: str = "") -> None:
    """The arrays agree in dtype, shape and every bit."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    as_integers = f"u{actual.dtype.itemsize}"
    got, want = (np.ascontiguousarray(array).view(as_integers) for array in (actual, expected))
    differing = np.argwhere(got != want)
    assert not len(differing), (
        f"{what}: {len(differing)} of {got.size} elements differ, first at {differing[0].tolist()}: "
        f"{actual[tuple(differing[0])]!r}, expected {expected[tuple(differing[0])]!r}"
    )


def low_level_moe(engine: Any, layer: Layer, num_experts_per_tok: int) -> Any:
    """The extension's layer, loaded, on an engine of one's own choice."""
    spec = parse_activation(layer.activation)
    config = ext.moe.MOEConfig(
        layer.num_experts, num_experts_per_tok, layer.hidden_size, layer.inter_size, pool=engine.backend_
    )
    config.set_activation(spec.kind, spec.gated, spec.limit, spec.alpha, spec.beta1, spec.beta2)
    config.scale_inputs = layer.scale_inputs
    moe = ext.moe.AMXBF16_MOE(config)
    engine.run(moe.load_weights_task(*layer.matrices, **layer.biases))
    return moe


def engine_of(*threads: int) -> Any:
    """An engine with sub-pools of so many threads, all on the first node."""
    node = min(ext.topology()["node_cpus"])
    return ext.CPUInfer(ext.WorkerPoolConfig(len(threads), [node] * len(threads), list(threads)))


def batch_taking(seconds: float, layer: Layer, num_experts_per_tok: int) -> Batch:
    """A batch that keeps the engine busy for about that long, whatever the machine."""
    moe, rng = layer.wrapper(num_experts_per_tok), np.random.default_rng(0)
    num_tokens, took = 32, 0.0
    while True:
        batch = draw_batch(rng, layer, num_tokens, num_experts_per_tok)
        begin = time.perf_counter()
        moe.forward(*batch)
        took = time.perf_counter() - begin
        if took >= seconds / 2:
            return batch
        num_tokens = int(num_tokens * min(4.0, 1.2 * seconds / took))


# ---- weights in memory of all kinds ----


def _misaligned(array: AnyArray, offset: int) -> AnyArray:
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    shifted = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    shifted[...] = array
    return shifted


def _interleaved(array: AnyArray) -> AnyArray:
    """Rows with a stride of two, as those of a gate in a fused gate_up projection."""
    pairs = np.full((array.shape[0], 2 * array.shape[1], array.shape[2]), np.nan, array.dtype)
    pairs[:, ::2] = array
    return pairs[:, ::2]


def _padded_rows(array: AnyArray) -> AnyArray:
    """Rows with something else behind them."""
    wide = np.full((*array.shape[:2], array.shape[2] + 7), np.nan, array.dtype)
    wide[:, :, : array.shape[2]] = array
    return wide[:, :, : array.shape[2]]


def _read_only(array: AnyArray) -> AnyArray:
    copy = array.copy()
    copy.setflags(write=False)
    return copy


#: name -> the same numbers in memory of another kind. All are C-contiguous along the last axis.
STORAGES: dict[str, Callable[[AnyArray], Any]] = {
    "aligned": partial(_misaligned, offset=0),
    "list": list,
    "tuple of copies": lambda array: tuple(matrix.copy() for matrix in array),
    "interleaved rows": _interleaved,
    "padded rows": _padded_rows,
    "rows backwards": lambda array: np.ascontiguousarray(array[:, ::-1])[:, ::-1],
    "experts backwards": lambda array: np.ascontiguousarray(array[::-1])[::-1],
    "experts inside": lambda array: np.ascontiguousarray(array.swapaxes(0, 1)).swapaxes(0, 1),
    "read-only": _read_only,
    **{f"{offset} bytes off": partial(_misaligned, offset=offset) for offset in (2, 30, 34, 62)},
}


def stored(array: AnyArray, how: str) -> Any:
    """`array` as `STORAGES` name it."""
    return STORAGES[how](array)


# ---- other processes ----


def run_python(
    script: str,
    *args: str,
    env: dict[str, str] | None = None,
    file: Path | None = None,
    timeout: float = 100.0,
) -> Any:
    """Run a script, indented or not, in a process of its own: `returncode`, `stdout` and `stderr`.

    It can import this module. In a `file` it can be imported itself, as the processes that it spawns do.
    """
    tests = os.path.dirname(os.path.abspath(__file__))
    source = os.path.dirname(os.path.dirname(os.path.abspath(ktmoe_np.__file__)))
    path = os.pathsep.join([tests, source, *filter(None, [os.environ.get("PYTHONPATH")])])
    what: list[str] = ["-c", textwrap.dedent(script)]
    if file is not None:
        file.write_text(what.pop())
        what = [str(file)]
    return subprocess.run(
        [sys.executable, "-W", "error", *what, *args],
        env={**os.environ, "KTMOE_ISA": ISA, "PYTHONPATH": path, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
