"""The engine and its process: forks, exits, signals, and that nothing is ever printed.

Each test is a script in a process of its own; what it prints is what the test wants to know.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from layers import ISA, run_python

pytestmark = pytest.mark.engine

SETUP = """
import gc, json, multiprocessing, os, signal, sys, threading
import numpy as np
from layers import assert_same_bits, batch_taking, bf16, draw_batch, draw_layer, engine_of, low_level_moe
from ktmoe_np import KTMoEWrapper
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.cpuinfer import _MoEBase

E, I, H, P, T = 4, 24, 40, 2, 6
layer = draw_layer(np.random.default_rng(0), E, I, H)
batch = draw_batch(np.random.default_rng(1), layer, T, P)
heavy = draw_layer(np.random.default_rng(2), E, 128, 256)
"""


def output_of(script: str, file: Path | None = None, timeout: float = 60.0) -> str:
    """What a script prints; it must end well and have no complaints."""
    done = run_python(SETUP + script, file=file, timeout=timeout)
    assert (done.returncode, done.stderr) == (0, "")
    return str(done.stdout)


# ---- forks ----


def test_a_forked_child() -> None:
    script = """
moe = layer.wrapper(P)
expected = moe.forward(*batch)
earlier = moe.cpu_infer.submit(moe._layer.forward_task(*batch, np.empty_like(expected)))
moe.submit_forward(*batch)  # one is under way while the process forks

def refused(call, *args):
    try:
        call(*args)
    except RuntimeError as error:
        return "fork" in str(error) and "spawn" in str(error) and "KTMoEWrapper.reset_engine()" in str(error)
    return False

