"""Tiny checkpoints in every naming that the loaders read, written without the code under test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "NAMINGS",
    "draw_experts",
    "header_bytes",
    "layer_tensors",
    "write_checkpoint",
    "write_safetensors",
]

AnyArray = NDArray[Any]

#: naming -> the layers' prefix, and the config.json apart from the sizes.
NAMINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("model.layers", {"hidden_act": "silu"}),
    "mixtral": ("model.layers", {"hidden_act": "silu"}),
    "deepseek_v4": ("layers", {"hidden_act": "silu", "swiglu_limit": 10.0}),
    "lfm2_moe": ("model.layers", {}),
    "jamba": ("model.layers", {"hidden_act": "silu"}),
    "mixer": ("backbone.layers", {"hidden_act": "silu"}),
    "nemotron_h": ("backbone.layers", {"mlp_hidden_act": "relu2"}),
    "mistral_large": ("layers", {"hidden_act": "silu"}),
    "qwen3_5_moe": ("model.language_model.layers", {"hidden_act": "silu"}),
    "gemma4": ("model.language_model.layers", {"hidden_activation": "gelu_pytorch_tanh"}),
    "granitemoe": ("model.layers", {"hidden_act": "silu"}),
    "granitemoe_swa": ("model.layers", {"hidden_act": "silu"}),
    "jetmoe": ("model.layers", {"activation_function": "silu"}),
    "llama4": ("language_model.model.layers", {"hidden_act": "silu"}),
    "qwen3_vl_moe": ("model.language_model.layers", {"hidden_act": "silu"}),
    "aria": ("language_model.model.layers", {"hidden_act": "silu"}),
    "inkling": ("model.llm.layers", {"hidden_act": "silu"}),
    "gpt_oss": ("model.layers", {"hidden_act": "silu", "swiglu_limit": 7.0}),
    "step3p5": ("model.layers", {"swiglu_limits": [7.0] * 64}),
}

_SEPARATE = {
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "deepseek_v4": ("ffn.experts", "w1", "w3", "w2"),
    "lfm2_moe": ("feed_forward.experts", "w1", "w3", "w2"),
    "jamba": ("feed_forward.experts", "gate_proj", "up_proj", "down_proj"),
    "mixer": ("mixer.experts", "w1", "w3", "w2"),
    "mistral_large": ("experts", "w1", "w3", "w2"),
}

_FUSED_BY_ROWS = {
    "qwen3_5_moe": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "gemma4": ("experts.gate_up_proj", "experts.down_proj"),
    "granitemoe_swa": (
        "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.experts.down_proj",
    ),
    "granitemoe": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    "jetmoe": ("mlp.input_linear.weight", "mlp.output_linear.weight"),
}

_FUSED_TRANSPOSED = {
    "llama4": ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    "qwen3_vl_moe": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "aria": ("mlp.experts.fc1.weight", "mlp.experts.fc2.weight"),
}

_DTYPE_NAMES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    np.dtype(np.int64): "I64",
    np.dtype(np.int32): "I32",
    np.dtype(np.int16): "I16",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
}


def draw_experts(
    naming: str, sizes: tuple[int, int, int], rng: np.random.Generator
) -> dict[str, AnyArray | None]:
    """Draw a layer's weights, under the names of the arguments of `ktmoe_np.reference.moe_forward`.

    `sizes` are E, I and H.
    """
    num_experts, inter, hidden = sizes

    def draw(*shape: int) -> AnyArray:
        values = rng.standard_normal(shape) / shape[-1] ** 0.5
        rounded: AnyArray = values.astype(np.float32).astype(ml_dtypes.bfloat16)
        return rounded

    gate, up = draw(num_experts, inter, hidden), draw(num_experts, inter, hidden)
    down = draw(num_experts, hidden, inter)
    layer: dict[str, AnyArray | None] = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    if naming == "nemotron_h":
        layer["up_proj"] = None
    if naming == "gpt_oss":
        layer |= {name: draw(num_experts, inter) for name in ("gate_bias", "up_bias")}
        layer["down_bias"] = draw(num_experts, hidden)
    return layer


def layer_tensors(naming: str, layer: Mapping[str, AnyArray | None]) -> dict[str, AnyArray]:
    """Lay a layer's weights out as `naming` has them, under their names behind the layer's prefix."""
    gate, up, down = layer["gate_proj"], layer["up_proj"], layer["down_proj"]
    assert gate is not None
    assert down is not None
    if naming == "nemotron_h":
        return {
            f"mixer.experts.{e}.{name}.weight": matrix
            for e in range(len(down))
            for name, matrix in (("up_proj", gate[e]), ("down_proj", down[e]))
        }
    assert up is not None
    if naming in _SEPARATE:
        container, *names = _SEPARATE[naming]
        return {
            f"{container}.{e}.{name}.weight": matrix
            for e in range(len(down))
            for name, matrix in zip(names, (gate[e], up[e], down[e]), strict=True)
        }
    if naming == "step3p5":
        return {"moe.gate_proj.weight": gate, "moe.up_proj.weight": up, "moe.down_proj.weight": down}
    halves = np.concatenate([gate, up], axis=1)
    rows = np.stack([gate, up], axis=2).reshape(halves.shape)
    if naming in _FUSED_BY_ROWS:
        return dict(zip(_FUSED_BY_ROWS[naming], (halves, down), strict=True))
    if naming in _FUSED_TRANSPOSED:
        return dict(zip(_FUSED_TRANSPOSED[naming], (halves.swapaxes(1, 2), down.swapaxes(1, 2)), strict=True))
    if naming == "inkling":
        return {"mlp.experts.w13_weight": rows, "mlp.experts.w2_weight": down}
    assert naming == "gpt_oss"
    gate_bias, up_bias, down_bias = layer["gate_bias"], layer["up_bias"], layer["down_bias"]
    assert gate_bias is not None
    assert up_bias is not None
    assert down_bias is not None
    return {
        "mlp.experts.gate_up_proj": rows.swapaxes(1, 2),
        "mlp.experts.gate_up_proj_bias": np.stack([gate_bias, up_bias], axis=2).reshape(len(down), -1),
        "mlp.experts.down_proj": down.swapaxes(1, 2),
        "mlp.experts.down_proj_bias": down_bias,
    }


def header_bytes(header: object) -> bytes:
    """A header as a file begins with it, padded to 8 bytes as the format's writers do."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, tensors: Mapping[str, AnyArray]) -> None:
    """Write one safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        span = [offset, offset + array.nbytes]
        header[name] = {"dtype": _DTYPE_NAMES[array.dtype], "shape": list(array.shape), "data_offsets": span}
        offset += array.nbytes
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(header_bytes(header) + data)


def write_checkpoint(
    directory: Path,
    naming: str,
    layers: Sequence[int],
    E: int,
    I: int,  # noqa: E741
    H: int,
    seed: int = 0,
    *,
    num_shards: int = 1,
    num_experts_per_tok: int = 2,
) -> dict[int, dict[str, AnyArray | None]]:
    """Write a checkpoint of a model with random experts.

    Parameters
    ----------
    directory : Path
        Created if need be.
    naming : str
        One of `NAMINGS`.
    layers : sequence of int
        The layers that have experts; each gets a router and a norm too.
    E, I, H : int
        Experts, intermediate size, hidden size.
    seed : int, optional
    num_shards : int, optional
        1 writes ``model.safetensors``, more write that many shards with an index.
    num_experts_per_tok : int, optional
        For config.json.

    Returns
    -------
    dict
        Layer -> the weights under the names of the arguments of `ktmoe_np.reference.moe_forward`:
        ``gate_proj [E, I, H]``, ``up_proj`` (None when not gated), ``down_proj [E, H, I]`` and, where the
        naming has them, ``gate_bias``, ``up_bias``, ``down_bias``.
    """
    rng = np.random.default_rng(seed)
    prefix, config = NAMINGS[naming]
    drawn = {layer: draw_experts(naming, (E, I, H), rng) for layer in layers}
    tensors: dict[str, AnyArray] = {"embed_tokens.weight": np.zeros((8, H), ml_dtypes.bfloat16)}
    for number, layer in drawn.items():
        stem = f"{prefix}.{number}"
        tensors |= {f"{stem}.{name}": array for name, array in layer_tensors(naming, layer).items()}
        tensors |= {
            f"{stem}.router.weight": np.zeros((E, H), np.float32),
            f"{stem}.norm": np.ones(H, np.float32),
        }
    directory.mkdir(parents=True, exist_ok=True)
    if num_shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
    else:
        names = list(tensors)
        weight_map: dict[str, str] = {}
        for shard in range(num_shards):
            file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
            part = names[shard * len(names) // num_shards : (shard + 1) * len(names) // num_shards]
            write_safetensors(directory / file, {name: tensors[name] for name in part})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    sizes = {
        "model_type": naming,
        "num_experts": E,
        "num_experts_per_tok": num_experts_per_tok,
        "hidden_size": H,
        "moe_intermediate_size": I,
        "num_hidden_layers": max(layers) + 1,
    }
    (directory / "config.json").write_text(json.dumps({**sizes, **config}))
    return drawn
