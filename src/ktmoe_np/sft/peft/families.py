"""The model families whose experts PEFT can adapt, how it names them, and why others are refused: a table.

transformers 5 stores the experts of a layer in two parameters, which PEFT adapts by ``target_parameters``:
the fused layout. For some families it also converts adapters of one Linear per expert as it loads them: the
per-expert layout. Checked with PEFT 0.21 and transformers 5.24.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...io import load_hf_config
from ...io.gguf.experts import is_gguf
from ..adapted import AdaptedLayer

__all__ = ["FAMILIES", "REFUSED", "SEPARATE_REFUSED", "PeftFamily", "PeftNames", "family_of", "find_family"]


@dataclass(frozen=True)
class PeftNames:
    """The names of a family's experts and projections where each expert is a module."""

    experts: str  #: the module of the experts, within a layer
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class PeftFamily:
    """How the experts of a family are adapted.

    Parameters
    ----------
    fused : str
        The module with the parameters of all experts; ``{layer}`` is the layer's number.
    separate : PeftNames, optional
        Names under which PEFT loads adapters of one Linear per expert; None where it loads none.
    interleaved : bool
        Rows of gate and up alternate; otherwise those of gate come first.
    swapped : bool
        Weights are transposed, and PEFT takes them as they stand: A and B change places.
    gated : bool
        Otherwise the first parameter is ``up_proj``, with no gate.
    """

    fused: str = "model.layers.{layer}.mlp.experts"
    separate: PeftNames | None = None
    interleaved: bool = False
    swapped: bool = False
    gated: bool = True


_QWEN = PeftNames("mlp.experts", "gate_proj", "up_proj", "down_proj")
_MIXTRAL = PeftNames("block_sparse_moe.experts", "w1", "w3", "w2")

_FUSED = PeftFamily()
_BLOCK = PeftFamily("model.layers.{layer}.block_sparse_moe.experts")
_FEED_FORWARD = PeftFamily("model.layers.{layer}.feed_forward.experts")

#: model_type -> how the experts are adapted.
FAMILIES: dict[str, PeftFamily] = {
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
            "beam",
            "dots1",
            "glm_moe_dsa",
            "mellum",
        ),
        PeftFamily(separate=_QWEN),
    ),
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), PeftFamily(separate=_MIXTRAL)),
    **dict.fromkeys(
        (
            "aria_text",
            "deepseek_v4",
            "minimax_m3_vl_text",
            "phimoe",
            "qwen2_moe",
            "qwen3_5_moe_text",
            "axk1",
            "axk2",
            "bailing_hybrid",
            "dots3_note_text",
            "flint",
            "hy_v3",
            "hy_v4",
            "inkling_text",
            "kimi_linear",
            "kolibri1",
            "laguna",
            "lara_mini",
            "mimo_v2_flash",
            "qwen4_exp_text",
            "zaya",
        ),
        _FUSED,
    ),
    **dict.fromkeys(("granitemoe", "granitemoehybrid", "granitemoeshared", "granitemoe_swa"), _BLOCK),
    **dict.fromkeys(("jamba", "lfm2_moe"), _FEED_FORWARD),
    "gemma4_text": PeftFamily("model.layers.{layer}.experts"),
    "gpt_oss": PeftFamily(interleaved=True),
    "llama4_text": PeftFamily("model.layers.{layer}.feed_forward.experts", swapped=True),
    "nemotron_h": PeftFamily("model.layers.{layer}.mixer.experts", gated=False),
}

_PART = "they are in one part of a model of several, under names that are not checked with PEFT"
_CAPPED = "gate and up are soft-capped, which our layers do not compute"
_NORMED = "what each gives is normed, which our layers do not compute"
_SETS = "there are two sets of them"

