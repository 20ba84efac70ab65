"""The reference against independent formulas and loops, against itself in float64, and its laws."""

from __future__ import annotations

import doctest
import math
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import ktmoe_np.reference.activation
import ktmoe_np.reference.bound
import ktmoe_np.reference.forward
from ktmoe_np.config import activation_names, parse_activation
from ktmoe_np.reference import activate, assert_within, error_bound, moe_forward, round_bf16

AnyArray = NDArray[Any]
bf16 = ml_dtypes.bfloat16
quick = settings(deadline=None, max_examples=100)


@pytest.mark.parametrize("module", ["activation", "bound", "forward"])
def test_doctests(module: str) -> None:
    assert doctest.testmod(getattr(ktmoe_np.reference, module)).failed == 0


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700 else 0.0


#: The formulas of the specification, one number at a time; L = 1.5 where there is a limit.
FORMULAS: dict[str, tuple[Any, Callable[[float, float], float]]] = {
    "silu": ("silu", lambda g, u: g * sigmoid(g) * u),
    "silu, limit": (
        {"kind": "silu", "limit": 1.5},
        lambda g, u: min(g, 1.5) * sigmoid(min(g, 1.5)) * max(-1.5, min(u, 1.5)),
    ),
    "swigluoai": (
        {"kind": "swigluoai", "limit": 1.5},
        lambda g, u: min(g, 1.5) * sigmoid(1.702 * min(g, 1.5)) * (max(-1.5, min(u, 1.5)) + 1),
    ),
    "swiglustep": (
        {"kind": "swiglustep", "limit": 1.5},
        lambda g, u: min(g * sigmoid(g), 1.5) * max(-1.5, min(u, 1.5)),
    ),
    "gelu": ("gelu", lambda g, u: g * math.erfc(-g / math.sqrt(2)) / 2 * u),
    "gelu_tanh": (
        "gelu_tanh",
        lambda g, u: g / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u,
    ),
    "situ": ("situ", lambda g, u: 4 * math.tanh(g / 4) * sigmoid(g) * 25 * math.tanh(u / 25)),
    "relu2": ("relu2", lambda g, u: max(g, 0.0) ** 2),
    "silu_ungated": ("silu_ungated", lambda g, u: g * sigmoid(g)),
    "gelu_tanh_ungated": (
        "gelu_tanh_ungated",
        lambda g, u: g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2,
    ),
}


def call(activation: Any, g: AnyArray, u: AnyArray) -> AnyArray:
    return activate(activation, g, u if parse_activation(activation).gated else None)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_are_their_formulas(name: str, dtype: type) -> None:
    activation, formula = FORMULAS[name]
    special = [0.0, 1.5, -1.5, 1e-6, -1e-6, 6.0, -6.0]
    drawn = np.random.default_rng(0).normal(scale=3.0, size=(2, 500))
    g: AnyArray = np.concatenate([special, drawn[0]]).astype(dtype)
    u: AnyArray = np.concatenate([special[::-1], drawn[1]]).astype(dtype)
    expected = np.array([formula(float(a), float(b)) for a, b in zip(g, u, strict=True)])
    got = call(activation, g, u)
    assert got.dtype == dtype
    # alpha is a float32, also in float64; gelu_tanh in the form 1 + tanh cancels in the formula here.
    tolerance = 4e-7 if dtype is np.float32 else 3e-8
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("name", activation_names())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_neither_warn_nor_lose_nan(name: str, dtype: type) -> None:
    large = float(np.finfo(dtype).max)
    values: AnyArray = np.array([0, -0.0, 1, -1, 90, -90, 800, -800, 1e18, -1e18, large, -large], dtype)
    g, u = (grid.ravel() for grid in np.meshgrid(values, values))
    with np.errstate(all="raise"):
        result = call(name, g, u)
        assert not np.isnan(result[(np.abs(g) < 1e3) & (np.abs(u) < 1e3)]).any()
        assert np.isnan(call(name, np.full_like(u, np.nan), u)).all()
        if parse_activation(name).gated:
            assert np.isnan(call(name, g, np.full_like(g, np.nan))).all()


ONE, TWO = np.ones(1, np.float32), np.ones(2, np.float32)


