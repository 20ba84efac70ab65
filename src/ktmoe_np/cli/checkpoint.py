"""The demo's checkpoint: the experts of a small Qwen3-MoE, in the layout of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..arrays.checks import Array
from ..io.safetensors.writer import replace_text, write_safetensors

__all__ = ["CONFIG", "NUM_LAYERS", "write_demo_checkpoint"]

NUM_LAYERS = 2

#: The keys of Qwen3-30B-A3B's config.json, with the sizes of a model that is written in a second.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": NUM_LAYERS,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def write_demo_checkpoint(directory: Path) -> int:
    """Write config.json and model.safetensors, about 100 MB.

    Parameters
    ----------
    directory : Path
        Made when it is not there.

    Returns
    -------
    int
        Bytes of the experts' weights.

    Raises
    ------
    ValueError
        The directory is not empty.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ValueError(f"{directory}: got files in it, expected a new or an empty directory")
    experts, hidden, inter = (CONFIG[key] for key in ("num_experts", "hidden_size", "moe_intermediate_size"))
    rng = np.random.default_rng(0)
    tensors: dict[str, Array] = {}
    num_bytes = 0
    for layer in range(NUM_LAYERS):
        stem = f"model.layers.{layer}.mlp"
        tensors[f"{stem}.gate.weight"] = _draw(rng, experts, hidden)  # the router
        for e in range(experts):
            for name, shape in (
                ("gate_proj", (inter, hidden)),
                ("up_proj", (inter, hidden)),
                ("down_proj", (hidden, inter)),
            ):
                matrix = _draw(rng, *shape)
                tensors[f"{stem}.experts.{e}.{name}.weight"] = matrix
                num_bytes += matrix.nbytes
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    replace_text(directory / "config.json", json.dumps(CONFIG, indent=2) + "\n")
    return num_bytes


def _draw(rng: np.random.Generator, *shape: int) -> Array:
    """Gaussian weights that keep the size of what they are multiplied with."""
    values = rng.standard_normal(shape, np.float32)
    values *= np.float32(shape[-1] ** -0.5)
    weights: Array = values.astype(ml_dtypes.bfloat16)
    return weights
