"""The families for which PEFT loads per-expert adapters, and their names: a table.

transformers 5 stores the experts of a layer in two tensors, so an adapter of one Linear per expert finds no
Linear. For some families PEFT converts such adapters as it loads them. For the others it refuses them, or,
where the model has shared experts or dense layers with modules of the same names, gives those adapters that
do nothing. Checked with PEFT 0.21 and transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..io import load_hf_config
from ..io.gguf.experts import is_gguf
from .adapted import AdaptedLayer

__all__ = ["LOADED", "REFUSED", "PeftNames", "peft_names"]


@dataclass(frozen=True)
class PeftNames:
    """The names of the experts and projections of a family."""

    experts: str  #: the module of the experts, within a layer
    gate: str
    up: str
    down: str


_QWEN = PeftNames("mlp.experts", "gate_proj", "up_proj", "down_proj")
_MIXTRAL = PeftNames("block_sparse_moe.experts", "w1", "w3", "w2")

#: model_type -> names under which PEFT loads adapters of its experts.
LOADED: dict[str, PeftNames] = {
    **dict.fromkeys(
        (
            "qwen3_moe",
            "qwen3_next",
            "olmoe",
            "flex_olmo",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe",
            "glm4_moe_lite",
            "ernie4_5_moe",
            "hunyuan_v1_moe",
            "exaone_moe",
            "solar_open",
            "cohere2_moe",
            "afmoe",
        ),
        _QWEN,
    ),
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
}

_NO_MODULE = "PEFT finds no module of theirs in the model"
_OTHER_MODULE = "PEFT gives them to the shared experts or dense layers, where they do nothing"

#: model_type -> why PEFT cannot load adapters of its experts.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "phimoe",
            "granitemoe",
            "granitemoeshared",
            "granitemoehybrid",
            "gpt_oss",
            "jamba",
            "lfm2_moe",
            "jetmoe",
        ),
        _NO_MODULE,
    ),
    **dict.fromkeys(
        (
            "qwen2_moe",
            "qwen3_5_moe_text",
            "deepseek_v4",
            "nemotron_h",
            "llama4_text",
            "gemma4_text",
            "aria_text",
            "minimax_m3_vl_text",
        ),
        _OTHER_MODULE,
    ),
}


def peft_names(layers: Sequence[AdaptedLayer], model_type: str | None = None) -> PeftNames:
    """Find the names under which PEFT loads adapters of these layers.

    Parameters
    ----------
    layers : sequence of BaseSFTMoEWrapper
    model_type : str, optional
        The family, as a config.json names it; None takes that of the checkpoints that the layers are from.
        Layers that are from none get the names of Qwen3-MoE.

    Raises
    ------
    ValueError
        PEFT cannot load adapters of the family, or it is not known to: says why, and what works.
    """
    types = [model_type] if model_type is not None else [_model_type(layer) for layer in layers]
    found = {_names(each) for each in types if each is not None}
    if len(found) > 1:
        raise ValueError(f"layers: got layers of {' and '.join(map(str, types))}, expected one family")
    return found.pop() if found else _QWEN


def _names(model_type: str) -> PeftNames:
    names = LOADED.get(model_type)
    if names is None:
        why = REFUSED.get(model_type, "it is not known what PEFT makes of them")
        raise ValueError(
            f"model_type: got {model_type!r:.80}, expected one of {', '.join(LOADED)}: of its experts there "
            f"can be no adapters that PEFT loads ({why}); save_lora_weights writes those of any layer"
        )
    return names


def _model_type(layer: AdaptedLayer) -> str | None:
    """The family of the checkpoint that a layer is from; None when it is from none that says so."""
    if layer.weight_path is None:
        return None
    if is_gguf(layer.weight_path):
        raise ValueError(
            f"model_type: got None, expected one of {', '.join(LOADED)}: {layer.weight_path} does not say"
        )
    try:
        config = load_hf_config(layer.weight_path)
    except FileNotFoundError:
        return None
    model_type = config.get("model_type")
    return model_type if isinstance(model_type, str) else None