def test_activations_take_any_shape() -> None:
    for shape in ((), (0,), (2, 0), (2, 3, 4)):
        for name in activation_names():
            assert call(name, np.zeros(shape, np.float32), np.zeros(shape, np.float32)).shape == shape


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("silu", ONE.astype(np.float16), ONE.astype(np.float16)),
            TypeError,
            "gate must be float32 or float64, got float16",
        ),
        (("silu", ONE, ONE.astype(np.float64)), TypeError, "up must be float32 like gate, got float64"),
        (("silu", ONE, TWO), ValueError, r"up must have the shape \(1,\) of gate"),
        (("silu", ONE, None), ValueError, "activation silu needs up, got up=None"),
        (("relu2", ONE, ONE), ValueError, "activation relu2 has no up, got up=array"),
    ],
)
def test_activate_refuses(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        activate(*arguments)


def round_by_bits(x: float) -> float:
    """Round to bfloat16 on the bits of a float32, to nearest even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    (rounded,) = struct.unpack("<f", struct.pack("<I", bits))
    return float(rounded)


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32)))
@quick
def test_rounding_is_to_nearest_even(values: list[float]) -> None:
    got = round_bf16(np.array(values, np.float32))
    assert got.dtype == np.float32
    assert got.tolist() == [round_by_bits(value) for value in values]


def test_rounding_of_special_values() -> None:
    got = round_bf16(np.array([np.nan, np.inf, -np.inf, 1e300, -0.0]))
    np.testing.assert_array_equal(got, [np.nan, np.inf, -np.inf, np.inf, -0.0])


Layer = dict[str, Any]


def draw_layer(
    seed: int,
    *,
    T: int = 5,
    E: int = 4,
    P: int = 2,
    H: int = 48,
    inter: int = 40,
    activation: Any = "silu",
    biases: bool = False,
) -> Layer:
    """Random arguments of `moe_forward`; ids from -1 up, duplicates among them."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> AnyArray:
        return rng.standard_normal(shape).astype(np.float32).astype(bf16)

    gated = parse_activation(activation).gated
    layer: Layer = {
        "hidden_states": draw(T, H),
        "topk_ids": rng.integers(-1, E, (T, P)),
        "topk_weights": rng.random((T, P), np.float32),
        "gate_proj": (draw(E, inter, H) * bf16(0.25)).astype(bf16),
        "up_proj": draw(E, inter, H) if gated else None,
        "down_proj": draw(E, H, inter),
        "activation": activation,
    }
    if biases:
        layer |= {"gate_bias": draw(E, inter), "down_bias": rng.standard_normal((E, H)).astype(np.float32)}
        layer |= {"up_bias": draw(E, inter)} if gated else {}
    return layer


def loop(layer: Layer) -> AnyArray:
    """The specification one number at a time, in Python's own floats, before the last rounding."""
    x, ids, weights = (layer[name] for name in ("hidden_states", "topk_ids", "topk_weights"))
    formula = FORMULAS[layer["activation"]][1]
    base, mask, order = (layer.get(name) for name in ("base", "gpu_experts_mask", "physical_to_logical_map"))
    out = np.zeros(x.shape)

    def dot(a: Any, b: Any, bias: Any, *at: int) -> float:
        total = sum(float(p) * float(q) for p, q in zip(a, b, strict=True))
        return total + (0.0 if bias is None else float(bias[at]))

    for t in range(x.shape[0]):
        for p in range(ids.shape[1]):
            e = int(ids[t, p])
            if e < 0 or (mask is not None and mask[e]):
                continue
            e = e if order is None else int(order[e])
            gate, up, down = layer["gate_proj"][e], layer["up_proj"], layer["down_proj"][e]
            h = []
            for i in range(len(gate)):
                g = dot(x[t], gate[i], layer.get("gate_bias"), e, i)
                u = 0.0 if up is None else dot(x[t], up[e][i], layer.get("up_bias"), e, i)
                h.append(round_by_bits(formula(g, u)))
            for n in range(x.shape[1]):
                out[t, n] += float(weights[t, p]) * dot(h, down[n], layer.get("down_bias"), e, n)
    return out if base is None else out + base.astype(np.float64)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["silu", "gelu", "gelu_tanh", "situ", "relu2", "silu_ungated", "gelu_tanh_ungated"]),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 3),
    st.tuples(st.integers(1, 9), st.integers(1, 7)),
    st.sampled_from([np.int8, np.int32, np.int64]),
    st.sets(st.sampled_from(["biases", "mask", "map", "base", "lists"])),
)
@quick
def test_forward_is_the_loop(
    seed: int, activation: str, T: int, E: int, P: int, sizes: tuple[int, int], ids: type, options: set[str]
) -> None:
    layer = draw_layer(
        seed, T=T, E=E, P=P, H=sizes[0], inter=sizes[1], activation=activation, biases="biases" in options
    )
    rng = np.random.default_rng(seed)
    layer["topk_ids"] = layer["topk_ids"].astype(ids)
    if "mask" in options:
        layer["gpu_experts_mask"] = rng.random(E) < 0.4
    if "map" in options:
        layer["physical_to_logical_map"] = rng.integers(0, E, E)
    if "base" in options:
        layer["base"] = rng.standard_normal(layer["hidden_states"].shape).astype(np.float32)
    if "lists" in options:
        layer["down_proj"] = list(layer["down_proj"])
    expected = loop(layer)
    for out in (np.float64, np.float32, bf16):
        bound = error_bound(**layer, out_dtype=out)
        truth = round_bf16(expected) if out is bf16 else expected.astype(out)
        for accumulate in (np.float32, np.float64):
            got = moe_forward(**layer, out_dtype=out, accumulate_dtype=accumulate)
            assert got.dtype == out
            assert_within(got, truth, bound)


