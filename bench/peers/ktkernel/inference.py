"""kt-kernel, its extension module driven directly: its Python layer needs CUDA, the extension does not.

The module is given by ``--kt-ext`` or by KTMOE_BENCH_KT_EXT: the file, or a directory that holds the unpacked
wheel (README.md says how to get it). It is built for one Python version: ``--kt-python`` or
KTMOE_BENCH_KT_PYTHON names another interpreter than the one that runs the bench, with NumPy and ml_dtypes.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ...core.cases import Case
from ...core.encoders_gguf import GGUF_FORMATS
from ...core.layer import Array, Layer, bfloat16
from ...core.methods import METHODS
from ...core.spec import Spec
from .memory import address, aligned
from .weights import GGUF_CLASS, GGUF_WITHOUT, GROUPS, give_gguf, give_groups

__all__ = ["LIBRARIES", "Backend", "backend_specs", "find_extension", "import_extension"]

#: Imported before the load is timed.
LIBRARIES: tuple[str, ...] = ()

#: Method -> classes of the extension, the first that it and the CPU have.
_CLASSES = {
    "BF16": ("AMXBF16_MOE", "AVX2BF16_MOE"),
    "AMXINT8": ("AMXInt8_MOE",),
    "AMXINT4": ("AMXInt4_MOE",),
    "MOE_INT8": ("Int8_KERNEL_MOE",),
    "AMXBF16_SFT": ("AMXBF16_SFT_MOE",),
    "AMXINT8_SFT": ("AMXInt8_SFT_MOE",),
    "AMXINT4_SFT": ("AMXInt4_SFT_MOE",),
    **{method: groups.classes for method, groups in GROUPS.items()},
    **{f"LLAMAFILE-{name}": (GGUF_CLASS,) for name in GGUF_FORMATS if name not in GGUF_WITHOUT},
}

#: Classes for a CPU flag that their build does not ask for.
_FLAGS = {"AMXMXFP8_KGroup_MOE": "amx_bf16", "AVXVNNI256GPTQInt4Packed_MOE": "avx_vnni"}

#: Builds of the wheel, the most capable first, and the CPU flag that they need.
_BUILDS = (("amx", "amx_bf16"), ("avx512_bf16", "avx512_bf16"), ("avx512_base", "avx512f"), ("avx2", "avx2"))


def backend_specs(base: Spec, options: Any) -> list[Spec]:
    """Take all threads, and one and two fewer: its threads wait spinning, which a full machine punishes."""
    if not options.kt_ext:
        raise ValueError("kt-kernel: expected its extension, by --kt-ext or KTMOE_BENCH_KT_EXT")
    counts = [base.threads - less for less in (0, 1, 2) if base.threads - less >= 1]
    spec = base.but(peer="kt-kernel", family="kt-kernel", python=options.kt_python or "", gives_limits=False)
    copies = 1.0
    if base.method in GROUPS:  # what they are packed from is there too while they are loaded
        copies = max(copies, 2.5 * METHODS[base.method].of_bf16)
    spec = spec.but(options={"ext": options.kt_ext}, copies=copies, best_of_family=True)
    return [spec.but(threads=count) for count in (counts if base.threads > 2 else counts[:2])]


class Backend:
    """A layer of kt-kernel; it packs a copy of the weights for itself, but for those in GGUF blocks."""

    def __init__(self, spec: Spec, layer: Layer) -> None:
        if spec.shape.biased or spec.shape.activation != "silu":
            raise NotImplementedError("kt-kernel has neither biases nor activations but silu")
        self._path = find_extension(Path(spec.options["ext"]))
        self._ext = import_extension(self._path)
        self._engine = self._ext.CPUInfer(spec.threads)
        self._map = aligned(np.arange(spec.shape.experts, dtype=np.int64))
        self._per_token = spec.shape.per_token
        self._moe = self._load(spec, layer)

    def _load(self, spec: Spec, layer: Layer) -> Any:
        shape, make = spec.shape, self._class(spec.method)
        config = self._ext.moe.MOEConfig(shape.experts, shape.per_token, shape.hidden, shape.inter, 0)
        self._configure(config, spec, layer)
        given: Any = None
        if spec.method in GROUPS:
            given = give_groups(config, spec.method, layer)
        elif METHODS[spec.method].library_name == "LLAMAFILE":
            self._blocks = give_gguf(config, self._ext.kvcache.ggml_type, spec.method, layer)
        moe = make(config)
        self._engine.submit(moe.load_weights_task(address(self._map)))
        self._engine.sync()
        del given
        return moe

    def _class(self, method: str) -> Any:
        flags = _cpu_flags()
        for name in _CLASSES.get(method, ()):
            if hasattr(self._ext.moe, name) and (name not in _FLAGS or _FLAGS[name] in flags):
                return getattr(self._ext.moe, name)
        raise NotImplementedError(f"kt-kernel: no class for {method} in {self._path.name}")

    def _configure(self, config: Any, spec: Spec, layer: Layer) -> None:
        """Fill in what inference and training have in common."""
        config.max_len = spec.max_tokens
        config.pool = self._engine.backend_
        config.gate_proj, config.up_proj, config.down_proj = map(address, (layer.gate, layer.up, layer.down))
        config.physical_to_logical_map = address(self._map)

    def prepare(self, cases: list[Case]) -> None:
        """See `bench.peers.Backend`."""
        self._cases = cases
        self._out = np.empty(cases[0].x.shape, bfloat16)
        self._batch = np.array([len(cases[0].x)], np.int32)
        addresses = [tuple(map(address, (case.ids, case.weights, case.x))) for case in cases]
        self._calls = [
            (address(self._batch), self._per_token, *a, address(self._out), False) for a in addresses
        ]

    def run(self, i: int) -> None:
        """See `bench.peers.Backend`."""
        self._engine.submit(self._moe.forward_task(*self._calls[i]))
        self._engine.sync()

    def answer(self) -> dict[str, Array]:
        """See `bench.peers.Backend`."""
        return {"y": self._out}

    def about(self) -> dict[str, Any]:
        """See `bench.peers.Backend`."""
        isa = self._path.name.removeprefix("_kt_kernel_ext_").split(".")[0]
        return {"version": _version(self._path), "isa": isa}


def find_extension(path: Path) -> Path:
    """Take the file itself; of a directory, the best build for this machine and this interpreter."""
    if path.is_file():
        return path
    tag = f"cpython-{sys.version_info[0]}{sys.version_info[1]}-"
    flags = _cpu_flags()
    for build, flag in _BUILDS:
        found = sorted(path.rglob(f"_kt_kernel_ext_{build}.{tag}*.so"))
        if found and flag in flags:
            return found[0]
    raise FileNotFoundError(f"kt-kernel: no build in {path} for {tag[:-1]} and this CPU")


def _cpu_flags() -> set[str]:
    return set(Path("/proc/cpuinfo").read_text().split())


def import_extension(path: Path) -> Any:
    """Import the extension, under the one name that its init function has."""
    spec = importlib.util.spec_from_file_location("kt_kernel_ext", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: not an extension module")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kt_kernel_ext"] = module
    spec.loader.exec_module(module)
    return module


def _version(path: Path) -> str:
    """From the wheel's metadata, when they lie beside it."""
    for metadata in path.parent.parent.glob("kt_kernel-*.dist-info"):
        return metadata.name.removeprefix("kt_kernel-").removesuffix(".dist-info")
    return "unknown"
