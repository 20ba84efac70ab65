"""The layer with quantized weights: against plain loops, within its bound, its laws, accuracy and errors."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_cases import METHODS, draw_quantized, quantized, quantized_loop
from reference_cases import FORMULAS, AnyArray, Layer, bf16, bits, draw_layer

import ktmoe_np.reference.forward
from ktmoe_np.reference import (
    activate,
    assert_within,
    error_bound,
    moe_forward,
    moe_forward_sft,
    product_weights,
    quantize_activations,
    quantize_int4,
    quantize_int8,
    round_bf16,
)

quick = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**32 - 1)
methods = pytest.mark.parametrize("method", sorted(METHODS))


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.reference.forward).failed == 0


@given(
    SEEDS,
    st.sampled_from(sorted(METHODS)),
    st.sampled_from(["silu", "swigluoai", "relu2"]),
    st.tuples(
        st.integers(0, 3), st.integers(1, 3), st.integers(0, 3), st.integers(1, 40), st.integers(1, 36)
    ),
    st.booleans(),
)
@quick
def test_forward_is_the_loop(seed: int, method: str, name: str, sizes: tuple[int, ...], biases: bool) -> None:
    activation, formula = FORMULAS[name]
    named = dict(zip(("T", "E", "P", "H", "inter"), sizes, strict=True))
    layer = draw_quantized(seed, method, **named, activation=activation, biases=biases)
    expected = quantized_loop(layer, formula)
    for out in (np.float64, np.float32, bf16):
        bound = error_bound(**layer, out_dtype=out)
        truth = round_bf16(expected) if out is bf16 else expected.astype(out)
        for accumulate in (np.float32, np.float64):
            got = moe_forward(**layer, out_dtype=out, accumulate_dtype=accumulate)
            assert got.dtype == out
            assert_within(got, truth, bound)


def noisy_engine(layer: Layer, rng: np.random.Generator, ulps: float) -> AnyArray:
    """Another evaluation: float32 sums in a random order, activations wrong by up to `ulps`."""

    def project(x: AnyArray, name: str, e: int) -> AnyArray:
        matrix = layer[f"{name}_proj"][e]
        order = rng.permutation(matrix.shape[1])
        if layer["product"] == "int8":
            codes, scale = quantize_activations(x)
            sums = codes.astype(np.int32) @ matrix.codes.astype(np.int32).T
            total = sums.astype(np.float32) * scale[:, None] * matrix.channel_scale
        else:
            weights = product_weights(matrix).astype(np.float32)[:, order]
            total = np.cumsum(x[:, None, order] * weights, axis=2, dtype=np.float32)[..., -1]
            total = total * getattr(matrix, "channel_scale", np.float32(1))
        bias = layer.get(f"{name}_bias")
        return total if bias is None else total + bias[e].astype(np.float32)

    x = layer["hidden_states"].astype(np.float32)
    out = np.zeros(x.shape, np.float32)
    for p in range(layer["topk_ids"].shape[1]):
        for e in range(layer["down_proj"].shape[0]):
            rows = np.flatnonzero(layer["topk_ids"][:, p] == e)
            gate, up = project(x[rows], "gate", e), project(x[rows], "up", e)
            wrong = 1 + ulps * 2.0**-24 * rng.uniform(-1, 1, gate.shape)
            h = round_bf16(activate(layer["activation"], gate, up) * wrong.astype(np.float32))
            out[rows] += layer["topk_weights"][rows, p, None] * project(h, "down", e)
    return out


@methods
@pytest.mark.parametrize("ulps", [4.0, 3000.0, 30000.0])
@pytest.mark.parametrize("seed", range(3))
def test_any_evaluation_stays_within_the_bound(method: str, ulps: float, seed: int) -> None:
    # 30000 of 2^-24 is half an ulp of bfloat16: most rows then find another element of h, or another scale.
    layer = draw_quantized(seed, method, T=40, H=130, inter=100, biases=seed == 1)
    rng = np.random.default_rng(seed)
    truth = moe_forward(**layer, accumulate_dtype=np.float64, out_dtype=np.float32)
    got = noisy_engine(layer, rng, ulps)
    options: Any = {"out_dtype": np.float32, "activation_ulps": 2 * ulps}
    assert_within(got, truth, error_bound(**layer, **options))
    assert_within(got, truth, error_bound(**layer, **options, sigmas=6.0))


@pytest.mark.parametrize("inter", [1, 2, 3])
def test_the_bound_knows_what_a_few_codes_may_do(inter: int) -> None:
    # A single h has the code 127 and only its scale moves; of two or three, single codes do.
    layer = draw_quantized(2, "int8", T=400, E=2, H=20, inter=inter)
    truth = moe_forward(**layer, accumulate_dtype=np.float64, out_dtype=np.float32)
    got = noisy_engine(layer, np.random.default_rng(2), 30000.0)
    bound = error_bound(**layer, out_dtype=np.float32, activation_ulps=30000.0)
    assert_within(got, truth, bound)
    reached = np.abs(got - truth) / bound
    assert reached.max() > 0.1


@pytest.mark.parametrize("power", [-126, -100, -60, 30])
@pytest.mark.parametrize("method", ["int8", "int4", "weight-only int4"])
def test_scales_of_any_size_stay_within_the_bound(method: str, power: int) -> None:
    layer = draw_layer(5, T=6, H=64, inter=40)
    for name in ("hidden_states", "down_proj"):
        scaled = np.ldexp(layer[name].astype(np.float64), power if name == "down_proj" else power // 4)
        layer[name] = scaled.astype(np.float32).astype(bf16)
    layer = quantized(layer, method)
    truth = moe_forward(**layer, accumulate_dtype=np.float64, out_dtype=np.float32)
    bound = error_bound(**layer, out_dtype=np.float32)
    assert np.isfinite(bound).all()
    assert_within(noisy_engine(layer, np.random.default_rng(0), 4.0), truth, bound)


@methods
def test_the_bound_is_sharp_enough_to_find_mistakes(method: str) -> None:
    plain = draw_layer(7, T=16, H=512, inter=256)
    layer = quantized(plain, method)
    truth = moe_forward(**layer, accumulate_dtype=np.float64)
    bound = error_bound(**layer, sigmas=6.0)
    scale = np.sqrt(np.mean(np.square(truth.astype(np.float64))))
    assert np.median(bound / scale) < 0.02
    other = "bfloat16" if layer["product"] == "int8" else "int8"
    mistakes: list[Layer] = [plain]
    if method != "weight-only int8, 32":
        mistakes.append({**layer, "product": other})
    for mistake in mistakes:
        with pytest.raises(AssertionError, match="elements are outside the bound"):
            assert_within(moe_forward(**mistake), truth, bound)


def test_integer_products_to_the_bit() -> None:
    layer = draw_quantized(3, "int4", T=1, E=1, P=1, H=70, inter=33, activation="relu2")
    layer["topk_ids"][:], layer["topk_weights"][:] = 0, 1
    values = layer["hidden_states"].astype(np.float32)
    for name, after in (("gate_proj", True), ("down_proj", False)):
        codes, scale = quantize_activations(values)
        sums = codes.astype(np.int32) @ layer[name][0].codes.astype(np.int32).T
        values = (sums.astype(np.float32) * scale[:, None]) * layer[name][0].channel_scale
        values = round_bf16(np.square(np.maximum(values, 0))) if after else values
    assert moe_forward(**layer, out_dtype=np.float32).tobytes() == values.tobytes()


@methods
def test_permuting_tokens_permutes(method: str) -> None:
    layer = draw_quantized(1, method, T=6)
    order = np.random.default_rng(1).permutation(6)
    names = ("hidden_states", "topk_ids", "topk_weights")
    result = bits(moe_forward(**layer, accumulate_dtype=np.float64))
    permuted = {**layer, **{name: layer[name][order] for name in names}}
    assert np.array_equal(bits(moe_forward(**permuted, accumulate_dtype=np.float64)), result[order])
    alone = {**layer, **{name: layer[name][:1] for name in names}}
    assert np.array_equal(bits(moe_forward(**alone, accumulate_dtype=np.float64)), result[:1])


@methods
def test_a_map_takes_other_experts(method: str) -> None:
    layer = draw_quantized(1, method, T=6)
    mapping = np.array([3, 0, 1, 2])
    logical = np.where(layer["topk_ids"] < 0, -1, mapping[layer["topk_ids"]])
    got = moe_forward(**layer, physical_to_logical_map=mapping)
    assert np.array_equal(bits(got), bits(moe_forward(**{**layer, "topk_ids": logical})))


def test_projections_may_differ() -> None:
    plain = draw_layer(1)
    layer = {
        **plain,
        "down_proj": quantize_int4(plain["down_proj"]),
        "up_proj": quantize_int8(plain["up_proj"]),
    }
    truth = moe_forward(**layer, accumulate_dtype=np.float64)
    assert_within(moe_forward(**layer), truth, error_bound(**layer))


@methods
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_own_row_nan(method: str, value: float) -> None:
    layer = draw_quantized(3, method, T=4)
    layer["topk_ids"] = np.array([[0, 1], [2, -1], [-1, -1], [3, 3]])
    clean, x = moe_forward(**layer), layer["hidden_states"]
    for t in range(4):
        layer["hidden_states"] = x.copy()
        layer["hidden_states"][t, 7] = value
        with np.errstate(all="raise"):
            got, bound = moe_forward(**layer), error_bound(**layer)
        others = np.arange(4) != t
        assert np.array_equal(bits(got[others]), bits(clean[others]))
        assert np.isnan(got[t].astype(np.float32)).all() == (t != 2)
        assert np.array_equal(np.isnan(bound), np.isnan(got.astype(np.float32)))


@methods
def test_zeros_and_an_overflow(method: str) -> None:
    layer = draw_quantized(3, method, T=3)
    layer["topk_ids"] = np.array([[0, 1], [0, 1], [0, 1]])
    layer["hidden_states"][0] = 0
    layer["hidden_states"][1] = 3e38
    with np.errstate(all="raise"):
        got, bound = moe_forward(**layer).astype(np.float32), error_bound(**layer)
    assert not got[0].any()
    assert (bound[0] < 1e-30).all()
    assert np.isinf(bound[1]).all()
    assert np.isfinite(got[2]).all()
    assert_within(got, moe_forward(**layer, accumulate_dtype=np.float64), bound)


@pytest.fixture(scope="module")
def wide() -> tuple[Layer, AnyArray]:
    """A layer of the shape of Qwen3-30B-A3B with fewer experts, in float32, and its exact output."""
    rng = np.random.default_rng(0)
    sizes = {"gate_proj": (4, 768, 2048), "up_proj": (4, 768, 2048), "down_proj": (4, 2048, 768)}
    layer: Layer = {n: rng.standard_normal(s, np.float32) * 0.3 / s[-1] ** 0.5 for n, s in sizes.items()}
    layer = {name: value.astype(np.float32) for name, value in layer.items()}
    layer["hidden_states"] = rng.standard_normal((64, 2048), np.float32).astype(bf16)
    layer["topk_ids"] = np.stack([rng.permutation(4)[:2] for _ in range(64)])
    layer["topk_weights"] = rng.random((64, 2), np.float32)
    return layer, moe_forward_sft(**layer, exact=True)[0]


@pytest.mark.parametrize(
    ("method", "limit"),
    [
        ("int8", 0.025),
        ("int4", 0.150),
        ("weight-only int8", 0.015),
        ("weight-only int8, 32", 0.009),
        ("weight-only int4", 0.147),
    ],
)
def test_accuracy(method: str, limit: float, wide: tuple[Layer, AnyArray]) -> None:
    layer, truth = wide
    error = moe_forward(**quantized(layer, method)).astype(np.float64) - truth
    assert np.linalg.norm(error) <= limit * np.linalg.norm(truth)


def test_accuracy_of_groups_on_a_layer_of_the_benches() -> None:
    # They draw bfloat16 weights that give gate and up a standard deviation of 1.
    rng = np.random.default_rng(3)
    sizes = {"gate_proj": (2, 384, 1024), "up_proj": (2, 384, 1024), "down_proj": (2, 1024, 384)}
    layer: Layer = {n: (rng.standard_normal(s) / s[-1] ** 0.5).astype(bf16) for n, s in sizes.items()}
    layer["hidden_states"] = rng.standard_normal((128, 1024)).astype(bf16)
    layer["topk_ids"] = rng.integers(0, 2, (128, 1))
    layer["topk_weights"] = rng.random((128, 1), np.float32)
    truth = moe_forward_sft(**layer, exact=True)[0]
    error = moe_forward(**quantized(layer, "weight-only int8, 32")).astype(np.float64) - truth
    assert np.linalg.norm(error) <= 0.009 * np.linalg.norm(truth)


@given(SEEDS, st.integers(1, 100), st.integers(-100, 100), st.sampled_from([bf16, np.float32]))
@quick
def test_no_group_is_worse_than_with_amax_over_127(seed: int, K: int, power: int, dtype: Any) -> None:
    weights = np.ldexp(np.random.default_rng(seed).standard_t(4, (5, K)), power).astype(dtype)
    exact = np.pad(weights.astype(np.float64), ((0, 0), (0, -K % 32))).reshape(-1, 32)
    scale = (np.abs(exact).max(axis=1, keepdims=True) / 127).astype(np.float32)
    codes = np.clip(np.rint(exact.astype(np.float32) * (np.float32(1) / scale)), -127, 127)
    found = np.pad(product_weights(quantize_int8(weights, group_size=32)), ((0, 0), (0, -K % 32)))
    errors = [
        np.square(exact - decoded.astype(np.float64).reshape(-1, 32)).sum(axis=1)
        for decoded in (found, round_bf16(codes * scale))
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"product": "int4"}, ValueError, "product: got 'int4', expected bfloat16 or int8"),
        (
            {"up_proj": np.zeros((4, 40, 48), bf16)},
            TypeError,
            "up_proj: got ndarray, expected an Int8Matrix or Int4Matrix for product int8",
        ),
        (
            {"down_proj": quantize_int8(np.zeros((4, 48, 40), bf16), group_size=32)},
            TypeError,
            "down_proj: got Int8GroupMatrix, expected an Int8Matrix or Int4Matrix for product int8",
        ),
        (
            {"gate_proj": quantize_int8(np.zeros((40, 48), bf16))},
            ValueError,
            r"gate_proj: got shape \[40, 48\], expected \[E, I, H\]",
        ),
        (
            {"up_proj": quantize_int8(np.zeros((3, 40, 48), bf16))},
            ValueError,
            "up_proj: got 3 experts, expected 4",
        ),
        (
            {"down_proj": quantize_int4(np.zeros((4, 48, 41), bf16))},
            ValueError,
            r"down_proj\[0\]: got shape \[48, 41\], expected \[H=48, I=40\]",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = {**draw_quantized(0, "int8"), **change}
    for function in (moe_forward, error_bound, moe_forward_sft):
        with pytest.raises(error, match=message):
            function(**layer)