@pytest.mark.parametrize("name", activation_names())
@pytest.mark.parametrize(("H", "inter"), [(64, 32), (300, 100), (1024, 257)])
def test_float32_is_float64_within_the_bound(name: str, H: int, inter: int) -> None:
    layer = draw_layer(H, T=4, H=H, inter=inter, activation=name, biases=True)
    truth = moe_forward(**layer, accumulate_dtype=np.float64)
    assert_within(moe_forward(**layer), truth, error_bound(**layer))
    assert_within(moe_forward(**layer), truth, error_bound(**layer, sigmas=6.0))


def sum_in_chains(products: AnyArray, chain: int) -> AnyArray:
    """Sum float32 over the last axis: `chain` numbers one after the other, then the partial sums so."""
    while products.shape[-1] > 1:
        missing = -products.shape[-1] % chain
        padded = np.pad(products, [(0, 0)] * (products.ndim - 1) + [(0, missing)])
        parts = padded.reshape(*products.shape[:-1], padded.shape[-1] // chain, chain)
        products = np.cumsum(parts, axis=-1, dtype=np.float32)[..., -1]
    return products[..., 0]


def other_engine(layer: Layer, rng: np.random.Generator, chain: int, *, round_gate: bool = False) -> AnyArray:
    """Another evaluation: every product summed in a random order and in chains, all in float32."""

    def product(a: AnyArray, w: AnyArray) -> AnyArray:
        order = rng.permutation(w.shape[1])
        products = a.astype(np.float32)[:, None, order] * w.astype(np.float32)[None, :, order]
        return sum_in_chains(products, chain)

    x = layer["hidden_states"]
    out = np.zeros(x.shape, np.float32)
    for p in range(layer["topk_ids"].shape[1]):
        for e in range(len(layer["down_proj"])):
            rows = np.flatnonzero(layer["topk_ids"][:, p] == e)
            gate, up = product(x[rows], layer["gate_proj"][e]), product(x[rows], layer["up_proj"][e])
            h = round_bf16(activate(layer["activation"], round_bf16(gate) if round_gate else gate, up))
            out[rows] += layer["topk_weights"][rows, p, None] * product(h, layer["down_proj"][e])
    return round_bf16(out).astype(bf16)


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 33, 200]), st.sampled_from([2, 16, 1000]))
@settings(deadline=None, max_examples=20)
def test_any_order_stays_within_the_bound(seed: int, H: int, chain: int) -> None:
    layer = draw_layer(seed, H=H, inter=64)
    got = other_engine(layer, np.random.default_rng(seed), chain)
    assert_within(got, moe_forward(**layer), error_bound(**layer))
    truth = moe_forward(**layer, accumulate_dtype=np.float64)
    steps = math.ceil(math.log(max(H, 64), chain))
    assert_within(got, truth, error_bound(**layer, max_chain=steps * chain))
    assert_within(got, truth, error_bound(**layer, sigmas=6.0))