#: model_type -> why its experts cannot be adapted. Of a model of several parts, `model_type` may name the
#: text model, if adapters are for that alone.
REFUSED: dict[str, str] = {
    "dbrx": "they are in matrices without an axis of experts, which PEFT adapts as one Linear",
    "jetmoe": "they are two modules with a weight each, not one module with two parameters",
    **dict.fromkeys(
        (
            "aria",
            "deepseek_ocr2",
            "deepseek_ocr2_text",
            "diffusion_gemma",
            "diffusion_gemma_text",
            "dots3_note",
            "gemma4",
            "glm4v_moe",
            "glm4v_moe_text",
            "glm5_next",
            "glm5_next_text",
            "hy_v4_vl",
            "hy_v4_vl_text",
            "inkling_mm_model",
            "llama4",
            "minimax_m3_vl",
            "mistral4",
            "mistral_large4",
            "mistral_large4_text",
            "qwen3_5_moe",
            "qwen3_vl_moe",
            "qwen4_exp",
            "qwen3_vl_moe_text",
            "unlimited_ocr",
            "unlimited_ocr_text",
        ),
        _PART,
    ),
    **dict.fromkeys(
        ("inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"),
        _CAPPED,
    ),
    **dict.fromkeys(("muse_spark", "muse_spark_text"), _NORMED),
    **dict.fromkeys(
        (
            "ernie4_5_vl_moe",
            "ernie4_5_vl_moe_text",
            "qwen3_omni_moe",
            "qwen3_omni_moe_talker_code_predictor",
            "qwen3_omni_moe_talker_text",
            "qwen3_omni_moe_text",
            "qwen3_omni_moe_thinker",
        ),
        _SETS,
    ),
    "openai_privacy_filter": "transformers has no causal language model of it",
}

_NO_MODULE = "PEFT finds no module of theirs in the model"
_OTHER_MODULE = "PEFT gives them to the shared experts or dense layers, where they do nothing"

#: model_type of `FAMILIES` -> why PEFT cannot load adapters of one Linear per expert.
SEPARATE_REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "phimoe",
            "granitemoe",
            "granitemoeshared",
            "granitemoehybrid",
            "granitemoe_swa",
            "gpt_oss",
            "jamba",
            "lfm2_moe",
            "inkling_text",
            "mimo_v2_flash",
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
            "axk1",
            "axk2",
            "bailing_hybrid",
            "dots3_note_text",
            "flint",
            "hy_v3",
            "hy_v4",
            "kimi_linear",
            "kolibri1",
            "laguna",
            "lara_mini",
            "qwen4_exp_text",
            "zaya",
        ),
        _OTHER_MODULE,
    ),
}


def find_family(model_type: str) -> PeftFamily:
    """The row of a family.

    Raises
    ------
    ValueError
        PEFT cannot adapt the experts of the family, or it is not known to: says why, and what works.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        why = REFUSED.get(model_type, "it is not known how PEFT adapts them")
        raise ValueError(
            f"model_type: got {model_type!r:.80}, expected one of {', '.join(FAMILIES)}: of its experts "
            f"there can be no adapters of PEFT ({why}); save_lora_weights writes those of any layer"
        )
    return family


def family_of(
    layers: Sequence[AdaptedLayer], model_type: str | None, base_model: str | os.PathLike[str] | None = None
) -> str | None:
    """The model_type of layers.

    Parameters
    ----------
    layers : sequence of BaseSFTMoEWrapper
    model_type : str, optional
        Given: it counts.
    base_model : str or path-like, optional
        Otherwise that of this checkpoint, if it is a directory with one, then those of the checkpoints that
        the layers are from.

    Returns
    -------
    str or None
        None for layers that are from no checkpoint, or from one that does not say.

    Raises
    ------
    ValueError
        Layers of several families, or of a GGUF file, which does not say.
    """
    if model_type is not None:
        return model_type
    if base_model is not None:
        said = _said(base_model)
        if said is not None:
            return said
    types = {_model_type(layer) for layer in layers} - {None}
    if len(types) > 1:
        shown = " and ".join(sorted(map(str, types)))
        raise ValueError(f"layers: got layers of {shown}, expected one family")
    return types.pop() if types else None


def _model_type(layer: AdaptedLayer) -> str | None:
    """The family of the checkpoint that a layer is from; None when it is from none that says so."""
    if layer.weight_path is None:
        return None
    if is_gguf(layer.weight_path):
        raise ValueError(
            f"model_type: got None, expected one of {', '.join(FAMILIES)}: {layer.weight_path} does not say"
        )
    return _said(layer.weight_path)


def _said(path: str | os.PathLike[str]) -> str | None:
    """The model_type in the config.json of a directory."""
    if not Path(path).is_dir():
        return None
    try:
        model_type = load_hf_config(path).get("model_type")
    except FileNotFoundError:
        return None
    return model_type if isinstance(model_type, str) else None
