"""The methods by name: which format and which wrapper serve each. The extension lists them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .. import kt_kernel_ext as ext

__all__ = [
    "METHODS",
    "Method",
    "find_method",
    "format_names",
    "main_name",
    "methods_that_take",
    "training_name",
]


@dataclass(frozen=True)
class Method:
    """The weights and products of a method."""

    name: str
    mode: str  #: "inference" or "sft"
    wrapper: str  #: module and class of the wrapper, below this package
    layer: str  #: the class in ``kt_kernel_ext.moe``
    weights: str = "bf16"  #: of the base: bf16, int8, int4, or a name in `ktmoe_np.formats.encodings`
    skip_lora: bool = False  #: adapters are used, but have no gradients
    #: Of methods that quantize: group size -> name in `ktmoe_np.formats.quantized`; the first is the default.
    formats: Mapping[int | None, str] = field(default_factory=dict, hash=False)
    #: Of encodings with a choice of groups: group size -> name in `ktmoe_np.formats.encodings`; likewise.
    encodings: Mapping[int | None, str] = field(default_factory=dict, hash=False)
    product: str = "bfloat16"  #: what is multiplied: see `ktmoe_np.reference.moe_forward`

    def resolve_group_size(self, group_size: Any) -> int | None:
        """The group size of the weights for a requested one.

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


#: Kind of weights -> the dtypes that they are made of, where codes have no dtype of their own.
_QUANTIZED_FROM = dict.fromkeys(("quantized", "gguf"), ("bfloat16", "float32", "float16"))

#: Mode, kind of weights and product -> the wrapper.
_WRAPPERS = {
    ("inference", "native", "bfloat16"): "inference.wrappers:NativeMoEWrapper",
    ("inference", "quantized", "int8"): "inference.wrappers:AMXMoEWrapper",
    ("inference", "quantized", "bfloat16"): "inference.wrappers:GeneralMoEWrapper",
    ("inference", "gguf", "bfloat16"): "inference.wrappers:LlamafileMoEWrapper",
    ("sft", "native", "bfloat16"): "sft.wrappers:NativeSFTMoEWrapper",
    ("sft", "quantized", "int8"): "sft.wrappers:QuantizedSFTMoEWrapper",
    ("sft", "quantized", "bfloat16"): "sft.wrappers:QuantizedSFTMoEWrapper",
    ("sft", "gguf", "bfloat16"): "sft.wrappers:LlamafileSFTMoEWrapper",
}


def training_name(inference: str) -> str:
    """The method that trains adapters on what a method for inference computes."""
    return f"{inference}_SFT"


def main_name(method: Method) -> str:
    """The first name of a method that has several."""
    return next(m.name for m in METHODS if replace(m, name=method.name) == method)


def format_names(info: ext.MethodInfo) -> dict[int | None, str]:
    """Group size -> name of the format that it chooses; the first is the default.

    The default format of native weights is called after the method: rows may be made of what is given.
    """
    names = {fmt.group: fmt.name for fmt in info.formats}
    if info.weights == "native":
        names[info.formats[0].group] = _plain_name(info).lower()
    return names


def _plain_name(info: ext.MethodInfo) -> str:
    """The name without the suffix of the mode."""
    return info.names[-1].removesuffix(training_name("")) if info.mode == "sft" else info.names[-1]


def _methods(info: ext.MethodInfo) -> Iterator[Method]:
    """The methods of an entry of the registry, by all of their names."""
    names = format_names(info)
    weights = next(iter(names.values()), "gguf").partition("_group")[0]
    plain = Method(
        name="",
        mode=info.mode,
        wrapper=_WRAPPERS[info.mode, info.weights, info.product],
        layer=info.layer,
        weights=weights if info.scales or info.weights != "native" else "bf16",
        formats=names if info.weights == "quantized" else {},
        encodings=names if info.weights == "native" and len(names) > 1 else {},
        product=info.product,
    )
    for suffix, skip_lora in (("", False), ("_SkipLoRA", True)) if info.mode == "sft" else (("", False),):
        for name in info.names:
            yield replace(plain, name=name + suffix, skip_lora=skip_lora)


#: The first of a mode is its default.
METHODS = tuple(method for info in ext.methods() for method in _methods(info))


def methods_that_take(dtype: str) -> str:
    """What a message about weights adds: which methods for inference take weights of a dtype.

    Examples
    --------
    >>> methods_that_take("float16"), methods_that_take("complex64")
    ('; BF16, AMXINT8, AMXINT4, MOE_INT8, MOE_INT4 and LLAMAFILE take float16', '')
    """
    names = [
        info.names[0]
        for info in ext.methods()
        if info.mode == "inference" and dtype in (info.codes or _QUANTIZED_FROM[info.weights])
    ]
    if not names:
        return ""
    listed = " and ".join([", ".join(names[:-1]), names[-1]][-len(names) :])
    return f"; {listed} {'take' if len(names) > 1 else 'takes'} {dtype}"


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