def test_the_bound_is_sharp_enough_to_find_mistakes() -> None:
    layer = draw_layer(7, T=16, H=512, inter=256)
    bound, truth = error_bound(**layer, sigmas=6.0), moe_forward(**layer, accumulate_dtype=np.float64)
    scale = np.sqrt(np.mean(np.square(truth.astype(np.float64))))
    assert np.median(bound / scale) < 0.02
    for mistake in (
        {**layer, "hidden_states": np.where(np.arange(512) == 511, 0, layer["hidden_states"]).astype(bf16)},
        {**layer, "topk_weights": layer["topk_weights"][:, ::-1].copy()},
        {**layer, "activation": "gelu"},
    ):
        wrong = moe_forward(**mistake)
        with pytest.raises(AssertionError, match="elements are outside the bound"):
            assert_within(wrong, truth, bound)
    twice_rounded = other_engine(layer, np.random.default_rng(0), 1000, round_gate=True)
    with pytest.raises(AssertionError, match="elements are outside the bound"):
        assert_within(twice_rounded, truth, error_bound(**layer, max_chain=40))


def exact_layer(seed: int, **sizes: Any) -> Layer:
    """Small integers: every float32 sum is exact, so laws hold bit for bit whatever NumPy's order."""
    layer = draw_layer(seed, activation="relu2", **sizes)
    for name in ("hidden_states", "gate_proj", "down_proj"):
        layer[name] = np.sign(layer[name].astype(np.float32)).astype(bf16)
    layer["topk_weights"] = np.round(layer["topk_weights"] * 4)
    return layer


def bits(array: AnyArray) -> AnyArray:
    return array.view(np.uint16)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@quick
def test_laws(seed: int, T: int) -> None:
    layer = exact_layer(seed, T=T)
    rng = np.random.default_rng(seed)
    result = bits(moe_forward(**layer))
    per_token = ("hidden_states", "topk_ids", "topk_weights")
    order = rng.permutation(T)
    permuted = {**layer, **{name: layer[name][order] for name in per_token}}
    assert np.array_equal(bits(moe_forward(**permuted)), result[order])
    alone = {**layer, **{name: layer[name][:1] for name in per_token}}
    assert np.array_equal(bits(moe_forward(**alone)), result[:1])
    mask = rng.random(4) < 0.5
    zeroed = np.where(mask[layer["topk_ids"]] & (layer["topk_ids"] >= 0), 0, layer["topk_weights"])
    masked = bits(moe_forward(**layer, gpu_experts_mask=mask))
    assert np.array_equal(masked, bits(moe_forward(**{**layer, "topk_weights": zeroed.astype(np.float32)})))
    mapping = rng.permutation(4)
    renamed = {name: layer[name][mapping] for name in ("gate_proj", "down_proj")}
    mapped = bits(moe_forward(**layer, physical_to_logical_map=mapping))
    assert np.array_equal(mapped, bits(moe_forward(**{**layer, **renamed})))


@pytest.mark.parametrize("dtype", [bf16, np.float16, np.float32, np.float64])
def test_a_base_is_added_before_the_one_rounding(dtype: type) -> None:
    layer = exact_layer(1)
    base = np.random.default_rng(1).standard_normal(layer["hidden_states"].shape).astype(dtype)
    before = base.copy()
    total = moe_forward(**layer, out_dtype=np.float32) + base.astype(np.float32)
    assert np.array_equal(bits(moe_forward(**layer, base=base)), bits(total.astype(bf16)))
    assert np.array_equal(base, before)


