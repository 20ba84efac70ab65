"""Logits of whole models, how near two ways to compute them are, and GGUF files of a model's experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import gguf_checkpoints
import numpy as np
import pytest

from ktmoe_np.config import MoEConfig
from ktmoe_np.io import load_experts, load_hf_config
from ktmoe_np.models import EMBEDDED_MODEL, MoEDecoder

__all__ = ["assert_same_but_for_roundings", "logits_of", "write_gguf_experts"]


def logits_of(model: MoEDecoder, text: bytes) -> np.ndarray[Any, Any]:
    return model.forward([list(text)], [model.new_cache()])[0]


def assert_same_but_for_roundings(
    model: MoEDecoder, text: bytes, actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]
) -> None:
    """The logits of a text, computed in two ways that add in another order, are as near as roundings allow.

    How far that is, is measured: by how far all logits move when the last bits of the embedding change.
    """
    plain, rng, moved = logits_of(model, text), np.random.default_rng(0), []
    with pytest.MonkeyPatch.context() as patch:
        embedding = model._embedding
        for _ in range(4):
            noise = rng.choice(np.float32([1 - 2.0**-23, 1 + 2.0**-23]), embedding.shape)
            patch.setattr(model, "_embedding", embedding * noise)
            moved.append(np.abs(logits_of(model, text) - plain).max())
    assert min(moved) > 0
    assert np.abs(actual - expected).max() <= 2 * max(moved)


def write_gguf_experts(path: Path, kinds: Mapping[str, str] | str, num_layers: int = 4) -> None:
    """Write the experts of the embedded model in types that `gguf` quantizes to, by role or all alike."""
    tensors: dict[str, tuple[str, Any]] = {}
    for i in range(num_layers):
        config = MoEConfig.from_hf_config(load_hf_config(EMBEDDED_MODEL), i)
        for projection, held in load_experts(EMBEDDED_MODEL, i, config).projections.items():
            role = projection.removesuffix("_proj")
            kind = kinds if isinstance(kinds, str) else kinds[role]
            weights = np.stack([codes.astype(np.float32) for codes in held.codes])
            data = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind.upper()])
            tensors[f"blk.{i}.ffn_{role}_exps.weight"] = (kind, data.view(np.uint8))
    metadata = {
        "qwen3moe.block_count": num_layers,
        "qwen3moe.embedding_length": 256,
        "qwen3moe.expert_feed_forward_length": 64,
        "qwen3moe.expert_count": 16,
        "qwen3moe.expert_used_count": 4,
    }
    gguf_checkpoints.write(path, tensors, metadata)
