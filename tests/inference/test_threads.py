"""Threads that meet at one pass, or at one chain of deferred experts: right numbers, or an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from layers import IS_SLOW, assert_same_bits, draw_batch, draw_layer, run_python

from ktmoe_np import DeferralChain, KTMoEWrapper

pytestmark = [pytest.mark.engine, pytest.mark.asan]

E, I, H, P, T = 6, 24, 40, 4, 7  # noqa: E741
NUM = 20 if IS_SLOW else 150


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    KTMoEWrapper.drain_deferred()
    yield
    KTMoEWrapper.drain_deferred()


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """What each call gives or raises, all at the same time in threads of their own."""
    results: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(i: int) -> None:
        barrier.wait()
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive()
    return results


def three_layers(seed: int, **options: Any) -> tuple[list[Any], list[Any]]:
    rng = np.random.default_rng(seed)
    layers = [draw_layer(rng, E, I, H) for _ in range(3)]
    moes = [
        layer.wrapper(P, layer_idx=i, max_deferred_experts_per_token=2, **options)
        for i, layer in enumerate(layers)
    ]
    return moes, [draw_batch(rng, layer, T, P) for layer in layers]


def run_pass(moes: list[Any], batches: list[Any], **chain: Any) -> list[Any]:
    outputs = [moe.forward(*batch, **chain) for moe, batch in zip(moes, batches, strict=True)]
    return [*outputs, KTMoEWrapper.drain_deferred(**chain)]


# ---- one pass ----


@pytest.mark.parametrize("is_bad", [False, True], ids=["a good pass", "a bad pass"])
def test_one_thread_gets_the_result(is_bad: bool) -> None:
    rng = np.random.default_rng(0)
    layer = draw_layer(rng, E, I, H)
    batch, moe = draw_batch(rng, layer, T, P), layer.wrapper(P)
    expected = moe.forward(*batch)
    submitted = batch._replace(ids=batch.ids + E) if is_bad else batch
    for _ in range(NUM):
        moe.submit_forward(*submitted)
        got = in_threads(*[moe.sync_forward] * 4)
        refused = [each for each in got if isinstance(each, RuntimeError)]
        (one,) = [each for each in got if not isinstance(each, RuntimeError)]
        assert len(refused) == 3
        for error in refused:
            assert str(error).startswith(
                (
                    "sync_forward: another call waits for the pass of layer 0 already",
                    "sync_forward: no pass of layer 0 is pending",
                )
            )
        if is_bad:
            assert isinstance(one, IndexError)
        else:
            assert_same_bits(one, expected)


def test_one_thread_submits() -> None:
    rng = np.random.default_rng(1)
    layer = draw_layer(rng, E, I, H)
    batch, moe = draw_batch(rng, layer, T, P), layer.wrapper(P)
    expected = moe.forward(*batch)
    for _ in range(NUM):
        got = in_threads(*[lambda: moe.submit_forward(*batch)] * 4)
        assert sorted(type(each).__name__ for each in got) == ["NoneType"] + ["RuntimeError"] * 3
        assert_same_bits(moe.sync_forward(), expected)


INTERRUPTED = """
import signal, threading
import numpy as np
from layers import assert_same_bits, batch_taking, draw_layer

layer = draw_layer(np.random.default_rng(0), 4, 128, 256)
batch, moe = batch_taking(0.1, layer, 2), layer.wrapper(2)
expected, armed = moe.forward(*batch), False

def interrupt(*_):
    global armed
    if armed:
        armed = False
        raise {error}("from the handler")

signal.signal(signal.SIGALRM, interrupt)

def is_interrupted():
    global armed
    moe.submit_forward(*batch)
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, 1e-3)
        moe.sync_forward()
        armed = False
        return False
    except {error} as error:
        assert str(error) == "from the handler"
        return True

for _ in range(3):
    while not is_interrupted():
        pass
    thread = threading.Thread(target=lambda: assert_same_bits(moe.sync_forward(), expected))
    thread.start()
    thread.join()
    try:
        moe.sync_forward()
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "TimeoutError"])
def test_after_an_exception_of_a_handler_another_thread_may_wait(error: str) -> None:
    done = run_python(INTERRUPTED.format(error=error))
    expected = "sync_forward: no pass of layer 0 is pending, call submit_forward first\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, 3 * expected, "")


# ---- one chain ----


