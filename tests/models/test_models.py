"""Whole models: the embedded one, laws of decoding, and what is wrong with other checkpoints."""

from __future__ import annotations

import doctest
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from decoders import assert_same_but_for_roundings, logits_of
from layers import IS_SLOW

from ktmoe_np.io import load_hf_config
from ktmoe_np.io.safetensors.checkpoint import SafetensorsCheckpoint
from ktmoe_np.io.safetensors.writer import write_safetensors
from ktmoe_np.models import (
    EMBEDDED_MODEL,
    EMBEDDED_TEXT,
    DecoderConfig,
    MoEDecoder,
    bits_per_token,
    generate,
    load_stop_tokens,
    load_tokenizer,
)

TEXT = b"And God said, Let there be light: and there was"
OTHER = b"In the beginning God created the heaven and the earth."

#: Bits per byte of Alice's first 4096 bytes, as measured, the mean of five instruction sets.
MEASURED = {"BF16": 2.6486, "AMXINT8": 2.6498, "AMXINT4": 2.6556, "MOE_INT8": 2.6485, "MOE_INT4": 2.6563}
LAST_DIGIT = 0.00005


@pytest.fixture(scope="module")
def model() -> MoEDecoder:
    return MoEDecoder.from_pretrained()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be changed."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(EMBEDDED_MODEL / name, tmp_path / name)
    return tmp_path


def configure(path: Path, **changes: Any) -> None:
    config = {**load_hf_config(path), **changes}
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def rewrite(path: Path, name: str, value: np.ndarray[Any, Any] | None) -> None:
    """Give a tensor another value, or leave it out."""
    read = SafetensorsCheckpoint(path)
    tensors = {other: read.tensor(other).copy() for other in read.names() if other != name}
    if value is not None:
        tensors[name] = value
    (path / "model.safetensors").unlink()
    write_safetensors(path / "model.safetensors", tensors)


@pytest.mark.parametrize("name", ["config", "decoder", "generation", "tokenizer"])
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"ktmoe_np.models.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_the_embedded_model_has_learned_its_texts(model: MoEDecoder) -> None:
    assert bytes(generate(model, TEXT, 12)) == b" no more a m"
    assert bits_per_token(model, list(TEXT)) < 2


# Slow: the whole model reads 4096 bytes as they are, and several times with other roundings.
@pytest.mark.slow
@pytest.mark.parametrize("method", MEASURED)
def test_bits_per_byte_of_every_method_are_as_measured(method: str) -> None:
    model = MoEDecoder.from_pretrained(method=method)
    assert model.experts[0].method == method
    text, embedding, rng = list(EMBEDDED_TEXT.read_bytes()[:4096]), model._embedding, np.random.default_rng(0)
    bits, moves = bits_per_token(model, text), []
    for _ in range(2 if IS_SLOW else 4):  # how far roundings take it: when the embedding's last bits change
        noise = rng.choice(np.float32([1 - 2.0**-23, 1 + 2.0**-23]), embedding.shape)
        model._embedding = embedding * noise
        moves.append(abs(bits_per_token(model, text) - bits))
    assert abs(bits - MEASURED[method]) <= 2 * max(moves) + LAST_DIGIT


@pytest.mark.kernels
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(model: MoEDecoder) -> None:
    texts = [TEXT, OTHER[:7], OTHER, TEXT[:20]]
    caches = [model.new_cache() for _ in texts]
    together = model.forward([list(text) for text in texts], caches)
    further = model.forward([[65]] * len(texts), caches)
    for text, logits, next_logits in zip(texts, together, further, strict=True):
        cache = model.new_cache()
        (alone,) = model.forward([list(text)], [cache])
        assert alone.tobytes() == logits.tobytes()
        assert model.forward([[65]], [cache])[0].tobytes() == next_logits.tobytes()


