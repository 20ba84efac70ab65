"""Layers of natively quantized checkpoints: the method is found, and the files are what is computed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import Batch, assert_same_bits, bf16
from native_checkpoints import ENCODINGS, LAYER, Layer, draw_layer, put_layer

from ktmoe_np import KTMoEWrapper

E, I, H, P = 3, 96, 160, 2  # noqa: E741

every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)


def checkpoint(directory: Path, encoding: str) -> tuple[Path, Layer]:
    """A model of one layer with experts."""
    layer = draw_layer(encoding, E, I, H)
    put_layer(directory, layer)
    config = {"num_experts": E, "num_experts_per_tok": P, "hidden_size": H, "moe_intermediate_size": I}
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **config}))
    return directory, layer


def batch() -> Batch:
    rng = np.random.default_rng(1)
    x = (2.0**-8 * rng.standard_normal((7, H))).astype(bf16)
    return Batch(x, rng.integers(0, E, (7, P)), rng.standard_normal((7, P), np.float32))


def from_arrays(layer: Layer, mode: str, method: str) -> Any:
    """The same layer, given as arrays."""
    moe = KTMoEWrapper(LAYER, E, P, H, I, mode=mode, method=method)
    arguments: dict[str, Any] = {}
    for projection, matrices in layer.matrices.items():
        name = projection.removesuffix("_proj")
        arguments[projection] = [matrix.codes for matrix in matrices]
        arguments[f"{name}_scale"] = [matrix.scale for matrix in matrices]
        if layer.method == "NVFP4":
            factors = np.array([matrix.factor for matrix in matrices], np.float32)
            arguments[f"{name}_global_scale"] = factors
        if layer.method == "INT4_ZP":
            arguments[f"{name}_zero"] = [matrix.zero for matrix in matrices]
        if projection in layer.biases:
            arguments[f"{name}_bias"] = layer.biases[projection]
    moe.load_weights_from_tensors(**arguments)
    return moe


@every_encoding
def test_the_method_is_found_and_the_bits_are_those_of_the_arrays(tmp_path: Path, encoding: str) -> None:
    path, layer = checkpoint(tmp_path, encoding)
    moe = KTMoEWrapper.from_pretrained(path, LAYER)
    assert moe.method == layer.method
    assert_same_bits(moe.forward(*batch()), from_arrays(layer, "inference", layer.method).forward(*batch()))


@every_encoding
def test_training_finds_its_method_too(tmp_path: Path, encoding: str) -> None:
    path, layer = checkpoint(tmp_path, encoding)
    sft = KTMoEWrapper.from_pretrained(path, LAYER, mode="sft", lora_rank=4)
    assert sft.method in (f"{layer.method}_SFT", f"AMX{layer.method}_SFT")
    sft.init_lora_weights()
    twin = from_arrays(layer, "sft", sft.method)
    # Scales are any bytes, so some results are NaN.
    results = (moe.forward(*batch()).astype(np.float32) for moe in (sft, twin))
    np.testing.assert_array_equal(*results)


def test_another_method_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path, "rawint4")
    with pytest.raises(ValueError, match="RAWINT4"):
        KTMoEWrapper.from_pretrained(path, LAYER, method="MXFP4")
    with pytest.raises(ValueError, match="layer 5 has experts, but under no known tensor names"):
        KTMoEWrapper.from_pretrained(path, LAYER, method="BF16")
