"""A decoder in NumPy whose experts are layers of this library: how they are embedded in a program.

All but the experts is float32 arithmetic of NumPy, a sequence at a time; the experts take the rows of all
sequences together. Both give a sequence the same bits whether it is alone or not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..experts import KTMoEWrapper
from ..inference.base import BaseMoEWrapper
from ..io import load_hf_config
from ..io.safetensors import SafetensorsCheckpoint
from .cache import KVCache
from .config import DecoderConfig
from .embedded import EMBEDDED_MODEL

__all__ = ["MoEDecoder"]

_Floats = NDArray[np.float32]


@dataclass(frozen=True)
class _Layer:
    """The weights of a layer, each projection [in, out], and its experts."""

    input_norm: _Floats
    query: _Floats
    key: _Floats
    value: _Floats
    output: _Floats
    qk_norm: tuple[_Floats, _Floats] | None
    expert_norm: _Floats
    router: _Floats
    experts: BaseMoEWrapper


@dataclass(frozen=True)
class _Place:
    """What attention must know of where tokens stand in their sequence; the same in every layer."""

    cos: _Floats  #: [T, D / 2], of the angles by which queries and keys are turned
    sin: _Floats
    mask: _Floats  #: [T, tokens so far], minus infinity where a token would look ahead


class MoEDecoder:
    """A language model with experts: Qwen3-MoE, Mixtral or OLMoE. Make one with `from_pretrained`.

    Attributes
    ----------
    config : DecoderConfig
    seconds_in_experts : float
        Time that `forward` has spent in the experts, of all calls.

    Examples
    --------
    >>> model = MoEDecoder.from_pretrained()
    >>> cache = model.new_cache()
    >>> (logits,) = model.forward([list(b"In the beginning God created the heaven and the e")], [cache])
    >>> logits.shape, chr(logits[-1].argmax())
    ((49, 256), 'a')
    """

    def __init__(
        self,
        config: DecoderConfig,
        embedding: _Floats,
        layers: Sequence[_Layer],
        norm: _Floats,
        head: _Floats,
    ) -> None:
        self.config = config
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        half = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
        self._frequencies = np.float32(config.rope_theta) ** -half
        self.seconds_in_experts = 0.0

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str] | None = None, method: str | None = None, **overrides: Any
    ) -> MoEDecoder:
        """Load a Hugging Face checkpoint.

        Parameters
        ----------
        path : str or path-like, optional
            Its directory; None takes the model that comes with the package.
        method : str, optional
            The experts' method (see `KTMoEWrapper`); None takes what they are encoded in.
        **overrides
            Any other parameter of `KTMoEWrapper`, e.g. ``cpuinfer_threads``.

        Returns
        -------
        MoEDecoder

        Raises
        ------
        FileNotFoundError
            No checkpoint there.
        ValueError
            A configuration that is not supported, or a tensor that is missing or of another shape (names file
            and tensor).
        """
        path = EMBEDDED_MODEL if path is None else path
        config = DecoderConfig.from_hf_config(load_hf_config(path))
        checkpoint = SafetensorsCheckpoint.shared(path)
        embedding = _read(checkpoint, "model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        layers = []
        for i in range(config.num_layers):
            experts = KTMoEWrapper.from_pretrained(path, i, method=method, **overrides)
            layers.append(_read_layer(checkpoint, config, f"model.layers.{i}.", experts))
        norm = _read(checkpoint, "model.norm.weight", config.hidden_size)
        head = embedding
        if not config.tie_word_embeddings:
            head = _read(checkpoint, "lm_head.weight", config.vocab_size, config.hidden_size)
        return cls(config, embedding, layers, norm, head.T)

    @property
    def experts(self) -> list[BaseMoEWrapper]:
        """The experts of each layer."""
        return [layer.experts for layer in self._layers]

    def new_cache(self) -> KVCache:
        """Make the memory of a sequence that has not begun."""
        c = self.config
        return KVCache(c.num_layers, c.num_kv_heads, c.head_dim)

    def forward(self, tokens: Sequence[Any], caches: Sequence[KVCache]) -> list[_Floats]:
        """Go on with some sequences.

        Parameters
        ----------
        tokens : sequence of arrays of integers [T]
            The next tokens of each sequence, as many as there are.
        caches : sequence of KVCache
            What each has behind it; it has `tokens` too afterwards.

        Returns
        -------
        list of float32 [T, vocab_size]
            The logits of what follows each of the tokens.

        Raises
        ------
        ValueError
            Other numbers of sequences and caches, a cache twice, or no tokens.
        IndexError
            A token that the vocabulary does not have.
        """
        ids = self._checked(tokens, caches)
        hidden = [self._embedding[row] for row in ids]
        places = [self._place(cache.length, len(row)) for row, cache in zip(ids, caches, strict=True)]
        for i, layer in enumerate(self._layers):
            for s, cache in enumerate(caches):
                hidden[s] = hidden[s] + self._attention(layer, i, hidden[s], cache, places[s])
            self._add_experts(layer, hidden)
        for row, cache in zip(ids, caches, strict=True):
            cache.advance(len(row))
        return [self._normed(x, self._norm) @ self._head for x in hidden]

    def _checked(self, tokens: Sequence[Any], caches: Sequence[KVCache]) -> list[NDArray[np.int64]]:
        if len(tokens) != len(caches):
            raise ValueError(f"caches: got {len(caches)}, expected one for each of {len(tokens)} sequences")
        if len({id(cache) for cache in caches}) < len(caches):
            raise ValueError("caches: got one twice, expected one for each sequence")
        ids = []
        for row in tokens:
            array = np.asarray(row)
            if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iu":
                got = f"{array.dtype} {list(array.shape)}"
                raise ValueError(f"tokens: got {got}, expected integers [T], at least one")
            wrong = (array < 0) | (array >= self.config.vocab_size)
            if wrong.any():
                limit = self.config.vocab_size
                raise IndexError(f"tokens: got {array[wrong][0]}, expected 0 to {limit - 1}")
            ids.append(array.astype(np.int64))
        return ids

    def _place(self, begin: int, length: int) -> _Place:
        positions = np.arange(begin, begin + length)
        angles = positions.astype(np.float32)[:, None] * self._frequencies
        ahead = np.arange(begin + length) > positions[:, None]
        mask = np.where(ahead, -np.inf, 0).astype(np.float32)
        return _Place(np.cos(angles), np.sin(angles), mask)

    def _normed(self, x: _Floats, weight: _Floats) -> _Floats:
        """Divide by the root of the mean square of the last axis, and multiply by weights."""
        mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
        root = np.sqrt(mean + np.float32(self.config.rms_norm_eps)).astype(np.float32, copy=False)
        return x / root * weight

    def _attention(self, layer: _Layer, i: int, x: _Floats, cache: KVCache, place: _Place) -> _Floats:
        """Causal attention of the heads: softmax(q k^T / sqrt(D)) v, through the output projection."""
        c = self.config
        x = self._normed(x, layer.input_norm)
        query, key, value = x @ layer.query, x @ layer.key, x @ layer.value
        if layer.qk_norm and c.qk_norm == "all":
            query, key = map(self._normed, (query, key), layer.qk_norm)
        if c.clip_qkv is not None:
            query, key, value = (np.clip(part, -c.clip_qkv, c.clip_qkv) for part in (query, key, value))
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if layer.qk_norm and c.qk_norm == "head":
            query, key = map(self._normed, (query, key), layer.qk_norm)
        keys, values = cache.append(i, _rotated(key, place), value)

        # Heads in groups that share keys and values: [kv heads, group, T, D].
        query = _rotated(query, place).reshape(c.num_kv_heads, -1, len(x), c.head_dim)
        scores = query @ keys[:, None].swapaxes(-1, -2) * np.float32(c.head_dim**-0.5)
        scores += place.mask
        mixed = (_softmax(scores) @ values[:, None]).reshape(c.num_heads, len(x), c.head_dim)
        joined = mixed.swapaxes(0, 1).reshape(len(x), -1) @ layer.output
        return joined.astype(np.float32, copy=False)

    def _heads(self, x: _Floats) -> _Floats:
        """[T, heads D] to [heads, T, D]."""
        return x.reshape(len(x), -1, self.config.head_dim).swapaxes(0, 1)

    def _add_experts(self, layer: _Layer, hidden: list[_Floats]) -> None:
        """Add to each sequence what its tokens' experts give: one call for all rows."""
        normed = [self._normed(x, layer.expert_norm) for x in hidden]
        routes = [self._route(layer, x) for x in normed]
        rows = np.concatenate(normed).astype(ml_dtypes.bfloat16)
        ids = np.concatenate([ids for ids, _ in routes])
        weights = np.concatenate([weights for _, weights in routes])
        started = time.perf_counter()
        out = layer.experts.forward(rows, ids, weights, out=np.empty(rows.shape, np.float32))
        self.seconds_in_experts += time.perf_counter() - started
        begin = 0
        for s, x in enumerate(hidden):
            hidden[s] = x + out[begin : begin + len(x)]
            begin += len(x)

    def _route(self, layer: _Layer, x: _Floats) -> tuple[NDArray[np.int64], _Floats]:
        """The likeliest experts of each token [T, P], and their weights."""
        chances = _softmax(x @ layer.router)
        ids = np.argsort(-chances, axis=-1, kind="stable")[:, : self.config.num_experts_per_tok]
        weights = np.take_along_axis(chances, ids, -1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdims=True)
        return ids, weights


