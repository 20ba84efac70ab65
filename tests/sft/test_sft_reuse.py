"""Layers that write the results of a step to the memory of the step before (`reuse_buffers`)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from array_kinds import numpy_of
from layers import assert_same_bits, bf16
from reuse_cases import (
    E,
    H,
    I,
    P,
    addresses,
    assert_same,
    copied,
    drawn,
    drawn_student,
    pair,
    step,
)
from sft_layers import BF16, Method, by_name

from ktmoe_np import KExpertsSFTBuffer, KTMoEWrapper
from ktmoe_np.buffers import Claim
from ktmoe_np.sft import SFTOptions

pytestmark = pytest.mark.kernels


@pytest.fixture(autouse=True)
def _no_buffers() -> Iterator[None]:
    KTMoEWrapper.clear_sft_buffer_cache()
    yield
    KTMoEWrapper.clear_sft_buffer_cache()


# ---- the same numbers ----


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (BF16, {}),
        (BF16, {"recompute": True, "lora_dropout": 0.25}),
        (BF16, {"full_weight_grad": True}),
        (("AMXBF16_SFT_SkipLoRA", None), {}),
        (("AMXINT4_SFT", 32), {"layer_idx": 3}),
    ],
)
def test_steps_have_the_same_bits(method: Method, options: dict[str, Any]) -> None:
    student = drawn_student(method)
    reusing, plain = pair(student, **options)
    for seed, num_tokens in enumerate((5, 5, 1, 9, 0, 5)):
        training = drawn(student, num_tokens, seed)
        assert_same(step(reusing, training), step(plain, training))


def test_gradients_of_several_batches_are_added() -> None:
    student = drawn_student()
    reusing, plain = pair(student)
    results = []
    for moe in (reusing, plain):
        found = None
        for seed in range(3):
            batch, grad_output = drawn(student, 6, seed)
            moe.forward_sft(*batch)
            found = moe.backward(grad_output, gradients=found, accumulate=found is not None)
        results.append(by_name(found))
    assert_same(*results)


def test_a_chain_of_layers() -> None:
    """What a layer gives is what the next one takes, there and back."""
    students = [drawn_student(seed=seed) for seed in range(4)]
    batch, grad = drawn(students[0], 7, 9)
    found = []
    for options in ({"reuse_buffers": True}, {}):
        layers = [student.wrapper(P, layer_idx=i, **options) for i, student in enumerate(students)]
        x, results = batch.x, {}
        for layer in layers:
            x = layer.forward_sft(x, batch.ids, batch.weights)
        results["y"] = x.copy()
        back = grad
        for layer in layers[::-1]:
            gradients = layer.backward(back)
            back = gradients.grad_input
            results |= copied({f"{layer.layer_idx} {k}": v for k, v in by_name(gradients).items()})
        found.append(results)
    assert_same(*found)


def test_a_layer_after_itself() -> None:
    """Where the buffers contain what a pass reads, the pass is given new arrays."""
    student = drawn_student()
    reusing, plain = pair(student)
    (x, ids, weights), grad = drawn(student, 5, 1)
    once, expected = (moe.forward(x, ids, weights) for moe in (reusing, plain))
    twice = reusing.forward(once[:], ids, weights)
    assert not np.shares_memory(twice, once)
    assert_same_bits(once, expected)
    assert_same_bits(twice, plain.forward(expected, ids, weights))
    results = []
    for moe in (reusing, plain):
        moe.forward_sft(x, ids, weights)
        back = moe.backward(grad).grad_input
        moe.forward_sft(x, ids, weights)
        again = moe.backward(back)
        assert not np.shares_memory(again.grad_input, back)
        results.append({"back": back, **by_name(again)})
    assert_same(*results)


@pytest.mark.crosscheck
def test_a_tensor_that_shares_memory_with_a_result_is_not_overwritten() -> None:
    torch = pytest.importorskip("torch")
    student = drawn_student()
    reusing, plain = pair(student)
    (x, ids, weights), _ = drawn(student, 5, 1)
    y = reusing.forward(torch.from_numpy(x.view(np.int16)).view(torch.bfloat16), ids, weights)
    before = numpy_of(y).copy()
    again = reusing.forward_sft(y, ids, weights, save_for_backward=False)
    assert_same_bits(numpy_of(y), before)
    assert_same_bits(before, plain.forward(x, ids, weights))
    assert_same_bits(numpy_of(again), plain.forward(before, ids, weights))


@pytest.mark.crosscheck
def test_programs_of_jax_write_arrays_of_their_own() -> None:
    jax = pytest.importorskip("jax")
    from ktmoe_np.jax import lora_parameters, moe_sft

    student = drawn_student()
    reusing, plain = pair(student)
    (x, ids, weights), _ = drawn(student, 5, 1)
    lora = lora_parameters(reusing)
    first = moe_sft(reusing, lora, x, ids, weights)
    kept = np.array(first)
    held = addresses({"y": reusing.forward(x, ids, weights)})
    second = moe_sft(reusing, lora, (2 * x).astype(bf16), ids, weights)
    assert_same_bits(np.asarray(first), kept)
    assert_same_bits(kept, plain.forward(x, ids, weights))
    assert np.asarray(second).ctypes.data not in held.values()
    grads = [
        jax.grad(lambda a, moe=moe: moe_sft(moe, a, x, ids, weights).astype("float32").sum())(lora)
        for moe in (reusing, plain)
    ]
    assert_same(*({name: np.asarray(array).copy() for name, array in g.items()} for g in grads))


# ---- the same memory ----


@pytest.mark.parametrize("submitted", [False, True])
def test_steps_have_the_same_memory(submitted: bool) -> None:
    student = drawn_student()
    moe = student.wrapper(P, reuse_buffers=True)
    seen, held = [], []
    for seed in range(4):
        batch, grad = drawn(student, 6, seed)
        if submitted:
            moe.submit_forward_sft(*batch)
            y = moe.sync_forward_sft()
            moe.submit_backward(grad)
            results = {"y": y, **by_name(moe.sync_backward())}
        else:
            results = step(moe, (batch, grad))
        held.append(results)  # holding results changes nothing
        seen.append(addresses(results))
    assert all(each == seen[0] for each in seen)
    assert len(set(seen[0].values())) == len(seen[0])
    buffers = KExpertsSFTBuffer.get_buffer(6, H, P)[0]
    expected = {"y": buffers.output, "grad_input": buffers.grad_input, "grad_weights": buffers.grad_weights}
    for name, array in addresses(expected).items():
        assert seen[0][name] == array, name


def test_without_the_option_every_result_is_new() -> None:
    student = drawn_student()
    moe = student.wrapper(P)
    steps = [step(moe, drawn(student, 6, 0)) for _ in range(2)]
    for name, array in steps[0].items():
        assert not np.shares_memory(array, steps[1][name])
    assert_same(*steps)


def test_layers_side_by_side() -> None:
    """Layers 0 and 1 share nothing; layers 0 and 2 share buffers, but no gradients of matrices."""
    students = [drawn_student(seed=seed) for seed in range(3)]
    layers = [student.wrapper(P, layer_idx=i, reuse_buffers=True) for i, student in enumerate(students)]
    training = drawn(students[0], 6, 5)
    first = step(layers[0], training)
    kept = copied(first)
    step(layers[1], training)
    assert_same(first, kept)
    third = step(layers[2], training)
    rows = {"y", "grad_input", "grad_weights"}
    for name, array in first.items():
        assert np.shares_memory(array, third[name]) == (name in rows), name
    assert_same({n: a for n, a in first.items() if n not in rows}, {n: kept[n] for n in kept.keys() - rows})


def test_a_batch_of_another_size_leaves_earlier_results() -> None:
    student = drawn_student()
    reusing, plain = pair(student)
    trainings = {num: drawn(student, num, num) for num in (6, 3, 8)}
    results = {}
    for num, training in trainings.items():
        results[num] = step(reusing, training)
    for num, training in trainings.items():
        expected = step(plain, training)
        rows = ("y", "grad_input", "grad_weights")
        assert_same({n: results[num][n] for n in rows}, {n: expected[n] for n in rows})
    again = step(reusing, trainings[8])  # the last size is still there, the others are gone
    assert addresses(again) == addresses(results[8])
    assert step(reusing, trainings[3])["y"].ctypes.data != results[3]["y"].ctypes.data


def test_captured_sizes_stay() -> None:
    student = drawn_student()
    moe = student.wrapper(P, reuse_buffers=True)
    KExpertsSFTBuffer.set_capture_batch_sizes([6])
    try:
        first = addresses(step(moe, drawn(student, 6, 0)))
        step(moe, drawn(student, 3, 0))
        assert addresses(step(moe, drawn(student, 6, 1))) == first
    finally:
        KExpertsSFTBuffer.set_capture_batch_sizes([])


def test_clearing_lets_go_of_what_nobody_holds() -> None:
    student = drawn_student()
    moe = student.wrapper(P, reuse_buffers=True)
    training = drawn(student, 6, 0)
    held = step(moe, training)
    kept = copied(held)
    buffers = weakref.ref(KExpertsSFTBuffer.get_buffer(6, H, P)[0])
    KTMoEWrapper.clear_sft_buffer_cache()
    gc.collect()
    assert buffers() is None
    after = step(moe, drawn(student, 6, 1))
    assert_same(held, kept)
    for name, array in held.items():
        assert not np.shares_memory(array, after[name]), name
    bases = [weakref.ref(array.base) for array in after.values()]
    del after, array
    KTMoEWrapper.clear_sft_buffer_cache()
    gc.collect()
    assert all(base() is None for base in bases)


def test_gradients_of_matrices_go_with_their_layer() -> None:
    student = drawn_student()
    moe = student.wrapper(P, reuse_buffers=True)
    base = weakref.ref(step(moe, drawn(student, 6, 0))["gate_lora_a"].base)
    gone = weakref.ref(moe)
    assert base() is not None
    del moe
    assert gone() is None  # at once: there is no circle
    assert base() is None


def test_results_are_views() -> None:
    """Flags that a caller sets are those of its own array."""
    student = drawn_student()
    moe = student.wrapper(P, reuse_buffers=True)
    training = drawn(student, 6, 0)
    for array in step(moe, training).values():
        array.setflags(write=False)
    assert all(array.flags.writeable for array in step(moe, training).values())


def test_arrays_that_are_given_come_first() -> None:
    student = drawn_student()
    moe = student.wrapper(P, reuse_buffers=True)
    batch, grad = drawn(student, 6, 0)
    buffers = KExpertsSFTBuffer.get_buffer(6, H, P)[0]
    buffers.output[...], buffers.grad_input[...] = 7, 7
    out, grad_input = np.empty((6, H), bf16), np.empty((6, H), bf16)
    assert moe.forward_sft(*batch, out=out) is out
    given = moe.backward(grad, grad_input=grad_input)
    assert given.grad_input is grad_input
    assert np.shares_memory(given.grad_weights, buffers.grad_weights)
    assert (buffers.output == 7).all()
    assert (buffers.grad_input == 7).all()


# ---- passes that wait ----


def test_a_submitted_pass_keeps_its_arrays() -> None:
    """Until its sync_*: from a pass of its own layer, and from one of another layer with the same buffers."""
    student, other = drawn_student(), drawn_student(seed=1)
    (first, plain), third = pair(student), other.wrapper(P, layer_idx=2, reuse_buffers=True)
    (one, grad), (two, grad_two) = drawn(student, 6, 0), drawn(student, 6, 1)
    expected = copied(step(plain, (one, grad)))
    expected_two = copied(step(other.wrapper(P), (two, grad_two)))
    buffers = KExpertsSFTBuffer.get_buffer(6, H, P)[0]

    first.submit_forward_sft(*one)
    third.submit_forward_sft(*two)
    first.forward(*two)
    y, y_two = first.sync_forward_sft(), third.sync_forward_sft()
    assert np.shares_memory(y, buffers.output)
    assert not np.shares_memory(y_two, buffers.output)
    assert_same_bits(y, expected["y"])
    assert_same_bits(y_two, expected_two["y"])

    first.submit_backward(grad)
    third.submit_backward(grad_two)
    found, found_two = by_name(first.sync_backward()), by_name(third.sync_backward())
    assert_same({"y": y, **found}, expected)
    assert_same({"y": y_two, **found_two}, expected_two)
    assert np.shares_memory(found["grad_input"], buffers.grad_input)
    assert np.shares_memory(first.forward(*one), buffers.output)  # taken, so free again


def test_arrays_of_a_slot_that_are_given_are_held_too() -> None:
    student = drawn_student()
    first, second = (student.wrapper(P, layer_idx=i, reuse_buffers=True) for i in (0, 2))
    training = drawn(student, 5, 0)
    batch, want = training[0], first.forward_sft(*training[0], save_for_backward=False).copy()
    buffers = KExpertsSFTBuffer.get_buffer(5, H, P)[0]
    first.submit_forward_sft(*batch, save_for_backward=False, out=buffers.output)
    second.forward_sft(batch[0] + batch[0], *batch[1:], save_for_backward=False)
    assert_same_bits(first.sync_forward_sft(), want)


def test_both_gradients_of_a_layer_that_waits_for_one() -> None:
    student = drawn_student()
    reusing, plain = pair(student)
    one, two = drawn(student, 6, 0), drawn(student, 6, 1)
    expected = copied(step(plain, one))
    reusing.forward_sft(*one[0])
    reusing.submit_backward(one[1])
    reusing.cpu_infer.sync()
    step(reusing, two)  # a whole step, while the first has not been taken
    found = by_name(reusing.sync_backward())
    assert_same(found, {name: array for name, array in expected.items() if name != "y"})


@pytest.mark.parametrize("when", ["submit", "sync"])
def test_a_pass_that_fails_leaves_the_slot_free(when: str) -> None:
    student = drawn_student()
    moe = student.wrapper(P, reuse_buffers=True)
    batch, grad = drawn(student, 6, 0)
    before = addresses(step(moe, (batch, grad)))
    wrong = batch.ids.copy()
    wrong[0, 0] = E
    if when == "submit":
        with pytest.raises(ValueError, match="topk_ids: got shape"):
            moe.submit_forward_sft(batch.x, batch.ids[:, :1], batch.weights)
    else:
        moe.submit_forward_sft(batch.x, wrong, batch.weights)
        with pytest.raises(IndexError):
            moe.sync_forward_sft()
    gc.collect()  # the exception may hold the frame that held the pass
    assert addresses(step(moe, (batch, grad))) == before


def test_a_layer_that_goes_leaves_the_slot_free() -> None:
    student = drawn_student()
    moe, other = student.wrapper(P, reuse_buffers=True), student.wrapper(P, layer_idx=2, reuse_buffers=True)
    training = drawn(student, 6, 0)
    expected = copied(step(student.wrapper(P), training))
    moe.submit_forward_sft(*training[0])
    del moe
    gc.collect()
    found = step(other, training)
    assert np.shares_memory(found["y"], KExpertsSFTBuffer.get_buffer(6, H, P)[0].output)
    assert_same(found, expected)


def test_a_claim_ends_with_its_holder() -> None:
    claims = KExpertsSFTBuffer.get_buffer(1, H, P)[0].claims
    claim = Claim()
    assert claims.take("output", claim)
    assert not claims.take("output", None)
    assert not claims.take("output", Claim())
    assert claims.take("gradients", None)
    del claim
    assert claims.take("output", None)
    assert claims.take("output", None)  # without a claim nothing is taken


# ---- all together ----


class Pair:
    """The same calls of a layer that reuses its buffers and of one that does not."""

    def __init__(self, layer_idx: int) -> None:
        self._student = drawn_student(seed=layer_idx)
        self._layers = pair(self._student, layer_idx=layer_idx)
        self._saved = self._forward = self._backward = False  # a pass is saved; passes that wait for sync_*
        self._num_tokens = 0  # of the pass that is saved

    def do_something(self, rng: np.random.Generator) -> str:
        """One call that may come now, whose results must be the same."""
        may = {
            "forward": True,
            "forward_sft": not self._saved,
            "submit_forward_sft": not self._saved and not self._forward,
            "sync_forward_sft": self._forward,
            "backward": self._saved,
            "submit_backward": self._saved and not self._backward,
            "sync_backward": self._backward,
        }
        name = str(rng.choice([name for name, now in may.items() if now]))
        getattr(self, f"_{name.partition('_')[0]}_calls")(name, rng)
        return name

    def _both(self, name: str, *arguments: Any) -> None:
        found, expected = (getattr(moe, name)(*arguments) for moe in self._layers)
        if isinstance(expected, np.ndarray):
            assert_same_bits(found, expected, name)
        elif expected is not None:
            assert_same(by_name(found), by_name(expected))

    def _forward_calls(self, name: str, rng: np.random.Generator) -> None:
        num = int(rng.choice([4, 4, 4, 7]))
        self._both(name, *drawn(self._student, num, int(rng.integers(5)))[0])
        if name != "forward":
            self._saved, self._num_tokens = True, num

    def _backward_calls(self, name: str, rng: np.random.Generator) -> None:
        self._both(name, drawn(self._student, self._num_tokens, int(rng.integers(5)))[1])
        self._saved = False

    def _submit_calls(self, name: str, rng: np.random.Generator) -> None:
        is_forward = name == "submit_forward_sft"
        (self._forward_calls if is_forward else self._backward_calls)(name, rng)
        self._forward, self._backward = self._forward or is_forward, self._backward or not is_forward

    def _sync_calls(self, name: str, rng: np.random.Generator) -> None:
        self._both(name)
        if name == "sync_forward_sft":
            self._forward = False
        else:
            self._backward = False


@pytest.mark.parametrize("seed", range(6))
def test_any_calls_of_layers_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [Pair(layer_idx) for layer_idx in range(3)]
    done = {pairs[int(rng.integers(3))].do_something(rng) for _ in range(120)}
    assert len(done) == 7


# ---- the option ----


def test_the_option_is_refused() -> None:
    with pytest.raises(TypeError, match="reuse_buffers: got 1, expected a bool"):
        SFTOptions(reuse_buffers=1)  # type: ignore[arg-type]
    message = "^reuse_buffers: got True with max_cache_depth 2, expected False: the results of passes that"
    with pytest.raises(ValueError, match=message):
        SFTOptions(reuse_buffers=True, max_cache_depth=2)
    with pytest.raises(ValueError, match="reuse_buffers: got True in mode 'inference', expected it in mode"):
        KTMoEWrapper(0, E, P, H, I, reuse_buffers=True)
    assert SFTOptions().reuse_buffers is False
