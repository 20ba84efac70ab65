"""What a layer is refused for: its weights, its sizes, its options. Nothing has changed afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import Batch, Layer, assert_same_bits, bf16, draw_batch, draw_layer

from ktmoe_np import KTMoEWrapper

AnyArray = Any
Change = Callable[[dict[str, Any]], dict[str, Any]]
Error = type[BaseException]

E, I, H, P, T = 4, 24, 40, 2, 6  # noqa: E741


@pytest.fixture(scope="module")
def layer() -> Layer:
    return draw_layer(np.random.default_rng(0), E, I, H, with_biases=True)


@pytest.fixture(scope="module")
def batch(layer: Layer) -> Batch:
    return draw_batch(np.random.default_rng(1), layer, T, P)


@pytest.fixture
def moe(layer: Layer) -> Any:
    return layer.wrapper(P)


def keyword(name: str, value: Callable[[AnyArray], Any]) -> Change:
    return lambda a: {name: value(a[name])}


def listed(change: Callable[[list[AnyArray]], Any]) -> Callable[[AnyArray], Any]:
    return lambda array: change(list(array))


LOAD: dict[str, tuple[Change, Error, str]] = {
    "gate_proj, None": (
        keyword("gate_proj", lambda _: None),
        TypeError,
        r"gate_proj: got NoneType, expected an array",
    ),
    "up_proj, None": (
        keyword("up_proj", lambda _: None),
        TypeError,
        r"up_proj: got NoneType, expected an array",
    ),
    "down_proj, a mapping": (
        keyword("down_proj", lambda _: {}),
        TypeError,
        r"down_proj: got dict, expected an array",
    ),
    "gate_proj, dtype": (
        keyword("gate_proj", lambda w: w.astype(np.float64)),
        TypeError,
        rf"gate_proj: got float64 \[{E}, {I}, {H}\], expected bfloat16( or float32 or float16)? "
        rf"\[{E}, {I}, {H}\]",
    ),
    "up_proj, rank": (
        keyword("up_proj", lambda w: w[0]),
        ValueError,
        rf"up_proj: got bfloat16 \[{I}, {H}\], expected bfloat16 \[{E}, {I}, {H}\]",
    ),
    "down_proj, not transposed": (
        keyword("down_proj", lambda w: np.ascontiguousarray(w.swapaxes(1, 2))),
        ValueError,
        rf"down_proj: got bfloat16 \[{E}, {I}, {H}\], expected bfloat16 \[{E}, {H}, {I}\]",
    ),
    "down_proj, a transposed view": (
        keyword("down_proj", lambda w: np.ascontiguousarray(w.swapaxes(1, 2)).swapaxes(1, 2)),
        TypeError,
        r"down_proj: got strides \[.*\], expected a contiguous last axis",
    ),
    "gate_proj, every second column": (
        keyword("gate_proj", lambda w: np.repeat(w, 2, axis=2)[:, :, ::2]),
        TypeError,
        r"gate_proj: got strides \[.*\], expected a contiguous last axis",
    ),
    "gate_proj, columns backwards": (
        keyword("gate_proj", lambda w: w[:, :, ::-1]),
        TypeError,
        r"gate_proj: got strides \[.*\], expected a contiguous last axis",
    ),
    "gate_proj, experts": (
        keyword("gate_proj", lambda w: w[:-1]),
        ValueError,
        rf"gate_proj: got bfloat16 \[{E - 1}, {I}, {H}\], expected bfloat16 \[{E}, {I}, {H}\]",
    ),
    "gate_proj, a short list": (
        keyword("gate_proj", listed(lambda w: w[:-1])),
        ValueError,
        rf"gate_proj: got {E - 1} arrays, expected {E}",
    ),
    "up_proj, an empty tuple": (
        keyword("up_proj", lambda _: ()),
        ValueError,
        rf"up_proj: got 0 arrays, expected {E}",
    ),
    "gate_proj, a word in a list": (
        keyword("gate_proj", listed(lambda w: [*w[:-1], "last"])),
        TypeError,
        r"gate_proj.*: got str, expected an array",
    ),
    "gate_proj, None in a list": (
        keyword("gate_proj", listed(lambda w: [*w[:-1], None])),
        TypeError,
        r"gate_proj.*: got NoneType, expected an array",
    ),
    "down_proj, one matrix of a list": (
        keyword("down_proj", listed(lambda w: [*w[:-1], w[-1].T.copy()])),
        ValueError,
        rf"down_proj.*: got bfloat16 \[{I}, {H}\], expected bfloat16 \[{H}, {I}\]",
    ),
    "gate_bias, shape": (
        lambda a: {"gate_bias": np.zeros((E, H), np.float32)},
        ValueError,
        rf"gate_bias: got float32 \[{E}, {H}\], expected float32 or bfloat16 \[{E}, {I}\]",
    ),
    "up_bias, rank": (
        lambda a: {"up_bias": np.zeros(I, np.float32)},
        ValueError,
        rf"up_bias: got float32 \[{I}\], expected float32 or bfloat16 \[{E}, {I}\]",
    ),
    "down_bias, dtype": (
        lambda a: {"down_bias": np.zeros((E, H))},
        TypeError,
        rf"down_bias: got float64 \[{E}, {H}\], expected float32 or bfloat16 \[{E}, {H}\]",
    ),
    "down_bias, a list": (
        lambda a: {"down_bias": [0.0]},
        TypeError,
        r"down_bias: got list, expected an array",
    ),
    "down_bias, strided": (
        lambda a: {"down_bias": np.zeros((E, 2 * H), np.float32)[:, ::2]},
        TypeError,
        r"down_bias: .* expected it C-contiguous",
    ),
    "map, too large an entry": (
        lambda a: {"physical_to_logical_map": np.array([0, 1, E, 2])},
        IndexError,
        rf"physical_to_logical_map: got expert {E} at 2, expected 0 to {E - 1}",
    ),
    "map, a negative entry": (
        lambda a: {"physical_to_logical_map": np.array([0, -1, 1, 2])},
        IndexError,
        rf"physical_to_logical_map: got expert -1 at 1, expected 0 to {E - 1}",
    ),
    "map, shape": (
        lambda a: {"physical_to_logical_map": np.arange(E - 1)},
        ValueError,
        rf"physical_to_logical_map: got int64 \[{E - 1}\], expected int64 \[{E}\]",
    ),
    "map, dtype": (
        lambda a: {"physical_to_logical_map": np.arange(E) * 1.0},
        TypeError,
        rf"physical_to_logical_map: got float64 \[{E}\], expected an integer dtype",
    ),
}


@pytest.mark.parametrize("case", LOAD)
@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded", "fresh"])
def test_loading_refuses(layer: Layer, batch: Batch, case: str, is_loaded: bool) -> None:
    change, error, message = LOAD[case]
    expected = layer.forward(batch)
    moe = layer.wrapper(P) if is_loaded else KTMoEWrapper(0, E, P, H, I)
    names = ("gate_proj", "up_proj", "down_proj")
    arguments = {**dict(zip(names, layer.matrices, strict=True)), **layer.biases}
    arguments.update(change(arguments))
    with pytest.raises(error, match=message):
        moe.load_weights_from_tensors(**arguments)
    assert moe.loaded == is_loaded
    if not is_loaded:
        layer.load_into(moe)
    assert_same_bits(moe.forward(*batch), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"up_proj": np.zeros((E, I, H), bf16)},
            r"up_proj: got one, expected None: the activation is not gated",
        ),
        ({"up_bias": np.zeros((E, I), np.float32)}, r"up_bias: got one, expected None: .* is not gated"),
    ],
)
def test_up_without_a_gate(change: dict[str, Any], message: str) -> None:
    layer = draw_layer(np.random.default_rng(0), E, I, H, "relu2")
    moe = KTMoEWrapper(0, E, P, H, I, activation="relu2")
    gate, up, down = layer.matrices
    with pytest.raises(ValueError, match=message):
        moe.load_weights_from_tensors(**{"gate_proj": gate, "up_proj": up, "down_proj": down, **change})
    moe.load_weights_from_tensors(gate, up, down)


def test_nothing_loaded(layer: Layer, batch: Batch) -> None:
    moe = KTMoEWrapper(7, E, P, H, I)
    message = "forward: layer 7 has no weights, load them first"
    for rows in (slice(0), slice(T)):
        with pytest.raises(RuntimeError, match=message):
            moe.forward(*batch.rows(rows))
        moe.submit_forward(*batch.rows(rows))
        with pytest.raises(RuntimeError, match=message):
            moe.sync_forward()
    with pytest.raises(RuntimeError, match="weight_path: got None, expected a checkpoint to load from"):
        moe.load_weights()
    layer.load_into(moe)
    moe.load_weights()  # loaded already
    assert_same_bits(moe.forward(*batch), layer.forward(batch))


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match="missing"):
        KTMoEWrapper(0, E, P, H, I, weight_path=missing).load_weights()
    with pytest.raises(FileNotFoundError, match="missing"):
        KTMoEWrapper.from_pretrained(missing)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        KTMoEWrapper.from_pretrained(tmp_path)


# ---- the layer ----

CONSTRUCTION: dict[str, tuple[dict[str, Any], Error, str]] = {
    "method": (
        {"method": "BF17"},
        ValueError,
        r"method: got 'BF17' for mode 'inference', expected one of .*BF16",
    ),
    "method, lower case": ({"method": "bf16"}, ValueError, r"method: got 'bf16' .* expected one of .*BF16"),
    "mode": ({"mode": "training"}, ValueError, r"mode: got 'training', expected one of .*inference"),
    "group_size": (
        {"group_size": 32},
        ValueError,
        r"group_size: got 32, expected None: method 'BF16' has no gro",
    ),
    "num_experts": ({"num_experts": 0}, ValueError, r"num_experts: got 0, expected at least 1"),
    "num_experts, float": ({"num_experts": 2.0}, TypeError, r"num_experts: got 2\.0, expected an integer"),
    "hidden_size": ({"hidden_size": -1}, ValueError, r"hidden_size: got -1, expected at least 1"),
    "hidden_size, huge": (
        {"hidden_size": 2**24 + 1},
        ValueError,
        r"hidden_size: got 16777217, expected 1 to 1677",
    ),
    "num_experts_per_tok": (
        {"num_experts_per_tok": 0},
        ValueError,
        r"num_experts_per_tok: got .*, expected at least 1",
    ),
    "layer_idx": ({"layer_idx": -1}, ValueError, r"layer_idx: got -1, expected at least 0"),
    "activation": ({"activation": "tanh"}, ValueError, r"activation: got 'tanh', expected one of silu"),
    "chunked_prefill_size": (
        {"chunked_prefill_size": 0},
        ValueError,
        r"chunked_prefill_size: got 0, expected 1 or more",
    ),
    "chunked_prefill_size, float": (
        {"chunked_prefill_size": 1.5},
        TypeError,
        r"chunked_prefill_size: got 1\.5, expected an integer",
    ),
    "deferred": (
        {"max_deferred_experts_per_token": -1},
        ValueError,
        r"max_deferred_experts_per_token: got -1, expected 0 or more",
    ),
    "deferred, bool": (
        {"max_deferred_experts_per_token": True},
        TypeError,
        r"max_deferred_experts_per_token: got True, expected an integer",
    ),
    "deferred, more than there are": (
        {"max_deferred_experts_per_token": P + 1},
        ValueError,
        rf"max_deferred_experts_per_token: got {P + 1}, expected at most num_experts_per_tok, {P}",
    ),
    "mask, dtype": (
        {"gpu_experts_mask": np.zeros(E, np.int64)},
        TypeError,
        rf"gpu_experts_mask: got int64 \[{E}\], expected bool \[{E}\]",
    ),
    "mask, shape": (
        {"gpu_experts_mask": np.zeros(E + 1, np.bool_)},
        ValueError,
        rf"gpu_experts_mask: got bool \[{E + 1}\], expected bool \[{E}\]",
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction_refuses(case: str) -> None:
    change, error, message = CONSTRUCTION[case]
    sizes = {"num_experts": E, "num_experts_per_tok": P, "hidden_size": H, "moe_intermediate_size": I}
    with pytest.raises(error, match=message):
        KTMoEWrapper(**{"layer_idx": 0, **sizes, **change})
    KTMoEWrapper(0, **sizes)


def test_setting_a_mask_refuses(moe: Any, batch: Batch) -> None:
    moe.set_gpu_experts_mask(np.arange(E) == 1)
    before = moe.forward(*batch)
    for mask, error in ([1, 0, 0, 0], TypeError), (np.zeros(E - 1, np.bool_), ValueError):
        with pytest.raises(error, match="gpu_experts_mask: got"):
            moe.set_gpu_experts_mask(mask)
    assert_same_bits(moe.forward(*batch), before)
