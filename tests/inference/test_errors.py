"""What is refused, in which words, and that nothing has changed afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import Batch, Layer, assert_same_bits, bf16, draw_batch, draw_layer

from ktmoe_np import KTMoEWrapper
from ktmoe_np import kt_kernel_ext as ext

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


# ---- the arguments of a forward pass ----


def fortran(array: AnyArray) -> AnyArray:
    return np.asfortranarray(array)


def strided(array: AnyArray) -> AnyArray:
    return np.repeat(array, 2, axis=1)[:, ::2]


def read_only(array: AnyArray) -> AnyArray:
    copy = array.copy()
    copy.setflags(write=False)
    return copy


def with_id(ids: AnyArray, token: int, expert: int, dtype: Any = np.int64) -> AnyArray:
    changed = ids.astype(dtype)
    changed[token, 1] = expert
    return changed


def over(array: AnyArray, offset: int = 0) -> AnyArray:
    """An `out` in the memory of `array`, which is first made large enough to hold it."""
    memory = array.base if array.base is not None else array
    return memory.view(np.uint8).reshape(-1)[offset : offset + T * H * 2].view(bf16).reshape(T, H)


def roomy(array: AnyArray) -> AnyArray:
    """A copy at the start of memory that has room for an output, which is its `base`."""
    memory = np.zeros(array.nbytes + T * H * 4, np.uint8)
    copy = memory[: array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def overlapping(name: str, offset: Callable[[AnyArray], int] = lambda array: 0) -> Change:
    def change(a: dict[str, Any]) -> dict[str, Any]:
        array = roomy(a[name])
        return {name: array, "out": over(array, offset(array))}

    return change


def keyword(name: str, value: Callable[[AnyArray], Any]) -> Change:
    return lambda a: {name: value(a[name])}


#: What the wrapper and the extension refuse alike. `out` begins as float32 [T, H].
FORWARD: dict[str, tuple[Change, Error, str]] = {
    "hidden_states, a list": (
        keyword("hidden_states", np.ndarray.tolist),
        TypeError,
        r"hidden_states: got list, expected an array",
    ),
    "hidden_states, None": (
        keyword("hidden_states", lambda _: None),
        TypeError,
        r"hidden_states: got NoneType, expected an array",
    ),
    "hidden_states, bits": (
        keyword("hidden_states", lambda x: x.view(np.uint16)),
        TypeError,
        rf"hidden_states: got uint16 \[{T}, {H}\], expected bfloat16",
    ),
    "hidden_states, width": (
        keyword("hidden_states", lambda x: x[:, :-1].copy()),
        ValueError,
        rf"hidden_states: got bfloat16 \[{T}, {H - 1}\], expected bfloat16.* \[(T|...), {H}\]",
    ),
    "hidden_states, Fortran order": (
        keyword("hidden_states", fortran),
        TypeError,
        r"hidden_states: .* gaps or in another order, expected it C-contiguous",
    ),
    "hidden_states, strided": (
        keyword("hidden_states", strided),
        TypeError,
        r"hidden_states: .* gaps or in another order, expected it C-contiguous",
    ),
    "topk_ids, rank": (
        keyword("topk_ids", lambda ids: ids[:, 0].copy()),
        ValueError,
        rf"topk_ids: got .*\[{T}\], expected .*\[{T}, {P}\]",
    ),
    "topk_ids, slots": (
        keyword("topk_ids", lambda ids: ids[:, :1].copy()),
        ValueError,
        rf"topk_ids: got .*\[{T}, 1\], expected .*\[{T}, {P}\]",
    ),
    "topk_ids, tokens": (
        keyword("topk_ids", lambda ids: ids[:-1]),
        ValueError,
        rf"topk_ids: got .*\[{T - 1}, {P}\], expected .*\[{T}, {P}\]",
    ),
    "topk_ids, dtype": (
        keyword("topk_ids", lambda ids: ids.astype(np.float64)),
        TypeError,
        rf"topk_ids: got float64 \[{T}, {P}\], expected .*int",
    ),
    "topk_ids, bool": (
        keyword("topk_ids", lambda ids: ids > 0),
        TypeError,
        rf"topk_ids: got bool \[{T}, {P}\], expected .*int",
    ),
    "topk_ids, None": (keyword("topk_ids", lambda _: None), TypeError, r"topk_ids: got "),
    "topk_ids, a word": (keyword("topk_ids", lambda _: "ids"), TypeError, r"topk_ids: got "),
    "topk_ids, just out of range": (
        keyword("topk_ids", lambda ids: with_id(ids, 0, E)),
        IndexError,
        rf"topk_ids: got expert {E} at \[0, 1\], expected ids below {E} \(negative ids are skipped\)",
    ),
    "topk_ids, far out of range in the last token": (
        keyword("topk_ids", lambda ids: with_id(ids, T - 1, 2**40)),
        IndexError,
        rf"topk_ids: got expert {2**40} at \[{T - 1}, 1\], expected ids below {E}",
    ),
    "topk_weights, a list": (
        keyword("topk_weights", np.ndarray.tolist),
        TypeError,
        r"topk_weights: got list, expected an array on the CPU",
    ),
    "topk_weights, None": (
        keyword("topk_weights", lambda _: None),
        TypeError,
        r"topk_weights: got NoneType, expected an array",
    ),
    "topk_weights, fewer tokens": (
        keyword("topk_weights", lambda w: w[:-1]),
        ValueError,
        rf"topk_weights: got float32 \[{T - 1}, {P}\], expected float32 \[{T}, {P}\]",
    ),
    "topk_weights, more tokens": (
        keyword("topk_weights", lambda w: np.concatenate([w, w])),
        ValueError,
        rf"topk_weights: got float32 \[{2 * T}, {P}\], expected float32 \[{T}, {P}\]",
    ),
    "topk_weights, slots": (
        keyword("topk_weights", lambda w: np.concatenate([w, w], axis=1)),
        ValueError,
        rf"topk_weights: got float32 \[{T}, {2 * P}\], expected float32 \[{T}, {P}\]",
    ),
    "out, a list": (keyword("out", np.ndarray.tolist), TypeError, r"out: got list, expected an array"),
    "out, dtype": (
        keyword("out", lambda out: out.astype(np.float64)),
        TypeError,
        rf"out: got float64 \[{T}, {H}\], expected bfloat16 or float32 \[{T}, {H}\]",
    ),
    "out, rank": (
        keyword("out", lambda out: out.reshape(-1)),
        ValueError,
        rf"out: got float32 \[{T * H}\], expected bfloat16 or float32 \[{T}, {H}\]",
    ),
    "out, fewer tokens": (
        keyword("out", lambda out: out[:-1].copy()),
        ValueError,
        rf"out: got float32 \[{T - 1}, {H}\], expected bfloat16 or float32 \[{T}, {H}\]",
    ),
    "out, more tokens": (
        keyword("out", lambda out: np.concatenate([out, out])),
        ValueError,
        rf"out: got float32 \[{2 * T}, {H}\], expected bfloat16 or float32 \[{T}, {H}\]",
    ),
    "out, width": (
        keyword("out", lambda out: out[:, :-1].copy()),
        ValueError,
        rf"out: got float32 \[{T}, {H - 1}\], expected bfloat16 or float32 \[{T}, {H}\]",
    ),
    "out, Fortran order": (
        keyword("out", fortran),
        TypeError,
        rf"out: got float32 \[{T}, {H}\] with gaps or in another order, expected it C-contiguous",
    ),
    "out, strided": (keyword("out", strided), TypeError, r"out: got .* expected it C-contiguous"),
    "out, read-only float32": (
        keyword("out", read_only),
        ValueError,
        rf"out: got a read-only array float32 \[{T}, {H}\], expected one that can be written",
    ),
    "out, read-only bfloat16": (
        keyword("out", lambda out: read_only(out.astype(bf16))),
        ValueError,
        rf"out: got a read-only array bfloat16 \[{T}, {H}\], expected one that can be written",
    ),
    "out is hidden_states": (
        overlapping("hidden_states"),
        ValueError,
        r"out: its memory overlaps that of hidden_states, expected memory of its own",
    ),
    "out begins in hidden_states' last element": (
        overlapping("hidden_states", lambda x: x.nbytes - 2),
        ValueError,
        r"out: its memory overlaps that of hidden_states",
    ),
    "out in topk_ids": (overlapping("topk_ids"), ValueError, r"out: its memory overlaps that of topk_ids"),
    "out in topk_weights": (
        overlapping("topk_weights"),
        ValueError,
        r"out: its memory overlaps that of topk_weights",
    ),
}


#: What the wrapper takes, and the extension, which converts nothing, does not.
EXTENSION: dict[str, tuple[Change, Error, str]] = {
    "hidden_states, dtype": (
        keyword("hidden_states", lambda x: x.astype(np.float32)),
        TypeError,
        rf"hidden_states: got float32 \[{T}, {H}\], expected bfloat16 \[T, {H}\]",
    ),
    "hidden_states, another dtype": (
        keyword("hidden_states", lambda x: x.astype(np.float16)),
        TypeError,
        rf"hidden_states: got float16 \[{T}, {H}\], expected bfloat16 \[T, {H}\]",
    ),
    "hidden_states, rank": (
        keyword("hidden_states", lambda x: x[None]),
        ValueError,
        rf"hidden_states: got .*\[1, {T}, {H}\], expected .*\[T, {'H|' + str(H)}\]",
    ),
    "topk_weights, float64": (
        keyword("topk_weights", lambda w: w.astype(np.float64)),
        TypeError,
        rf"topk_weights: got float64 \[{T}, {P}\], expected float32 \[{T}, {P}\]",
    ),
    "topk_weights, bfloat16": (
        keyword("topk_weights", lambda w: w.astype(bf16)),
        TypeError,
        rf"topk_weights: got bfloat16 \[{T}, {P}\], expected float32 \[{T}, {P}\]",
    ),
    "topk_weights, byte order": (
        keyword("topk_weights", lambda w: w.astype(">f4")),
        TypeError,
        r"topk_weights: got ",
    ),
}


def valid(batch: Batch) -> dict[str, Any]:
    names = ("hidden_states", "topk_ids", "topk_weights")
    arrays = {name: array.copy() for name, array in zip(names, batch, strict=True)}
    return {**arrays, "out": np.full((T, H), 7.0, np.float32)}


def by_forward(moe: Any, arguments: dict[str, Any]) -> None:
    moe.forward(**arguments)


def by_submit(moe: Any, arguments: dict[str, Any]) -> None:
    moe.submit_forward(**arguments)
    moe.sync_forward()


def by_extension(moe: Any, arguments: dict[str, Any]) -> None:
    engine = moe.cpu_infer
    engine.submit(moe._layer.forward_task(**arguments))
    engine.sync()


CALLS = {"forward": by_forward, "submit": by_submit, "extension": by_extension}


@pytest.mark.parametrize("case", FORWARD)
@pytest.mark.parametrize(
    ("call", "chunk"),
    [("forward", T), ("forward", T - 2), ("submit", T), ("submit", T - 2), ("extension", T)],
    ids=["forward", "forward in chunks", "submit", "submit in chunks", "extension"],
)
def test_a_forward_pass_refuses(layer: Layer, batch: Batch, case: str, call: str, chunk: int) -> None:
    change, error, message = FORWARD[case]
    moe = layer.wrapper(P, chunked_prefill_size=chunk)
    before = moe.forward(*batch)
    arguments = valid(batch)
    arguments.update(change(arguments))
    out = arguments["out"]
    untouched = out.copy() if isinstance(out, np.ndarray) else None
    with pytest.raises(error, match=message):
        CALLS[call](moe, arguments)
    if untouched is not None:
        assert_same_bits(out, untouched, "out")
    assert_same_bits(moe.forward(*batch), before)
    moe.submit_forward(*batch)
    assert_same_bits(moe.sync_forward(), before)


@pytest.mark.parametrize("case", EXTENSION)
def test_the_extension_refuses(layer: Layer, batch: Batch, case: str) -> None:
    change, error, message = EXTENSION[case]
    moe, arguments = layer.wrapper(P), valid(batch)
    arguments.update(change(arguments))
    with pytest.raises(error, match=message):
        by_extension(moe, arguments)


@pytest.mark.parametrize("wrong", [2**64 - 1, 2**63, E])
def test_an_unsigned_id_out_of_range_does_not_vanish(moe: Any, batch: Batch, wrong: int) -> None:
    ids = with_id(batch.ids, 3, wrong, np.uint64)
    with pytest.raises(IndexError, match=rf"topk_ids: got expert {wrong} "):
        moe.forward(batch.x, ids, batch.weights)


@pytest.mark.parametrize("dtype", ["i1", "i2", "u1", "u4", ">i4"])
def test_ids_out_of_range_in_any_dtype(moe: Any, batch: Batch, dtype: str) -> None:
    with pytest.raises(IndexError, match=r"topk_ids: got expert 100 at \[3, 1\]"):
        moe.forward(batch.x, with_id(batch.ids, 3, 100, dtype), batch.weights)


def test_int32_ids_are_the_wrappers_matter(moe: Any, batch: Batch) -> None:
    out = np.empty((T, H), np.float32)
    with pytest.raises(TypeError, match=rf"topk_ids: got int32 \[{T}, {P}\], expected int64 \[{T}, {P}\]"):
        moe._layer.forward_task(batch.x, batch.ids.astype(np.int32), batch.weights, out)


#: What a task of the extension refuses besides; the wrapper copies ids and weights of another order.
TASK: dict[str, tuple[Change, Error, str]] = {
    "topk_ids, strided": (
        keyword("topk_ids", strided),
        TypeError,
        rf"topk_ids: got int64 \[{T}, {P}\] with gaps or in another order, expected it C-contiguous",
    ),
    "topk_weights, Fortran order": (
        keyword("topk_weights", fortran),
        TypeError,
        r"topk_weights: .* gaps or in another order, expected it C-contiguous",
    ),
    "base with incremental": (
        lambda a: {"base": a["out"].copy(), "incremental": True},
        ValueError,
        r"base: got one with incremental=True, expected one of the two",
    ),
    "base, dtype": (
        lambda a: {"base": a["out"].astype(np.float64)},
        TypeError,
        rf"base: got float64 \[{T}, {H}\], expected bfloat16 or float32 \[{T}, {H}\]",
    ),
    "base, shape": (
        lambda a: {"base": a["out"][:-1]},
        ValueError,
        rf"base: got float32 \[{T - 1}, {H}\], expected bfloat16 or float32 \[{T}, {H}\]",
    ),
    "base, order": (lambda a: {"base": fortran(a["out"])}, TypeError, r"base: .* expected it C-contiguous"),
    "base overlaps": (lambda a: {"base": a["out"]}, ValueError, r"out: its memory overlaps that of base"),
    "skip_experts, dtype": (
        lambda a: {"skip_experts": np.zeros(E, np.int32)},
        TypeError,
        rf"skip_experts: got int32 \[{E}\], expected bool \[{E}\]",
    ),
    "skip_experts, shape": (
        lambda a: {"skip_experts": np.zeros(E + 1, np.bool_)},
        ValueError,
        rf"skip_experts: got bool \[{E + 1}\], expected bool \[{E}\]",
    ),
    "skip_experts, strided": (
        lambda a: {"skip_experts": np.zeros(2 * E, np.bool_)[::2]},
        TypeError,
        r"skip_experts: .* expected it C-contiguous",
    ),
}


@pytest.mark.parametrize("case", TASK)
def test_a_task_refuses(moe: Any, batch: Batch, case: str) -> None:
    change, error, message = TASK[case]
    before = moe.forward(*batch)
    arguments = valid(batch)
    arguments.update(change(arguments))
    with pytest.raises(error, match=message):
        moe._layer.forward_task(**arguments)
    assert (arguments["out"] == 7.0).all()
    assert_same_bits(moe.forward(*batch), before)


def test_more_slots_than_an_index_can_count(tmp_path: Path) -> None:
    """2^31 slots, in sparse files; refused before any is read."""
    slots, tokens = 2**24, 2**7
    config = ext.moe.MOEConfig(1, slots, 1, 1, pool=KTMoEWrapper(0, 1, 1, 1, 1).cpu_infer.backend_)
    ids = np.memmap(tmp_path / "ids", np.int64, "w+", shape=(tokens, slots))
    weights = np.memmap(tmp_path / "weights", np.float32, "w+", shape=(tokens, slots))
    x, out = np.zeros((tokens, 1), bf16), np.zeros((tokens, 1), bf16)
    with pytest.raises(ValueError, match=f"hidden_states: got {tokens} tokens, expected fewer in one"):
        ext.moe.AMXBF16_MOE(config).forward_task(x, ids, weights, out)


# ---- numbers that are none ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, H - 1])
def test_a_bad_hidden_state_makes_its_own_row_nan(moe: Any, batch: Batch, value: float, column: int) -> None:
    good = moe.forward(*batch)
    x = batch.x.copy()
    x[2, column] = value
    result = moe.forward(x, batch.ids, batch.weights)
    assert np.isnan(result[2].astype(np.float32)).all()
    others = np.arange(T) != 2
    assert_same_bits(result[others], good[others])


@pytest.mark.parametrize("activation", ["relu2", "swigluoai", {"kind": "silu", "limit": 2.0}], ids=str)
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_bad_hidden_state_is_not_clamped_away(activation: Any, value: float) -> None:
    """With weights of one sign nothing cancels, and a limit would make finite numbers of it."""
    layer = draw_layer(np.random.default_rng(2), E, I, H, activation).with_matrices(np.abs)
    batch = draw_batch(np.random.default_rng(3), layer, T, P)
    batch.x[2, 5] = value
    result = layer.forward(batch).astype(np.float32)
    assert np.isnan(result[2]).all()
    assert np.isfinite(result[np.arange(T) != 2]).all()


def test_a_bad_hidden_state_is_nobodys_when_nothing_is_computed(moe: Any, batch: Batch) -> None:
    x, ids = batch.x.copy(), batch.ids.copy()
    x[2], ids[2] = np.nan, -1
    out = np.full((T, H), 3.0, np.float32)
    result = moe.forward(x, ids, batch.weights, out=out, incremental=True)
    assert (result[2] == 3.0).all()
    assert np.isfinite(result).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_routing_weight_stays_in_its_row(moe: Any, batch: Batch, value: float) -> None:
    good = moe.forward(*batch)
    weights = batch.weights.copy()
    weights[2, 1] = value
    result = moe.forward(batch.x, batch.ids, weights)
    assert not np.isfinite(result[2].astype(np.float32)).any()
    if np.isnan(value):
        assert np.isnan(result[2].astype(np.float32)).all()
    others = np.arange(T) != 2
    assert_same_bits(result[others], good[others])


def test_a_nan_in_the_output_is_added_to(moe: Any, batch: Batch) -> None:
    out = np.zeros((T, H), np.float32)
    out[1, 2] = np.nan
    result = moe.forward(*batch, out=out, incremental=True)
    assert np.argwhere(np.isnan(result)).tolist() == [[1, 2]]
