"""The config of a layer that trains, in the extension: its defaults, and the adapters that it may bring."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from layers import Batch, assert_same_bits, bf16
from sft_layers import Student, draw_student, draw_training

from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.sft import SFTOptions
from ktmoe_np.sft.gradients import LORA_NAMES

pytestmark = pytest.mark.asan

AnyArray = Any

E, I, H, P, R, T = 3, 20, 36, 2, 16, 5  # noqa: E741


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    made = ext.CPUInfer(2)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def student() -> Student:
    return draw_student(np.random.default_rng(0), (E, I, H), R, lora_alpha=32.0)


@pytest.fixture(scope="module")
def batch(student: Student) -> Batch:
    return draw_training(np.random.default_rng(1), student, T, P)[0]


@pytest.fixture(scope="module")
def expected(student: Student, batch: Batch) -> AnyArray:
    """What the layer gives with the student's adapters."""
    return student.wrapper(P).forward(*batch)


def make(engine: Any, student: Student, config: Any) -> Any:
    moe = ext.moe.AMXBF16_SFT_MOE(config)
    engine.run(moe.load_weights_task(*student.layer.matrices))
    return moe


def forward(engine: Any, moe: Any, batch: Batch) -> AnyArray:
    out = np.full((T, H), np.nan, bf16)
    engine.run(moe.forward_sft_task(*batch, out, False))
    return out


def new_config(engine: Any, **options: Any) -> Any:
    return ext.moe.MOESFTConfig(E, P, H, I, pool=engine.backend_, **options)


def test_defaults_are_those_of_the_options() -> None:
    config, options = ext.moe.MOESFTConfig(), SFTOptions()
    assert (config.lora_rank, config.lora_alpha) == (options.lora_rank, options.lora_alpha) == (16, 32.0)
    assert [getattr(config, name) for name in LORA_NAMES] == [None] * 6


@pytest.mark.parametrize("dtype", [np.float32, bf16])
@pytest.mark.parametrize("how", ["arguments", "attributes"])
def test_a_layer_begins_with_the_adapters_of_its_config(
    engine: Any, student: Student, batch: Batch, expected: AnyArray, how: str, dtype: Any
) -> None:
    given = {name: matrix.astype(dtype) for name, matrix in student.lora.items()}
    config = new_config(engine, **(given if how == "arguments" else {}))
    for name, matrix in given.items() if how == "attributes" else ():
        setattr(config, name, matrix)
    assert all(getattr(config, name) is matrix for name, matrix in given.items())
    assert_same_bits(forward(engine, make(engine, student, config), batch), expected)


def test_some_adapters_leave_the_others_zero(engine: Any, student: Student, batch: Batch) -> None:
    some = {name: student.lora[name] for name in ("up_lora_a", "up_lora_b", "down_lora_b")}
    lora = {name: some.get(name, np.zeros_like(matrix)) for name, matrix in student.lora.items()}
    expected = Student(student.layer, lora, R, 32.0).wrapper(P).forward(*batch)
    moe = make(engine, student, new_config(engine, **some))
    assert_same_bits(forward(engine, moe, batch), expected)


def test_a_layer_that_was_made_keeps_its_adapters(
    engine: Any, student: Student, batch: Batch, expected: AnyArray
) -> None:
    given = {name: matrix.copy() for name, matrix in student.lora.items()}
    config = new_config(engine, **given)
    moe = make(engine, student, config)
    for name, matrix in given.items():
        matrix[...] = np.nan
        setattr(config, name, None)
    assert_same_bits(forward(engine, moe, batch), expected)
    other = make(engine, student, config)  # of the same config, now without adapters
    assert_same_bits(forward(engine, other, batch), student.layer.forward(batch))
    assert_same_bits(forward(engine, moe, batch), expected)
    engine.run(moe.update_lora_weights_task(gate_lora_b=np.zeros((E, I, R), np.float32)))
    assert not np.array_equal(forward(engine, moe, batch), expected)


def test_arrays_are_read_when_the_layer_is_made(
    engine: Any, student: Student, batch: Batch, expected: AnyArray
) -> None:
    given = {name: np.zeros_like(matrix) for name, matrix in student.lora.items()}
    config = new_config(engine, **given)
    for name, matrix in given.items():
        matrix[...] = student.lora[name]
    assert_same_bits(forward(engine, make(engine, student, config), batch), expected)


