"""What quantises and holds quantised weights, by the reference, for an extension that does not do so yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np._formats import FORMATS
from ktmoe_np._methods import METHODS
from ktmoe_np.cpuinfer import _MoEBase
from ktmoe_np.reference import pack_int4, pack_int8, quantize_int4, quantize_int8

AnyArray = NDArray[Any]

CLASSES = [method.layer for method in METHODS if method.formats]
HAS_QUANTIZE = hasattr(ext, "quantize_task")
HAS_LAYERS = all(hasattr(ext.moe, name) for name in CLASSES)
needs_layers = pytest.mark.skipif(
    not (HAS_QUANTIZE and HAS_LAYERS), reason=f"kt_kernel_ext lacks quantize_task or one of {CLASSES}"
)


def quantized_bytes(fmt: str, weights: AnyArray) -> tuple[AnyArray, AnyArray | None]:
    """Rows and row scales of matrices [..., N, K], as the reference has them."""
    found = FORMATS[fmt]
    if found.bits == 4:
        assert found.group_size is not None
        int4 = quantize_int4(weights, group_size=found.group_size)
        return pack_int4(int4), int4.row_scale
    if found.group_size is None:
        int8 = quantize_int8(weights)
        return pack_int8(int8), int8.row_scale
    return pack_int8(quantize_int8(weights, group_size=found.group_size)), None


@dataclass
class Task:
    run: Callable[[], None]


class Engine:
    """The engine, which also takes the doubles' tasks."""

    def __init__(self, real: ext.CPUInfer) -> None:
        self.real = real

    def run(self, task: Any) -> None:
        if isinstance(task, Task):
            task.run()
        else:
            self.real.run(task)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def quantize_task(
    fmt: str, weights: AnyArray, codes: AnyArray, row_scale: AnyArray | None = None, *, pool: Any
) -> Task:
    assert isinstance(pool, type(_MoEBase._get_cpu_infer().backend_))
    assert (codes.dtype, codes.shape[0]) == (np.uint8, len(weights))

    def run() -> None:
        values = weights.astype(np.float32)
        wrong = ~np.isfinite(values)
        if wrong.any():
            row = np.argwhere(wrong)[0, 0]
            kind = "nan" if np.isnan(values[row]).any() else "inf"
            raise ValueError(f"row {row} holds {kind}, expected finite weights")
        rows, scale = quantized_bytes(fmt, weights)
        codes[...] = rows
        if row_scale is not None:
            row_scale[...] = scale

    return Task(run)


class Config:
    """Takes the place of `MOEConfig`, which has no group size yet."""

    def __init__(self, *sizes: Any) -> None:
        self.sizes = sizes
        self.group_size = 0

    def set_activation(self, *spec: Any) -> None:
        self.activation = spec


class QuantizedLayer:
    """Holds weights and computes nothing."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.loaded = False
        self.given: dict[str, Any] = {}

    def load_weights_task(self, gate: Any, up: Any, down: Any, map: Any = None, **more: Any) -> Task:
        def run() -> None:
            self.given = {"gate": gate, "up": up, "down": down, "map": map, **more}
            self.loaded = True

        return Task(run)


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the doubles where the extension lacks something."""
    if HAS_QUANTIZE and HAS_LAYERS:
        return
    make = _MoEBase._get_cpu_infer.__func__  # type: ignore[attr-defined]
    patch.setattr(_MoEBase, "_get_cpu_infer", classmethod(lambda cls, *a: Engine(make(cls, *a))))
    if not HAS_QUANTIZE:
        patch.setattr(ext, "quantize_task", quantize_task, raising=False)
    if not HAS_LAYERS:
        patch.setattr(ext.moe, "MOEConfig", Config)
        for name in CLASSES:
            patch.setattr(ext.moe, name, QuantizedLayer, raising=False)
