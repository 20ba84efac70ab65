"""Decoders in GGUF files: their configuration, and their dense tensors, by the names of Hugging Face."""

from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np

from ..arrays.checks import Array, bfloat16
from ..io.gguf.checkpoint import GgufCheckpoint
from ..io.gguf.config import gguf_config
from ._arithmetic import Floats

__all__ = ["GGUF_FAMILIES", "GgufTensors", "decode_rows", "gguf_hf_config"]

#: The architectures that run, and what transformers calls them. Mixtral is a llama with experts.
GGUF_FAMILIES = {"qwen3moe": "qwen3_moe", "llama": "mixtral", "olmoe": "olmoe"}

#: Whether the weights of a token's experts sum to 1, which headers mostly do not say.
_NORMALIZES = {"qwen3moe": True, "llama": True, "olmoe": False}

#: Architectures whose queries and keys are stored for rotations of neighbors, not of halves.
_PERMUTED = ("llama",)

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def gguf_hf_config(checkpoint: GgufCheckpoint) -> dict[str, Any]:
    """What the config.json of the model would say, from the header of its GGUF file.

    Raises
    ------
    ValueError
        An architecture that does not run, and the list of those that do; scaled positions; a value that
        differs by layer, or is missing where experts need it.
    """
    architecture = checkpoint.metadata("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF_FAMILIES:
        raise ValueError(
            f"{checkpoint.path}: metadata 'general.architecture': got {architecture!r:.80}, expected one of "
            f"{', '.join(GGUF_FAMILIES)}: other decoders do not run, but their expert layers do"
        )
    experts = gguf_config(checkpoint, 0)  # says so when there are none

    def value(name: str) -> Any:
        return _same_in_all_layers(checkpoint, f"{architecture}.{name}")

    kind = value("rope.scaling.type")
    if kind not in (None, "none"):
        raise ValueError(
            f"{checkpoint.path}: metadata '{architecture}.rope.scaling.type': got {kind!r:.80}, expected "
            "'none': scaled positions do not run"
        )
    if "rope_freqs.weight" in checkpoint:
        raise ValueError(
            f"{checkpoint.file_of('rope_freqs.weight')}: tensor 'rope_freqs.weight': got one, expected none: "
            "scaled positions do not run"
        )
    family = GGUF_FAMILIES[architecture]
    normalizes = value("expert_weights_norm")
    config = {
        "model_type": family,
        "vocab_size": checkpoint.info("token_embd.weight").shape[0],
        "hidden_size": value("embedding_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "head_dim": value("attention.key_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base"),
        "sliding_window": value("attention.sliding_window") or None,
        "clip_qkv": value("attention.clamp_kqv"),
        "norm_topk_prob": _NORMALIZES[architecture] if normalizes is None else normalizes,
        "tie_word_embeddings": "output.weight" not in checkpoint,
        "num_experts_per_tok": experts.num_experts_per_tok,
        "num_local_experts" if family == "mixtral" else "num_experts": experts.num_experts,
        "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size": (
            experts.moe_intermediate_size
        ),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in checkpoint,
    }
    return {name: found for name, found in config.items() if found is not None}


def _same_in_all_layers(checkpoint: GgufCheckpoint, key: str) -> Any:
    """A value of the header; of one for each layer the only one that there is."""
    found = checkpoint.metadata(key)
    if not isinstance(found, list):
        return found
    if not found or any(other != found[0] for other in found):
        raise ValueError(
            f"{checkpoint.path}: metadata {key!r}: got {found!r:.80}, expected the same for all layers"
        )
    return found[0]


class GgufTensors:
    """The dense tensors of a GGUF model, decoded to float32.

    Parameters
    ----------
    checkpoint : GgufCheckpoint
    num_heads, num_kv_heads : int
        Queries' and keys' heads.
    """

    def __init__(self, checkpoint: GgufCheckpoint, num_heads: int, num_kv_heads: int) -> None:
        self._checkpoint = checkpoint
        is_permuted = checkpoint.metadata("general.architecture") in _PERMUTED
        self._heads = {"q_proj": num_heads, "k_proj": num_kv_heads} if is_permuted else {}

    def read(self, name: str, *shape: int) -> Floats:
        """Decode a tensor that the checkpoint of transformers calls `name`.

        Raises
        ------
        ValueError
            There is none, or one of another shape or of a type that cannot be decoded: names file and tensor.
        ImportError
            Its type needs the package gguf, which is missing.
        """
        stored = _stored_name(name)
        info = self._checkpoint.info(stored)
        if info.shape != shape:
            raise ValueError(
                f"{self._checkpoint.file_of(stored)}: tensor {stored!r}: got {list(info.shape)}, expected "
                f"{list(shape)}"
            )
        try:
            decoded = decode_rows(self._checkpoint.tensor(stored), info.type)
        except (ImportError, ValueError) as error:
            raise type(error)(f"{self._checkpoint.file_of(stored)}: tensor {stored!r}: {error}") from error
        heads = self._heads.get(name.split(".")[-2])
        return decoded if heads is None else _unpermuted(decoded, heads)

    def type_of(self, name: str) -> str:
        """The type that a tensor is stored in, in small letters."""
        return self._checkpoint.info(_stored_name(name)).type


def _stored_name(name: str) -> str:
    """The name of a tensor in GGUF files."""
    if (match := _LAYER.fullmatch(name)) is not None:
        return f"blk.{match[1]}.{_IN_LAYER[match[2]]}"
    return _OUTER[name]


def decode_rows(rows: Array, kind: str) -> Floats:
    """Decode rows of bytes [..., B] of a GGUF type to float32 [..., K].

    Raises
    ------
    ValueError
        A type that the package gguf does not decode.
    ImportError
        The type needs that package, which is missing.
    """
    plain = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": bfloat16}.get(kind)
    if plain is not None:
        found: Array = np.ascontiguousarray(rows).view(plain).astype(np.float32)
        return found
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(f"got {kind}, which needs: pip install gguf") from error
    try:
        return np.asarray(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind.upper()]), np.float32)
    except (KeyError, NotImplementedError):
        raise ValueError(f"got {kind}, expected a type that the package gguf decodes") from None


def _unpermuted(matrix: Floats, heads: int) -> Floats:
    """Put rows of heads, stored as pairs that are rotated, back into halves: 0, 2, 4, .., 1, 3, 5, .."""
    rows, columns = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)