REFUSED: dict[str, tuple[str, Any, type[Exception], str]] = {
    "dtype": (
        "gate_lora_b",
        np.zeros((E, I, R), np.float16),
        TypeError,
        rf"^gate_lora_b: got float16 \[{E}, {I}, {R}\], expected float32 or bfloat16 \[{E}, {I}, {R}\]$",
    ),
    "shape": (
        "down_lora_a",
        np.zeros((E, R - 1, I), np.float32),
        ValueError,
        rf"^down_lora_a: got float32 \[{E}, {R - 1}, {I}\], expected float32 or bfloat16 \[{E}, {R}, {I}\]$",
    ),
    "order": (
        "up_lora_a",
        np.zeros((E, H, R), np.float32).swapaxes(1, 2),
        TypeError,
        "^up_lora_a: .* expected it C-contiguous",
    ),
    "kind": ("gate_lora_a", [[[0.0]]], TypeError, "^gate_lora_a: got list, expected an array on the CPU"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_of_a_config_are_refused(engine: Any, student: Student, case: str) -> None:
    name, wrong, error, message = REFUSED[case]
    config = new_config(engine, **{name: wrong})
    with pytest.raises(error, match=message):
        ext.moe.AMXBF16_SFT_MOE(config)
    setattr(config, name, student.lora[name])
    ext.moe.AMXBF16_SFT_MOE(config)


def test_shapes_follow_the_rank_that_the_config_has_in_the_end(engine: Any) -> None:
    config = new_config(engine, gate_lora_a=np.zeros((E, 2, H), np.float32))
    with pytest.raises(ValueError, match=rf"gate_lora_a: got .*, expected .* \[{E}, {R}, {H}\]"):
        ext.moe.AMXBF16_SFT_MOE(config)
    config.lora_rank = 2
    ext.moe.AMXBF16_SFT_MOE(config)
    config.lora_rank = -1
    with pytest.raises(ValueError, match="lora_rank: got -1, expected 0 to 4096"):
        ext.moe.AMXBF16_SFT_MOE(config)


def test_adapters_of_up_without_a_gate(engine: Any) -> None:
    config = new_config(engine, up_lora_a=np.zeros((E, R, H), np.float32))
    config.set_activation("relu2", False)
    with pytest.raises(ValueError, match="up_lora_a: got one, expected None: the activation is not gated"):
        ext.moe.AMXBF16_SFT_MOE(config)


def test_reading_an_array_may_change_the_config(engine: Any, student: Student) -> None:
    """Arrays are checked against the config at the creation of the layer."""

    class Sly:
        dtype = np.dtype(np.float32)

        def __init__(self, config: Any) -> None:
            self.config = config

        def __dlpack__(self, **options: Any) -> Any:
            self.config.lora_rank = 4096
            self.config.up_lora_b = None
            gc.collect()
            return np.zeros((E, R, H), np.float32).__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return 1, 0

    config = new_config(engine, up_lora_b=student.lora["up_lora_b"].copy())
    config.gate_lora_a = Sly(config)
    moe = ext.moe.AMXBF16_SFT_MOE(config)
    engine.run(moe.update_lora_weights_task(gate_lora_a=np.zeros((E, R, H), np.float32)))
    assert config.lora_rank == 4096


def test_a_config_is_collected_with_arrays_that_refer_to_it() -> None:
    class Array(np.ndarray[Any, Any]):
        config: Any

    matrix = np.zeros((E, R, H), np.float32).view(Array)
    matrix.config = ext.moe.MOESFTConfig(gate_lora_a=matrix)
    gone = weakref.ref(matrix)
    del matrix
    gc.collect()
    assert gone() is None


def test_the_layer_lets_go_of_the_arrays(engine: Any, student: Student) -> None:
    class Array(np.ndarray[Any, Any]):
        pass

    matrix = student.lora["gate_lora_a"].copy().view(Array)
    gone = weakref.ref(matrix)
    moe = ext.moe.AMXBF16_SFT_MOE(new_config(engine, gate_lora_a=matrix))
    del matrix
    assert gone() is None
    assert not moe.loaded


def test_an_update_of_nothing_is_an_error(
    engine: Any, student: Student, batch: Batch, expected: AnyArray
) -> None:
    names = ", ".join(LORA_NAMES)
    message = f"^update_lora_weights: got no matrix, expected at least one of {names}$"
    moe = make(engine, student, new_config(engine, **student.lora))
    wrapper = student.wrapper(P)
    wrapper.forward_sft(*batch)
    for update in (moe.update_lora_weights_task, wrapper.update_lora_weights):
        assert list(inspect.signature(wrapper.update_lora_weights).parameters) == list(LORA_NAMES)
        for nothing in ({}, dict.fromkeys(LORA_NAMES), {"gate_lora_a": None}):
            with pytest.raises(ValueError, match=message):
                update(**nothing)
    assert_same_bits(forward(engine, moe, batch), expected)
    assert_same_bits(wrapper.forward(*batch), expected)
    assert wrapper.num_cached == 1
    for name, matrix in wrapper.lora_weights.items():
        assert_same_bits(matrix, student.lora[name])


@pytest.mark.parametrize("rank", [0, 4])
def test_an_update_of_nothing_makes_no_adapters(student: Student, rank: int) -> None:
    """Neither a layer without adapters nor one whose adapters have no values yet takes it."""
    moe = Student(student.layer, {}, rank).wrapper(P)
    with pytest.raises(ValueError, match=r"update_lora_weights: got no matrix, expected at least one of"):
        moe.update_lora_weights()
    assert set(moe.lora_weights) == (set(LORA_NAMES) if rank else set())
