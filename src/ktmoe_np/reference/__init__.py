"""The specification: what the engine computes, in NumPy and ml_dtypes alone.

Read `forward` (the layer), then `activation` (the functions in it). `bound` says how far two correct
evaluations may lie apart, so that a comparison needs no guessed tolerance; `inputs` checks the arguments.

T tokens, E experts, P experts per token, H hidden size, I intermediate size; bf(x) rounds to bfloat16.
"""

from .activation import activate, round_bf16
from .bound import assert_within, error_bound
from .forward import moe_forward

__all__ = ["activate", "assert_within", "error_bound", "moe_forward", "round_bf16"]