pid = os.fork()
if pid == 0:
    checks = [
        refused(moe.forward, *batch),
        refused(moe.sync_forward),
        refused(moe.submit_forward, *batch),
        refused(layer.load_into, moe),
        refused(moe.cpu_infer.sync),
        refused(moe.cpu_infer.wait, earlier),
        refused(moe.cpu_infer.shutdown),
        refused(layer.wrapper, P),
    ]
    _MoEBase.reset_cpu_infer()  # although a layer is loaded: it cannot run any more
    again = layer.wrapper(P)
    assert_same_bits(again.forward(*batch), expected)
    again.submit_forward(*batch)
    assert_same_bits(again.sync_forward(), expected)
    del moe
    gc.collect()
    print(checks, flush=True)
    sys.exit(0 if all(checks) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert_same_bits(moe.sync_forward(), expected)
assert_same_bits(moe.forward(*batch), expected)
"""
    assert output_of(script) == f"{[True] * 8}\n"


def test_a_child_that_forgets_the_engine() -> None:
    """The layers of the parent, and the engine with what was queued, may just be dropped."""
    script = """
engine, batch = engine_of(2), batch_taking(0.01, heavy, P)
moe = low_level_moe(engine, heavy, P)
for _ in range(20):
    engine.submit(moe.forward_task(*batch, np.empty(batch.x.shape, bf16)))
pid = os.fork()
if pid == 0:
    del engine, moe
    gc.collect()
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
engine.sync()
"""
    assert output_of(script) == ""


def test_forks_while_threads_compute() -> None:
    script = """
moe = layer.wrapper(P)
expected, stop = moe.forward(*batch), threading.Event()

def compute():
    while not stop.is_set():
        assert_same_bits(moe.forward(*batch), expected)

threads = [threading.Thread(target=compute) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        _MoEBase.reset_cpu_infer()
        assert_same_bits(layer.forward(batch), expected)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
stop.set()
for thread in threads:
    thread.join()
"""
    assert output_of(script) == ""


@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver"])
def test_multiprocessing(tmp_path: Path, how: str) -> None:
    script = f"""
def work(pipe):
    if {how!r} == "fork":
        _MoEBase.reset_cpu_infer()
    pipe.send(layer.forward(batch).view(np.uint16))

if __name__ == "__main__":
    expected = layer.forward(batch)
    context = multiprocessing.get_context({how!r})
    mine, others = context.Pipe()
    process = context.Process(target=work, args=(others,))
    process.start()
    assert_same_bits(mine.recv().view(bf16), expected)
    process.join()
    print(process.exitcode)
"""
    assert output_of(script, tmp_path / "script.py") == "0\n"


# ---- the end ----


@pytest.mark.parametrize("held_by", ["a variable", "a module", "a cycle", "nobody"])
@pytest.mark.parametrize("kind", ["wrapper", "low level"])
def test_the_end_with_work_pending(kind: str, held_by: str) -> None:
    script = f"""
batch = batch_taking(0.005, heavy, P)
if {kind!r} == "wrapper":
    moe = heavy.wrapper(P)
    engine, task = moe.cpu_infer, moe._layer.forward_task
else:
    engine = engine_of(2)
    moe = low_level_moe(engine, heavy, P)
    task = moe.forward_task
for _ in range(20):
    engine.submit(task(*batch, np.empty(batch.x.shape, bf16)))
if {kind!r} == "wrapper":
    moe.submit_forward(*batch)
if {held_by!r} == "a module":
    sys.kept_by_a_test = engine, moe
elif {held_by!r} == "a cycle":
    cycle = [engine, moe]
    cycle.append(cycle)
    del cycle
if {held_by!r} != "a variable":
    del engine, moe, task
"""
    assert output_of(script, timeout=30.0) == ""


#: The call of one of several threads, and what it is made with.
DAEMONS = {
    "forward": ("heavy.wrapper(P, layer_idx=i)", "moe.forward(*batch)"),
    "submit": ("heavy.wrapper(P, layer_idx=i)", "moe.submit_forward(*batch); moe.sync_forward()"),
    "run": ("low_level_moe(engine, heavy, P)", "engine.run(moe.forward_task(*batch, outs[i]))"),
}


@pytest.mark.parametrize("call", DAEMONS)
def test_the_end_while_daemon_threads_compute(call: str) -> None:
    """They may be told that the engine is gone, but must not take the process down with them."""
    made, called = DAEMONS[call]
    script = f"""
engine, batch = engine_of(2), batch_taking(0.02, heavy, P)
outs = [np.empty(batch.x.shape, bf16) for _ in range(3)]
started = threading.Semaphore(0)

def compute(i, moe):
    try:
        while True:
            started.release()
            {called}
    except RuntimeError:
        pass  # shut down

for i in range(3):
    threading.Thread(target=compute, args=(i, {made}), daemon=True).start()
for _ in range(9):
    started.acquire()
"""
    assert output_of(script, timeout=30.0) == ""


def test_an_exception_at_the_end_of_a_script() -> None:
    done = run_python(SETUP + "moe = layer.wrapper(P)\nmoe.submit_forward(*batch)\nraise SystemExit(5)\n")
    assert (done.returncode, done.stdout, done.stderr) == (5, "", "")


# ---- Ctrl-C ----


def test_an_interrupt_while_waiting() -> None:
    script = """
batch = batch_taking(0.01, heavy, P)
moe = heavy.wrapper(P)
expected, engine = moe.forward(*batch), moe.cpu_infer
outs = [np.empty_like(expected) for _ in range(60)]
main = threading.get_ident()

def interrupt():
    while sys._current_frames()[main].f_code.co_name != "wait_for_all":
        pass
    os.kill(os.getpid(), signal.SIGINT)

def wait_for_all():
    engine.sync()

threading.Thread(target=interrupt).start()
last = [engine.submit(moe._layer.forward_task(*batch, out)) for out in outs][-1]
try:
    wait_for_all()
except KeyboardInterrupt:
    print("interrupted", engine.num_completed < last.number)
moe.submit_forward(*batch)
assert_same_bits(moe.sync_forward(), expected)
engine.sync()
for out in outs:
    assert_same_bits(out, expected)
"""
    assert output_of(script) == "interrupted True\n"


def test_an_interrupt_of_a_long_call() -> None:
    """It comes between two chunks."""
    script = """
batch = batch_taking(0.6, heavy, P)
num = len(batch.ids)
moe = heavy.wrapper(P, chunked_prefill_size=max(1, num // 40))
out = np.full(batch.x.shape, 7, np.float32)
engine = moe.cpu_infer
before = engine.num_completed

def interrupt():
    while engine.num_completed < before + 3:
        pass
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    moe.forward(*batch, out=out)
except KeyboardInterrupt:
    print("interrupted", bool((out[-1] == 7).all()))
few = batch.rows(slice(5))
assert_same_bits(moe.forward(*few), heavy.forward(few))
"""
    assert output_of(script) == "interrupted True\n"


def test_an_interrupt_of_a_submitted_pass() -> None:
    script = """
batch = batch_taking(0.3, heavy, P)
moe = heavy.wrapper(P)
out, few, main = np.zeros(batch.x.shape, np.float32), batch.rows(slice(5)), threading.get_ident()

def interrupt():
    while sys._current_frames()[main].f_code.co_name != "sync":
        pass
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
moe.submit_forward(*batch, out=out)
try:
    moe.sync_forward()
except KeyboardInterrupt:
    print("interrupted")
try:
    moe.sync_forward()
except RuntimeError as error:
    assert "is pending" in str(error)
assert_same_bits(moe.forward(*few), heavy.forward(few))  # after the pass: tasks keep their order
assert_same_bits(out, heavy.forward(batch, out=np.empty_like(out)))
"""
    assert output_of(script) == "interrupted\n"


def test_signal_handlers_run_on_the_main_thread_alone() -> None:
    """The engine's threads take no signal away from the application."""
    script = """
moe = layer.wrapper(P)
seen = []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(threading.current_thread() is threading.main_thread()))
for _ in range(100):
    moe.submit_forward(*batch)
    os.kill(os.getpid(), signal.SIGUSR1)
    moe.sync_forward()
print(len(seen) > 0, all(seen))
"""
    assert output_of(script) == "True True\n"


# ---- silence, and one process's misuse of a layer ----


def test_nothing_is_ever_printed() -> None:
    script = """
def tried(call, *args, **options):
    try:
        call(*args, **options)
    except Exception:
        pass

moe = layer.wrapper(P)
x, ids, weights = batch
tried(moe.forward, x, ids + E, weights)
tried(moe.forward, x, ids, weights[:1])
tried(moe.forward, x.astype(float), ids, weights)
tried(moe.load_weights_from_tensors, *layer.matrices[::-1])
tried(KTMoEWrapper, 0, 0, 0, 0, 0)
tried(KTMoEWrapper, 0, E, P, H, I, cpuinfer_threads=1000)
tried(ext.CPUInfer, 0)
tried(moe.cpu_infer.wait, 0)
moe.submit_forward(x, ids + E, weights)
tried(moe.sync_forward)
moe.submit_forward(x, ids + E, weights)  # no call waits
moe.forward(*batch)
moe.cpu_infer.submit(moe._layer.forward_task(*batch, np.empty((T, H), bf16)))
del moe
gc.collect()
"""
    assert output_of(script) == ""


def test_importing_starts_nothing() -> None:
    script = """
import os, sys
before = len(os.listdir("/proc/self/task"))
import ktmoe_np
print(len(os.listdir("/proc/self/task")) - before, "torch" in sys.modules, "jax" in sys.modules)
"""
    done = run_python("import numpy\n" + script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 False False\n", "")


def test_a_layer_on_two_engines_is_right_or_refused() -> None:
    """A layer belongs to the engine whose threads it was made with; nothing keeps it from another."""
    script = """
batch = batch_taking(0.004, heavy, P)
expected, engine, other = heavy.forward(batch), engine_of(2), engine_of(2)
moe = low_level_moe(engine, heavy, P)
outs = []
try:
    for _ in range(50):
        for either in (engine, other):
            out = np.full(expected.shape, np.nan, bf16)
            either.submit(moe.forward_task(*batch, out))
            outs.append(out)
    other.sync()
except (ValueError, RuntimeError) as error:
    assert "engine" in str(error)
    outs.clear()
engine.sync()
for out in outs:
    assert_same_bits(out, expected)
"""
    assert output_of(script) == ""


def test_threads_that_cannot_be_started() -> None:
    script = """
import resource
before = len(os.listdir("/proc/self/task"))
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    engine_of(2000)
except RuntimeError as error:
    print(str(error)[:29], len(os.listdir("/proc/self/task")) == before)
engine = engine_of(2)
moe = low_level_moe(engine, layer, P)
engine.run(moe.forward_task(*batch, np.empty((T, H), bf16)))
"""
    assert output_of(script) == "could not start thread 'ktmoe True\n"


def test_the_instruction_set_of_a_child() -> None:
    assert output_of("print(ext.isa_info()['active'])") == f"{ISA}\n"