def test_threads_on_the_shared_chain_are_right_or_refused() -> None:
    cases = [three_layers(seed) for seed in range(4)]
    expected = [run_pass(*case) for case in cases]
    num_right = 0

    def hammer(case: Any, want: list[Any]) -> int:
        right = 0
        for _ in range(NUM):
            try:
                got = run_pass(*case)
            except RuntimeError as error:
                if "chain=DeferralChain()" not in str(error):
                    raise
                continue
            for output, each in zip(got, want, strict=True):
                assert_same_bits(output, each)
            right += 1
        return right

    got = in_threads(*[lambda i=i: hammer(cases[i], expected[i]) for i in range(len(cases))])
    for each in got:
        assert isinstance(each, int), each
        num_right += each
    assert num_right > 0
    assert KTMoEWrapper.drain_deferred() is None


def test_threads_with_chains_of_their_own() -> None:
    cases = [three_layers(seed) for seed in range(4)]
    expected = [run_pass(*case) for case in cases]

    def hammer(case: Any, want: list[Any]) -> None:
        chain = DeferralChain()
        for _ in range(NUM):
            for output, each in zip(run_pass(*case, chain=chain), want, strict=True):
                assert_same_bits(output, each)

    assert in_threads(*[lambda i=i: hammer(cases[i], expected[i]) for i in range(len(cases))]) == [None] * 4


def test_a_pass_that_goes_from_thread_to_thread() -> None:
    moes, batches = three_layers(5)
    expected = run_pass(moes, batches)
    chain = DeferralChain()
    got = []
    for moe, batch in zip(moes, batches, strict=True):
        got += in_threads(lambda moe=moe, batch=batch: moe.forward(*batch, chain=chain))
        assert chain.is_waiting
    got += in_threads(lambda: KTMoEWrapper.drain_deferred(chain=chain))
    assert not chain.is_waiting
    for output, want in zip(got, expected, strict=True):
        assert_same_bits(output, want)


def test_chains_do_not_meet() -> None:
    """Their layers may use the same slot of a buffer, had they not buffers of their own."""
    moes, batches = three_layers(6)
    expected = run_pass(moes, batches)
    chains = [DeferralChain() for _ in range(3)]
    got: list[list[Any]] = [[], [], []]
    for moe, batch in zip(moes, batches, strict=True):
        for outputs, chain in zip(got, chains, strict=True):
            moe.submit_forward(*batch, chain=chain)
            outputs.append(moe.sync_forward())
    for outputs, chain in zip(got, chains, strict=True):
        outputs.append(KTMoEWrapper.drain_deferred(chain=chain))
        for output, want in zip(outputs, expected, strict=True):
            assert_same_bits(output, want)
    assert KTMoEWrapper.drain_deferred() is None


def test_a_thread_takes_nothing_that_another_has_deferred() -> None:
    moes, batches = three_layers(7)
    plain = draw_layer(np.random.default_rng(8), E, I, H).wrapper(P, layer_idx=2)
    expected = run_pass(moes, batches)
    first = moes[0].forward(*batches[0])
    calls = [
        lambda: moes[1].forward(*batches[1]),
        lambda: moes[1].submit_forward(*batches[1]),
        lambda: plain.forward(*batches[2]),
        KTMoEWrapper.drain_deferred,
    ]
    for call in calls:
        (error,) = in_threads(call)
        assert isinstance(error, RuntimeError)
        assert "a pass that has deferred experts of layer 0 is under way in thread 'MainThread'" in str(error)
    rest = [moe.forward(*batch) for moe, batch in zip(moes[1:], batches[1:], strict=True)]
    for output, want in zip([first, *rest, KTMoEWrapper.drain_deferred()], expected, strict=True):
        assert_same_bits(output, want)


def test_the_deferred_output_of_a_thread_that_has_ended() -> None:
    moes, batches = three_layers(9)
    moes[0].forward(*batches[0])
    expected = KTMoEWrapper.drain_deferred()
    in_threads(lambda: moes[0].forward(*batches[0]))
    with pytest.raises(
        RuntimeError, match=r"layer 1: .* was not drained by thread '.*', now ended; call drain"
    ):
        moes[1].forward(*batches[1])
    assert_same_bits(KTMoEWrapper.drain_deferred(), expected)


def test_what_is_refused() -> None:
    (moe, *_), (batch, *_) = three_layers(10)
    wrong: Any = object()
    for call in (moe.forward, moe.submit_forward):
        with pytest.raises(TypeError, match=r"^chain: got object, expected a DeferralChain$"):
            call(*batch, chain=wrong)
        with pytest.raises(ValueError, match=r"^chain: got one with a cuda_stream, expected None"):
            call(*batch, 0, chain=DeferralChain())
    with pytest.raises(TypeError, match=r"^chain: got object, expected a DeferralChain$"):
        KTMoEWrapper.drain_deferred(chain=wrong)
    with pytest.raises(ValueError, match=r"^chain: got one with a cuda_stream, expected None"):
        KTMoEWrapper.drain_deferred(0, chain=DeferralChain())
