"""The methods that quantise, and what each makes of a layer, by the reference."""

from __future__ import annotations

from layers import Layer

from ktmoe_np.reference import quantize_int4, quantize_int8

__all__ = ["METHODS", "product_of", "quantized_layer"]

#: Method, group size.
METHODS = (
    ("AMXINT8", None),
    ("AMXINT4", 32),
    ("AMXINT4", 64),
    ("AMXINT4", 128),
    ("MOE_INT8", None),
    ("MOE_INT8", 32),
    ("MOE_INT4", 32),
    ("MOE_INT4", 64),
    ("MOE_INT4", 128),
)


def quantized_layer(layer: Layer, method: str, group_size: int | None) -> Layer:
    """The layer with what the method, of inference or of training, makes of its weights."""
    if method.startswith(("AMXINT4", "MOE_INT4")):
        return layer.with_matrices(lambda w: quantize_int4(w, group_size=group_size or 32))
    if method.startswith(("AMXINT8", "MOE_INT8")):
        return layer.with_matrices(lambda w: quantize_int8(w, group_size=group_size))
    return layer


def product_of(method: str) -> str:
    """What the method multiplies, as the reference calls it."""
    return "int8" if method.startswith("AMXINT") else "bfloat16"