def _read(checkpoint: SafetensorsCheckpoint, name: str, *shape: int) -> _Floats:
    """Read a tensor in float32, of that shape in the checkpoint."""
    checkpoint.info(name)  # says so when there is none
    problem = checkpoint.problem(name, ("BF16", "F16", "F32"), (shape,))
    if problem is not None:
        raise ValueError(problem)
    return checkpoint.tensor(name).astype(np.float32)


def _read_layer(
    checkpoint: SafetensorsCheckpoint, c: DecoderConfig, stem: str, experts: BaseMoEWrapper
) -> _Layer:
    def read(name: str, *shape: int) -> _Floats:
        return _read(checkpoint, f"{stem}{name}", *shape)

    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    qk_norm = None
    if c.qk_norm:
        widths = (c.head_dim, c.head_dim) if c.qk_norm == "head" else (queries, keys)
        qk_norm = (
            read("self_attn.q_norm.weight", widths[0]),
            read("self_attn.k_norm.weight", widths[1]),
        )
    return _Layer(
        input_norm=read("input_layernorm.weight", c.hidden_size),
        query=read("self_attn.q_proj.weight", queries, c.hidden_size).T,
        key=read("self_attn.k_proj.weight", keys, c.hidden_size).T,
        value=read("self_attn.v_proj.weight", keys, c.hidden_size).T,
        output=read("self_attn.o_proj.weight", c.hidden_size, queries).T,
        qk_norm=qk_norm,
        expert_norm=read("post_attention_layernorm.weight", c.hidden_size),
        router=read(c.router, c.num_experts, c.hidden_size).T,
        experts=experts,
    )


def _softmax(x: _Floats) -> _Floats:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    result: _Floats = powers / powers.sum(axis=-1, keepdims=True)
    return result


def _rotated(x: _Floats, place: _Place) -> _Floats:
    """Turn pairs (i, i + D / 2) of [heads, T, D] by the angles of their positions."""
    first, second = np.split(x, 2, axis=-1)
    turned = first * place.cos - second * place.sin, second * place.cos + first * place.sin
    return np.concatenate(turned, axis=-1)
