"""A batch of tokens as passes take it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.checks import Array, bfloat16, count_tokens, expert_ids, routing_weights
from ..arrays.spec import ArraySpec
from ..config import MoEConfig

__all__ = ["Batch"]


class Batch:
    """The arrays of one forward pass.

    Raises
    ------
    TypeError, ValueError
        Hidden states or ids that are not what they should be, or no `out` to add to. The engine checks the
        rest.
    """

    def __init__(
        self,
        config: MoEConfig,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        out: Any,
        incremental: bool,
        activation_dtype: str | None = None,
    ) -> None:
        self.num_tokens = count_tokens(hidden_states)
        self.hidden_states = hidden_states
        self.ids = expert_ids(topk_ids)
        self.weights = routing_weights(topk_weights)
        ArraySpec((), (self.num_tokens, config.num_experts_per_tok)).check("topk_ids", self.ids)
        if out is None and incremental:
            raise ValueError("out: got None with incremental=True, expected the array to add to")
        self.out: Array = np.empty((self.num_tokens, config.hidden_size), bfloat16) if out is None else out
        self.incremental = incremental
        self.activation_dtype = activation_dtype
