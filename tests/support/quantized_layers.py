"""The methods that quantize, and what each makes of a layer, by the reference."""

from __future__ import annotations

from layers import Layer

from ktmoe_np.cli.quantized_reference import quantize_matrices
from ktmoe_np.formats.methods import METHODS as REGISTRY
from ktmoe_np.formats.methods import Method
from ktmoe_np.formats.quantized import FORMATS

__all__ = ["METHODS", "product_of", "quantized_layer"]

#: Method, group size.
METHODS = tuple(
    (method.name, size) for method in REGISTRY if method.mode == "inference" for size in method.formats
)


def quantized_layer(layer: Layer, method: str, group_size: int | None) -> Layer:
    """The layer with what the method, of inference or of training, makes of its weights."""
    found = _found(method)
    if not found.formats:
        return layer
    fmt = FORMATS[found.formats[found.resolve_group_size(group_size)]]
    return layer.with_matrices(lambda weights: quantize_matrices(fmt, weights))


def product_of(method: str) -> str:
    """What the method multiplies, as the reference calls it."""
    return _found(method).product


def _found(name: str) -> Method:
    return next(method for method in REGISTRY if method.name == name)
