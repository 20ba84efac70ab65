"""Whole GGUF models for tests: checkpoints of Hugging Face, named and ordered as llama.cpp does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ktmoe_np.config import MoEConfig
from ktmoe_np.io import SafetensorsCheckpoint, load_experts, load_hf_config
from ktmoe_np.models import EMBEDDED_MODEL

__all__ = ["ARCHITECTURES", "byte_tokens", "permuted", "write_gguf_model"]

AnyArray = Any

#: model_type -> architecture of GGUF.
ARCHITECTURES = {"qwen3_moe": "qwen3moe", "mixtral": "llama", "olmoe": "olmoe"}

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}


def byte_tokens(writer: gguf.GGUFWriter, template: str = "{{ messages[0].content }} and there was") -> None:
    """A token for each byte, as the packaged model has, and a chat template."""
    vocab = json.loads((EMBEDDED_MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_chat_template(template)


def permuted(matrix: AnyArray, heads: int) -> AnyArray:
    """Halves of heads interleaved: what the rotation turns together become neighbors."""
    halves = matrix.reshape(heads, 2, len(matrix) // heads // 2, -1)
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(matrix.shape)


def write_gguf_model(
    source: Path,
    target: Path,
    *,
    dense: str = "f32",
    experts: str = "bf16",
    change: Callable[[dict[str, AnyArray]], None] = lambda tensors: None,
    extra: Mapping[str, Any] | None = None,
    tokens: Callable[[gguf.GGUFWriter], None] | None = None,
) -> None:
    """Write a checkpoint as a GGUF file; `dense` and `experts` are types that `gguf` quantizes to.

    `change` may change the dense tensors, `extra` has more numbers of the header, and `tokens` adds the
    tokenizer.
    """
    config, checkpoint = load_hf_config(source), SafetensorsCheckpoint(source)
    architecture = ARCHITECTURES[config["model_type"]]
    tensors = _dense_tensors(config, checkpoint, architecture)
    change(tensors)
    writer = gguf.GGUFWriter(target, architecture)
    _add_numbers(writer, config, architecture)
    for key, value in (extra or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](key, value)
    if tokens is not None:
        tokens(writer)
    for name, tensor in tensors.items():
        _add(writer, name, tensor, dense if tensor.ndim == 2 and "gate_inp" not in name else "f32")
    for i in range(config["num_hidden_layers"]):
        found = load_experts(checkpoint, i, MoEConfig.from_hf_config(config, i))
        for projection, held in found.projections.items():
            weights = np.stack([codes.astype(np.float32) for codes in held.codes])
            _add(writer, f"blk.{i}.ffn_{projection.removesuffix('_proj')}_exps.weight", weights, experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _dense_tensors(
    config: Mapping[str, Any], checkpoint: SafetensorsCheckpoint, architecture: str
) -> dict[str, AnyArray]:
    names = checkpoint.names()
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    if not config.get("tie_word_embeddings"):
        outer["lm_head"] = "output"
    tensors = {
        f"{to}.weight": checkpoint.tensor(f"{name}.weight").astype(np.float32) for name, to in outer.items()
    }
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for i in range(config["num_hidden_layers"]):
        for name, stored in _NAMES.items():
            full = f"model.layers.{i}.{name}.weight"
            if full not in names:
                continue
            tensor = checkpoint.tensor(full).astype(np.float32)
            role = name.split(".")[-1]
            if architecture == "llama" and role in heads:
                tensor = permuted(tensor, heads[role])
            tensors[f"blk.{i}.{stored}.weight"] = tensor
    return tensors


def _add_numbers(writer: gguf.GGUFWriter, config: Mapping[str, Any], architecture: str) -> None:
    """Sizes and other numbers of the model."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    if config.get("clip_qkv") is not None:
        writer.add_clamp_kqv(config["clip_qkv"])
    moe = MoEConfig.from_hf_config(config, 0)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.num_experts_per_tok)
    if architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(moe.moe_intermediate_size)
    else:
        writer.add_feed_forward_length(moe.moe_intermediate_size)


def _add(writer: gguf.GGUFWriter, name: str, tensor: AnyArray, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind.upper()]
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(tensor), number), raw_dtype=number)
