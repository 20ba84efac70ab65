"""The specification: what the engine computes, in NumPy and ml_dtypes alone.

Read `forward` (the layer), then `activation` (the functions in it). `bound` says how far two correct
evaluations may differ, so that a comparison needs no guessed tolerance; `inputs` checks the arguments.
Training: `training` (the layer with adapters), `lora` (the adapters), `dropout` (their masks), then
`backward`. Quantized weights: `quantized` (what they are), `quantize` (how they come about),
`weights` (what is multiplied with them), `packing` (their bytes). Encodings of checkpoints: `native`, `gguf`.
int8 activations for all of these: `int8_activations`, `integer_matrix`, `integer_encodings`.

T tokens, E experts, P experts per token, H hidden size, I intermediate size, R LoRA rank; bf(x) rounds to
bfloat16.
"""

from . import native
from .activation import activate, activate_gradients, round_bf16
from .backward import Gradients, moe_backward
from .bound import assert_within, error_bound
from .dropout import Dropout, dropout_mask, philox4x32
from .forward import moe_forward
from .gguf import decode_gguf
from .int8_activations import integer_product
from .integer_encodings import (
    integers_of_gguf,
    integers_of_gptq_int4,
    integers_of_int4_zp,
    integers_of_mxfp4,
    integers_of_nvfp4,
    integers_of_quantized,
    integers_of_rawint4,
)
from .integer_matrix import IntegerMatrix
from .lora import LoraWeights
from .native import *  # noqa: F403
from .packing import pack_int4, pack_int8, unpack_int4, unpack_int8
from .quantize import quantize_activations, quantize_int4, quantize_int8
from .quantized import (
    Int4Matrix,
    Int8GroupMatrix,
    Int8Matrix,
    QuantizedMatrix,
    ScaledMatrix,
    dequantize,
    gradient_weights,
    product_weights,
)
from .training import ForwardCache, moe_forward_sft

__all__ = [
    "Dropout",
    "ForwardCache",
    "Gradients",
    "Int4Matrix",
    "Int8GroupMatrix",
    "Int8Matrix",
    "IntegerMatrix",
    "LoraWeights",
    "QuantizedMatrix",
    "ScaledMatrix",
    "activate",
    "activate_gradients",
    "assert_within",
    "decode_gguf",
    "dequantize",
    "dropout_mask",
    "error_bound",
    "gradient_weights",
    "integer_product",
    "integers_of_gguf",
    "integers_of_gptq_int4",
    "integers_of_int4_zp",
    "integers_of_mxfp4",
    "integers_of_nvfp4",
    "integers_of_quantized",
    "integers_of_rawint4",
    "moe_backward",
    "moe_forward",
    "moe_forward_sft",
    "pack_int4",
    "pack_int8",
    "philox4x32",
    "product_weights",
    "quantize_activations",
    "quantize_int4",
    "quantize_int8",
    "round_bf16",
    "unpack_int4",
    "unpack_int8",
]

__all__ += native.__all__  # one for each encoding
