"""The config of a decoder, read from a checkpoint's config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import MoEConfig
from ..io.gguf.checkpoint import GgufCheckpoint, is_gguf
from ..io.json_text import naming_file
from ..io.safetensors.checkpoint import hf_config_path, load_hf_config
from .gguf_model import gguf_hf_config

__all__ = ["DecoderConfig"]


@dataclass(frozen=True)
class _Family:
    """Properties of a model type that are not in config.json."""

    router: str  #: its tensor within a layer
    qk_norm: str = ""  #: queries and keys are normed by "head", as a whole ("all"), or not
    always_renormalize: bool = (
        False  #: weights of a token's experts sum to 1, regardless of the configuration
    )


_FAMILIES = {
    "qwen3_moe": _Family("mlp.gate.weight", qk_norm="head"),
    "mixtral": _Family("block_sparse_moe.gate.weight", always_renormalize=True),
    "olmoe": _Family("mlp.gate.weight", qk_norm="all"),
}

#: Settings that change what a model computes, and the values that are computed here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "decoder_sparse_step": (1, None),
    "hidden_act": ("silu", "swish", None),
    "mlp_only_layers": ([], None),
    "sliding_window": (None,),
}

#: The normal positive numbers of float32, in which everything is computed.
_LEAST, _LIMIT = 2.0**-126, 2.0**128


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder; of its experts, what the router needs.

    Raises
    ------
    ValueError
        From `from_hf_config`: a model type or a setting that is not one of those known here, or a size that
        is missing or not a positive number.
    TypeError
        A size of the experts of another type (see `MoEConfig.from_hf_config`).

    Examples
    --------
    >>> from ktmoe_np.io import load_hf_config
    >>> from ktmoe_np.models import EMBEDDED_MODEL
    >>> DecoderConfig.from_hf_config(load_hf_config(EMBEDDED_MODEL)).num_layers
    4
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    rms_norm_eps: float
    rope_theta: float
    norm_topk_prob: bool
    tie_word_embeddings: bool
    clip_qkv: float | None
    router: str
    qk_norm: str

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> DecoderConfig:
        """Read the config.json, or the GGUF header, of a model; errors are ValueErrors that name the file."""
        if is_gguf(path):
            checkpoint = GgufCheckpoint.shared(path)
            config = gguf_hf_config(checkpoint)
            with naming_file(checkpoint.path):
                return cls.from_hf_config(config)
        config = load_hf_config(path)
        with naming_file(hf_config_path(path)):
            return cls.from_hf_config(config)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read the parsed file of a Qwen3-MoE, Mixtral or OLMoE checkpoint."""
        model_type = config.get("model_type")
        family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            raise ValueError(f"model_type: got {model_type!r:.80}, expected one of {', '.join(_FAMILIES)}")
        for name, allowed in _ONLY.items():
            value = config.get(name)
            if name == "sliding_window" and config.get("use_sliding_window") is False:
                continue
            if value not in allowed:
                raise ValueError(f"{name}: got {value!r:.80}, expected {allowed[0]!r}")
        experts = MoEConfig.from_hf_config(config, 0)
        heads = _size(config, "num_attention_heads")
        kv_heads = _size(config, "num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads: got {kv_heads}, expected a divisor of {heads}")
        head_dim = _size(config, "head_dim", default=experts.hidden_size // heads)
        if head_dim % 2:
            raise ValueError(f"head_dim: got {head_dim}, expected an even number")
        return cls(
            model_type=str(model_type),
            vocab_size=_size(config, "vocab_size"),
            hidden_size=experts.hidden_size,
            num_layers=_size(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            num_experts=experts.num_experts,
            num_experts_per_tok=experts.num_experts_per_tok,
            rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(config),
            norm_topk_prob=family.always_renormalize or bool(config.get("norm_topk_prob", False)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            clip_qkv=None if config.get("clip_qkv") is None else _number(config, "clip_qkv", 0.0),
            router=family.router,
            qk_norm=family.qk_norm,
        )


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(f"{name}: got {value!r:.80}, expected a positive integer below 2**31")
    return value


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _LEAST <= value < _LIMIT:
        raise ValueError(f"{name}: got {value!r:.80}, expected a positive number in the range of float32")
    return float(value)


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary angles; positions that are scaled are refused."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if not isinstance(rope, Mapping):
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{name}: got rope type {kind!r:.80}, expected 'default'")
        if "rope_theta" in rope:
            return _number(rope, "rope_theta", 10000.0)
    return _number(config, "rope_theta", 10000.0)
