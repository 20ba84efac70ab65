"""The one table of methods: which format and which wrapper serve a name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["METHODS", "Method", "find_method"]


@dataclass(frozen=True)
class Method:
    """How a method is carried out."""

    name: str
    mode: str  #: "inference" or "sft"
    wrapper: str  #: module and class of the wrapper, below this package
    layer: str  #: the class in ``kt_kernel_ext.moe``


METHODS = (Method("BF16", "inference", "inference.native:NativeMoEWrapper", "AMXBF16_MOE"),)


def find_method(name: str, mode: str) -> Method:
    """The method of that name in a mode.

    Raises
    ------
    ValueError
        Unknown mode or method; the message lists those that exist.
    """
    modes = sorted({method.mode for method in METHODS})
    if mode not in modes:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(modes)}")
    for method in METHODS:
        if method.name == name and method.mode == mode:
            return method
    known = ", ".join(method.name for method in METHODS if method.mode == mode)
    raise ValueError(f"method: got {name!r} for mode {mode!r}, expected one of {known}")
