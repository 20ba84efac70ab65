"""Keys of a Hugging Face config.json for the sizes and the activation of a mixture-of-experts layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .activations import activation_kinds, kind_of_config_key

__all__ = ["LIMITS_KEY", "HfLayer", "read_hf_layer", "read_hf_model"]

#: Of a bound per layer on the activated gate.
LIMITS_KEY = "swiglu_limits"

#: Size of `MoEConfig` -> its names. All that are present must agree.
_SAME_SIZE_NAMES = {
    "num_experts": ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    "num_experts_per_tok": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "moe_k",
        "moe_topk",
        "moe_top_k",
        "top_k_experts",
    ),
}

#: Size of `MoEConfig` -> its names, the special one first: experts may run at a width of their own
#: (Kimi-K3, Nemotron-3, Muse Spark), and `intermediate_size` is most often the dense layers' where
#: `moe_intermediate_size` is there.
_FIRST_SIZE_NAMES = {
    "hidden_size": ("routed_expert_hidden_size", "moe_latent_size", "moe_hidden_size", "hidden_size"),
    "moe_intermediate_size": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
}

#: Models whose experts are of `intermediate_size`, whatever else their config.json has.
_INTERMEDIATE_SIZE_MODELS = (
    "aria_text",
    "cohere2_moe",
    "flex_olmo",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "jamba",
    "jetmoe",
    "llama4_text",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mixtral",
    "olmoe",
    "openai_privacy_filter",
    "phimoe",
)

_NUM_LAYERS_NAMES = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")

_ACTIVATION_NAMES = ("mlp_hidden_act", "hidden_activation", "hidden_act", "activation_function")

#: Hugging Face's activation -> ours, where it has another name.
_ACTIVATIONS = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

#: Models whose experts are swigluoai although their config.json may say silu.
_SWIGLUOAI_MODELS = ("gpt_oss", "minimax_m3_vl", "minimax_m3_vl_text")

#: Where a multimodal model keeps its language model's values.
_NESTED = ("text_config", "language_config", "llm_config", "thinker_config")

#: How deep it may keep them; known models nest twice.
_MAX_DEPTH = 4


#: Models whose routing weights scale the inputs of the experts. No setting of a config.json says it.
_INPUT_SCALED_MODELS = ("llama4", "llama4_text")


class HfLayer(NamedTuple):
    """The sizes of a layer, the key of each, its activation, and whether routing weights scale its inputs."""

    sizes: dict[str, Any]
    sources: dict[str, str]
    activation: dict[str, Any]
    scale_inputs: bool


def read_hf_layer(config: Mapping[str, Any], layer_idx: int) -> HfLayer:
    """Read the sizes and the activation of a layer, and whether routing weights scale its inputs.

    Parameters
    ----------
    config : mapping
        A parsed config.json.
    layer_idx : int
        The layer.

    Returns
    -------
    HfLayer
        Sizes are ``num_experts``, ``num_experts_per_tok``, ``hidden_size`` and ``moe_intermediate_size``;
        the activation is what `ktmoe_np.config.parse_activation` reads.

    Raises
    ------
    ValueError, TypeError
        See `ktmoe_np.config.MoEConfig.from_hf_config`.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config: got {type(config).__name__}, expected a mapping (a parsed config.json)")
    part = _find_moe_part(config)
    if part is None:
        names = ", ".join(_SAME_SIZE_NAMES["num_experts"])
        raise ValueError(
            f"config: got no number of experts (model_type {config.get('model_type')!r}), expected one of "
            f"{names}, at its top or under {', '.join(_NESTED)}"
        )
    model_types = {str(values.get("model_type")) for values in (config, part)}
    found = {size: _agreed(part, size, names, layer_idx) for size, names in _SAME_SIZE_NAMES.items()}
    for size, in_order in _FIRST_SIZE_NAMES.items():
        reverse = size == "moe_intermediate_size" and model_types.intersection(_INTERMEDIATE_SIZE_MODELS)
        ordered = in_order[::-1] if reverse else in_order
        found[size] = next(iter(_present(part, size, ordered, layer_idx).items()))
    return HfLayer(
        {size: value for size, (_, value) in found.items()},
        {size: name for size, (name, _) in found.items()},
        _read_activation(part, layer_idx),
        not model_types.isdisjoint(_INPUT_SCALED_MODELS),
    )


