"""Layers with int8 activations in blocks: against plain loops, within their bound, gradients, and errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gradient_bound import gradient_balls
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_cases import ENCODINGS, draw_encoded, product_loop
from layers import assert_close, draw_batch
from native_layers import draw_native_layer
from quantized_cases import PROJECTIONS, quantized
from reference_cases import (
    FORMULAS,
    AnyArray,
    Layer,
    bf16,
    bits,
    draw_layer,
    experts_loop,
)
from training_cases import draw_training, present

from ktmoe_np.reference import (
    Dropout,
    IntegerMatrix,
    ScaledMatrix,
    activate,
    assert_within,
    error_bound,
    gradient_weights,
    integer_product,
    integers_of_quantized,
    moe_backward,
    moe_forward,
    moe_forward_sft,
    quantize_int4,
    quantize_int8,
    round_bf16,
)
from ktmoe_np.reference.integer_encodings import INTEGERS
from ktmoe_np.reference.weights import ExpertWeights

SEEDS = st.integers(0, 2**32 - 1)
quick = settings(deadline=None, max_examples=40)
#: One of each kind: minima, multipliers, small groups, a channel scale, scales of rows, codes of m * q.
SOME = ("GGUF q4_k", "GGUF q6_k", "GGUF q5_1", "GGUF iq3_xxs", "MXFP4", "NVFP4", "MOE_INT8", "MOE_INT4, 32")
some = pytest.mark.parametrize("name", SOME)


def sized(matrix: IntegerMatrix, factor: float) -> IntegerMatrix:
    """The matrix with its weights times a power of two."""
    by = np.float32(factor)
    minimum = None if matrix.minimum is None else matrix.minimum * by
    return replace(matrix, scale=matrix.scale * by, minimum=minimum)


def encoded(layer: Layer, seed: int, names: tuple[str, ...]) -> Layer:
    """The layer with random weights of the encodings, one for each projection, and int8 activations."""
    rng = np.random.default_rng(seed)
    result = {**layer, "activation_dtype": "int8"}
    for name, projection in zip(names, PROJECTIONS, strict=True):
        if layer[projection] is not None:
            e, n, k = layer[projection].shape
            factor = 2.0 ** -round(np.log2(k) / 2)
            result[projection] = sized(draw_encoded(rng, name, e, n, k).matrix, factor)
    return result


def draw_encoded_layer(seed: int, names: tuple[str, ...], **sizes: Any) -> Layer:
    """H and I are whole blocks of all types unless they are given."""
    return encoded(draw_layer(seed, **{"H": 512, "inter": 256, **sizes}), seed, names)


def int8_loop(layer: Layer, formula: Callable[[float, float], float]) -> AnyArray:
    """The specification, one token at a time, with products in exact fractions, before the last rounding."""

    def project(x: list[float], name: str, e: int) -> list[float]:
        bias = layer.get(f"{name}_bias")
        sums = product_loop(np.float32([x]), layer[f"{name}_proj"][e])[0]
        return [float(y if bias is None else y + np.float32(bias[e, n])) for n, y in enumerate(sums)]

    return experts_loop(layer, formula, project)


@given(
    SEEDS,
    st.tuples(*(st.sampled_from(["MXFP4", "NVFP4", "MOE_INT8", "MOE_INT4, 32", "RAWINT4, 64"]),) * 3),
    st.sampled_from(["silu", "relu2"]),
    st.tuples(
        st.integers(0, 2), st.integers(1, 2), st.integers(0, 2), st.integers(1, 140), st.integers(1, 20)
    ),
    st.booleans(),
    st.booleans(),
)
@quick
def test_forward_is_the_loop(
    seed: int, names: Any, activation: str, sizes: Any, biases: bool, scale_inputs: bool
) -> None:
    spec, formula = FORMULAS[activation]
    named = dict(zip(("T", "E", "P", "H", "inter"), sizes, strict=True))
    layer = draw_encoded_layer(seed, names, **named, activation=spec, biases=biases)
    layer["scale_inputs"] = scale_inputs
    expected = int8_loop(layer, formula)
    bound = error_bound(**layer, out_dtype=np.float32)
    for numbers in (np.float32, np.float64):
        got = moe_forward(**layer, out_dtype=np.float32, accumulate_dtype=numbers)
        assert_within(got, expected.astype(np.float32), bound)


@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_forward_to_the_bit(name: str) -> None:
    layer = draw_encoded_layer(3, (name,) * 3, T=3, E=1, P=1, activation="relu2")
    layer["topk_ids"][:], layer["topk_weights"][:] = 0, 1
    gate, down = layer["gate_proj"][0], layer["down_proj"][0]
    h = round_bf16(np.square(np.maximum(integer_product(layer["hidden_states"].astype("f4"), gate), 0)))
    assert moe_forward(**layer, out_dtype=np.float32).tobytes() == integer_product(h, down).tobytes()


@some
def test_training_forwards_the_same(name: str) -> None:
    layer = draw_encoded_layer(2, (name,) * 3, biases=True)
    out, cache = moe_forward_sft(**layer, cache_dtype=np.float32)
    assert np.array_equal(bits(out), bits(moe_forward(**layer)))
    e, t, p = 1, *(at[:1] for at in np.nonzero(layer["topk_ids"] == 1))
    g = integer_product(layer["hidden_states"][t].astype(np.float32), layer["gate_proj"][e])
    assert np.array_equal(cache.gate[t, p], g + layer["gate_bias"][e].astype(np.float32))


@some
def test_gradients_go_through_the_weights_in_bfloat16(name: str) -> None:
    layer, grad_output = draw_training(4, T=9, H=256, inter=256)
    layer = encoded(layer, 4, (name,) * 3)
    if name.startswith("MOE"):
        layer |= {n: quantize_int8(draw_layer(4, H=256, inter=256)[n]) for n in PROJECTIONS}
    _, cache = moe_forward_sft(**layer)
    plain = {}
    for short in ("gate", "up", "down"):
        matrix = layer[f"{short}_proj"]
        if isinstance(matrix, IntegerMatrix):
            values = matrix.product_weights()
            if matrix.channel_scale is not None:
                values = gradient_weights(ScaledMatrix(values, matrix.channel_scale))
        else:
            values = gradient_weights(matrix)
        plain[short] = [ExpertWeights(one) for one in values]
    other = replace(cache, inputs=replace(cache.inputs, **plain))
    got, want = (present(moe_backward(c, grad_output)) for c in (cache, other))
    want = {key: value for key, value in want.items() if key in got}
    for key, value in got.items():
        assert np.array_equal(value, want[key]), key
    with pytest.raises(
        ValueError, match="full_weight_grad: got True, expected False: gate_proj is quantized"
    ):
        moe_backward(cache, grad_output, full_weight_grad=True)


@some
@pytest.mark.parametrize("activation", ["silu", "swigluoai", "relu2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("rounded", [True, False])
def test_training_stays_within_its_bound(name: str, activation: str, dtype: str, rounded: bool) -> None:
    # Whole blocks of 256 twice in h, where codes may change.
    layer, grad_output = draw_training(
        4, T=5, E=2, H=256, inter=512, activation=FORMULAS[activation][0], biases=True
    )
    layer = {**encoded(layer, 4, (name,) * 3), "activation_dtype": dtype, "dropout": Dropout(0.3, seed=3)}
    balls = gradient_balls(layer, grad_output, rounded=rounded)
    computations: list[Layer] = [{}, {"accumulate_dtype": np.float64}]
    for numbers in [*computations, *([] if rounded else [{"exact": True}])]:
        out, cache = moe_forward_sft(**layer, **numbers)
        for key, value in {**present(moe_backward(cache, grad_output)), "out": out}.items():
            assert_within(value, balls[key].center, balls[key].radius)


@some
def test_the_bound_of_training_finds_other_activations(name: str) -> None:
    layer, grad_output = draw_training(4, T=5, E=2, H=256, inter=512)
    layer = encoded(layer, 4, (name,) * 3)
    balls = gradient_balls(layer, grad_output, rounded=True)
    other_blocks = {n: replace(layer[n], activation_block=64) for n in PROJECTIONS}
    for change in ({"activation_dtype": None}, other_blocks):
        _, cache = moe_forward_sft(**{**layer, **change})
        ball = balls["down_lora_a"]
        with pytest.raises(AssertionError, match="elements are outside the bound"):
            assert_within(moe_backward(cache, grad_output).down_lora_a, ball.center, ball.radius)


@some
def test_an_exact_computation_has_no_int8(name: str) -> None:
    layer = draw_encoded_layer(2, (name,) * 3)
    exact, _ = moe_forward_sft(**layer, exact=True)
    whole: Layer = {**layer, "activation_dtype": None}
    for projection in PROJECTIONS:
        matrix = layer[projection]
        factor = 1 if matrix.channel_scale is None else matrix.channel_scale[..., None].astype(np.float64)
        whole[projection] = matrix.values(np.float64) * factor
    assert np.array_equal(exact, moe_forward_sft(**whole, exact=True)[0])
    error = moe_forward(**layer, out_dtype=np.float32) - exact
    assert np.linalg.norm(error) <= 0.04 * np.linalg.norm(exact)


# ---- what activations are ----


@some
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_without_int8_integers_are_their_decoded_weights(name: str, dtype: str | None) -> None:
    layer = {**draw_encoded_layer(2, (name,) * 3), "activation_dtype": dtype}
    plain = dict(layer)
    for projection in PROJECTIONS:
        matrix = layer[projection]
        values = matrix.product_weights()
        plain[projection] = (
            values if matrix.channel_scale is None else ScaledMatrix(values, matrix.channel_scale)
        )
    assert np.array_equal(bits(moe_forward(**layer)), bits(moe_forward(**plain)))
    assert np.array_equal(error_bound(**layer), error_bound(**plain))


def test_quantized_matrices_are_taken_as_they_are() -> None:
    plain = draw_layer(1, H=140, inter=130)
    for quantize in (quantize_int8, quantize_int4, lambda w: quantize_int8(w, group_size=32)):
        given_layer = {**plain, **{n: quantize(plain[n]) for n in PROJECTIONS}, "activation_dtype": "int8"}
        integers = {**given_layer, **{n: integers_of_quantized(given_layer[n]) for n in PROJECTIONS}}
        result = moe_forward(**given_layer)
        assert np.array_equal(bits(result), bits(moe_forward(**integers)))
        assert not np.array_equal(
            bits(result), bits(moe_forward(**{**given_layer, "activation_dtype": None}))
        )


def test_rows_of_one_scale_are_another_product() -> None:
    layer = quantized(draw_layer(1, H=140, inter=130), "int8")
    asked = moe_forward(**layer, activation_dtype="int8")
    assert np.array_equal(bits(asked), bits(moe_forward(**layer)))
    blocks = moe_forward(**{**layer, "product": "bfloat16"}, activation_dtype="int8")
    assert not np.array_equal(bits(asked), bits(blocks))


def test_other_projections_stay_in_bfloat16() -> None:
    mixed = draw_encoded_layer(1, ("GGUF q4_k",) * 3)
    plain = draw_layer(1, H=512, inter=256)
    scaled = ScaledMatrix(plain["gate_proj"], np.full((4, 256), 0.5, np.float32))
    for projection, weights in (("up_proj", plain["up_proj"]), ("gate_proj", scaled)):
        layer = {**mixed, projection: weights}
        truth = moe_forward(**layer, accumulate_dtype=np.float64)
        assert_within(moe_forward(**layer), truth, error_bound(**layer))
        x, h = layer["hidden_states"].astype(np.float32), {}
        for short in ("gate", "up"):
            matrix = layer[f"{short}_proj"][0]
            if isinstance(matrix, IntegerMatrix):
                h[short] = integer_product(x, matrix)
            else:
                values, factor = getattr(matrix, "codes", matrix), getattr(matrix, "channel_scale", 1)
                h[short] = x @ values.astype(np.float32).T * np.float32(factor)
        rows = {**layer, "topk_ids": np.zeros((5, 1), np.int64), "topk_weights": np.ones((5, 1), np.float32)}
        y = integer_product(round_bf16(activate("silu", h["gate"], h["up"])), layer["down_proj"][0])
        assert np.array_equal(moe_forward(**rows, out_dtype=np.float32), y)


@pytest.mark.parametrize("method", [*sorted(INTEGERS), "LLAMAFILE"])
def test_layers_of_checkpoints(method: str) -> None:
    rng = np.random.default_rng(1)
    layer = draw_native_layer(rng, method, 3, 96, 512, with_biases=True)
    integers = layer.with_integers(method)
    batch = draw_batch(rng, layer, 4, 2)
    decoded = moe_forward(*batch, *layer.matrices, **layer.biases)
    assert np.array_equal(bits(decoded), bits(moe_forward(*batch, *integers.matrices, **layer.biases)))
    in_int8 = moe_forward(
        *batch, *integers.matrices, **layer.biases, activation_dtype="int8", out_dtype=np.float32
    )
    assert_close(in_int8, integers, batch, activation_dtype="int8")
    assert not np.array_equal(in_int8, decoded)


# ---- within the bound ----


def noisy(layer: Layer, rng: np.random.Generator, ulps: float) -> AnyArray:
    """Another evaluation: activation functions wrong by up to `ulps`, so other codes here and there."""
    x = layer["hidden_states"].astype(np.float32)
    out = np.zeros(x.shape, np.float32)
    for (t, p), e in np.ndenumerate(layer["topk_ids"]):
        if e >= 0:
            gate, up = (integer_product(x[t : t + 1], layer[f"{n}_proj"][e]) for n in ("gate", "up"))
            wrong = 1 + ulps * 2.0**-24 * rng.uniform(-1, 1, gate.shape)
            h = round_bf16(activate(layer["activation"], gate, up) * wrong.astype(np.float32))
            out[t] += layer["topk_weights"][t, p] * integer_product(h, layer["down_proj"][e])[0]
    return out


@some
@pytest.mark.parametrize("ulps", [4.0, 3000.0, 30000.0])
def test_any_evaluation_stays_within_the_bound(name: str, ulps: float) -> None:
    layer = draw_encoded_layer(1, (name,) * 3, T=20)
    truth = moe_forward(**layer, accumulate_dtype=np.float64, out_dtype=np.float32)
    got = noisy(layer, np.random.default_rng(1), ulps)
    options: Any = {"out_dtype": np.float32, "activation_ulps": 2 * ulps}
    assert_within(got, truth, error_bound(**layer, **options))
    assert_within(got, truth, error_bound(**layer, **options, sigmas=6.0))


@some
def test_the_bound_is_sharp_enough_to_find_mistakes(name: str) -> None:
    layer = draw_encoded_layer(7, (name,) * 3, T=16)
    truth = moe_forward(**layer, accumulate_dtype=np.float64)
    bound = error_bound(**layer, sigmas=6.0)
    scale = np.sqrt(np.mean(np.square(truth.astype(np.float64))))
    assert np.median(bound / scale) < 0.02
    with pytest.raises(AssertionError, match="elements are outside the bound"):
        assert_within(moe_forward(**{**layer, "activation_dtype": None}), truth, bound)
    other_blocks = {n: replace(layer[n], activation_block=64) for n in PROJECTIONS}
    with pytest.raises(AssertionError, match="elements are outside the bound"):
        assert_within(moe_forward(**{**layer, **other_blocks}), truth, bound)


@pytest.mark.parametrize("power", [-126, -100, 30])
def test_scales_of_any_size_stay_within_the_bound(power: int) -> None:
    layer = draw_encoded_layer(5, ("GGUF q4_1", "GGUF q4_0", "GGUF q5_1"), T=6)
    layer["down_proj"] = sized(layer["down_proj"], 2.0**power)
    truth = moe_forward(**layer, accumulate_dtype=np.float64, out_dtype=np.float32)
    bound = error_bound(**layer, out_dtype=np.float32)
    assert np.isfinite(bound).all()
    assert_within(moe_forward(**layer, out_dtype=np.float32), truth, bound)


@some
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_own_row_nan(name: str, value: float) -> None:
    layer = draw_encoded_layer(3, (name,) * 3, T=4)
    layer["topk_ids"] = np.array([[0, 1], [2, -1], [-1, -1], [3, 3]])
    clean, x = moe_forward(**layer), layer["hidden_states"]
    for t in range(4):
        layer["hidden_states"] = x.copy()
        layer["hidden_states"][t, 300] = value
        with np.errstate(all="raise"):
            got, bound = moe_forward(**layer), error_bound(**layer)
        others = np.arange(4) != t
        assert np.array_equal(bits(got[others]), bits(clean[others]))
        assert np.isnan(got[t].astype(np.float32)).all() == (t != 2)
        assert np.array_equal(np.isnan(bound), np.isnan(got.astype(np.float32)))


@some
def test_zeros_and_an_overflow(name: str) -> None:
    layer = draw_encoded_layer(3, (name,) * 3, T=3)
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


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_dtype": "int4"}, "activation_dtype: got 'int4', expected None, bfloat16 or int8"),
        (
            {
                n: np.zeros((4, *shape), bf16)
                for n, shape in zip(PROJECTIONS, ((40, 48), (40, 48), (48, 40)), strict=True)
            },
            "activation_dtype: got 'int8', expected None or 'bfloat16': no projection has integer weights",
        ),
        (
            {
                **{n: quantize_int8(np.zeros((4, 40, 48), bf16)) for n in ("gate_proj", "up_proj")},
                "down_proj": quantize_int8(np.zeros((4, 48, 40), bf16)),
                "product": "int8",
                "activation_dtype": "bfloat16",
            },
            "activation_dtype: got 'bfloat16', expected None or 'int8' for product int8",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    layer = {**draw_encoded_layer(0, ("MXFP4",) * 3, H=48, inter=40), **change}
    for function in (moe_forward, error_bound, moe_forward_sft):
        with pytest.raises(ValueError, match=message):
            function(**layer)


def test_integers_are_not_for_products_of_whole_rows() -> None:
    layer = draw_encoded_layer(0, ("MXFP4",) * 3, H=48, inter=40)
    with pytest.raises(TypeError, match="gate_proj: got IntegerMatrix, expected an Int8Matrix or Int4Matrix"):
        moe_forward(**layer, product="int8")
    layer["down_proj"] = layer["down_proj"][0]
    with pytest.raises(ValueError, match=r"down_proj: got shape \[48, 40\], expected \[E, H, I\]"):
        moe_forward(**layer)
