"""The locks of the package: threads, signal handlers that re-enter a call, interrupts, forks.

What forks or is interrupted is a script in a process of its own, which a timeout ends if it hangs.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
from layers import IS_SLOW, run_python

from ktmoe_np import kt_kernel_ext as ext

pytestmark = pytest.mark.engine

NUM_FORKS = 20 if IS_SLOW else 50


def test_one_thread_at_a_time() -> None:
    lock, count, together = ext.CallLock("x"), 0, []

    def add() -> None:
        nonlocal count
        for _ in range(2000):
            with lock:
                before = count
                together.append(0)
                count = before + 1

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == len(together) == 8000


def test_a_thread_never_waits_for_itself() -> None:
    lock = ext.CallLock("x")
    with lock:
        with pytest.raises(RuntimeError, match=r"^x: got a call from within another one of the same thread"):
            lock.__enter__()
        free = threading.Event()

        def take() -> None:
            with lock:
                free.set()

        other = threading.Thread(target=take)
        other.start()
        assert not free.wait(0.1)
    assert free.wait(10.0)
    other.join()
    with lock:
        pass


SETUP = """
import os, random, signal, sys, threading, time
import numpy as np
from layers import assert_same_bits, draw_batch, draw_layer
from sft_layers import Student, draw_lora
from ktmoe_np import DeferralChain, KExpertsCPUBuffer, KTMoEWrapper
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.cpuinfer import _MoEBase
from ktmoe_np.io.shared import SharedCache

E, I, H, P, T = 4, 24, 40, 2, 6
layer = draw_layer(np.random.default_rng(0), E, I, H)
batch = draw_batch(np.random.default_rng(1), layer, T, P)
student = Student(layer, draw_lora(np.random.default_rng(2), layer, 4), 4)
"""


def output_of(script: str, timeout: float = 120.0) -> str:
    done = run_python(SETUP + script, timeout=timeout)
    assert (done.returncode, done.stderr) == (0, "")
    return str(done.stdout)


def test_an_interrupt_never_leaves_a_lock_taken() -> None:
    script = """
lock, times, stop = ext.CallLock("x"), 0, threading.Event()

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)

def others():
    while not stop.is_set():
        with lock:
            pass

thread = threading.Thread(target=others)
thread.start()
num = 0
while num < 300:
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 1e-3))
        while True:
            with lock:
                times += 1
    except KeyboardInterrupt:
        num += 1
    with lock:  # not held by this thread
        pass
stop.set()
thread.join(20)
print(thread.is_alive(), times > 0)
"""
    assert output_of(script) == "False True\n"


def test_an_interrupt_of_a_thread_that_waits_for_a_lock() -> None:
    script = """
lock, holds, done = ext.CallLock("x"), threading.Event(), threading.Event()

def hold():
    with lock:
        holds.set()
        done.wait(20)

thread = threading.Thread(target=hold)
thread.start()
holds.wait()
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGUSR1, interrupt)
try:
    with lock:
        print("taken")
except KeyboardInterrupt:
    print("interrupted")
done.set()
thread.join()
with lock:
    print("free")
"""
    assert output_of(script) == "interrupted\nfree\n"


def test_a_forked_child_of_a_thread_that_does_not_hold_the_lock() -> None:
    script = """
free, of_engine = ext.CallLock("x"), ext.CallLock("x", of_engine=True)
holds, done = threading.Event(), threading.Event()

def hold():
    with free, of_engine:
        holds.set()
        done.wait(20)

thread = threading.Thread(target=hold)
thread.start()
holds.wait()
pid = os.fork()
if pid == 0:
    for _ in range(3):
        with free:
            pass
    try:
        with of_engine:
            pass
    except RuntimeError as error:
        os._exit(0 if "fork" in str(error) and "KTMoEWrapper.reset_engine()" in str(error) else 2)
    os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
done.set()
thread.join()
with free, of_engine:
    pid = os.fork()  # the child inherits what it holds
    if pid == 0:
        try:
            with free:
                pass
        except RuntimeError:
            os._exit(0)
        os._exit(4)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    assert output_of(script) == ""


#: What threads do all the time while the process forks: (made, called). A child uses what is of no engine as
#: it is; of what is of one it is refused the parent's, and makes its own.
OF_NO_ENGINE = {
    "open files": ("SharedCache()", "it.get(random.choice('abc'), lambda: {1})"),
    "buffers": ("KExpertsCPUBuffer", "it.get_buffer(random.choice((1, 2, 3)), H, P)"),
}
OF_AN_ENGINE = {
    "the engine": ("layer.wrapper(P)", "it._get_cpu_infer()"),
    "a pass": ("layer.wrapper(P)", "(it.submit_forward(*batch), it.sync_forward())"),
    "adapters": ("student.wrapper(P)", "it.update_lora_weights(**student.lora)"),
    "the engine's queue": ("layer.wrapper(P)", "it.cpu_infer.sync()"),
    "deferred experts": (
        "(layer.wrapper(P, max_deferred_experts_per_token=1), DeferralChain())",
        "(it[0].forward(*batch, chain=it[1]), it[0].drain_deferred(chain=it[1]))",
    ),
    "training": (
        "student.wrapper(P)",
        "(it.forward_sft(*batch), it.backward(np.ones((T, H), batch.x.dtype)))",
    ),
}


