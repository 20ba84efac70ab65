"""Decoder layers but for their experts, on a GPU: attention over a cache, norms, router."""

from __future__ import annotations

from typing import Any

import torch

from ..core.shapes import Shape

__all__ = ["GpuLayers"]

_HEADS, _KV_HEADS, _HEAD_DIM = 32, 4, 128


def _drawn(*sizes: int) -> Any:
    return torch.randn(sizes, device="cuda", dtype=torch.bfloat16) * sizes[-1] ** -0.5


class GpuLayers:
    """A batch of tokens, each the next one of a cached sequence, and the layers they go through."""

    def __init__(self, shape: Shape, num_layers: int, tokens: int, context: int) -> None:
        torch.manual_seed(0)
        self._per_token = shape.per_token
        self._hidden = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
        width = _HEADS * _HEAD_DIM
        cached = (tokens, _KV_HEADS, context, _HEAD_DIM)
        self._layers = [
            {
                "qkv": _drawn((_HEADS + 2 * _KV_HEADS) * _HEAD_DIM, shape.hidden),
                "o": _drawn(shape.hidden, width),
                "router": _drawn(shape.experts, shape.hidden),
                "keys": _drawn(*cached),
                "values": _drawn(*cached),
            }
            for _ in range(num_layers)
        ]

    def _before_experts(self, layer: dict[str, Any], hidden: Any) -> tuple[Any, Any, Any, Any]:
        """The residual stream, and hidden states, ids and weights for the experts."""
        functional, tokens = torch.nn.functional, len(hidden)
        x = functional.rms_norm(hidden, hidden.shape[-1:])
        heads = (x @ layer["qkv"].T).view(tokens, _HEADS + 2 * _KV_HEADS, _HEAD_DIM)
        query, key, value = heads.split([_HEADS, _KV_HEADS, _KV_HEADS], 1)
        layer["keys"][:, :, -1] = key
        layer["values"][:, :, -1] = value
        # Queries that share keys and values are rows of one head's.
        rows = query.reshape(tokens, _KV_HEADS, _HEADS // _KV_HEADS, _HEAD_DIM)
        found = functional.scaled_dot_product_attention(rows, layer["keys"], layer["values"])
        hidden = hidden + found.reshape(tokens, -1) @ layer["o"].T
        x = functional.rms_norm(hidden, hidden.shape[-1:])
        probabilities = (x @ layer["router"].T).float().softmax(-1)
        weights, ids = probabilities.topk(self._per_token)
        return hidden, x, ids, weights / weights.sum(-1, keepdim=True)

    def routed(self) -> list[tuple[Any, Any, Any]]:
        """What each layer's experts are given when they give nothing."""
        hidden, batches = self._hidden, []
        for layer in self._layers:
            hidden, *batch = self._before_experts(layer, hidden)
            batches.append(tuple(batch))
        return batches

    def run(self, experts: Any) -> Any:
        """Through all layers, with those experts or without any."""
        hidden = self._hidden
        for i, layer in enumerate(self._layers):
            hidden, x, ids, weights = self._before_experts(layer, hidden)
            if experts is None:
                hidden = hidden + x
            else:
                experts.begin(i, x, ids, weights)
                hidden = hidden + experts.end(i)
        return hidden