@pytest.mark.parametrize("activation", activation_names())
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("zero_weights", [False, True])
def test_what_is_not_finite_makes_its_own_row_nan(activation: str, value: float, zero_weights: bool) -> None:
    layer = draw_layer(3, T=4, activation=activation)
    layer["topk_ids"] = np.array([[0, 1], [2, -1], [-1, -1], [3, 3]])
    if zero_weights:
        layer["gate_proj"] = np.zeros_like(layer["gate_proj"])
    clean = moe_forward(**layer)
    for t in range(4):
        layer["hidden_states"] = draw_layer(3, T=4, activation=activation)["hidden_states"]
        layer["hidden_states"][t, 7] = value
        got = moe_forward(**layer)
        others = np.arange(4) != t
        assert np.array_equal(bits(got[others]), bits(clean[others]))
        assert np.isnan(got[t].astype(np.float32)).all() == (t != 2)
        assert np.array_equal(np.isnan(error_bound(**layer)), np.isnan(got.astype(np.float32)))
    assert not moe_forward(**layer)[2].any()


def test_a_nan_routing_weight_makes_its_row_nan_when_its_slot_is_computed() -> None:
    layer = draw_layer(3, T=3)
    layer["topk_ids"] = np.array([[0, 1], [-1, 1], [0, 1]])
    layer["topk_weights"][:2, 0] = np.nan
    got = np.isnan(moe_forward(**layer).astype(np.float32))
    assert got.all(axis=1).tolist() == [True, False, False]
    assert got.any(axis=1).tolist() == [True, False, False]


def test_an_overflow_stays_in_its_row_and_silent() -> None:
    layer = draw_layer(3, T=2)
    layer["topk_ids"] = np.array([[0, 1], [0, 1]])
    layer["hidden_states"][0] = 3e38
    with np.errstate(all="raise"):
        got = moe_forward(**layer).astype(np.float32)
        bound = error_bound(**layer)
    assert not np.isfinite(got[0]).any()
    assert np.isfinite(got[1]).all()
    assert np.isinf(bound[0]).all()
    assert_within(got, moe_forward(**layer, accumulate_dtype=np.float64), bound)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": [[1.0]]}, TypeError, "hidden_states must be a NumPy array, got list"),
        ({"hidden_states": np.zeros((5, 48))}, TypeError, "hidden_states must be bfloat16, got float64"),
        (
            {"hidden_states": np.zeros(48, bf16)},
            ValueError,
            r"hidden_states must have shape \[T, H\], got \[48\]",
        ),
        (
            {"hidden_states": np.zeros((5, 47), bf16)},
            ValueError,
            r"gate_proj\[0\] must have shape \[I, H=47\]",
        ),
        ({"topk_ids": np.zeros((5, 2))}, TypeError, "topk_ids must have an integer dtype, got float64"),
        ({"topk_ids": np.zeros((5, 2), bool)}, TypeError, "topk_ids must have an integer dtype, got bool"),
        (
            {"topk_ids": np.zeros((4, 2), int)},
            ValueError,
            r"topk_ids must have shape \[T=5, P\], got \[4, 2\]",
        ),
        (
            {"topk_weights": np.zeros((5, 3), np.float32)},
            ValueError,
            r"topk_weights must have shape \[T=5, P=2\], got \[5, 3\]",
        ),
        ({"topk_weights": np.zeros((5, 2))}, TypeError, "topk_weights must be float32, got float64"),
        ({"gate_proj": np.zeros((40, 48), bf16)}, ValueError, r"gate_proj must have shape \[E, I, H\], got"),
        ({"gate_proj": []}, ValueError, "gate_proj must hold some experts, got 0"),
        ({"gate_proj": 3}, TypeError, "gate_proj must be an array or a sequence of arrays, got int"),
        ({"up_proj": np.zeros((3, 40, 48), bf16)}, ValueError, "up_proj must hold 4 experts, got 3"),
        ({"up_proj": np.zeros((4, 40, 48), "f4")}, TypeError, r"up_proj\[0\] must be bfloat16, got float32"),
        ({"up_proj": None}, ValueError, "up_proj is None, but activation silu is gated"),
        ({"activation": "relu2"}, ValueError, "up_proj must be None: activation relu2 has one projection"),
        (
            {"activation": "relu2", "up_proj": None, "up_bias": np.zeros((4, 40), "f4")},
            ValueError,
            "up_bias must be None: activation relu2",
        ),
        (
            {"down_proj": [np.zeros((48, 40), bf16)] * 3 + [np.zeros((48, 41), bf16)]},
            ValueError,
            r"down_proj\[3\] must have shape \[H=48, I=40\], got \[48, 41\]",
        ),
        (
            {"gate_bias": np.zeros((4, 40))},
            TypeError,
            "gate_bias must be float32 or float16 or bfloat16, got",
        ),
        ({"down_bias": np.zeros((4, 40), "f4")}, ValueError, r"down_bias must have shape \[E=4, H=48\], got"),
        ({"gpu_experts_mask": np.zeros(4, int)}, TypeError, "gpu_experts_mask must be bool, got int64"),
        (
            {"gpu_experts_mask": np.zeros(3, bool)},
            ValueError,
            r"gpu_experts_mask must have shape \[E=4\], got",
        ),
        (
            {"physical_to_logical_map": np.array([0, 1, 2, 4])},
            ValueError,
            r"physical_to_logical_map\[3\] = 4: expected 0 to 3",
        ),
        (
            {"physical_to_logical_map": np.array([0, -1, 2, 3])},
            ValueError,
            r"physical_to_logical_map\[1\] = -1: expected 0 to 3",
        ),
        ({"physical_to_logical_map": np.zeros(4, "i4")}, TypeError, "map must be int64, got int32"),
        ({"base": np.zeros((5, 47), "f4")}, ValueError, r"base must have shape \[T=5, H=48\], got \[5, 47\]"),
        ({"base": np.zeros((5, 48), "i4")}, TypeError, "base must be float32 or .* got int32"),
        (
            {"out_dtype": np.float16},
            ValueError,
            "out_dtype must be bfloat16, float32 or float64, got float16",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = {**draw_layer(0), **change}
    for function in (moe_forward, error_bound):
        with pytest.raises(error, match=message):
            function(**layer)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint64])
