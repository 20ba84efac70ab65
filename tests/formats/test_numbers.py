"""Weights in float32 and float16: held in place by methods for numbers, quantized by the others."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import NAMINGS, layer_tensors, write_safetensors
from layers import (
    STORAGES,
    Batch,
    Layer,
    assert_close,
    assert_same_bits,
    bf16,
    draw_batch,
    draw_layer,
    stored,
)
from sft_layers import Step, assert_same_steps, assert_step_close, draw_student, draw_training, train

import ktmoe_np.formats.numbers
from ktmoe_np import KTMoEWrapper
from ktmoe_np.formats.numbers import NUMBER_DTYPES
from ktmoe_np.io import SafetensorsCheckpoint, load_experts
from ktmoe_np.io.inspect import inspect_checkpoint
from ktmoe_np.io.layouts.layer import WEIGHT_DTYPES
from ktmoe_np.models import EMBEDDED_MODEL, MoEDecoder, generate
from ktmoe_np.reference import moe_backward, moe_forward, moe_forward_sft

pytestmark = pytest.mark.kernels

E, I, H, P = 3, 45, 70, 2  # noqa: E741

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
other_dtypes = pytest.mark.parametrize("dtype", [F32, F16])

#: Dtypes of gate, up and down.
MIXED = [(F32, F16, bf16), (bf16, F32, F16), (F16, bf16, F32)]


def draw(dtypes: Any, sizes: tuple[int, int, int] = (E, I, H), seed: int = 0) -> Layer:
    """A layer whose numbers are not those of bfloat16; some are ties between two of these."""
    rng = np.random.default_rng(seed)
    num_experts, inter, hidden = sizes
    matrices = []
    for dtype, (n, k) in zip(dtypes, ((inter, hidden), (inter, hidden), (hidden, inter)), strict=True):
        values = k**-0.5 * rng.standard_normal((num_experts, n, k), np.float32)
        values[:, ::3] = values[:, ::3].astype(bf16).astype(np.float32) * np.float32(1 + 2**-8)
        matrices.append(values.astype(dtype))
    return Layer(*matrices)


def rounded(layer: Layer) -> Layer:
    return layer.with_matrices(lambda matrix: matrix.astype(np.float32).astype(bf16))


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.formats.numbers).failed == 0


def test_files_and_arrays_have_the_same_dtypes() -> None:
    names = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
    assert {names[dtype.name] for dtype in NUMBER_DTYPES} == set(WEIGHT_DTYPES)


# ---- held in place ----


@pytest.mark.parametrize("dtypes", [(F32,) * 3, (F16,) * 3, *MIXED])
@pytest.mark.parametrize("num_tokens", [1, 9, 40])
@pytest.mark.parametrize("sizes", [(E, I, H), (2, 704, 96), (1, 33, 2081)])
def test_forward_is_that_of_the_rounded_weights(
    dtypes: Any, num_tokens: int, sizes: tuple[int, int, int]
) -> None:
    layer = draw(dtypes, sizes)
    batch = draw_batch(np.random.default_rng(1), layer, num_tokens, P)
    result = layer.forward(batch)
    assert_same_bits(result, rounded(layer).forward(batch))
    assert_close(result, layer, batch)


@pytest.mark.parametrize("dtypes", [(F32,) * 3, (F16,) * 3, *MIXED])
@pytest.mark.parametrize("num_tokens", [1, 20, 40])
def test_a_training_step_is_that_of_the_rounded_weights(dtypes: Any, num_tokens: int) -> None:
    rng = np.random.default_rng(2)
    student = replace(draw_student(rng, (E, I, H), 8), layer=draw(dtypes))
    batch, grad_output = draw_training(rng, student, num_tokens, P)
    step = train(student.wrapper(P, full_weight_grad=True), batch, grad_output)
    twin = replace(student, layer=rounded(student.layer))
    assert_same_steps(step, train(twin.wrapper(P, full_weight_grad=True), batch, grad_output))
    assert_step_close(train(student.wrapper(P), batch, grad_output), twin, batch, grad_output)


@other_dtypes
@pytest.mark.parametrize("how", STORAGES)
def test_memory_of_any_kind(dtype: Any, how: str) -> None:
    layer = draw((dtype,) * 3)
    batch = draw_batch(np.random.default_rng(3), layer, 9, P)
    elsewhere = layer.with_matrices(lambda matrix: stored(matrix, how))
    assert_same_bits(elsewhere.forward(batch), layer.forward(batch))


@other_dtypes
def test_nothing_is_copied(dtype: Any) -> None:
    layer = draw((dtype,) * 3)
    batch = draw_batch(np.random.default_rng(4), layer, 3, P)
    moe = layer.wrapper(P)
    assert moe.forward(*batch).any()
    layer.down_proj[...] = 0
    assert not moe.forward(*batch).any()


def test_the_bytes_of_an_expert_are_those_of_its_dtypes() -> None:
    assert draw((F32, F16, bf16)).wrapper(P).expert_bytes == I * H * (4 + 2 + 2)
    moe = KTMoEWrapper(0, E, P, H, I)
    assert moe.expert_bytes == I * H * 6
    draw((F32,) * 3).load_into(moe)
    assert moe.expert_bytes == I * H * 12
    draw((bf16,) * 3).load_into(moe)
    assert moe.expert_bytes == I * H * 6


def test_special_numbers() -> None:
    layer = draw((F32, F16, F32))
    layer.gate_proj[0, 0, :4] = np.float32([1e-40, -0.0, 3.4e38, 1e-30])  # the third is too large for bf16
    layer.up_proj[1, 1, :3] = np.float16([6e-8, np.inf, np.nan])
    batch = draw_batch(np.random.default_rng(5), layer, 9, P)
    assert_same_bits(layer.forward(batch), rounded(layer).forward(batch))


@pytest.mark.crosscheck
@other_dtypes
def test_torch_tensors(dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    layer = draw((dtype,) * 3)
    batch = draw_batch(np.random.default_rng(6), layer, 3, P)
    tensors = layer.with_matrices(torch.from_numpy)
    assert_same_bits(tensors.forward(batch), layer.forward(batch))
    lists = layer.with_matrices(lambda matrix: list(torch.from_numpy(matrix)))
    assert_same_bits(lists.forward(batch), layer.forward(batch))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda w: w.astype(np.float64),
            TypeError,
            rf"gate_proj: got float64 \[{E}, {I}, {H}\], expected bfloat16 or float32 or float16 "
            rf"\[{E}, {I}, {H}\]",
        ),
        (lambda w: w[1:], ValueError, rf"gate_proj: got float32 \[{E - 1}, {I}, {H}\], expected float32"),
        (
            lambda w: [w[0], w[1].astype(F16), w[2]],
            TypeError,
            rf"gate_proj: got float16 \[{I}, {H}\], expected float32 \[{I}, {H}\]",
        ),
        (lambda w: list(w[1:]), ValueError, rf"gate_proj: got {E - 1} arrays, expected {E}"),
        (
            lambda w: np.asfortranarray(w),
            TypeError,
            r"gate_proj: got strides \[.*\], expected a contiguous last axis",
        ),
    ],
)
def test_wrong_arrays_are_refused(change: Any, error: type[Exception], message: str) -> None:
    layer = draw((F32,) * 3)
    moe = KTMoEWrapper(0, E, P, H, I)
    with pytest.raises(error, match=message):
        moe.load_weights_from_tensors(change(layer.gate_proj), *layer.matrices[1:])
    assert not moe.loaded


def test_int8_activations_are_refused() -> None:
    moe = draw((F32,) * 3).wrapper(P)
    batch = draw_batch(np.random.default_rng(0), draw((F32,) * 3), 1, P)
    with pytest.raises(ValueError, match="activation_dtype: got int8, expected bfloat16: f32 weights"):
        moe.forward(*batch, activation_dtype="int8")


# ---- quantized ----


@pytest.mark.parametrize("method", ["AMXINT8", "AMXINT4", "MOE_INT8", "MOE_INT4"])
def test_float16_is_quantized_as_the_same_numbers_in_float32(method: str) -> None:
    layer = draw((F16,) * 3)
    batch = draw_batch(np.random.default_rng(7), layer, 5, P)
    wide = layer.with_matrices(lambda matrix: matrix.astype(F32))
    assert_same_bits(layer.forward(batch, method=method), wide.forward(batch, method=method))


# ---- checkpoints ----


def write(directory: Path, naming: str, layer: Layer) -> None:
    """A checkpoint of one layer."""
    prefix, config = NAMINGS[naming]
    arguments = {
        **dict(zip(("gate_proj", "up_proj", "down_proj"), layer.matrices, strict=True)),
        **layer.biases,
    }
    tensors = layer_tensors(naming, arguments)
    write_safetensors(
        directory / "model.safetensors", {f"{prefix}.0.{name}": tensor for name, tensor in tensors.items()}
    )
    sizes = {"num_experts": E, "num_experts_per_tok": P, "hidden_size": H, "moe_intermediate_size": I}
    (directory / "config.json").write_text(json.dumps({"model_type": naming, **sizes, **config}))


@other_dtypes
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_loads_and_trains(tmp_path: Path, naming: str, dtype: Any) -> None:
    drawn = draw((dtype,) * 3)
    if naming == "nemotron_h":
        drawn = replace(drawn, up_proj=None)
    if naming == "gpt_oss":
        biases = draw_layer(np.random.default_rng(8), E, I, H, with_biases=True).biases
        drawn = replace(drawn, **{name: np.asarray(bias, F32) for name, bias in biases.items()})
    write(tmp_path, naming, drawn)
    moe = KTMoEWrapper.from_pretrained(tmp_path, 0)
    layer = replace(drawn, activation=moe.config.activation, scale_inputs=moe.config.scale_inputs)
    batch = draw_batch(np.random.default_rng(9), layer, 9, P)
    assert moe.method == "BF16"
    assert_close(moe.forward(*batch), layer, batch)
    sft = KTMoEWrapper.from_pretrained(tmp_path, 0, mode="sft", lora_rank=4)
    sft.init_lora_weights()
    assert_same_bits(sft.forward_sft(*batch), moe.forward(*batch))
    assert np.isfinite(sft.backward(batch.x).gate_lora_b).all()
    quantized = KTMoEWrapper.from_pretrained(tmp_path, 0, "MOE_INT8")
    assert_same_bits(quantized.forward(*batch), layer.forward(batch, method="MOE_INT8"))


@pytest.mark.parametrize("dtypes", MIXED)
def test_each_projection_has_its_dtype(tmp_path: Path, dtypes: Any) -> None:
    layer = draw(dtypes)
    write(tmp_path, "qwen3_moe", layer)
    batch = draw_batch(np.random.default_rng(10), layer, 9, P)
    assert_same_bits(KTMoEWrapper.from_pretrained(tmp_path, 0).forward(*batch), layer.forward(batch))
    names = {F32: "f32", F16: "f16", bf16: "bf16"}
    report = inspect_checkpoint(tmp_path)
    assert list(report.layers[0].formats.values()) == [names[dtype] for dtype in dtypes]
    assert report.num_bytes == sum(matrix.nbytes for matrix in layer.matrices)


@other_dtypes
def test_a_file_is_mapped_and_not_copied(tmp_path: Path, dtype: Any) -> None:
    layer = draw((dtype,) * 3)
    write(tmp_path, "qwen3_moe", layer)
    moe = KTMoEWrapper.from_pretrained(tmp_path, 0)
    batch = Batch(np.ones((1, H), bf16), np.array([[0]]), np.ones((1, 1), np.float32))
    moe = KTMoEWrapper.from_pretrained(tmp_path, 0, num_experts_per_tok=1)
    before = moe.forward(*batch)
    data = (tmp_path / "model.safetensors").read_bytes()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(data.index(layer.down_proj[0, 0].tobytes()))
        file.write(bytes(layer.down_proj[0, 0].nbytes))
    after = moe.forward(*batch)
    assert after[0, 0] == 0
    assert_same_bits(after[:, 1:], before[:, 1:])


def test_one_projection_has_one_dtype(tmp_path: Path) -> None:
    layer = draw((F32,) * 3)
    write(tmp_path, "qwen3_moe", layer.with_matrices(lambda m: [m[0], m[1].astype(F16), m[2]]))
    with pytest.raises(
        ValueError, match=rf"tensor '.*\.1\.gate_proj\.weight': got F16 \[{I}, {H}\], expected F32"
    ):
        load_experts(tmp_path, 0)


def test_encoded_methods_name_the_one_that_takes_numbers(tmp_path: Path) -> None:
    write(tmp_path, "qwen3_moe", draw((F32,) * 3))
    for method in ("FP8", "RAWINT4", "MXFP4"):
        with pytest.raises(
            ValueError, match=r"got F32, expected weights of FP8, .*; method BF16 takes these$"
        ):
            KTMoEWrapper.from_pretrained(tmp_path, 0, method)


# ---- the reference ----


def test_the_reference_rounds() -> None:
    layer = draw((F32, F16, F32))
    batch = draw_batch(np.random.default_rng(11), layer, 9, P)
    for accumulate in (np.float32, np.float64):
        results = [
            moe_forward(*batch, *one.matrices, accumulate_dtype=accumulate) for one in (layer, rounded(layer))
        ]
        assert_same_bits(*results)


def test_the_reference_trains_on_rounded_weights() -> None:
    rng = np.random.default_rng(12)
    student = replace(draw_student(rng, (E, I, H), 4), layer=draw((F32, F16, F32)))
    batch, grad_output = draw_training(rng, student, 9, P)
    steps = []
    for one in (student, replace(student, layer=rounded(student.layer))):
        out, cache = moe_forward_sft(**one.reference(batch))
        gradients = {k: v for k, v in vars(moe_backward(cache, grad_output)).items() if v is not None}
        steps.append(Step(out, gradients))
    assert_same_steps(*steps)


def test_a_whole_model_in_float32(tmp_path: Path) -> None:
    """bfloat16 widened is the same model."""
    checkpoint = SafetensorsCheckpoint(EMBEDDED_MODEL)
    wide = {name: checkpoint.tensor(name).astype(np.float32) for name in checkpoint.names()}
    write_safetensors(tmp_path / "model.safetensors", wide)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(EMBEDDED_MODEL / name)
    models = [MoEDecoder.from_pretrained(path) for path in (tmp_path, EMBEDDED_MODEL)]
    assert [layer.expert_bytes for layer in models[0].experts] == [
        2 * layer.expert_bytes for layer in models[1].experts
    ]
    texts = [list(generate(model, list(b"In the beginning"), 8)) for model in models]
    assert texts[0] == texts[1]
