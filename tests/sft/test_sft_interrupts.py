"""Training passes that exceptions end at any moment: the saved passes and the step are as before the call.

Each test is a script in a process of its own, whose main thread a timer interrupts.
"""

from __future__ import annotations

from typing import Any

import pytest
from layers import IS_SLOW, run_python

pytestmark = pytest.mark.engine

NUM = 30 if IS_SLOW else 250

SETUP = f"""
import random, signal, threading, time
import numpy as np
from layers import assert_same_bits, batch_taking, draw, draw_batch, draw_layer
from sft_layers import Student, by_name, draw_lora

rng, NUM = np.random.default_rng(0), {NUM}
E, I, H, P, T = 6, 96, 128, 2, 40
layer = draw_layer(rng, E, I, H)
student = Student(layer, draw_lora(rng, layer, 8), 8)
batch, grad_output = draw_batch(rng, layer, T, P), draw(rng, T, H)
x, ids, weights = batch
random.seed(0)
armed = False

def interrupt(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)

def interrupted(call, most):
    \"\"\"Whether a timer, set to at most so many seconds, has ended the call.

    Python looks for signals after calls of C and of f(*args), not after those of functions like f(a, b): with
    these a call that has returned cannot be interrupted any more.
    \"\"\"
    global armed
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, most))
        call()
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)  # one that rings while Python exits would kill the process
        return False
    except KeyboardInterrupt:
        return True

def seconds(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin

def trained(moe):
    moe.step = 5
    out = moe.forward_sft(*batch)
    return [out, *by_name(moe.backward(grad_output)).values()]

def assert_same(results, expected):
    for result, want in zip(results, expected, strict=True):
        assert_same_bits(result, want)

def keep_busy(moe, stop):
    \"\"\"Other passes, so that the main thread waits for a thread that computes its own.\"\"\"
    while not stop.is_set():
        moe.submit_forward(*batch)
        moe.sync_forward()
"""

OPTIONS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "float32": {"cache_dtype": "float32"},
    "recompute": {"recompute": True},
}


def assert_ends_well(script: str) -> None:
    done = run_python(SETUP + script, timeout=240.0)
    assert (done.returncode, done.stderr) == (0, "")
    num_interrupted = int(done.stdout)
    assert NUM // 20 <= num_interrupted <= NUM


@pytest.mark.parametrize("is_busy", [False, True], ids=["alone", "beside others"])
@pytest.mark.parametrize("options", OPTIONS)
def test_interrupted_passes(options: str, is_busy: bool) -> None:
    script = f"""
moe = student.wrapper(P, layer_idx=0, lora_dropout=0.25, max_cache_depth=2, **{OPTIONS[options]!r})
expected = trained(moe)
other, stop = layer.wrapper(P, layer_idx=1), threading.Event()
thread = threading.Thread(target=keep_busy, args=(other, stop))
if {is_busy}:
    thread.start()
moe.forward_sft(*batch)
how_long = sorted(seconds(lambda: trained(moe)) for _ in range(5))[2]
num = 0
try:
    for i in range(NUM):
        moe.step, num_cached, is_forward = 5, 1, i % 2 == 0
        if not is_forward:
            moe.forward_sft(*batch)
            num_cached = 2
        step = moe.step
        forward = lambda: moe.forward_sft(x, ids, weights)
        call = forward if is_forward else (lambda: moe.backward(grad_output))
        if interrupted(call, how_long):
            num += 1
            assert (moe.num_cached, moe.step) == (num_cached, step), (moe.num_cached, moe.step, is_forward)
            moe.cpu_infer.sync()  # what was queued for the call may run only now
            assert (moe.num_cached, moe.step) == (num_cached, step), (moe.num_cached, moe.step, is_forward)
            if is_forward:
                assert_same(trained(moe), expected)
            else:
                assert_same(by_name(moe.backward(grad_output)).values(), expected[1:])
        elif is_forward:
            assert (moe.num_cached, moe.step) == (2, 6)
            assert_same(by_name(moe.backward(grad_output)).values(), expected[1:])
        assert moe.num_cached == 1
finally:
    stop.set()
if {is_busy}:
    thread.join()
print(num)
"""
    assert_ends_well(script)


