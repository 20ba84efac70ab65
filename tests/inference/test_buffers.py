"""The memory that calls reuse."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from layers import bf16

from ktmoe_np import KExpertsCPUBuffer, KExpertsSFTBuffer, KTMoEWrapper

get = KExpertsCPUBuffer.get_buffer


@pytest.fixture(autouse=True)
def _no_buffers() -> Iterator[None]:
    KExpertsCPUBuffer.clear_buffer_cache()
    yield
    KExpertsCPUBuffer.set_capture_batch_sizes([])
    KExpertsCPUBuffer.clear_buffer_cache()


def addresses(batch_size: int) -> list[int]:
    return [batch.input.ctypes.data for batch in get(batch_size, 8, 2)]


def test_two_slots_with_memory_of_their_own() -> None:
    buffers = get(5, 8, 2)
    assert len(buffers) == KExpertsCPUBuffer.buffer_depth == 2
    arrays: list[Any] = []
    for batch in buffers:
        shapes = {
            "input": ((5, 8), bf16),
            "topk_ids": ((5, 2), np.dtype(np.int64)),
            "num_tokens": ((1,), np.dtype(np.int64)),
            "immediate_ids": ((5, 2), np.dtype(np.int64)),
            "deferred_ids": ((5, 2), np.dtype(np.int64)),
            "weights": ((5, 2), np.dtype(np.float32)),
            "output": ((5, 8), bf16),
            "deferred_output": ((5, 8), np.dtype(np.float32)),
        }
        for name, (shape, dtype) in shapes.items():
            array = getattr(batch, name)
            assert (array.shape, array.dtype) == (shape, dtype), name
            assert array.flags.c_contiguous
            assert array.flags.writeable
            arrays.append(array)
    for i, array in enumerate(arrays):
        assert not any(np.shares_memory(array, other) for other in arrays[:i])


def test_the_same_slots_again() -> None:
    assert get(5, 8, 2) is get(5, 8, 2)


@pytest.mark.parametrize("other", [(6, 8, 2), (5, 9, 2), (5, 8, 3)])
def test_other_sizes_have_other_slots(other: tuple[int, int, int]) -> None:
    buffers = get(5, 8, 2)
    assert get(*other)[0].input.shape == other[:2]
    assert get(*other) is not buffers


def test_the_last_size_that_is_not_captured_is_kept_and_the_one_before_let_go() -> None:
    batch = weakref.ref(get(5, 8, 2)[0].input)
    get(5, 8, 2)
    gc.collect()
    assert batch() is not None
    get(6, 8, 2)
    gc.collect()
    assert batch() is None


def test_captured_sizes_stay_where_they_are() -> None:
    KExpertsCPUBuffer.set_capture_batch_sizes([4, 2])
    captured = {size: addresses(size) for size in (2, 4)}
    for size in (7, 2, 9, 4, 7):
        get(size, 8, 2)
    assert {size: addresses(size) for size in (2, 4)} == captured


def test_a_size_that_was_used_before_it_was_captured() -> None:
    first = addresses(4)
    KExpertsCPUBuffer.set_capture_batch_sizes([4])
    captured = addresses(4)
    get(7, 8, 2)
    assert addresses(4) == captured
    assert first  # may differ: it was not captured yet


def test_captured_sizes_of_two_models() -> None:
    KExpertsCPUBuffer.set_capture_batch_sizes([4])
    one, other = get(4, 8, 2), get(4, 16, 2)
    get(7, 8, 2)
    assert get(4, 8, 2) is one
    assert get(4, 16, 2) is other


def test_clearing_lets_go_but_of_what_is_in_use() -> None:
    KExpertsCPUBuffer.set_capture_batch_sizes([4])
    held, dropped = get(4, 8, 2), weakref.ref(get(6, 8, 2)[0].input)
    KExpertsCPUBuffer.clear_buffer_cache()
    gc.collect()
    assert dropped() is None
    held[0].input[...] = 1
    assert get(4, 8, 2) is not held
    assert KExpertsCPUBuffer.get_capture_batch_sizes() == [4]


def test_capture_sizes_are_a_sorted_list_of_their_own() -> None:
    sizes = [8, 1, 2, 8]
    KTMoEWrapper.set_capture_batch_sizes(sizes)
    assert KTMoEWrapper.get_capture_batch_sizes() == KExpertsCPUBuffer.get_capture_batch_sizes() == [1, 2, 8]
    sizes.append(99)
    KTMoEWrapper.get_capture_batch_sizes().append(99)
    assert KTMoEWrapper.get_capture_batch_sizes() == [1, 2, 8]
    KTMoEWrapper.set_capture_batch_sizes(np.array([3]))
    assert KTMoEWrapper.get_capture_batch_sizes() == [3]
    KTMoEWrapper.set_capture_batch_sizes([])
    assert KTMoEWrapper.get_capture_batch_sizes() == []


@pytest.mark.parametrize("wrong", [0, -3])
def test_capture_sizes_that_cannot_be(wrong: int) -> None:
    KExpertsCPUBuffer.set_capture_batch_sizes([5])
    with pytest.raises(ValueError, match=f"capture_batch_sizes: got {wrong}, expected sizes of 1 or more"):
        KExpertsCPUBuffer.set_capture_batch_sizes([4, wrong])
    assert KExpertsCPUBuffer.get_capture_batch_sizes() == [5]


def test_an_empty_batch() -> None:
    assert get(0, 8, 2)[0].input.shape == (0, 8)


def test_the_factory_clears_the_same_cache() -> None:
    buffers = get(5, 8, 2)
    KTMoEWrapper.clear_buffer_cache()
    assert get(5, 8, 2) is not buffers


def test_many_threads_get_the_same_slots() -> None:
    KExpertsCPUBuffer.set_capture_batch_sizes([4])
    barrier, seen = threading.Barrier(8), []

    def work() -> None:
        barrier.wait()
        seen.append(get(4, 8, 2))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(buffers is seen[0] for buffers in seen)


def test_buffers_of_training() -> None:
    KExpertsSFTBuffer.clear_buffer_cache()
    buffers = KExpertsSFTBuffer.get_buffer(5, 8, 2)
    assert KExpertsSFTBuffer.get_buffer(5, 8, 2) is buffers
    assert len(buffers) == KExpertsSFTBuffer.buffer_depth == 2
    rows, routes = ("input", "output", "grad_output", "grad_input"), ("weights", "grad_weights")
    kinds = dict.fromkeys(rows, ((5, 8), bf16)) | dict.fromkeys(routes, ((5, 2), np.float32))
    kinds["ids"] = ((5, 2), np.int64)
    arrays = [getattr(batch, name) for batch in buffers for name in kinds]
    assert [(array.shape, array.dtype) for array in arrays] == 2 * list(kinds.values())
    for i, array in enumerate(arrays):
        assert not any(np.shares_memory(array, other) for other in arrays[:i])
    KExpertsSFTBuffer.set_capture_batch_sizes([5])
    assert KTMoEWrapper.get_capture_batch_sizes() == []  # those of inference are others
    KTMoEWrapper.clear_buffer_cache()
    assert KExpertsSFTBuffer.get_buffer(5, 8, 2) is buffers
    KTMoEWrapper.clear_sft_buffer_cache()
    assert KExpertsSFTBuffer.get_buffer(5, 8, 2) is not buffers
    KExpertsSFTBuffer.set_capture_batch_sizes([])
    KExpertsSFTBuffer.clear_buffer_cache()


def test_buffers_of_training_are_of_a_thread() -> None:
    KExpertsSFTBuffer.clear_buffer_cache()
    buffers, others = KExpertsSFTBuffer.get_buffer(5, 8, 2), []
    matrices = KExpertsSFTBuffer.get_matrices(buffers[0].claims, {"a": (2, 3)})  # of any object

    def work() -> None:
        others.append(KExpertsSFTBuffer.get_buffer(5, 8, 2))
        others.append(KExpertsSFTBuffer.get_matrices(buffers[0].claims, {"a": (2, 3)}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert others[0] is not buffers
    assert others[1] is not matrices
    assert KExpertsSFTBuffer.get_buffer(5, 8, 2) is buffers
    assert KExpertsSFTBuffer.get_matrices(buffers[0].claims, {"a": (2, 3)}) is matrices
    assert (matrices.arrays["a"].shape, matrices.arrays["a"].dtype) == ((2, 3), np.float32)
    KExpertsSFTBuffer.clear_buffer_cache()
