"""Which encoded weights can be multiplied with int8 activations, and where that is the default."""

from __future__ import annotations

from collections.abc import Mapping

from .. import kt_kernel_ext as ext
from .encodings import NATIVE_FORMATS
from .methods import Method

__all__ = ["ACTIVATION_BLOCKS", "default_in_models", "integer_projections"]

#: Format of weights -> columns that share a scale of int8 activations; 0 where these are not possible.
ACTIVATION_BLOCKS: Mapping[str, int] = {
    **{info.name: info.activation_block for info in ext.formats()},
    **{name: fmt.info.activation_block for name, fmt in NATIVE_FORMATS.items()},
}


def integer_projections(formats: Mapping[str, str]) -> list[str]:
    """List the projections whose weights can be multiplied with int8 activations.

    Parameters
    ----------
    formats : mapping of str to str
        Projection -> format of its weights.

    Examples
    --------
    >>> integer_projections({"gate_proj": "q4_k", "up_proj": "mxfp4", "down_proj": "f16"})
    ['gate_proj', 'up_proj']
    """
    return [name for name, fmt in formats.items() if ACTIVATION_BLOCKS[fmt]]


def default_in_models(method: Method, formats: Mapping[str, str]) -> str:
    """What whole models take activations in unless they are told: as other programs compute these weights.

    Parameters
    ----------
    method : Method
    formats : mapping of str to str
        Projection -> format of its weights, at least of GGUF.

    Returns
    -------
    str
        ``int8`` for quantized GGUF types, as llama.cpp does, else what the method takes.

    Examples
    --------
    >>> from ktmoe_np.formats.methods import find_method
    >>> default_in_models(find_method("LLAMAFILE", "inference"), {"down_proj": "q8_0"})
    'int8'
    >>> default_in_models(find_method("MOE_INT8", "inference"), {"down_proj": "int8"})
    'bfloat16'
    """
    if method.weights == "gguf" and integer_projections(formats):
        return "int8"
    return method.product
