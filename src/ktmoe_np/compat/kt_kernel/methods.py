"""kt-kernel's methods and activations, and what they are called here."""

from __future__ import annotations

from ...config import ActivationSpec, parse_activation
from ...formats.methods import METHODS

__all__ = ["INT8_METHODS", "activation_of", "main_method"]

#: kt-kernel's names -> ours, by mode. All of ours can be named too.
_METHODS: dict[str, dict[str, str]] = {
    mode: {**{method.name: method.name for method in METHODS if method.mode == mode}, **others}
    for mode, others in {
        "inference": {},
        "sft": {
            "INT8_SFT": "AMXINT8_SFT",
            "AMXINT4_KGroup_SFT": "AMXINT4_SFT",
            "AMXINT4_KGroup_SFT_SkipLoRA": "AMXINT4_SFT_SkipLoRA",
        },
    }.items()
}

_OFFSETS = "int4 weights with an offset are INT4_ZP here, of AWQ or GPTQ checkpoints; AMXINT4 has none"

#: kt-kernel's methods that are not here, and why.
_REFUSED = {
    "SYCL_GPTQ_INT4": "it computes on a SYCL device; GPTQ_INT4 computes the same checkpoints on the CPU",
    **dict.fromkeys(
        (
            "AMXINT4_1_SFT",
            "AMXINT4_1KGroup_SFT",
            "AMXINT4_1_SFT_SkipLoRA",
            "AMXINT4_1KGroup_SFT_SkipLoRA",
        ),
        _OFFSETS,
    ),
}

#: Methods whose activations kt-kernel takes as int8.
INT8_METHODS = ("LLAMAFILE", "RAWINT4")


def main_method(method: str, mode: str, group_size: int, zero_point: bool) -> tuple[str, int | None]:
    """Our name of a method, and its group size where that is the caller's choice.

    Raises
    ------
    ValueError
        An unknown mode or method, one that is not here, or zero points.
    """
    if mode not in _METHODS:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(_METHODS)}")
    known = _METHODS[mode]
    if method in _REFUSED:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(known)}: {_REFUSED[method]}")
    if method not in known:
        raise ValueError(f"method: got {method!r} for mode {mode!r}, expected one of {', '.join(known)}")
    if "KGroup" not in method:
        return known[method], None
    if zero_point:
        raise ValueError(f"zero_point: got {zero_point!r} with {method}, expected False: {_OFFSETS}")
    return known[method], group_size


def activation_of(swiglu_limit: float, swiglu_alpha: float) -> ActivationSpec:
    """The activation that the two numbers mean; 0 is none of them."""
    if swiglu_alpha:
        limit = {"limit": float(swiglu_limit)} if swiglu_limit else {}
        return parse_activation({"kind": "swigluoai", "alpha": float(swiglu_alpha), **limit})
    if swiglu_limit:
        return parse_activation({"kind": "silu", "limit": float(swiglu_limit)})
    return parse_activation("silu")
