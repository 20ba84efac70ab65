"""Handlers for JAX programs that note where XLA put the arrays of each call, before they call the real ones.

`note_addresses` must be called before `ktmoe_np.jax` is imported: that is when handlers are registered.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from ktmoe_np import kt_kernel_ext as ext

__all__ = ["Call", "note_addresses"]


@dataclass(frozen=True)
class Call:
    """A call that XLA made: the addresses of its operands and results."""

    name: str
    operands: list[int]
    results: list[int]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extensions", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("data", ctypes.c_void_p),
    ]


class _Buffers(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extensions", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("values", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    ]


class _CallFrame(ctypes.Structure):
    """The beginning of one; `test_xla_abi` compares the layout in C++ with XLA's headers."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extensions", ctypes.c_void_p),
        ("api", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int32),
        ("args", _Buffers),
        ("rets", _Buffers),
    ]


_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = (
    ctypes.py_object,
    [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
)
_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

#: XLA may call handlers as long as the process lives.
_kept: list[Any] = []


def _addresses(buffers: _Buffers) -> list[int]:
    return [buffers.values[i].contents.data or 0 for i in range(buffers.size)]


def _noting(name: str, capsule: object, calls: list[Call]) -> object:
    real = _Handler(_pointer_in(capsule, None))

    def handler(frame: Any) -> Any:
        if not frame.contents.extensions:  # XLA requests metadata by an extension, without arrays
            args, rets = frame.contents.args, frame.contents.rets
            calls.append(Call(name, _addresses(args), _addresses(rets)))
        return real(frame)

    noting = _Handler(handler)
    _kept.append(noting)
    return _new_capsule(ctypes.cast(noting, ctypes.c_void_p), None, None)


def note_addresses() -> list[Call]:
    """Let the programs of this process call noting handlers: the list to which every call is added."""
    calls: list[Call] = []
    real = ext.xla.handlers()
    noting = {name: _noting(name, capsule, calls) for name, capsule in real.items()}
    ext.xla.handlers = lambda: noting  # type: ignore[assignment, return-value]
    return calls
