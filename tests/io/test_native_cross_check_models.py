"""Models that transformers dequantizes while it loads them, beside the engine on their codes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cross_checks import COMMON, TOKENS, Call, recorded, rounding_of_the_intermediate
from native_layers import draw_native_layer
from native_readers import (
    E4M3,
    SCHEMES,
    AnyArray,
    Tensors,
    as_tensor,
    assert_same_numbers,
    decoded,
    of_compressed_tensors,
    of_gptq,
    of_matrix,
    plain,
    stacked,
)

from ktmoe_np import KTMoEWrapper
from ktmoe_np.formats.weights import ExpertWeights, Projection
from ktmoe_np.io.native import load_native
from ktmoe_np.reference import (
    assert_within,
    error_bound,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.crosscheck, pytest.mark.filterwarnings("ignore")]


def of_format(form: str) -> dict[str, Any]:
    """The quantization that compressed-tensors describes, of the experts only."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": SCHEMES[form]}},
    }


@dataclass(frozen=True)
class Case:
    """A model that is stored in a format."""

    method: str
    codes: str  # what the names of its tensors end with
    scale: str
    #: What the model's configuration says; None where transformers cannot do without a GPU.
    quantization: dict[str, Any] | None
    model_type: str = "qwen3_moe"
    needs: str = "transformers"
    #: What transformers must load it in: float32 where weights are not rounded to bfloat16.
    dtype: Any = torch.bfloat16


