"""Causal attention with rotated positions, and its derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ._arithmetic import (
    Floats,
    rms_norm,
    rms_norm_backward,
    rotate,
    rotate_backward,
    softmax,
    softmax_backward,
)
from .config import DecoderConfig

__all__ = ["QUERY_BLOCK", "Attention", "AttentionPass", "Place"]

#: Tokens that attend at a time: the scores of a long prompt would take gigabytes. The blocks of a sequence
#: begin with the tokens of a pass, whatever else is in the batch.
QUERY_BLOCK = 256


@dataclass(frozen=True)
class Place:
    """The positions of tokens in their sequence for attention; the same in every layer."""

    cos: Floats  #: [T, D / 2], of the angles by which queries and keys are turned
    sin: Floats
    begin: int = 0  #: tokens of the sequence before these


@dataclass(frozen=True)
class AttentionPass:
    """The values of a forward pass over a whole sequence for the backward pass."""

    place: Place
    projected: tuple[
        Floats, Floats, Floats
    ]  #: queries, keys and values [T, heads D] as projections give them
    query: Floats  #: [kv heads, group, T, D]
    keys: Floats  #: [kv heads, T, D]
    values: Floats
    chances: Floats  #: [kv heads, group, T, T]


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T / sqrt(D)) v of each head; heads in groups that share keys and values.

    Projections are [in, out].
    """

    config: DecoderConfig
    query: Floats
    key: Floats
    value: Floats
    output: Floats
    qk_norm: tuple[Floats, Floats] | None

    def forward(
        self,
        x: Floats,
        place: Place,
        append: Callable[[Floats, Floats], tuple[Floats, Floats]],
        keeps_chances: bool = True,
    ) -> tuple[Floats, AttentionPass | None]:
        """Attend from tokens [T, H] to themselves and to what is behind.

        `append` takes keys and values [kv heads, T, D] of the tokens and gives all that the sequence has.
        What the backward pass needs comes with the result, if `keeps_chances`; the bits are the same.
        """
        c = self.config
        projected = x @ self.query, x @ self.key, x @ self.value
        query, key, value = self._to_heads(projected)
        keys, values = append(rotate(key, place.cos, place.sin), value)
        query = self._grouped(rotate(query, place.cos, place.sin))
        mixed = np.empty_like(query)
        kept = np.zeros((*query.shape[:-1], keys.shape[1]), x.dtype) if keeps_chances else None
        for first in range(0, len(x), QUERY_BLOCK):
            rows = slice(first, min(first + QUERY_BLOCK, len(x)))
            seen = place.begin + rows.stop  # keys behind these are masked for the whole block
            chances = self._chances(query[:, :, rows], keys[:, :seen])
            mixed[:, :, rows] = chances @ values[:, None, :seen]
            if kept is not None:
                kept[:, :, rows, :seen] = chances
        out = _joined(mixed.reshape(c.num_heads, len(x), c.head_dim)) @ self.output
        return out, None if kept is None else AttentionPass(place, projected, query, keys, values, kept)

    def _chances(self, query: Floats, keys: Floats) -> Floats:
        """softmax(q k^T / sqrt(D)) of [.., T, D] and [.., S, D]; the last T keys are those of the queries."""
        scores: Floats = query @ keys[:, None].swapaxes(-1, -2) * query.dtype.type(self.config.head_dim**-0.5)
        num = query.shape[-2]
        scores[..., -num:] += np.triu(np.full((num, num), -np.inf, query.dtype), 1)  # no token looks ahead
        return softmax(scores)

    def backward(self, kept: AttentionPass, grad: Floats) -> Floats:
        """The gradient by the input, of that by the output; both [T, H]."""
        c, place = self.config, kept.place
        grad_mixed = self._grouped(self._heads(grad @ self.output.T))
        grad_value = (kept.chances.swapaxes(-1, -2) @ grad_mixed).sum(axis=1)
        grad_chances = grad_mixed @ kept.values[:, None].swapaxes(-1, -2)
        grad_scores = softmax_backward(kept.chances, grad_chances) * grad.dtype.type(c.head_dim**-0.5)
        grad_query = (grad_scores @ kept.keys[:, None]).reshape(c.num_heads, len(grad), c.head_dim)
        grad_key = (grad_scores.swapaxes(-1, -2) @ kept.query).sum(axis=1)
        turned_back = (rotate_backward(place.cos, place.sin, part) for part in (grad_query, grad_key))
        grads = self._to_heads_backward(kept.projected, (*turned_back, grad_value))
        result: Floats = grads[0] @ self.query.T + grads[1] @ self.key.T + grads[2] @ self.value.T
        return result

    def _to_heads(self, projected: tuple[Floats, ...]) -> tuple[Floats, ...]:
        """Queries, keys and values [heads, T, D]: normed and clipped as the family does."""
        heads = tuple(self._heads(part) for part in self._clipped(self._normed(projected, "all")))
        return self._normed(heads, "head")

    def _to_heads_backward(
        self, projected: tuple[Floats, ...], grads: tuple[Floats, ...]
    ) -> tuple[Floats, ...]:
        normed = self._normed(projected, "all")
        heads = tuple(self._heads(part) for part in self._clipped(normed))
        grads = tuple(_joined(grad) for grad in self._normed_backward(heads, grads, "head"))
        if self.config.clip_qkv is not None:
            inside = (np.abs(part) <= self.config.clip_qkv for part in normed)
            grads = tuple(grad * mask for grad, mask in zip(grads, inside, strict=True))
        return self._normed_backward(projected, grads, "all")

    def _normed(self, parts: tuple[Floats, ...], what: str) -> tuple[Floats, ...]:
        """Queries and keys normed, where the model norms `what`: each "head", or "all" of them together."""
        if self.qk_norm is None or self.config.qk_norm != what:
            return parts
        eps = self.config.rms_norm_eps
        return *map(lambda x, weight: rms_norm(x, weight, eps), parts[:2], self.qk_norm), parts[2]

    def _normed_backward(
        self, parts: tuple[Floats, ...], grads: tuple[Floats, ...], what: str
    ) -> tuple[Floats, ...]:
        if self.qk_norm is None or self.config.qk_norm != what:
            return grads
        eps = self.config.rms_norm_eps
        back = (rms_norm_backward(parts[i], self.qk_norm[i], eps, grads[i]) for i in range(2))
        return *back, grads[2]

    def _clipped(self, parts: tuple[Floats, ...]) -> tuple[Floats, ...]:
        limit = self.config.clip_qkv
        return parts if limit is None else tuple(np.clip(part, -limit, limit) for part in parts)

    def _heads(self, x: Floats) -> Floats:
        """[T, heads D] to [heads, T, D]."""
        return x.reshape(len(x), -1, self.config.head_dim).swapaxes(0, 1)

    def _grouped(self, x: Floats) -> Floats:
        """[heads, T, D] to [kv heads, group, T, D]."""
        return x.reshape(self.config.num_kv_heads, -1, *x.shape[1:])


def _joined(x: Floats) -> Floats:
    """[heads, T, D] to [T, heads D]."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)