def test_an_id_that_is_too_large_is_an_error(dtype: type) -> None:
    layer = draw_layer(0)
    layer["topk_ids"] = np.zeros((5, 2), dtype)
    layer["topk_ids"][3, 1] = 4
    with pytest.raises(
        IndexError, match=r"topk_ids\[3, 1\] = 4: expected an id below the number of experts, 4"
    ):
        moe_forward(**layer)
    layer["topk_ids"][3, 1] = np.iinfo(dtype).max
    with pytest.raises(IndexError, match=r"topk_ids\[3, 1\] = "):
        moe_forward(**layer)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (
            moe_forward,
            {"accumulate_dtype": np.float16},
            "accumulate_dtype must be float32 or float64, got float16",
        ),
        (error_bound, {"max_chain": 0}, "max_chain must be at least 1, got 0"),
        (error_bound, {"sigmas": 0.0}, "sigmas must be above 0, got 0.0"),
    ],
)
def test_wrong_options(function: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**draw_layer(0), **options)


@pytest.mark.parametrize(
    ("actual", "expected", "bound", "message"),
    [
        ([1.0, 3.0], [1.0, 2.0], [0.0, 0.5], r"1 of 2 .* worst at \[1\]: actual .*3.0.*, expected .*2.0"),
        ([1.0, np.nan], [1.0, 2.0], [0.0, 0.5], r"1 of 2 .* worst at \[1\]: actual .*nan"),
        ([1.0, 2.0], [1.0, np.nan], [0.0, np.nan], r"1 of 2 .* worst at \[1\]"),
        ([1.0, np.inf], [1.0, 2.0], [0.0, 5.0], r"1 of 2 .* worst at \[1\]"),
        ([1.0], [1.0, 2.0], [0.0, 0.5], r"shapes differ: actual \(1,\), expected \(2,\), bound \(2,\)"),
    ],
)
def test_assert_within_fails(actual: Any, expected: Any, bound: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_within(np.array(actual), np.array(expected), np.array(bound))


def test_assert_within_passes() -> None:
    actual, expected = np.array([np.nan, np.inf, 5.0, 1.0]), np.array([np.nan, np.inf, np.nan, 1.25])
    assert_within(actual, expected, np.array([np.nan, 0.0, np.inf, 0.25]))
    assert_within(np.zeros((0, 3), bf16), np.zeros((0, 3)), np.zeros((0, 3)))
