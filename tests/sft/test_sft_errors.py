"""What the passes of training refuse. Nothing has changed afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from layers import Batch, assert_same_bits, bf16
from sft_layers import Step, Student, assert_same_steps, by_name, draw_student, draw_training, train

from ktmoe_np import KTMoEWrapper, SFTGradients

AnyArray = Any
Error = type[BaseException]

E, I, H, P, R, T = 4, 24, 40, 2, 3, 6  # noqa: E741


@pytest.fixture(scope="module")
def student() -> Student:
    return draw_student(np.random.default_rng(0), (E, I, H), R)


@pytest.fixture(scope="module")
def batch(student: Student) -> Batch:
    return draw_training(np.random.default_rng(1), student, T, P)[0]


@pytest.fixture(scope="module")
def grad_output(student: Student) -> AnyArray:
    return draw_training(np.random.default_rng(1), student, T, P)[1]


@pytest.fixture
def moe(student: Student) -> Any:
    return student.wrapper(P)


# ---- forward ----

FORWARD: dict[str, tuple[Callable[[Batch], Any], Error, str]] = {
    "hidden_states, dtype": (
        lambda b: b._replace(x=b.x.astype(np.float64)),
        TypeError,
        rf"hidden_states: got float64 \[{T}, {H}\], expected bfloat16 or float32 or float16 \[..., {H}\]",
    ),
    "hidden_states, width": (
        lambda b: b._replace(x=b.x[:, 1:].copy()),
        ValueError,
        rf"hidden_states: got bfloat16 \[{T}, {H - 1}\], expected bfloat16 or float32 .*\[..., {H}\]",
    ),
    "hidden_states, rank": (
        lambda b: b._replace(x=b.x[0]),
        ValueError,
        rf"topk_ids: got shape \[{T}, {P}\], expected \[{P}\]",
    ),
    "topk_ids, dtype": (
        lambda b: b._replace(ids=b.ids * 1.0),
        TypeError,
        rf"topk_ids: got float64 \[{T}, {P}\], expected an integer dtype",
    ),
    "topk_ids, shape": (
        lambda b: b._replace(ids=b.ids[:-1]),
        ValueError,
        rf"topk_ids: got shape \[{T - 1}, {P}\], expected \[{T}, {P}\]",
    ),
    "topk_ids, expert": (
        lambda b: b._replace(ids=b.ids + E * (np.arange(T)[:, None] == 2)),
        IndexError,
        r"topk_ids: got expert \d+ at \[2, [01]\], expected ids below 4",
    ),
    "topk_weights, dtype": (
        lambda b: b._replace(weights=b.weights.astype(np.int64)),
        TypeError,
        rf"topk_weights: got int64 \[{T}, {P}\], expected floats \[..., {P}\]",
    ),
}


def submitted_forward(moe: Any) -> Callable[..., AnyArray]:
    def call(*arguments: Any) -> AnyArray:
        moe.submit_forward_sft(*arguments)
        result: AnyArray = moe.sync_forward_sft()
        return result

    return call


def submitted_backward(moe: Any) -> Callable[..., SFTGradients]:
    def call(*arguments: Any, **options: Any) -> SFTGradients:
        moe.submit_backward(*arguments, **options)
        result: SFTGradients = moe.sync_backward()
        return result

    return call


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("case", FORWARD)
def test_forward_refuses(moe: Any, batch: Batch, grad_output: AnyArray, case: str, saved: bool) -> None:
    change, error, message = FORWARD[case]
    batch = batch._replace(ids=np.abs(batch.ids))
    expected, step = train(moe, batch, grad_output), moe.step
    wrong = change(batch)
    for call in (moe.forward_sft, submitted_forward(moe)):
        with pytest.raises(error, match=message):
            call(*wrong, saved)
    assert (moe.num_cached, moe.step) == (0, step)
    out = moe.forward_sft(*batch, out=np.empty((T, H), np.float32))
    with pytest.raises((RuntimeError, error)):  # full, or wrong
        moe.forward_sft(*wrong, saved)
    assert_same_steps(Step(out, by_name(moe.backward(grad_output))), expected)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (
            np.empty((T, H)),
            TypeError,
            rf"out: got float64 \[{T}, {H}\], expected bfloat16 or float32 \[{T}, {H}",
        ),
        (np.empty((T, 1), bf16), ValueError, rf"out: got bfloat16 \[{T}, 1\], expected bfloat16 or float32"),
        ([], TypeError, r"out: got list, expected an array"),
    ],
)
def test_an_output_is_refused(moe: Any, batch: Batch, out: Any, error: Error, message: str) -> None:
    for call in (moe.forward_sft, moe.forward):
        with pytest.raises(error, match=message):
            call(*batch, out=out)
    with pytest.raises(RuntimeError, match=r"cuda_stream: got 1, expected None: arrays are on the CPU"):
        moe.forward(*batch, 1)
    assert moe.num_cached == 0


def test_nothing_loaded(student: Student, batch: Batch) -> None:
    moe = KTMoEWrapper(7, E, P, H, I, mode="sft", method="BF16_SFT", lora_rank=R)
    for call in (moe.forward, moe.forward_sft):
        with pytest.raises(RuntimeError, match=r"layer 7 has no weights, load them first"):
            call(*batch)
    with pytest.raises(RuntimeError, match="weight_path: got None, expected a checkpoint to load from"):
        moe.load_weights()
    assert moe.num_cached == 0
    student.layer.load_into(moe)
    moe.update_lora_weights(**student.lora)
    assert_same_bits(moe.forward_sft(*batch, False), student.wrapper(P, lora_alpha=32.0).forward(*batch))


# ---- saved passes ----


@pytest.mark.parametrize("depth", [1, 3])
def test_a_full_cache(student: Student, batch: Batch, grad_output: AnyArray, depth: int) -> None:
    moe = student.wrapper(P, max_cache_depth=depth)
    expected = train(moe, batch, grad_output)
    for _ in range(depth):
        moe.forward_sft(*batch)
    step, held = moe.step, moe.cache_bytes
    assert held > 0
    message = (
        rf"forward_sft: got {depth} saved forward passes of layer 0, expected fewer than max_cache_depth "
        rf"{depth}; "
        "call backward or clear the cache first"
    )
    with pytest.raises(RuntimeError, match=message):
        moe.forward_sft(*batch)
    moe.submit_forward_sft(*batch)
    with pytest.raises(RuntimeError, match=message):
        moe.sync_forward_sft()
    moe.forward_sft(*batch, False)
    assert (moe.num_cached, moe.step, moe.cache_bytes) == (depth, step, held)
    assert_same_steps(Step(expected.out, by_name(moe.backward(grad_output))), expected)
    moe.clear_cache()
    assert (moe.num_cached, moe.cache_bytes) == (0, 0)
    assert_same_steps(train(moe, batch, grad_output), expected)


def test_backward_without_forward(moe: Any, batch: Batch, grad_output: AnyArray) -> None:
    message = r"backward: got no saved forward pass of layer 0, expected a forward_sft with save_for_backward"
    for before in (
        lambda: None,
        lambda: moe.forward_sft(*batch, False),
        lambda: train(moe, batch, grad_output),
    ):
        before()
        with pytest.raises(RuntimeError, match=message):
            moe.backward(grad_output)
        moe.submit_backward(grad_output)
        with pytest.raises(RuntimeError, match=message):
            moe.sync_backward()
    moe.forward_sft(*batch)
    moe.clear_cache()
    with pytest.raises(RuntimeError, match=message):
        moe.backward(grad_output)


def test_loading_while_a_pass_is_saved(
    moe: Any, student: Student, batch: Batch, grad_output: AnyArray
) -> None:
    expected = train(moe, batch, grad_output)
    out = moe.forward_sft(*batch, out=np.empty((T, H), np.float32))
    with pytest.raises(RuntimeError, match="load_weights: got 1 forward passes of layer 0 that wait for"):
        student.layer.load_into(moe)
    assert_same_steps(Step(out, by_name(moe.backward(grad_output))), expected)
    student.layer.load_into(moe)


def read_only(array: AnyArray) -> AnyArray:
    copy = array.copy()
    copy.setflags(write=False)
    return copy


def with_matrix(name: str, change: Callable[[AnyArray], Any]) -> Callable[[AnyArray, SFTGradients], Any]:
    return lambda q, g: (q, replace(g, **{name: change(g.matrices[name])}))


BACKWARD: dict[str, tuple[Callable[[AnyArray, SFTGradients], Any], Error, str]] = {
    "grad_output, tokens": (
        lambda q, g: (q[:-1], g),
        ValueError,
        rf"grad_output: got {T - 1} tokens, expected {T} as in the forward pass",
    ),
    "grad_output, no tokens": (lambda q, g: (q[:0], g), ValueError, r"grad_output: got 0 tokens, expected 6"),
    "grad_output, width": (
        lambda q, g: (q[:, 1:].copy(), g),
        ValueError,
        rf"grad_output: got bfloat16 \[{T}, {H - 1}\], expected bfloat16 or float32 .*\[..., {H}\]",
    ),
    "grad_output, dtype": (
        lambda q, g: (q.astype(np.float64), g),
        TypeError,
        rf"grad_output: got float64 \[{T}, {H}\], expected bfloat16 or float32 or float16 \[..., {H}\]",
    ),
    "grad_output, rank": (
        lambda q, g: (q[0], g),
        ValueError,
        rf"grad_output: got 1 tokens, expected {T} as in the forward pass",
    ),
    "grad_output, a list": (
        lambda q, g: ([], g),
        TypeError,
        r"grad_output: got list, expected an array on the CPU",
    ),
    "grad_output, transposed": (
        lambda q, g: (np.asfortranarray(q), g),
        TypeError,
        r"grad_output: .* expected it C-contiguous",
    ),
    "gradients, None": (
        lambda q, g: (q, None),
        ValueError,
        r"gradients: got None with accumulate=True, expected SFTGradients",
    ),
    "gradients, a dict": (lambda q, g: (q, {}), TypeError, r"gradients: got dict, expected SFTGradients"),
    "gradients, untrained": (
        lambda q, g: (q, replace(g, down_proj=np.zeros((E, H, I), np.float32))),
        ValueError,
        r"gradients: got down_proj, expected None there: .*\(method 'AMXBF16_SFT', lora_rank 3, .* False\)",
    ),
    "gradients, dtype": (
        with_matrix("up_lora_b", lambda m: m.astype(bf16)),
        TypeError,
        rf"up_lora_b: got bfloat16 \[{E}, {I}, {R}\], expected float32 \[{E}, {I}, {R}\]",
    ),
    "gradients, shape": (
        with_matrix("down_lora_a", lambda m: m[1:]),
        ValueError,
        rf"down_lora_a: got float32 \[{E - 1}, {R}, {I}\], expected float32 \[{E}, {R}, {I}\]",
    ),
    "gradients, read-only": (
        with_matrix("gate_lora_a", read_only),
        ValueError,
        r"gate_lora_a: got a read-only array .*, expected one that can be written",
    ),
    "gradients, one array twice": (
        lambda q, g: (q, replace(g, up_lora_a=g.gate_lora_a)),
        ValueError,
        r"up_lora_a: shares memory with gate_lora_a|up_lora_a.*gate_lora_a",
    ),
}


@pytest.mark.parametrize("case", BACKWARD)
def test_backward_refuses(moe: Any, batch: Batch, grad_output: AnyArray, case: str) -> None:
    change, error, message = BACKWARD[case]
    expected = train(moe, batch, grad_output)
    arrays = {name: value.copy() for name, value in list(expected.gradients.items())[2:]}
    into = SFTGradients(np.empty(0), np.empty(0), **arrays)
    out = moe.forward_sft(*batch, out=np.empty((T, H), np.float32))
    wrong, gradients = change(grad_output, into)
    for call in (moe.backward, submitted_backward(moe)):
        with pytest.raises(error, match=message):
            call(wrong, gradients=gradients, accumulate=True)
    for name, value in arrays.items():
        assert_same_bits(value, expected.gradients[name])
    assert moe.num_cached == 1
    assert_same_steps(Step(out, by_name(moe.backward(grad_output))), expected)


def test_a_method_without_gradients_of_adapters(
    student: Student, batch: Batch, grad_output: AnyArray
) -> None:
    moe = student.wrapper(P, method="BF16_SFT_SkipLoRA")
    moe.forward_sft(*batch)
    into = SFTGradients(np.empty(0), np.empty(0), gate_lora_a=np.zeros((E, R, H), np.float32))
    with pytest.raises(ValueError, match=r"gradients: got gate_lora_a, expected None there"):
        moe.backward(grad_output, gradients=into)
    assert list(by_name(moe.backward(grad_output))) == ["grad_input", "grad_weights"]


# ---- submitting ----


def test_one_pass_of_a_kind_at_a_time(student: Student, batch: Batch, grad_output: AnyArray) -> None:
    moe = student.wrapper(P, max_cache_depth=2)
    with pytest.raises(
        RuntimeError, match="sync_forward_sft: no pass of layer 0 is pending, call submit_forwar"
    ):
        moe.sync_forward_sft()
    with pytest.raises(
        RuntimeError, match="sync_backward: no pass of layer 0 is pending, call submit_backward"
    ):
        moe.sync_backward()
    moe.submit_forward_sft(*batch)
    with pytest.raises(
        RuntimeError, match="submit_forward_sft: a pass of layer 0 is pending, call sync_forward"
    ):
        moe.submit_forward_sft(*batch)
    moe.sync_forward_sft()
    moe.submit_backward(grad_output)
    with pytest.raises(
        RuntimeError, match="submit_backward: a pass of layer 0 is pending, call sync_backward f"
    ):
        moe.submit_backward(grad_output)
    moe.sync_backward()
    assert moe.num_cached == 0


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "step: got -1, expected 0 or more"),
        (2**32, ValueError, "step: got 4294967296, expected at most 4294967295"),
        (1.0, TypeError, r"step: got 1\.0, expected an integer"),
    ],
)
def test_a_step_is_refused(moe: Any, value: Any, error: Error, message: str) -> None:
    moe.step = 2**32 - 1
    with pytest.raises(error, match=message):
        moe.step = value
    assert moe.step == 2**32 - 1
