"""The specification: what the engine computes, in NumPy and ml_dtypes alone.

Read `forward` (the layer), then `activation` (the functions in it). `bound` says how far two correct
evaluations may lie apart, so that a comparison needs no guessed tolerance; `inputs` checks the arguments.
Training: `training` (the layer with adapters), `lora` (the adapters), `dropout` (their masks), then
`backward` and `derivative`.

T tokens, E experts, P experts per token, H hidden size, I intermediate size, R LoRA rank; bf(x) rounds to
bfloat16.
"""

from .activation import activate, round_bf16
from .backward import Gradients, moe_backward
from .bound import assert_within, error_bound
from .derivative import activate_gradients
from .dropout import Dropout, dropout_mask, philox4x32
from .forward import moe_forward
from .lora import LoraWeights
from .training import ForwardCache, moe_forward_sft

__all__ = [
    "Dropout",
    "ForwardCache",
    "Gradients",
    "LoraWeights",
    "activate",
    "activate_gradients",
    "assert_within",
    "dropout_mask",
    "error_bound",
    "moe_backward",
    "moe_forward",
    "moe_forward_sft",
    "philox4x32",
    "round_bf16",
]