def test_what_follows_does_not_change_what_was_said(model: MoEDecoder) -> None:
    whole, part = logits_of(model, TEXT), logits_of(model, TEXT[:-5])
    assert_same_but_for_roundings(model, TEXT, whole[: len(part)], part)


def test_a_text_in_steps_is_the_text_at_once(model: MoEDecoder) -> None:
    long = list(OTHER * 3)  # beyond the cache's first room
    cache = model.new_cache()
    steps = [model.forward([[token]], [cache])[0][0] for token in long]
    assert cache.length == len(long)
    assert_same_but_for_roundings(model, bytes(long), np.stack(steps), logits_of(model, bytes(long)))


def test_draws_repeat_by_their_seed(model: MoEDecoder) -> None:
    draws = [tuple(generate(model, TEXT, 16, temperature=1.0, seed=seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_low_temperature_takes_the_likeliest(model: MoEDecoder) -> None:
    assert list(generate(model, TEXT, 8, temperature=1e-6)) == list(generate(model, TEXT, 8))


def test_stops_end_a_text(model: MoEDecoder) -> None:
    assert bytes(generate(model, TEXT, 100, stop=list(b"m"))) == b" no "


def test_the_batch_does_not_change_a_measurement(model: MoEDecoder) -> None:
    tokens = list(EMBEDDED_TEXT.read_bytes()[:300])
    seen: list[int] = []
    one = bits_per_token(model, tokens, window=64, batch=1)
    assert bits_per_token(model, tokens, window=64, batch=3, progress=seen.append) == one
    assert sum(seen) == len(tokens)


def test_bits_are_those_of_the_chances(model: MoEDecoder) -> None:
    logits = logits_of(model, TEXT[:-1]).astype(np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    bits = -np.log2(chances[np.arange(len(TEXT) - 1), list(TEXT[1:])])
    assert bits_per_token(model, list(TEXT)) == pytest.approx(bits.mean())


def test_an_embedding_of_its_own_head(checkpoint: Path, model: MoEDecoder) -> None:
    embedding = SafetensorsCheckpoint(checkpoint).tensor("model.embed_tokens.weight")
    rewrite(checkpoint, "lm_head.weight", (2 * embedding.astype(np.float32)).astype(ml_dtypes.bfloat16))
    configure(checkpoint, tie_word_embeddings=False)
    other = MoEDecoder.from_pretrained(checkpoint)
    np.testing.assert_array_equal(logits_of(other, TEXT), 2 * logits_of(model, TEXT))


def test_seconds_in_experts_add_up(model: MoEDecoder) -> None:
    before = model.seconds_in_experts
    logits_of(model, TEXT)
    assert model.seconds_in_experts > before


@pytest.mark.parametrize(
    ("tokens", "caches", "error", "message"),
    [
        ([[1]], 2, ValueError, "caches: got 2, expected one for each of 1 sequences"),
        ([[]], 1, ValueError, r"tokens: got float64 \[0\], expected integers \[T\], at least one"),
        ([[[1]]], 1, ValueError, r"tokens: got int64 \[1, 1\]"),
        ([[0.5]], 1, ValueError, r"tokens: got float64 \[1\]"),
        ([[256]], 1, IndexError, "tokens: got 256, expected 0 to 255"),
        ([[3, -1]], 1, IndexError, "tokens: got -1, expected 0 to 255"),
    ],
)
def test_wrong_tokens(model: MoEDecoder, tokens: Any, caches: int, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        model.forward(tokens, [model.new_cache() for _ in range(caches)])


def test_a_cache_is_of_one_sequence(model: MoEDecoder) -> None:
    cache = model.new_cache()
    with pytest.raises(ValueError, match="caches: got one twice"):
        model.forward([[1], [2]], [cache, cache])
    assert cache.length == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: got -1"),
        ({"max_new_tokens": 1, "temperature": -0.5}, "temperature: got -0.5"),
        ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature: got nan"),
        ({"max_new_tokens": 1, "temperature": float("inf")}, "temperature: got inf"),
    ],
)
def test_wrong_generation(model: MoEDecoder, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(generate(model, TEXT, **arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [1]}, r"tokens: got shape \[1\], expected \[T\], at least 2"),
        ({"tokens": [1, 2], "window": 1}, "window: got 1, expected at least 2"),
        ({"tokens": [1, 2], "batch": 0}, "batch: got 0, expected at least 1"),
    ],
)
def test_wrong_measurement(model: MoEDecoder, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bits_per_token(model, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type: got 'llama', expected one of qwen3_moe, mixtral, olmoe"),
        ({"attention_bias": True}, "attention_bias: got True, expected False"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected 'silu'"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers: got \[0\], expected \[\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step: got 2, expected 1"),
        ({"sliding_window": 4096}, "sliding_window: got 4096, expected None"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: got rope type 'yarn', expected 'default'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: got 0, expected a positive integer"),
        ({"vocab_size": "absent"}, "vocab_size: got None, expected a positive integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: got 'small', expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: got nan, expected a positive number in the range of"),
        (
            {"rope_theta": 10**300},
            "rope_theta: got 10*, expected a positive number in the range of float32",
        ),
        (
            {"rope_theta": 1e-300},
            "rope_theta: got 1e-300, expected a positive number in the range of float32",
        ),
        ({"vocab_size": 2**63}, "vocab_size: got 9223372036854775808, expected a positive integer below"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "num_key_value_heads: got 3, expected a divi"),
        ({"head_dim": 63}, "head_dim: got 63, expected an even number"),
        ({"model_type": ["qwen3_moe"]}, r"model_type: got \['qwen3_moe'\], expected one of qwen3_moe"),
        ({"num_experts_per_tok": 1000}, "num_experts_per_tok: got 1000, expected at most num_experts"),
    ],
)
def test_wrong_configurations(changes: dict[str, Any], message: str) -> None:
    config = {**load_hf_config(EMBEDDED_MODEL), **changes}
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf_config({k: v for k, v in config.items() if v != "absent"})


def test_settings_that_change_nothing() -> None:
    config = load_hf_config(EMBEDDED_MODEL)
    plain = DecoderConfig.from_hf_config(config)
    more = {"sliding_window": 4096, "use_sliding_window": False, "rope_parameters": {"rope_theta": 10000.0}}
    assert DecoderConfig.from_hf_config({**config, **more}) == plain


def test_missing_and_misshaped_tensors_are_named(checkpoint: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    rewrite(checkpoint, name, np.zeros((3, 256), np.float32))
    with pytest.raises(
        ValueError, match=rf"model.safetensors: tensor '{name}': got F32 \[3, 256\], expected"
    ):
        MoEDecoder.from_pretrained(checkpoint)
    rewrite(checkpoint, name, None)
    with pytest.raises(ValueError, match=f"no tensor '{name}'"):
        MoEDecoder.from_pretrained(checkpoint)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MoEDecoder.from_pretrained(tmp_path / "none")


def test_bytes_are_tokens(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.encode("é!") == [0xC3, 0xA9, 0x21]
    assert tokenizer.decode([0xC3, 0xA9, 0x21, 0xC3]) == "é!�"


def test_tokenizers_that_are_not_there(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(checkpoint)


def test_what_ends_a_text(checkpoint: Path) -> None:
    assert load_stop_tokens(checkpoint) == frozenset()
    configure(checkpoint, eos_token_id=3)
    assert load_stop_tokens(checkpoint) == {3}
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_stop_tokens(checkpoint) == {5, 6}
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(
        ValueError, match=r"generation_config.json: eos_token_id: got 'end', expected an integer"
    ):
        load_stop_tokens(checkpoint)


def test_other_tokenizers_need_their_package(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["model"]["merges"] = [["a", "b"]]
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        load_tokenizer(checkpoint)