def _blocks(rows: int, columns: int, **other: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": [rows, columns], **other}


CASES = {
    "fp8": Case("FP8", ".weight", ".weight_scale_inv", _blocks(128, 128), needs="accelerate"),
    "mxfp8": Case(
        "MXFP8", ".weight", ".weight_scale_inv", _blocks(1, 32, scale_fmt="ue8m0"), needs="accelerate"
    ),
    "fp8_channel": Case(
        "FP8_PERCHANNEL",
        ".weight",
        ".weight_scale",
        of_format("float-quantized"),
        needs="compressed_tensors",
        dtype=torch.float32,
    ),
    "rawint4": Case(
        "RAWINT4", ".weight_packed", ".weight_scale", of_format("pack-quantized"), needs="compressed_tensors"
    ),
    "mxfp4": Case(
        "MXFP4",
        ".weight_packed",
        ".weight_scale",
        of_format("mxfp4-pack-quantized"),
        needs="compressed_tensors",
    ),
    "gpt_oss": Case("MXFP4", "_blocks", "_scales", {"quant_method": "mxfp4"}, "gpt_oss"),
    "nvfp4": Case("NVFP4", ".weight_packed", ".weight_scale", None, needs="compressed_tensors"),
    "gptq": Case("GPTQ_INT4", ".qweight", ".scales", None, needs="neural_compressor"),
}

NUM_EXPERTS, INTER, HIDDEN = 4, 128, 256


def tensors_of(case: Case, rng: np.random.Generator) -> dict[str, dict[str, AnyArray]]:
    """Any codes, with scales that keep the layer's numbers in bounds, by projection and then by suffix."""
    drawn = draw_native_layer(rng, case.method, NUM_EXPERTS, INTER, HIDDEN).arguments
    by_projection: dict[str, dict[str, Any]] = {}
    for projection in ("gate", "up", "down"):
        n, k = (HIDDEN, INTER) if projection == "down" else (INTER, HIDDEN)
        codes, scale = drawn[f"{projection}_proj"], drawn[f"{projection}_scale"]
        codes = codes.view(E4M3) if case.method in ("FP8", "FP8_PERCHANNEL", "MXFP8") else codes
        scale = scale.view(np.uint8) if case.method in ("MXFP8", "MXFP4") else scale
        scale = scale[..., None] if case.method == "FP8_PERCHANNEL" else scale
        found = {case.codes: codes, case.scale: scale}
        if case.method == "RAWINT4":
            found[".weight_shape"] = np.tile(np.array([n, k]), (NUM_EXPERTS, 1))
        if case.method == "NVFP4":
            factor = np.exp2(np.round(np.log2(np.abs(drawn[f"{projection}_global_scale"]))))
            found[".weight_global_scale"] = 1 / factor[:, None]
        if case.method == "GPTQ_INT4":
            found[".qzeros"] = np.full((*scale.shape[:-1], n // 8), 0x77777777, np.int32)
        by_projection[projection] = found
    return by_projection


def named(case: Case, by_projection: dict[str, dict[str, AnyArray]]) -> Tensors:
    """The tensors of the first layer as files of the model have them."""
    stem = "model.layers.0.mlp.experts."
    if case.model_type != "gpt_oss":
        return {
            f"{stem}{expert}.{projection}_proj{suffix}": as_tensor(array[expert])
            for projection, found in by_projection.items()
            for suffix, array in found.items()
            for expert in range(NUM_EXPERTS)
        }
    gate, up, down = by_projection.values()
    both = {suffix: np.stack([gate[suffix], up[suffix]], axis=2) for suffix in gate}
    tensors = {f"{stem}gate_up_proj{suffix}": array for suffix, array in both.items()}
    tensors |= {f"{stem}down_proj{suffix}": array for suffix, array in down.items()}
    rows = {"gate_up_proj": 2 * INTER, "down_proj": HIDDEN}
    shaped = {}
    for name, array in tensors.items():
        last = (-1, 16) if name.endswith("_blocks") else (-1,)
        n = next(n for projection, n in rows.items() if projection in name)
        shaped[name] = as_tensor(array.reshape(NUM_EXPERTS, n, *last))
    return shaped


def saved(case: Case, path: Path) -> Any:
    """Save a model with the case's experts, and return it without them."""
    from safetensors.torch import load_file, save_file

    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "head_dim": 8}
    own = {
        "qwen3_moe": {"num_experts": NUM_EXPERTS, "moe_intermediate_size": INTER},
        "gpt_oss": {"num_local_experts": NUM_EXPERTS, "intermediate_size": INTER},
    }[case.model_type]
    config = transformers.AutoConfig.for_model(case.model_type, **{**COMMON, **sizes, **own})
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3)
    made.save_pretrained(path)

    file = path / "model.safetensors"
    others = {
        name: tensor
        for name, tensor in load_file(file).items()
        if ".experts." not in name or name.endswith("_bias")
    }
    experts = named(case, tensors_of(case, np.random.default_rng(0)))
    save_file(others | experts, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    if case.quantization is not None:
        config["quantization_config"] = {**case.quantization, "dequantize": True}
    (path / "config.json").write_text(json.dumps(config))
    return made


def fill(experts: Any, path: Path, case: Case) -> None:
    """Give a model's module the weights that its file has, for transformers."""
    from safetensors.torch import load_file

    read = {"NVFP4": of_compressed_tensors("nvfp4-pack-quantized"), "GPTQ_INT4": of_gptq(1)}[case.method]
    tensors = load_file(path / "model.safetensors")
    with torch.no_grad():
        for expert in range(NUM_EXPERTS):
            gate, up, down = (
                read(of_matrix(tensors, f"{name}_proj", expert, 0)).bfloat16()
                for name in ("gate", "up", "down")
            )
            experts.gate_up_proj[expert] = torch.cat([gate, up])
            experts.down_proj[expert] = down


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_model(tmp_path: Path, case: Case) -> None:
    """Its file goes to both; what transformers computes, in float32, the engine computes from the codes."""
    pytest.importorskip(case.needs)
    model = saved(case, tmp_path)
    if case.quantization is None:
        fill(model.get_submodule("model.layers.0.mlp.experts"), tmp_path, case)
    else:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=case.dtype, output_loading_info=True
        )
        assert not any(info.values())
    model = model.float().eval()
    module = model.get_submodule("model.layers.0.mlp.experts")
    calls = recorded(module)
    with torch.no_grad():
        model(torch.randint(2, 64, (1, TOKENS)))
    call: Call = next(calls)
    assert len(np.unique(call.batch.ids)) > 2

    moe = KTMoEWrapper.from_pretrained(tmp_path, 0)
    assert moe.method == case.method
    experts = load_native(tmp_path, 0, moe.config)
    matrices = {name: decoded(experts, name, moe.config) for name in experts.projections}
    gate_up, their_down = module.gate_up_proj, module.down_proj
    if case.model_type == "gpt_oss":
        gate_up = torch.cat([gate_up[..., ::2], gate_up[..., 1::2]], dim=2).mT
        their_down = their_down.mT
    halves = zip(("gate_proj", "up_proj"), gate_up.chunk(2, dim=1), strict=True)
    for name, theirs in (*halves, ("down_proj", their_down)):
        for ours, matrix in zip(matrices[name], theirs, strict=True):
            assert_same_numbers(ours, matrix)

    got = moe.forward(*call.batch, out=np.empty(call.output.shape, np.float32))
    gate, up, down = (stacked(matrices[name]) for name in ("gate_proj", "up_proj", "down_proj"))
    biases = experts.bias_arguments()
    activation = moe.config.activation
    bound = error_bound(*call.batch, gate, up, down, **biases, activation=activation, out_dtype=np.float32)
    dense = ExpertWeights.of(
        {
            name: Projection(plain(matrix), bias=experts.biases.get(name))
            for name, matrix in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
        }
    )
    rounding = rounding_of_the_intermediate(dense, call.batch, activation)
    assert_within(got, call.output, bound + rounding)
    error = np.linalg.norm(got - call.output) / np.linalg.norm(call.output)
    assert error < 2.0**-8
