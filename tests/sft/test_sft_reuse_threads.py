"""Layers that reuse their buffers, in several threads: each has slots of its own."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from layers import assert_same_bits
from reuse_cases import P, assert_same, copied, drawn, drawn_student, pair, step

from ktmoe_np import KTMoEWrapper

pytestmark = [pytest.mark.kernels, pytest.mark.engine]


@pytest.fixture(autouse=True)
def _no_buffers() -> Iterator[None]:
    KTMoEWrapper.clear_sft_buffer_cache()
    yield
    KTMoEWrapper.clear_sft_buffer_cache()


def in_threads(works: list[Callable[[], None]]) -> None:
    """Run each in a thread of its own; the first exception is raised here."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_no_thread_overwrites_the_results_of_another() -> None:
    """Layers with the same slot train in threads; each result is looked at when all threads have theirs."""
    num = 4
    students = [drawn_student(seed=seed) for seed in range(num)]
    layers = [s.wrapper(P, layer_idx=2 * i, reuse_buffers=True) for i, s in enumerate(students)]
    plain = [student.wrapper(P) for student in students]
    trainings = [[drawn(student, 6, seed) for seed in range(5)] for student in students]
    expected = [[copied(step(moe, t)) for t in each] for moe, each in zip(plain, trainings, strict=True)]
    barrier = threading.Barrier(num, timeout=20)

    def work(i: int) -> None:
        for training, right in zip(trainings[i], expected[i], strict=True):
            found = step(layers[i], training)
            barrier.wait()
            assert_same(found, right)
            barrier.wait()

    in_threads([lambda i=i: work(i) for i in range(num)])  # type: ignore[misc]


def test_threads_that_share_a_layer() -> None:
    student = drawn_student()
    reusing, plain = pair(student)
    batches = [drawn(student, 6, seed)[0] for seed in range(4)]
    expected = [plain.forward(*batch) for batch in batches]
    lock, barrier = threading.Lock(), threading.Barrier(4, timeout=20)
    trained = copied(step(plain, drawn(student, 6, 9)))

    def work(i: int) -> None:
        for _ in range(10):
            y = reusing.forward(*batches[i])
            barrier.wait()
            assert_same_bits(y, expected[i])
            with lock:  # a forward pass and its backward pass
                found = step(reusing, drawn(student, 6, 9))
            barrier.wait()
            assert_same(found, trained)

    in_threads([lambda i=i: work(i) for i in range(4)])  # type: ignore[misc]


def test_the_arrays_of_a_thread_go_with_it() -> None:
    student = drawn_student()
    moe = student.wrapper(P, reuse_buffers=True)
    training, bases = drawn(student, 6, 0), []

    def work() -> None:
        bases.extend(weakref.ref(array.base) for array in step(moe, training).values())
        assert all(base() is not None for base in bases)

    in_threads([work])
    gc.collect()
    assert all(base() is None for base in bases)
    assert bases


def test_clearing_is_for_all_threads() -> None:
    moe_ready, cleared = threading.Event(), threading.Event()
    student = drawn_student()
    moe = student.wrapper(P, reuse_buffers=True)
    training, seen = drawn(student, 6, 0), []

    def work() -> None:
        held = step(moe, training)
        moe_ready.set()
        assert cleared.wait(60)
        seen.append(np.shares_memory(held["y"], step(moe, training)["y"]))

    thread = threading.Thread(target=work)
    thread.start()
    assert moe_ready.wait(60)
    KTMoEWrapper.clear_sft_buffer_cache()
    cleared.set()
    thread.join()
    assert seen == [False]
