"""Writing the adapters of layers in PEFT's format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ...arrays.checks import Array
from ...io.safetensors.writer import replace_text, write_safetensors
from ..adapted import AdaptedLayer
from ..adapters import shapes_of
from .config import CONFIG_FILE, TENSORS_FILE
from .families import FAMILIES, SEPARATE_REFUSED, PeftFamily, PeftNames, family_of, find_family
from .fused import Fused, joined, packed
from .layers import common_scale

__all__ = ["export_peft"]

_PREFIX = "base_model.model."
_SEPARATE = _PREFIX + "model.layers.{layer}.{experts}.{expert}.{projection}.lora_{matrix}.weight"

#: The family of layers that do not say theirs.
_DEFAULT = "qwen3_moe"


def export_peft(
    directory: str | os.PathLike[str],
    layers: Sequence[AdaptedLayer],
    *,
    layout: Literal["fused", "per_expert"] = "fused",
    base_model_name_or_path: str | os.PathLike[str] | None = None,
    model_type: str | None = None,
) -> None:
    """Write the adapters of layers of one model in the PEFT format: a directory of two files.

    ``adapter_model.safetensors`` has the matrices, ``adapter_config.json`` ranks, scales and targets. PEFT
    applies dropout to no fused experts, so the files set it to 0.

    Parameters
    ----------
    directory : str or path-like
        Made when it is not there; the files are overwritten.
    layers : sequence of BaseSFTMoEWrapper
        Of different numbers, with the same rank and scale.
    layout : {"fused", "per_expert"}
        ``fused`` adapts the parameters that transformers 5 stores experts in, ``experts.gate_up_proj`` and
        ``experts.down_proj``, by ``target_parameters``. Gate and up are one parameter with one A there, so
        theirs are stacked: of rank 2R, with 2 alpha and a block-diagonal B. ``per_expert`` writes
        ``...experts.{e}.gate_proj.lora_A.weight`` [R, H] and so on, which PEFT converts for the families
        whose row of `ktmoe_np.sft.peft.FAMILIES` has such names.
    base_model_name_or_path : str or path-like, optional
        The model that the adapters are for, which ``AutoPeftModelForCausalLM`` loads.
    model_type : str, optional
        The family, as a config.json names it. None takes that of `base_model_name_or_path`, if that is a
        directory, or of the checkpoint that the layers are from; layers made of arrays are written as those
        of qwen3_moe.

    Raises
    ------
    ValueError
        No layers, two of the same number, ranks or scales that differ, a layer without adapters, another
        layout, a family that PEFT cannot adapt in that layout or is not known to, or layers that are gated
        and their family is not, or the other way round.
    OSError
        A file cannot be written.

    Examples
    --------
    >>> import os, tempfile
    >>> from ktmoe_np import KTMoEWrapper
    >>> from ktmoe_np.sft import export_peft, peft_scale
    >>> layers = [KTMoEWrapper(layer_idx=i, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                        moe_intermediate_size=2, mode="sft", method="AMXBF16_SFT", lora_rank=1)
    ...           for i in range(2)]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     export_peft(directory, layers)
    ...     sorted(os.listdir(directory)), peft_scale(directory)
    (['adapter_config.json', 'adapter_model.safetensors'], (1, 32.0))
    """
    rank, alpha = common_scale(layers)
    if layout not in ("fused", "per_expert"):
        raise ValueError(f"layout: got {layout!r}, expected 'fused' or 'per_expert'")
    found = family_of(layers, model_type, base_model_name_or_path)
    if found is None:
        found = _default(layers, layout)
    family = find_family(found)
    if layout == "fused":
        tensors, targets = _fused_tensors(layers, family), _fused_targets(family, rank, alpha)
    else:
        names = _separate_names(found, family)
        tensors, targets = _separate_tensors(layers, names), _separate_targets(layers, names)
    base = base_model_name_or_path
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else os.fspath(base),
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        **targets,
        "layers_to_transform": sorted(layer.layer_idx for layer in layers),
        "layers_pattern": "layers",
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    write_safetensors(target / TENSORS_FILE, tensors, {"format": "pt"})
    replace_text(target / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def _number(alpha: float) -> float:
    return int(alpha) if alpha.is_integer() else alpha


def _default(layers: Sequence[AdaptedLayer], layout: str) -> str:
    return _DEFAULT if layout == "per_expert" or layers[0].config.activation.gated else "nemotron_h"


# ---- parameters that hold all experts ----


def _fused_tensors(layers: Sequence[AdaptedLayer], family: PeftFamily) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for layer in layers:
        if layer.config.activation.gated != family.gated:
            form = {True: "a gate", False: "no gate"}
            raise ValueError(
                f"layers: got layer {layer.layer_idx} with {form[not family.gated]}, expected "
                f"{form[family.gated]}, as its family has"
            )
        lora = layer.lora_weights
        adapters = {
            role: Fused(lora[f"{role}_lora_a"], lora[f"{role}_lora_b"])
            for role in ("gate", "up", "down")
            if f"{role}_lora_a" in lora
        }
        first = adapters["gate"]
        if family.gated:
            first = joined(first, adapters["up"], interleaved=family.interleaved)
        stem = _PREFIX + family.fused.format(layer=layer.layer_idx)
        for name, adapter in ((f"{stem}.base_layer", first), (stem, adapters["down"])):
            matrices = packed(adapter, swapped=family.swapped)
            tensors |= {f"{name}.lora_{x}.weight": m for x, m in zip("AB", matrices, strict=True)}
    return tensors


def _fused_targets(family: PeftFamily, rank: int, alpha: float) -> dict[str, Any]:
    module = family.fused.rpartition(".")[2]
    first = "gate_up_proj" if family.gated else "up_proj"
    patterns: Mapping[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    if family.gated:
        name = r".*\.gate_up_proj"
        patterns = {"rank_pattern": {name: 2 * rank}, "alpha_pattern": {name: _number(2 * alpha)}}
    return {
        "target_modules": [],
        "target_parameters": [f"{module}.{first}", f"{module}.down_proj"],
        **patterns,
    }


# ---- one Linear per expert and projection ----


def _separate_names(model_type: str, family: PeftFamily) -> PeftNames:
    if family.separate is None:
        known = ", ".join(name for name, each in FAMILIES.items() if each.separate)
        raise ValueError(
            f"model_type: got {model_type!r}, expected one of {known} for layout 'per_expert': of its "
            f"experts there can be none that PEFT loads ({SEPARATE_REFUSED[model_type]}); 'fused' works"
        )
    return family.separate


def _separate_tensors(layers: Sequence[AdaptedLayer], names: PeftNames) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for layer in layers:
        for name, matrices in layer.lora_weights.items():
            role, _, matrix = name.split("_")
            for expert, each in enumerate(matrices):
                tensors[
                    _SEPARATE.format(
                        layer=layer.layer_idx,
                        experts=names.experts,
                        expert=expert,
                        projection=getattr(names, role),
                        matrix=matrix.upper(),
                    )
                ] = each
    return tensors


def _separate_targets(layers: Sequence[AdaptedLayer], names: PeftNames) -> dict[str, Any]:
    roles = {name.split("_")[0] for layer in layers for name in shapes_of(layer)}
    return {"target_modules": sorted(getattr(names, role) for role in roles)}
