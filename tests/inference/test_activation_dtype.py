"""What products take activations in: what names it, what calls override, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from int8_layers import METHODS, REFUSING, Int8Layer, draw_int8_layer
from layers import Batch, assert_same_bits, draw_batch, draw_layer
from native_layers import WITH_SCALES, draw_native_layer

from ktmoe_np import DeferralChain, KTMoEWrapper
from ktmoe_np.models import EMBEDDED_MODEL

pytestmark = pytest.mark.kernels

AnyArray = Any
MOE_INT8 = ("MOE_INT8", None)
SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "moe_intermediate_size": 32}
NO_INTEGERS = "activation_dtype: got int8, expected bfloat16: {} weights are not integers with scales"
NO_BFLOAT16 = (
    "activation_dtype: got bfloat16, expected int8: the method multiplies int8 activations; "
    "MOE_INT8 and MOE_INT4 take the same weights with bfloat16"
)


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    KTMoEWrapper.drain_deferred()
    yield
    KTMoEWrapper.drain_deferred()


def whole(message: str) -> str:
    return f"^{re.escape(message)}$"


def drawn(seed: int, method: Any = MOE_INT8, num_tokens: int = 9, **options: Any) -> tuple[Int8Layer, Batch]:
    rng = np.random.default_rng(seed)
    layer = draw_int8_layer(rng, method, (4, 96, 160), **options)
    return layer, draw_batch(rng, layer.layer, num_tokens, 3)


def unloaded(method: str, **options: Any) -> Any:
    return KTMoEWrapper(0, *SIZES.values(), method=method, **options)


# ---- names ----


@pytest.mark.parametrize("mode", ["inference", "sft"])
def test_the_default_is_the_methods_own(mode: str) -> None:
    for method in ("AMXINT8", "AMXINT4", "BF16", "FP8", *(name for name, _ in METHODS)):
        moe = unloaded(method if mode == "inference" else f"{method}_SFT", mode=mode)
        assert moe.activation_dtype == ("int8" if method.startswith("AMX") else "bfloat16")
        assert "activations" not in repr(moe)
        assert (
            unloaded(method, activation_dtype=moe.activation_dtype).activation_dtype == moe.activation_dtype
        )


@pytest.mark.parametrize("int8", ["int8", np.int8, np.dtype(np.int8)], ids=repr)
@pytest.mark.parametrize("bf16", ["bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)], ids=repr)
def test_names_and_dtypes(int8: Any, bf16: Any) -> None:
    layer, batch = drawn(0)
    moe, plain = layer.wrapper(3, activation_dtype=int8), layer.wrapper(3, activation_dtype=bf16)
    assert (moe.activation_dtype, plain.activation_dtype) == ("int8", "bfloat16")
    assert_same_bits(moe.forward(*batch, activation_dtype=bf16), plain.forward(*batch))
    assert_same_bits(plain.forward(*batch, activation_dtype=int8), moe.forward(*batch))
    assert not np.array_equal(moe.forward(*batch), plain.forward(*batch))


def test_repr_shows_what_is_not_the_default() -> None:
    sizes = "E=4 P=2 H=64 I=32 silu, not loaded"
    moe = unloaded("MOE_INT4", activation_dtype="int8")
    expected = f"layer 0: MOE_INT4 in groups of 32 with int8 activations, {sizes}"
    assert repr(moe) == f"<GeneralMoEWrapper {expected}>"
    assert "activations" not in repr(unloaded("MOE_INT8", activation_dtype="bfloat16"))
    assert "activations" not in repr(unloaded("AMXINT8", activation_dtype="int8"))


@pytest.mark.parametrize("mode", ["inference", "sft"])
def test_of_a_checkpoint(mode: Any) -> None:
    method = "MOE_INT8" if mode == "inference" else "MOE_INT8_SFT"
    moe = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, 1, method, mode=mode, activation_dtype="int8")
    plain = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, 1, method, mode=mode)
    assert (moe.activation_dtype, plain.activation_dtype) == ("int8", "bfloat16")
    rng = np.random.default_rng(1)
    c = moe.config
    x = rng.standard_normal((3, c.hidden_size), np.float32).astype(ml_dtypes.bfloat16)
    batch = x, rng.integers(0, c.num_experts, (3, c.num_experts_per_tok))
    weights = rng.random(batch[1].shape, np.float32)
    got = moe.forward(*batch, weights)
    assert_same_bits(got, plain.forward(*batch, weights, activation_dtype="int8"))
    assert not np.array_equal(got, plain.forward(*batch, weights))


# ---- calls ----


@pytest.mark.parametrize("method", [MOE_INT8, ("LLAMAFILE", None), ("MXFP4", None)], ids=lambda m: m[0])
def test_submitted_is_as_called(method: Any) -> None:
    layer, batch = drawn(2, method)
    moe = layer.wrapper(3)
    for dtype in ("int8", "bfloat16", None):
        moe.submit_forward(*batch, activation_dtype=dtype)
        assert_same_bits(moe.sync_forward(), moe.forward(*batch, activation_dtype=dtype))
    in_int8 = layer.wrapper(3, activation_dtype="int8").forward(*batch)
    assert_same_bits(moe.forward(*batch, activation_dtype="int8"), in_int8)


def in_chain(moes: list[Any], batches: list[Batch], *dtypes: str | None, chain: Any = None) -> list[AnyArray]:
    """The outputs of a pass, and what its last layer leaves."""
    outs = [
        moe.forward(*batch, chain=chain, activation_dtype=dtype)
        for moe, batch, dtype in zip(moes, batches, dtypes, strict=True)
    ]
    return [*outs, KTMoEWrapper.drain_deferred(chain=chain)]


@pytest.mark.parametrize("own_chain", [False, True])
@pytest.mark.parametrize("dtypes", [("int8", "int8"), ("int8", "bfloat16"), ("bfloat16", "int8")])
def test_deferred_experts_take_what_their_layer_does(own_chain: bool, dtypes: tuple[str, str]) -> None:
    cases = [drawn(seed) for seed in (3, 4)]
    batches = [batch for _, batch in cases]

    def made(*own: str | None) -> list[Any]:
        return [
            layer.wrapper(3, layer_idx=i, max_deferred_experts_per_token=2, activation_dtype=dtype)
            for i, ((layer, _), dtype) in enumerate(zip(cases, own, strict=True))
        ]

    chain = DeferralChain() if own_chain else None
    expected = in_chain(made(*dtypes), batches, None, None, chain=chain)
    for moes in (made(None, None), made(*dtypes[::-1])):
        for got, want in zip(in_chain(moes, batches, *dtypes, chain=chain), expected, strict=True):
            assert_same_bits(got, want)
    other = {"int8": "bfloat16", "bfloat16": "int8"}[dtypes[0]]
    differing = in_chain(made(None, None), batches, other, dtypes[1], chain=chain)
    # What the first layer has deferred is part of the second layer's output.
    equal = [np.array_equal(got, want) for got, want in zip(differing, expected, strict=True)]
    assert equal == [False, False, True]


# ---- what is refused ----


@pytest.mark.parametrize("mode", ["inference", "sft"])
@pytest.mark.parametrize("method", REFUSING)
def test_weights_that_are_no_integers(method: str, mode: str) -> None:
    name = method if mode == "inference" else f"{method}_SFT"
    message = whole(NO_INTEGERS.format(method.lower()))
    with pytest.raises(ValueError, match=message):
        unloaded(name, mode=mode, activation_dtype="int8")
    rng = np.random.default_rng(5)
    layer: Any = draw_layer(rng, 3, 32, 64)
    if method in WITH_SCALES:
        layer = draw_native_layer(rng, method, 3, 32, 64)
    batch = draw_batch(rng, layer, 5, 2)
    moe = layer.wrapper(2, method=name, mode=mode)
    expected = moe.forward(*batch)
    for call in calls_of(moe):
        with pytest.raises(ValueError, match=message):
            call(*batch, activation_dtype="int8")
        assert_same_bits(moe.forward(*batch), expected)
        assert_same_bits(moe.forward(*batch, activation_dtype="bfloat16"), expected)


@pytest.mark.parametrize("mode", ["inference", "sft"])
@pytest.mark.parametrize("method", ["AMXINT8", "AMXINT4"])
def test_methods_whose_activations_are_int8(method: str, mode: str) -> None:
    name = method if mode == "inference" else f"{method}_SFT"
    with pytest.raises(ValueError, match=whole(NO_BFLOAT16)):
        unloaded(name, mode=mode, activation_dtype="bfloat16")
    rng = np.random.default_rng(6)
    layer = draw_layer(rng, 3, 32, 64)
    batch = draw_batch(rng, layer, 5, 2)
    moe = layer.wrapper(2, method=name, mode=mode)
    expected = moe.forward(*batch)
    for call in calls_of(moe):
        with pytest.raises(ValueError, match=whole(NO_BFLOAT16)):
            call(*batch, activation_dtype="bfloat16")
        assert_same_bits(moe.forward(*batch, activation_dtype="int8"), expected)


def calls_of(moe: Any) -> list[Any]:
    if hasattr(moe, "forward_sft"):
        return [moe.forward, moe.forward_sft, moe.submit_forward_sft]
    return [moe.forward, moe.submit_forward]


@pytest.mark.parametrize("mode", ["inference", "sft"])
def test_what_is_no_dtype_of_activations(mode: str) -> None:
    method = "MOE_INT8" if mode == "inference" else "MOE_INT8_SFT"
    layer, batch = drawn(7)
    moe = layer.layer.wrapper(3, method=method, mode=mode)
    expected = "expected None, 'bfloat16' or 'int8'"
    cases: list[tuple[Any, Any, str]] = [
        ("int4", ValueError, "'int4'"),
        ("", ValueError, "''"),
        (np.float32, ValueError, "'float32'"),
        (np.dtype(np.uint8), ValueError, "'uint8'"),
        (8, TypeError, "8"),
        (["int8"], TypeError, "['int8']"),
    ]
    for value, kind, shown in cases:
        message = whole(f"activation_dtype: got {shown}, {expected}")
        with pytest.raises(kind, match=message):
            unloaded(method, mode=mode, activation_dtype=value)
        for call in calls_of(moe):
            with pytest.raises(kind, match=message):
                call(*batch, activation_dtype=value)
    moe.forward(*batch)


def test_gguf_says_what_it_is_when_it_is_loaded() -> None:
    mixed, batch = drawn(8, ("LLAMAFILE", None), types=("f16", "f32", "q4_0"))
    floats, _ = drawn(8, ("LLAMAFILE", None), types=("f16", "f32", "bf16"))
    moe = mixed.wrapper(3, activation_dtype="int8")
    expected = moe.forward(*batch)
    message = whole(NO_INTEGERS.format("f16"))
    with pytest.raises(ValueError, match=message):
        floats.layer.load_into(moe)
    assert_same_bits(moe.forward(*batch), expected)
    empty = KTMoEWrapper(0, 4, 3, 160, 96, method="LLAMAFILE", activation_dtype="int8")
    with pytest.raises(ValueError, match=message):
        floats.layer.load_into(empty)
    assert not empty.loaded
    plain = floats.wrapper(3)
    with pytest.raises(ValueError, match=message):
        plain.forward(*batch, activation_dtype="int8")
    mixed.layer.load_into(plain)
    assert_same_bits(plain.forward(*batch, activation_dtype="int8"), expected)


def test_a_refused_pass_leaves_the_chain_as_it_was() -> None:
    rng = np.random.default_rng(9)
    layers = [draw_layer(rng, 4, 32, 64) for _ in range(2)]
    batches = [draw_batch(rng, layer, 6, 3) for layer in layers]
    moes = [layer.wrapper(3, layer_idx=i, max_deferred_experts_per_token=2) for i, layer in enumerate(layers)]
    expected = in_chain(moes, batches, None, None)
    outs = []
    for moe, batch in zip(moes, batches, strict=True):
        for call in (moe.forward, moe.submit_forward):
            with pytest.raises(ValueError, match=whole(NO_INTEGERS.format("bf16"))):
                call(*batch, activation_dtype="int8")
        outs.append(moe.forward(*batch))
    outs.append(KTMoEWrapper.drain_deferred())
    for got, want in zip(outs, expected, strict=True):
        assert_same_bits(got, want)
