"""What is used of ggml's C interface: contexts, tensors, graphs, and its backend for the CPU."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t
from pathlib import Path
from typing import Any

__all__ = ["Ggml", "Pointer"]

#: To a tensor, a context, a graph or whatever else ggml makes.
Pointer = ctypes.c_void_p

#: Room for the tensors of the largest graph.
_CONTEXT_BYTES = 1 << 19

#: ggml_threadpool_params is far smaller.
_PARAMS_BYTES = 4096


class _Params(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", Pointer), ("no_alloc", c_bool))


class _TensorHead(ctypes.Structure):
    """How a ggml_tensor begins."""

    _fields_ = (("type", c_int), ("buffer", Pointer))


#: Name without the prefix -> result and arguments.
_FUNCTIONS = {
    "init": (Pointer, _Params),
    "free": (None, Pointer),
    "version": (c_char_p,),
    "type_name": (c_char_p, c_int),
    "new_tensor_2d": (Pointer, Pointer, c_int, c_int64, c_int64),
    "new_tensor_3d": (Pointer, Pointer, c_int, c_int64, c_int64, c_int64),
    "view_2d": (Pointer, Pointer, Pointer, c_int64, c_int64, c_size_t, c_size_t),
    "mul_mat_id": (Pointer, Pointer, Pointer, Pointer, Pointer),
    "swiglu_split": (Pointer, Pointer, Pointer, Pointer),
    "mul": (Pointer, Pointer, Pointer, Pointer),
    "add": (Pointer, Pointer, Pointer, Pointer),
    "cont": (Pointer, Pointer, Pointer),
    "set_input": (None, Pointer),
    "set_output": (None, Pointer),
    "nbytes": (c_size_t, Pointer),
    "get_data": (Pointer, Pointer),
    "new_graph": (Pointer, Pointer),
    "build_forward_expand": (None, Pointer, Pointer),
    "gallocr_new": (Pointer, Pointer),
    "gallocr_free": (None, Pointer),
    "gallocr_alloc_graph": (c_bool, Pointer, Pointer),
    "threadpool_params_init": (None, Pointer, c_int),
    "threadpool_new": (Pointer, Pointer),
    "backend_cpu_init": (Pointer,),
    "backend_cpu_set_n_threads": (None, Pointer, c_int),
    "backend_cpu_set_threadpool": (None, Pointer, Pointer),
    "backend_cpu_buffer_type": (Pointer,),
    "backend_alloc_ctx_tensors_from_buft": (Pointer, Pointer, Pointer),
    "backend_buft_alloc_buffer": (Pointer, Pointer, c_size_t),
    "backend_buft_name": (c_char_p, Pointer),
    "backend_tensor_set": (None, Pointer, Pointer, c_size_t, c_size_t),
    "backend_graph_compute": (c_int, Pointer, Pointer),
    "backend_get_device": (Pointer, Pointer),
    "backend_dev_backend_reg": (Pointer, Pointer),
    "backend_dev_supports_op": (c_bool, Pointer, Pointer),
    "backend_reg_get_proc_address": (Pointer, Pointer, c_char_p),
}


class Ggml:
    """The functions as methods, by their names without the prefix, and what takes several of them.

    Parameters
    ----------
    directory : Path
        It holds libggml-base.so and libggml-cpu.so, at any depth.

    Raises
    ------
    FileNotFoundError
        It does not.
    """

    def __init__(self, directory: Path) -> None:
        # The second library needs the first, and finds it when that is there already.
        base = ctypes.CDLL(str(_find(directory, "libggml-base.so")), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(_find(directory, "libggml-cpu.so")))
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(base if hasattr(base, f"ggml_{name}") else cpu, f"ggml_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml_{name} is not in use")

    def type_of(self, name: str) -> int:
        """Look up the number of a type, whose name is given in capitals."""
        for number in range(64):
            found = self.type_name(number)
            if found and found.decode().upper() == name:
                return number
        raise NotImplementedError(f"ggml has no type {name}")

    def context(self) -> int:
        """Make a context whose tensors have no memory yet."""
        return int(self.init(_Params(_CONTEXT_BYTES, None, True)))

    def backend(self, threads: int) -> int:
        """Make a backend for the CPU with threads of its own that stay."""
        backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(backend, threads)
        params = ctypes.create_string_buffer(_PARAMS_BYTES)
        self.threadpool_params_init(params, threads)
        self.backend_cpu_set_threadpool(backend, self.threadpool_new(params))
        return int(backend)

    def memory_for(self, backend: int, weights: int, product: int) -> int:
        """Find the first of the CPU's own kinds of memory where `product` can be computed, else the plain."""
        device = self.backend_get_device(backend)
        registry = self.backend_dev_backend_reg(device)
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer)(address)(device)
        head = ctypes.cast(weights, ctypes.POINTER(_TensorHead)).contents
        i = 0
        while kinds[i]:
            head.buffer = self.backend_buft_alloc_buffer(kinds[i], 0)
            supported = self.backend_dev_supports_op(device, product)
            head.buffer = None
            if supported:
                return int(kinds[i])
            i += 1
        return int(self.backend_cpu_buffer_type())


def _find(directory: Path, name: str) -> Path:
    for path in sorted(directory.rglob(f"{name}*")):
        return path
    raise FileNotFoundError(f"ggml: no {name} in {directory}")
