"""The config of the experts of a layer from the metadata of a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ...config import ActivationSpec, MoEConfig, parse_activation
from ...config.activations import kind_of_config_key
from ...config.hf import LIMITS_KEY
from ..json_text import naming_file
from .checkpoint import GgufCheckpoint

__all__ = ["gguf_config"]

#: Activations of the experts of architectures, where it is not silu with a gate. A file does not say it.
_ACTIVATIONS: Mapping[str, str] = {
    "gpt-oss": "swigluoai",
    "minimax-m3": "swigluoai",
    "gemma4": "gelu_tanh",
    "grok": "gelu_tanh",
    "nomic-bert-moe": "gelu_tanh_ungated",
    "nemotron_h_moe": "relu2",
    "smallthinker": "relu",
}

#: Architectures whose routing weights scale the inputs of the experts.
_INPUT_SCALED = ("llama4",)

#: A limit of up to this counts as none.
_NO_LIMIT = 1e-6


def gguf_config(checkpoint: GgufCheckpoint | str | os.PathLike[str], layer_idx: int) -> MoEConfig:
    """Read sizes and activation of a layer's experts from the metadata of a GGUF model.

    Parameters
    ----------
    checkpoint : GgufCheckpoint, str or path-like
    layer_idx : int
        The layer; matters where a model sets a value per layer.

    Returns
    -------
    MoEConfig
        With the activation of the architecture; silu with a gate for one that is not known.

    Raises
    ------
    FileNotFoundError
        No checkpoint there.
    ValueError
        Not a GGUF file, or a value that is missing, not a number of at least 1, or not there for the layer.

    Examples
    --------
    >>> import gguf, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.gguf")
    >>> writer = gguf.GGUFWriter(path, "qwen3moe")
    >>> writer.add_embedding_length(2048)
    >>> writer.add_expert_feed_forward_length(768)
    >>> writer.add_expert_count(128)
    >>> writer.add_expert_used_count(8)
    >>> writer.write_header_to_file()
    >>> writer.write_kv_data_to_file()
    >>> writer.close()
    >>> config = gguf_config(path, layer_idx=3)
    >>> config.num_experts, config.num_experts_per_tok, config.hidden_size, config.moe_intermediate_size
    (128, 8, 2048, 768)
    """
    checkpoint = GgufCheckpoint.opened(checkpoint)
    architecture = checkpoint.metadata("general.architecture")
    if not isinstance(architecture, str):
        got = "none" if architecture is None else repr(architecture)
        raise ValueError(
            f"{checkpoint.path}: metadata 'general.architecture': got {got:.80}, expected a string"
        )

    sources: dict[str, str] = {}

    def size(what: str, *names: str) -> int:
        key, value = _size(checkpoint, [f"{architecture}.{name}" for name in names], layer_idx)
        sources[what] = key
        return value

    # Experts that work in a narrower space than the layer's: that is their H.
    is_latent = checkpoint.metadata(f"{architecture}.moe_latent_size") not in (None, 0)
    keys = {
        "num_experts": ("expert_count",),
        "num_experts_per_tok": ("expert_used_count",),
        "hidden_size": ("moe_latent_size" if is_latent else "embedding_length",),
        "moe_intermediate_size": ("expert_feed_forward_length", "feed_forward_length"),
    }
    sizes = {what: size(what, *names) for what, names in keys.items()}
    activation = _activation(checkpoint, architecture, layer_idx)
    scales = architecture in _INPUT_SCALED
    with naming_file(checkpoint.path):
        config = MoEConfig(
            **sizes, activation=activation, layer_idx=layer_idx, scale_inputs=scales, sources=sources
        )
        config.check_model()
    return config


def _size(checkpoint: GgufCheckpoint, keys: list[str], layer_idx: int) -> tuple[str, int]:
    """The first key that is there, and the size under it."""
    for key in keys:
        value = checkpoint.metadata_of_layer(key, layer_idx)
        if value is not None:
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"{checkpoint.path}: metadata {key!r}: got {value!r:.80} for layer {layer_idx}, "
                    "expected a whole number of at least 1"
                )
            return key, value
    raise ValueError(
        f"{checkpoint.path}: metadata {' or '.join(map(repr, keys))}: got none, "
        "expected a whole number of at least 1"
    )


def _activation(checkpoint: GgufCheckpoint, architecture: str, layer_idx: int) -> ActivationSpec:
    """The activation of an architecture, with the layer's limit."""
    if architecture in _ACTIVATIONS:
        return parse_activation(_ACTIVATIONS[architecture])
    key = f"{architecture}.swiglu_clamp_exp"
    limit = checkpoint.metadata_of_layer(key, layer_idx)
    if limit is None:
        return parse_activation("silu")
    if type(limit) not in (int, float):
        raise ValueError(f"{checkpoint.path}: metadata {key!r}: got {limit!r:.80}, expected a number")
    if not limit > _NO_LIMIT:
        return parse_activation("silu")
    # DeepSeek clamps the gate, the others its silu.
    kind = "silu" if architecture.startswith("deepseek") else kind_of_config_key(LIMITS_KEY)
    return parse_activation({"kind": kind, "limit": limit})
