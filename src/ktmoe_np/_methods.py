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
    weights: str = "bf16"  #: the format of the base weights
    skip_lora: bool = False  #: adapters are used, but have no gradients


def _sft(name: str, skip_lora: bool = False) -> Method:
    return Method(name, "sft", "sft.amx:AMXSFTMoEWrapper", "AMXBF16_SFT_MOE", "bf16", skip_lora)


#: The first of a mode is its default.
METHODS = (
    Method("BF16", "inference", "inference.native:NativeMoEWrapper", "AMXBF16_MOE"),
    _sft("AMXBF16_SFT"),
    _sft("BF16_SFT"),  # the same under a shorter name
    _sft("AMXBF16_SFT_SkipLoRA", skip_lora=True),
    _sft("BF16_SFT_SkipLoRA", skip_lora=True),
)


def find_method(name: str | None, mode: str) -> Method:
    """The method of that name in a mode; the mode's default for None.

    Raises
    ------
    ValueError
        Unknown mode or method; the message lists those that exist.
    """
    modes = sorted({method.mode for method in METHODS})
    if mode not in modes:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(modes)}")
    for method in METHODS:
        if method.mode == mode and name in (method.name, None):
            return method
    known = ", ".join(method.name for method in METHODS if method.mode == mode)
    raise ValueError(f"method: got {name!r} for mode {mode!r}, expected one of {known}")