@pytest.mark.parametrize("of_engine", [False, True], ids=["of no engine", "of an engine"])
def test_forks_while_threads_hold_locks(of_engine: bool) -> None:
    pairs = ", ".join(
        f"(lambda: {made}, lambda it: {called})"
        for made, called in (OF_AN_ENGINE if of_engine else OF_NO_ENGINE).values()
    )
    script = f"""
plain = layer.wrapper(P)
expected, stop = plain.forward(*batch), threading.Event()
signal.signal(signal.SIGALRM, signal.SIG_DFL)
sys.setswitchinterval(1e-5)
kinds = [{pairs}]
its = [make() for make, _ in kinds]

def hammer(use, it):
    while not stop.is_set():
        use(it)

def is_refused(use, it):
    try:
        use(it)
    except RuntimeError as error:
        return "fork" in str(error)
    return False

def child():
    if {of_engine}:
        assert all(is_refused(use, it) for (_, use), it in zip(kinds, its))
    _MoEBase.reset_cpu_infer()
    for (make, use), it in zip(kinds, its):
        use(make() if {of_engine} else it)
    assert_same_bits(layer.forward(batch), expected)

threads = [threading.Thread(target=hammer, args=(use, it)) for (_, use), it in zip(kinds, its)]
for thread in threads:
    thread.start()
for _ in range({NUM_FORKS}):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # a child that hangs
        try:
            child()
        except BaseException as error:
            os.write(1, repr(error).encode())
            os._exit(2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != 0:
        break
stop.set()
for thread in threads:
    thread.join()
print(code)
"""
    assert output_of(script, timeout=250.0) == "0\n"


def test_a_chain_of_a_parent_process() -> None:
    """The deferred output there is of the parent's engine; the child must not begin with it."""
    script = """
first, second = (layer.wrapper(P, layer_idx=i, max_deferred_experts_per_token=1) for i in range(2))
chain = DeferralChain()
first.forward(*batch, chain=chain)
pid = os.fork()
if pid == 0:
    messages = []
    _MoEBase.reset_cpu_infer()
    second = layer.wrapper(P, layer_idx=1, max_deferred_experts_per_token=1)
    for call in (lambda: second.forward(*batch, chain=chain), lambda: second.drain_deferred(chain=chain)):
        try:
            call()
        except RuntimeError as error:
            messages.append(str(error))
    os._exit(0 if len(messages) == 2 and "another engine" in messages[0] and "fork" in messages[1] else 2)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert second.forward(*batch, chain=chain).shape == (T, H)
second.drain_deferred(chain=chain)
"""
    assert output_of(script) == ""


#: Calls of the package, in the main thread and in a signal handler that interrupts these.
CALLS: dict[str, Any] = {
    "open files": "held.get('a', lambda: set(range(100)))",
    "the engine": "moe._get_cpu_infer()",
    "buffers": "KExpertsCPUBuffer.get_buffer(random.choice((1, 2, 3)), H, P)",
    "forward": "assert_same_bits(moe.forward(*batch), expected)",
    "a pass": "moe.submit_forward(*batch); assert_same_bits(moe.sync_forward(), expected)",
    "the end of a pass": "moe.sync_forward()",
    "adapters": "sft.update_lora_weights(**student.lora)",
    "training": "sft.forward_sft(*batch); sft.backward(np.ones((T, H), batch.x.dtype))",
    "deferred experts": "first.forward(*batch, chain=chain); first.drain_deferred(chain=chain)",
    "the shared chain": "first.forward(*batch); first.drain_deferred()",
    "sync": "moe.cpu_infer.sync()",
    "a new layer": "layer.wrapper(P)",
}

#: What a call is told that cannot be made there.
REFUSALS = (
    "from within another one of the same thread",
    "is pending",
    "another call waits",
    "are left over from",
    "expected fewer than max_cache_depth",
    "expected a forward_sft with save_for_backward first",
)


@pytest.mark.parametrize("call", CALLS)
def test_signal_handlers_that_call_the_package(call: str) -> None:
    """They are told what cannot be, or it works; neither they nor the calls they interrupt ever hang."""
    script = f"""
held = SharedCache()
moe, sft = layer.wrapper(P, layer_idx=5), student.wrapper(P, layer_idx=6)
first, chain = layer.wrapper(P, layer_idx=7, max_deferred_experts_per_token=1), DeferralChain()
expected, refused, num = moe.forward(*batch), set(), 0

def tried(call):
    try:
        call()
    except RuntimeError as error:
        if not any(message in str(error) for message in {REFUSALS!r}):
            raise
        refused.add(str(error))

calls = [{", ".join(f"lambda: ({each.replace('; ', ', ')})" for each in CALLS.values())}]
main = lambda: ({CALLS[call].replace("; ", ", ")})
handled = False

def handle(*_):
    global num, handled
    if handled:
        return
    handled = True
    try:
        num += 1
        tried(main)
        tried(random.choice(calls))
    finally:
        handled = False

signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
end = time.monotonic() + {3 if IS_SLOW else 0.7}
while time.monotonic() < end or num < 20:
    tried(main)
signal.setitimer(signal.ITIMER_REAL, 0)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
for pending in (moe.sync_forward, first.sync_forward):
    tried(pending)
first.drain_deferred()
first.drain_deferred(chain=chain)
sft.clear_cache()
tried = None
moe.submit_forward(*batch)
assert_same_bits(moe.sync_forward(), expected)
first.forward(*batch)
first.drain_deferred()
sft.forward_sft(*batch)
sft.backward(np.ones((T, H), batch.x.dtype))
sft.update_lora_weights(**student.lora)
print(num >= 20)
"""
    assert output_of(script, timeout=60.0) == "True\n"