def read_hf_model(config: Mapping[str, Any]) -> tuple[str | None, str | None, int | None]:
    """Read model_type, architecture and number of layers of a model; None where the config does not say.

    Examples
    --------
    >>> read_hf_model({"model_type": "qwen3_moe", "num_experts": 8, "num_hidden_layers": 48})
    ('qwen3_moe', None, 48)
    """
    part = _find_moe_part(config) or config
    model_type, architectures = config.get("model_type"), config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    num_layers = next((part[name] for name in _NUM_LAYERS_NAMES if type(part.get(name)) is int), None)
    return (
        model_type if isinstance(model_type, str) else None,
        first if isinstance(first, str) else None,
        num_layers,
    )


def _find_moe_part(config: Mapping[str, Any], depth: int = 0) -> Mapping[str, Any] | None:
    """Find the mapping that counts the experts: `config` or one nested in it."""
    if any(config.get(name) is not None for name in _SAME_SIZE_NAMES["num_experts"]):
        return config
    for name in _NESTED if depth < _MAX_DEPTH else ():
        nested = config.get(name)
        part = _find_moe_part(nested, depth + 1) if isinstance(nested, Mapping) else None
        if part is not None:
            return part
    return None


def _present(part: Mapping[str, Any], size: str, names: tuple[str, ...], layer_idx: int) -> dict[str, Any]:
    """Collect the layer's values that are there, in the order of `names`; at least one."""
    found = {name: _of_layer(part, name, layer_idx) for name in names if part.get(name) is not None}
    if not found:
        raise ValueError(f"config: got no {size}, expected one of {', '.join(names)}")
    return found


def _of_layer(part: Mapping[str, Any], name: str, layer_idx: int) -> Any:
    """Look up `name`; of a list with a value per layer, take the layer's."""
    value = part[name]
    if not isinstance(value, (list, tuple)):
        return value
    num_layers = part.get("num_hidden_layers")
    if isinstance(num_layers, int) and len(value) < num_layers:
        raise ValueError(
            f"config: {name}: got {len(value)} values, expected one for each of {num_layers} layers"
        )
    if not 0 <= layer_idx < len(value):
        raise ValueError(
            f"config: {name}: got values for layers 0 to {len(value) - 1}, expected one for layer {layer_idx}"
        )
    return value[layer_idx]


def _agreed(part: Mapping[str, Any], size: str, names: tuple[str, ...], layer_idx: int) -> tuple[str, Any]:
    """Take the one value that all the names present give, with the first of these."""
    found = _present(part, size, names, layer_idx)
    shown = {name: f"{value!r:.80}" for name, value in found.items()}
    if len(set(shown.values())) > 1:
        pairs = ", ".join(f"{name}={value}" for name, value in shown.items())
        raise ValueError(f"config: {size}: got {pairs}, expected the same of all")
    return next(iter(found.items()))


def _read_activation(part: Mapping[str, Any], layer_idx: int) -> dict[str, Any]:
    """Tell the activation by its name, by the clamps beside it and, for a few models, by the model."""
    given = next((part[name] for name in _ACTIVATION_NAMES if part.get(name) is not None), "silu")
    known = (*activation_kinds(), *_ACTIVATIONS)
    if not isinstance(given, str) or given not in known:
        raise ValueError(f"config: activation: got {given!r}, expected one of {', '.join(known)}")
    kind = _ACTIVATIONS.get(given, given)
    if kind == "situ":
        names = {"beta1": "activation_situ_beta", "beta2": "activation_situ_linear_beta"}
        return {"kind": kind, **{beta: _required(part, name) for beta, name in names.items()}}
    limit = part.get("swiglu_limit")
    oai_model = part.get("swiglu_alpha") is not None or part.get("model_type") in _SWIGLUOAI_MODELS
    if kind == "silu" and oai_model:
        kind = "swigluoai"
    elif kind in ("silu", kind_of_config_key(LIMITS_KEY)) and part.get(LIMITS_KEY) is not None:
        # Step-3.x: a bound per layer, where 0 or null is none, on the activated gate.
        limit = _of_layer(part, LIMITS_KEY, layer_idx) or None
        kind = kind_of_config_key(LIMITS_KEY) if limit is not None else "silu"
    options = {"limit": limit, "alpha": part.get("swiglu_alpha")} if kind == "swigluoai" else {"limit": limit}
    return {"kind": kind, **{name: value for name, value in options.items() if value is not None}}


def _required(part: Mapping[str, Any], name: str) -> Any:
    """Look up a saturation of situ; without it the model means another function."""
    if part.get(name) is None:
        raise ValueError(f"config: {name}: got none, expected the number that activation 'situ' needs")
    return part[name]
