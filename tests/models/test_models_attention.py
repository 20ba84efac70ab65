"""Attention in blocks of queries: the same sums, and memory that does not grow with a prompt's square."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from decoders import assert_same_but_for_roundings, logits_of

from ktmoe_np.io import load_hf_config
from ktmoe_np.models import EMBEDDED_MODEL, EMBEDDED_TEXT, DecoderConfig, MoEDecoder
from ktmoe_np.models import attention as attention_module
from ktmoe_np.models.attention import QUERY_BLOCK, Attention, Place

AnyArray = Any

LONG = 2 * QUERY_BLOCK + 70


@pytest.fixture(scope="module")
def model() -> MoEDecoder:
    return MoEDecoder.from_pretrained()


def draw_attention(rng: np.random.Generator, dtype: Any = np.float64) -> Attention:
    kv_heads, head_dim = 2, 8
    config = replace(
        DecoderConfig.from_hf_config(load_hf_config(EMBEDDED_MODEL)),
        hidden_size=16,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        qk_norm="",
    )
    widths = (4 * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    projections = (rng.standard_normal((16, width)).astype(dtype) for width in widths)
    return Attention(config, *projections, rng.standard_normal((4 * head_dim, 16)).astype(dtype), None)


def attend(attention: Attention, x: AnyArray, keys: AnyArray, values: AnyArray, **options: Any) -> Any:
    """Attention of tokens behind those whose keys and values are given."""
    begin, half = keys.shape[1], attention.config.head_dim // 2
    angles = (begin + np.arange(len(x)))[:, None] * 0.1 ** np.arange(half)
    append = [keys], [values]

    def with_those_before(k: AnyArray, v: AnyArray) -> tuple[AnyArray, AnyArray]:
        return np.concatenate([*append[0], k], axis=1), np.concatenate([*append[1], v], axis=1)

    cos, sin = (turn(angles).astype(x.dtype) for turn in (np.cos, np.sin))
    return attention.forward(x, Place(cos, sin, begin), with_those_before, **options)


@pytest.mark.parametrize("num_before", [0, 1, 300])
def test_blocks_are_the_whole(num_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where another order of sums changes the last digits only."""
    rng = np.random.default_rng(0)
    attention = draw_attention(rng)
    keys, values = rng.standard_normal((2, 2, num_before, 8))
    x = rng.standard_normal((LONG, 16))
    out, kept = attend(attention, x, keys, values)
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 10**9)
    expected, kept_whole = attend(attention, x, keys, values)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(kept.chances, kept_whole.chances, rtol=1e-12, atol=1e-15)
    ahead = np.triu(np.ones((LONG, num_before + LONG), bool), num_before + 1)
    assert not kept.chances[..., ahead].any()


def test_training_computes_what_inference_does() -> None:
    rng = np.random.default_rng(1)
    attention = draw_attention(rng, np.float32)
    x = rng.standard_normal((LONG, 16)).astype(np.float32)
    none = np.zeros((2, 0, 8), np.float32)
    kept, dropped = (attend(attention, x, none, none, keeps_chances=keeps) for keeps in (True, False))
    np.testing.assert_array_equal(kept[0], dropped[0])
    assert dropped[1] is None


def test_a_long_text_has_its_bits_in_any_batch(model: MoEDecoder) -> None:
    text = EMBEDDED_TEXT.read_bytes()
    parts = [list(text[:LONG]), list(text[500:520]), list(text[900 : 900 + QUERY_BLOCK])]
    together = model.forward(parts, [model.new_cache() for _ in parts])
    for part, logits in zip(parts, together, strict=True):
        (alone,) = model.forward([part], [model.new_cache()])
        np.testing.assert_array_equal(alone, logits)


def test_a_long_text_in_parts_is_the_text_at_once(model: MoEDecoder) -> None:
    text = EMBEDDED_TEXT.read_bytes()[:LONG]
    cache, cuts = model.new_cache(), (0, 1, QUERY_BLOCK + 3, LONG - 1, LONG)
    parts = [model.forward([list(text[a:b])], [cache])[0] for a, b in itertools.pairwise(cuts)]
    assert_same_but_for_roundings(model, text, np.concatenate(parts), logits_of(model, text))


def test_the_last_logits_alone(model: MoEDecoder) -> None:
    text = list(EMBEDDED_TEXT.read_bytes()[:40])
    (every,) = model.forward([text], [model.new_cache()])
    (last,) = model.forward([text], [model.new_cache()], last=True)
    assert last.shape == (1, every.shape[1])
    np.testing.assert_allclose(last[0], every[-1], rtol=1e-5, atol=1e-4)


@pytest.mark.memory
def test_memory_of_a_long_prompt() -> None:
    """Scores of all pairs of 4096 tokens, and what a softmax makes of them, would be 268 MB each."""
    rng = np.random.default_rng(2)
    attention = draw_attention(rng, np.float32)
    x = rng.standard_normal((4096, 16)).astype(np.float32)
    none = np.zeros((2, 0, 8), np.float32)
    tracemalloc.start()
    attend(attention, x, none, none, keeps_chances=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