def test_interrupted_passes_that_were_submitted() -> None:
    """One whose submit was interrupted is not pending and never was; one whose sync was is still pending."""
    script = """
moe = student.wrapper(P, lora_dropout=0.25, max_cache_depth=2)
expected = trained(moe)
how_long = sorted(seconds(lambda: trained(moe)) for _ in range(5))[2]

def is_pending(sync):
    try:
        sync()
    except RuntimeError as error:
        assert "no pass of layer" in str(error), error
        return False
    return True

def tried(submit, sync, state, after):
    if interrupted(submit, how_long / 20):
        moe.cpu_infer.sync()
        assert state() == before and not is_pending(sync), state()
        return 1
    if not interrupted(sync, how_long):
        assert state() == after, state()
        return 0
    assert is_pending(sync), "interrupted in sync"
    assert state() == after, state()
    return 1

state = lambda: (moe.num_cached, moe.step)
num = 0
for i in range(NUM):
    moe.step = 5
    before = state()
    num += tried(lambda: moe.submit_forward_sft(x, ids, weights), moe.sync_forward_sft, state, (1, 6))
    if moe.num_cached == 0:
        moe.forward_sft(*batch)
    before = state()
    num += tried(lambda: moe.submit_backward(grad_output), moe.sync_backward, state, (0, 6))
    if moe.num_cached == 1:
        assert_same(by_name(moe.backward(grad_output)).values(), expected[1:])
print(min(num, NUM))
"""
    assert_ends_well(script)


def test_taking_back_a_pass_that_has_not_begun() -> None:
    """The low-level task: whenever it is taken back, the saved passes are as they were."""
    script = """
moe = student.wrapper(P, max_cache_depth=3)
engine, outs = moe.cpu_infer, [np.empty(batch.x.shape, batch.x.dtype) for _ in range(3)]
tasks = [moe._layer.forward_sft_task(*batch, out, True) for out in outs]
tasks[0].revoke()
for task in tasks:
    engine.submit(task)
engine.sync()
assert (moe.num_cached, moe.step) == (2, 2)
tasks[1].revoke()  # not the last one: the number of the next stays
assert (moe.num_cached, moe.step) == (1, 2)
tasks[1].revoke()
tasks[2].revoke()
assert (moe.num_cached, moe.step) == (0, 1)
moe.forward_sft(*batch)
moe.clear_cache()
tasks[2].revoke()
assert (moe.num_cached, moe.step) == (0, 2)
"""
    done = run_python(SETUP + script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_used_pass_does_not_come_back_after_others_were_forgotten() -> None:
    script = """
moe = student.wrapper(P, max_cache_depth=2)
moe.forward_sft(*batch)
result, task = moe._backward_task(grad_output, None, False, None, None)
moe.cpu_infer.run(task)
assert moe.num_cached == 0
task.revoke()
assert moe.num_cached == 1
assert_same(by_name(moe.backward(grad_output)).values(), by_name(result.given()).values())
for forget in (moe.clear_cache, lambda: layer.load_into(moe)):
    moe.forward_sft(*batch)
    result, task = moe._backward_task(grad_output, None, False, None, None)
    moe.cpu_infer.run(task)
    forget()
    task.revoke()
    assert moe.num_cached == 0
"""
    done = run_python(SETUP + script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_interrupt_right_after_a_pass_was_queued() -> None:
    script = """
class Interrupting:
    def __init__(self, engine):
        self.engine = engine

    def submit(self, task):
        self.engine.submit(task)
        raise KeyboardInterrupt

def queued_and_interrupted(submit, pending, sync):
    engine = pending._engine
    pending._engine = Interrupting(engine)
    try:
        submit()
        print("not interrupted")
    except KeyboardInterrupt:
        pending._engine = engine
    engine.sync()
    try:
        sync()
        print("pending")
    except RuntimeError:
        pass

moe = student.wrapper(P, lora_dropout=0.25, max_cache_depth=2)
expected = trained(moe)
moe.step = 5
for _ in range(20):
    queued_and_interrupted(lambda: moe.submit_forward_sft(*batch), moe._forward, moe.sync_forward_sft)
    assert (moe.num_cached, moe.step) == (0, 5)
moe.forward_sft(*batch)
for _ in range(20):
    queued_and_interrupted(lambda: moe.submit_backward(grad_output), moe._backward, moe.sync_backward)
    assert (moe.num_cached, moe.step) == (1, 6)
assert_same(by_name(moe.backward(grad_output)).values(), expected[1:])
"""
    done = run_python(SETUP + script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
