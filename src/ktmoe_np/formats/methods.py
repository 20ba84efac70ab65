"""The one table of methods: which format and which wrapper serve a name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["METHODS", "Method", "find_method", "main_name", "training_name"]


@dataclass(frozen=True)
class Method:
    """How a method is carried out."""

    name: str
    mode: str  #: "inference" or "sft"
    wrapper: str  #: module and class of the wrapper, below this package
    layer: str  #: the class in ``kt_kernel_ext.moe``
    weights: str = "bf16"  #: of the base: bf16, int8, int4, or a name in `ktmoe_np.formats.encodings`
    skip_lora: bool = False  #: adapters are used, but have no gradients
    #: Of methods that quantise: group size -> name in `ktmoe_np.formats.quantized`; the first is the default.
    formats: Mapping[int | None, str] = field(default_factory=dict, hash=False)
    #: Of encodings with a choice of groups: group size -> name in `ktmoe_np.formats.encodings`; likewise.
    encodings: Mapping[int | None, str] = field(default_factory=dict, hash=False)
    product: str = "bfloat16"  #: what is multiplied: see `ktmoe_np.reference.moe_forward`

    def resolve_group_size(self, group_size: Any) -> int | None:
        """The group size that weights get when this one is asked for.

        Raises
        ------
        TypeError
            Not an integer.
        ValueError
            One that the method does not have.
        """
        known_sizes = self.formats or self.encodings
        if group_size is None:
            return next(iter(known_sizes), None)
        if isinstance(group_size, bool) or not hasattr(group_size, "__index__"):
            raise TypeError(f"group_size: got {group_size!r}, expected an integer or None")
        size = int(group_size)
        if size in known_sizes:
            return size
        sizes = [str(known) for known in known_sizes if known is not None]
        if not sizes:
            raise ValueError(f"group_size: got {size}, expected None: method {self.name!r} has no groups")
        known = ", ".join(["None", *sizes[:-1]]) + f" or {sizes[-1]}"
        raise ValueError(f"group_size: got {size}, expected {known} with method {self.name!r}")


_AMX, _GENERAL = "inference.wrappers:AMXMoEWrapper", "inference.wrappers:GeneralMoEWrapper"
_NATIVE, _LLAMAFILE = "inference.wrappers:NativeMoEWrapper", "inference.wrappers:LlamafileMoEWrapper"

#: Wrapper for inference -> that for training.
_TRAINING_WRAPPERS = {
    _AMX: "sft.wrappers:QuantizedSFTMoEWrapper",
    _GENERAL: "sft.wrappers:QuantizedSFTMoEWrapper",
    _NATIVE: "sft.wrappers:NativeSFTMoEWrapper",
    _LLAMAFILE: "sft.wrappers:LlamafileSFTMoEWrapper",
}


def _quantized(name: str, wrapper: str, layer: str, weights: str, *group_sizes: int | None) -> Method:
    formats = {size: weights if size is None else f"{weights}_group{size}" for size in group_sizes}
    product = "int8" if wrapper == _AMX else "bfloat16"
    return Method(name, "inference", wrapper, layer, weights, formats=formats, product=product)


_INFERENCE = (
    Method("BF16", "inference", _NATIVE, "AMXBF16_MOE"),
    _quantized("AMXINT8", _AMX, "AMXInt8_MOE", "int8", None),
    _quantized("AMXINT4", _AMX, "AMXInt4_MOE", "int4", 32, 64, 128),
    _quantized("MOE_INT8", _GENERAL, "Int8_MOE", "int8", None, 32),
    _quantized("MOE_INT4", _GENERAL, "Int4_MOE", "int4", 32, 64, 128),
    Method("FP8", "inference", _NATIVE, "AMXFP8_MOE", "fp8"),
    Method("FP8_PERCHANNEL", "inference", _NATIVE, "AMXFP8PerChannel_MOE", "fp8_perchannel"),
    Method("MXFP8", "inference", _NATIVE, "MXFP8_MOE", "mxfp8"),
    Method(
        "RAWINT4",
        "inference",
        _NATIVE,
        "RAWINT4_MOE",
        "rawint4",
        encodings={32: "rawint4", 64: "rawint4_group64", 128: "rawint4_group128"},
    ),
    Method("GPTQ_INT4", "inference", _NATIVE, "GPTQ_INT4_MOE", "gptq_int4"),
    Method("MXFP4", "inference", _NATIVE, "MXFP4_MOE", "mxfp4"),
    Method("NVFP4", "inference", _NATIVE, "NVFP4_MOE", "nvfp4"),
    Method("LLAMAFILE", "inference", _LLAMAFILE, "Llamafile_MOE", "gguf"),
)

#: Methods whose training has a name of its class beside its own; the first is the one that is told.
_FAMILY_NAMES = {name: (f"AMX{name}", name) for name in ("BF16", "FP8")}


def training_name(inference: str) -> str:
    """The method that trains adapters on what a method for inference computes."""
    return f"{inference}_SFT"


def main_name(method: Method) -> str:
    """The first name of a method that has several."""
    return next(m.name for m in METHODS if replace(m, name=method.name) == method)


def _training(method: Method) -> Iterator[Method]:
    """The methods that train adapters on what a method for inference computes."""
    layer = method.layer.replace("_MOE", "_SFT_MOE")
    names = _FAMILY_NAMES.get(method.name, (method.name,))
    for suffix, skip_lora in (("", False), ("_SkipLoRA", True)):
        for name in names:
            yield replace(
                method,
                name=training_name(name) + suffix,
                mode="sft",
                wrapper=_TRAINING_WRAPPERS[method.wrapper],
                layer=layer,
                skip_lora=skip_lora,
            )


#: The first of a mode is its default.
METHODS = (*_INFERENCE, *(trained for method in _INFERENCE for trained in _training(method)))


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
