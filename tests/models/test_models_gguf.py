"""Whole GGUF models: the logits of the checkpoint that they were made of, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from decoders import logits_of
from gguf_models import ARCHITECTURES, permuted, write_gguf_model

from ktmoe_np.io.safetensors.writer import write_safetensors
from ktmoe_np.models import EMBEDDED_MODEL, DecoderConfig, MoEDecoder
from ktmoe_np.models import gguf_model as gguf_module

AnyArray = Any

TEXT = bytes(range(30, 90))

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 32, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 32},
    "olmoe": {"num_experts": 8, "intermediate_size": 32, "norm_topk_prob": False, "clip_qkv": 0.5},
}


def in_float32(config: DecoderConfig) -> DecoderConfig:
    """The config with the numbers that a GGUF header can hold."""
    return replace(config, rms_norm_eps=float(np.float32(config.rms_norm_eps)))


def write_checkpoint(path: Path, family: str) -> Path:
    """A checkpoint of random numbers in bfloat16."""
    config = {"model_type": family, **COMMON, **FAMILIES[family]}
    rng, hidden, head = np.random.default_rng(3), 64, config.get("head_dim", 16)
    queries, keys = 4 * head, 2 * head
    shapes = {"model.embed_tokens": (96, hidden), "model.norm": (hidden,), "lm_head": (96, hidden)}
    experts, router = "mlp.experts", "mlp.gate"
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if family == "mixtral":
        experts, router = "block_sparse_moe.experts", "block_sparse_moe.gate"
        names = {"gate": "w1", "up": "w3", "down": "w2"}
    for i in range(2):
        stem = f"model.layers.{i}."
        shapes |= {stem + "input_layernorm": (hidden,), stem + "post_attention_layernorm": (hidden,)}
        shapes |= {
            f"{stem}self_attn.{name}_proj": shape
            for name, shape in {
                "q": (queries, hidden),
                "k": (keys, hidden),
                "v": (keys, hidden),
                "o": (hidden, queries),
            }.items()
        }
        if family != "mixtral":
            widths = (head, head) if family == "qwen3_moe" else (queries, keys)
            shapes |= {f"{stem}self_attn.{n}_norm": (w,) for n, w in zip("qk", widths, strict=True)}
        shapes[stem + router] = (8, hidden)
        for e in range(8):
            for role, name in names.items():
                shapes[f"{stem}{experts}.{e}.{name}"] = (hidden, 32) if role == "down" else (32, hidden)
    tensors = {
        f"{name}.weight": (rng.standard_normal(shape) * (1 if len(shape) == 1 else shape[-1] ** -0.5)).astype(
            ml_dtypes.bfloat16
        )
        for name, shape in shapes.items()
    }
    path.mkdir()
    write_safetensors(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", family)
    write_gguf_model(source, tmp_path / "model.gguf")
    ours, theirs = (MoEDecoder.from_pretrained(path) for path in (tmp_path / "model.gguf", source))
    assert in_float32(ours.config) == in_float32(theirs.config)
    np.testing.assert_array_equal(logits_of(ours, TEXT), logits_of(theirs, TEXT))


def test_tied_embeddings_and_split_files(tmp_path: Path) -> None:
    write_gguf_model(EMBEDDED_MODEL, tmp_path / "model.gguf", dense="bf16")
    model, expected = MoEDecoder.from_pretrained(tmp_path), MoEDecoder.from_pretrained()
    assert in_float32(model.config) == in_float32(expected.config)
    np.testing.assert_array_equal(logits_of(model, b"And God said"), logits_of(expected, b"And God said"))


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "q5_1"])
def test_dense_tensors_of_any_type(kind: str, tmp_path: Path) -> None:
    """What the package gguf decodes is what the model computes with."""
    number = gguf.GGMLQuantizationType[kind.upper()]

    def round_trip(tensors: dict[str, AnyArray]) -> None:
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and "gate_inp" not in name:
                tensors[name] = gguf.quants.dequantize(gguf.quants.quantize(tensor, number), number)

    write_gguf_model(EMBEDDED_MODEL, tmp_path / "quantized.gguf", dense=kind)
    write_gguf_model(EMBEDDED_MODEL, tmp_path / "rounded.gguf", change=round_trip)
    found, expected = (
        logits_of(MoEDecoder.from_pretrained(tmp_path / f"{name}.gguf"), b"In the beginning")
        for name in ("quantized", "rounded")
    )
    np.testing.assert_array_equal(found, expected)


def test_experts_of_quantized_types_take_int8_activations(tmp_path: Path) -> None:
    write_gguf_model(EMBEDDED_MODEL, tmp_path / "model.gguf", experts="q8_0")
    model = MoEDecoder.from_pretrained(tmp_path / "model.gguf")
    assert model.activation_dtypes == ["int8"] * 4
    expected = logits_of(MoEDecoder.from_pretrained(), b"And God said, Let there be")
    found = logits_of(model, b"And God said, Let there be")
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.9


def test_training(tmp_path: Path) -> None:
    from ktmoe_np.models import loss_and_gradients

    write_gguf_model(EMBEDDED_MODEL, tmp_path / "model.gguf")
    options: dict[str, Any] = {"mode": "sft", "lora_rank": 2}
    tokens = list(b"And God saw the light, that it was good")
    losses = [
        loss_and_gradients(MoEDecoder.from_pretrained(path, **options), [tokens])
        for path in (tmp_path / "model.gguf", EMBEDDED_MODEL)
    ]
    assert losses[0].bits_per_token == losses[1].bits_per_token
    for ours, theirs in zip(losses[0].layers, losses[1].layers, strict=True):
        for name, matrix in ours.matrices.items():
            np.testing.assert_array_equal(matrix, theirs.matrices[name])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_order_of_rotated_rows(heads: int) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((heads * 8, 3)).astype(np.float32)
    stored = permuted(matrix, heads)
    assert heads == 0 or not np.array_equal(stored, matrix)
    # A pair that is rotated together is i and i + 4 of a head's 8 in the one, 2 i and 2 i + 1 in the other.
    np.testing.assert_array_equal(stored[0:8:2], matrix[0:4])
    np.testing.assert_array_equal(stored[1:8:2], matrix[4:8])
    np.testing.assert_array_equal(gguf_module._unpermuted(stored, heads), matrix)


@pytest.mark.crosscheck
@pytest.mark.filterwarnings("ignore")
def test_the_order_is_that_of_transformers() -> None:
    reading = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    matrix = np.random.default_rng(0).standard_normal((4 * 8, 6)).astype(np.float32)
    processor = reading.LlamaTensorProcessor(config={})
    theirs = processor._reverse_permute_weights(matrix, 4, 4)
    np.testing.assert_array_equal(gguf_module._unpermuted(matrix, 4), theirs)


def _write(path: Path, extra: dict[str, Any] | None = None, change: Any = lambda tensors: None) -> None:
    write_gguf_model(EMBEDDED_MODEL, path, extra=extra, change=change)


def test_other_architectures(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "deepseek2")
    writer.add_expert_count(4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match=r"x.gguf: metadata 'general.architecture': got 'deepseek2', expected"
    ) as e:
        MoEDecoder.from_pretrained(tmp_path / "x.gguf")
    assert ", ".join(ARCHITECTURES.values()) in str(e.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"qwen3moe.rope.scaling.type": "yarn"}, "'qwen3moe.rope.scaling.type': got 'yarn', expected 'none'"),
        ({"qwen3moe.attention.sliding_window": 512}, "sliding_window: got 512, expected None"),
        (
            {"qwen3moe.attention.layer_norm_rms_epsilon": "x"},
            "rms_norm_eps: got 'x', expected a positive number",
        ),
    ],
)
def test_settings_that_change_what_is_computed(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    if "qwen3moe.attention.layer_norm_rms_epsilon" in extra:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, "add_layer_norm_rms_eps", lambda self, value: None)
            _write(path, extra)
    else:
        _write(path, extra)
    with pytest.raises(ValueError, match=message) as e:
        MoEDecoder.from_pretrained(path)
    assert str(path) in str(e.value)


def test_settings_that_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    _write(path, {"qwen3moe.rope.scaling.type": "none", "qwen3moe.expert_weights_norm": True})
    found, expected = (DecoderConfig.from_pretrained(each) for each in (path, EMBEDDED_MODEL))
    assert in_float32(found) == in_float32(expected)


def test_values_by_layer(tmp_path: Path) -> None:
    for name, counts in (("same", [2, 2, 2, 2]), ("other", [2, 1, 2, 2])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, "add_head_count_kv", lambda self, value: None)
            _write(tmp_path / f"{name}.gguf", {"qwen3moe.attention.head_count_kv": counts})
    assert DecoderConfig.from_pretrained(tmp_path / "same.gguf").num_kv_heads == 2
    with pytest.raises(
        ValueError, match=r"'qwen3moe.attention.head_count_kv': got \[2, 1, 2, 2\], expected the same"
    ):
        DecoderConfig.from_pretrained(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.attn_q.weight"), "no tensor 'blk.1.attn_q.weight'"),
        (lambda t: t.update({"output_norm.weight": np.ones(3, np.float32)}), r"got \[3\], expected \[256\]"),
        (lambda t: t.update({"rope_freqs.weight": np.ones(4, np.float32)}), "'rope_freqs.weight': got one"),
        (lambda t: t.update({"blk.0.attn_q.bias": np.ones(4, np.float32)}), "attention_bias: got True"),
    ],
)
def test_tensors_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    _write(tmp_path / "x.gguf", change=change)
    with pytest.raises(ValueError, match=message) as e:
        MoEDecoder.from_pretrained(tmp_path / "x.gguf")
    assert "x.gguf" in str(e.value)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf_model(EMBEDDED_MODEL, tmp_path / "x.gguf", dense="q8_0")
    import importlib

    real = importlib.import_module

    def missing(name: str) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(gguf_module.importlib, "import_module", missing)
    with pytest.raises(ImportError, match="got q8_0, which needs: pip install gguf"):
        MoEDecoder.from_pretrained(tmp_path / "x.gguf")


def test_a_type_that_the_package_does_not_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf_model(EMBEDDED_MODEL, tmp_path / "x.gguf", dense="q8_0")

    def refuse(*_: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    with pytest.raises(ValueError, match="got q8_0, expected a type that the package gguf decodes"):
        MoEDecoder.from_pretrained(tmp_path / "x.gguf")
