"""Checkpoints for `inspect_checkpoint` and `ktmoe inspect`, beside those of the loaders' tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoints import draw_experts, layer_tensors, write_safetensors
from native_checkpoints import LAYER, draw_layer, put_layer

__all__ = ["put_config", "write_gguf", "write_mixed", "write_native"]

E, I, H = 3, 96, 160  # noqa: E741


def put_config(path: Path, **more: Any) -> None:
    """A config.json for the layers of `native_checkpoints`."""
    config = {"num_experts": E, "num_experts_per_tok": 2, "hidden_size": H, "moe_intermediate_size": I}
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **config, **more}))


def write_native(path: Path, encoding: str) -> int:
    """A model whose layer `LAYER` has experts; the bytes of their tensors."""
    layer = draw_layer(encoding, E, I, H)
    put_layer(path, layer)
    put_config(path, num_hidden_layers=LAYER + 2)
    return sum(array.nbytes for name, array in layer.tensors.items() if not name.endswith("input_scale"))


def write_mixed(path: Path) -> None:
    """Layers 1 and 2 in bfloat16, layer 5 in FP8; layer 8 is behind the model's last one."""
    tensors = dict(draw_layer("fp8", E, I, H).tensors)
    for number in (1, 2, 8):
        layer = layer_tensors("qwen3_moe", draw_experts("qwen3_moe", (E, I, H), np.random.default_rng(0)))
        tensors |= {f"model.layers.{number}.{name}": array for name, array in layer.items()}
    write_safetensors(path / "model.safetensors", tensors)
    put_config(path, num_hidden_layers=7, architectures=["Qwen3MoeForCausalLM"])


def write_gguf(path: Path, *, num_layers: int = 3, further: int = 0) -> None:
    """Layers from 1 on with experts, gate and up in Q4_0, down in BF16: E 4, P 2, H 64, I 32."""
    import gguf

    num_experts, inter, hidden = 4, 32, 64
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(num_layers)
    writer.add_embedding_length(hidden)
    writer.add_expert_feed_forward_length(inter)
    writer.add_expert_count(num_experts)
    writer.add_expert_used_count(2)
    if further:
        writer.add_uint32("qwen3moe.nextn_predict_layers", further)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    codes = gguf.quants.quantize(np.ones((num_experts, inter, hidden), np.float32), q4_0)
    down = np.zeros((num_experts, hidden, inter), ml_dtypes.bfloat16).view(np.uint8)
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((hidden, inter), np.float32))
    for number in range(1, num_layers):
        for role in ("gate", "up"):
            writer.add_tensor(f"blk.{number}.ffn_{role}_exps.weight", codes, raw_dtype=q4_0)
        bf16 = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(f"blk.{number}.ffn_down_exps.weight", down, raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
