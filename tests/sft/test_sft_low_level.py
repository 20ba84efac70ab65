"""The training part of the extension as it is used directly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from layers import Batch, assert_same_bits, bf16
from sft_layers import (
    Step,
    Student,
    assert_same_steps,
    assert_step_close,
    draw_student,
    draw_training,
    low_level_sft,
    train,
)

from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.reference import Dropout

pytestmark = [pytest.mark.kernels, pytest.mark.asan, pytest.mark.emulated]

AnyArray = Any

E, I, H, P, R, T = 4, 24, 40, 2, 16, 6  # noqa: E741


@pytest.fixture(scope="module")
def student() -> Student:
    return draw_student(np.random.default_rng(0), (E, I, H), R, lora_alpha=32.0)


@pytest.fixture(scope="module")
def training(student: Student) -> tuple[Batch, AnyArray]:
    return draw_training(np.random.default_rng(1), student, T, P)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    made = ext.CPUInfer(2)
    yield made
    made.shutdown()


def gradients_of(student: Student, fill: float = np.nan) -> dict[str, AnyArray]:
    """Arrays for the gradients of the adapters."""
    return {name: np.full(matrix.shape, fill, np.float32) for name, matrix in student.lora.items()}


def test_as_the_documentation_has_it(student: Student, training: Any) -> None:
    (gate, up, down), ((x, ids, w), grad_output) = student.layer.matrices, training
    out, node = np.empty((T, H), bf16), min(ext.topology()["node_cpus"])

    engine = ext.CPUInfer(
        ext.WorkerPoolConfig(subpool_count=1, subpool_numa_map=[node], subpool_thread_count=[2])
    )
    cfg = ext.moe.MOESFTConfig(expert_num=E, num_experts_per_tok=P, hidden_size=H, intermediate_size=I)
    cfg.lora_rank = 16
    cfg.lora_alpha = 32.0
    cfg.pool = engine.backend_
    moe = ext.moe.AMXBF16_SFT_MOE(cfg)
    engine.submit(moe.load_weights_task(gate, up, down))
    engine.sync()
    engine.submit(moe.forward_sft_task(x, ids, w, out, True))
    engine.sync()

    assert_same_bits(out, student.layer.forward(training[0]))  # all adapters begin as zeros
    engine.submit(moe.update_lora_weights_task(**student.lora))
    engine.submit(moe.clear_cache_task())
    exact = np.empty((T, H), np.float32)
    engine.submit(moe.forward_sft_task(x, ids, w, exact, True))
    grad_input, grad_weights, gradients = (
        np.empty((T, H), bf16),
        np.empty((T, P), "f4"),
        gradients_of(student),
    )
    engine.submit(moe.backward_task(grad_output, grad_input, grad_weights, **gradients))
    engine.sync()
    step = Step(exact, {"grad_input": grad_input, "grad_weights": grad_weights, **gradients})
    assert_step_close(step, student, *training)
    assert_same_steps(step, train(student.wrapper(P), *training))
    engine.shutdown()


def test_a_config_and_its_defaults(engine: Any) -> None:
    config = ext.moe.MOESFTConfig(E, P, H, I, 3, engine.backend_)
    assert isinstance(config, ext.moe.MOEConfig)
    assert (config.expert_num, config.layer_idx) == (E, 3)
    defaults = {
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "seed": 0,
        "max_cache_depth": 1,
        "recompute": False,
        "cache_float32": False,
    }
    assert {name: getattr(config, name) for name in defaults} == defaults
    moe = ext.moe.AMXBF16_SFT_MOE(config)
    assert isinstance(moe, ext.moe.MoE_Interface)
    assert (moe.loaded, moe.num_cached, moe.cache_bytes, moe.step) == (False, 0, 0, 0)
    for name in ("lora_rank", "seed", "cache_float32"):
        with pytest.raises(TypeError):
            setattr(config, name, "many")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "lora_rank": ({"lora_rank": -1}, r"lora_rank: got -1, expected 0 to 4096"),
    "lora_rank, huge": ({"lora_rank": 4097}, r"lora_rank: got 4097, expected 0 to 4096"),
    "lora_alpha": ({"lora_alpha": np.nan}, r"lora_alpha: got -?nan, expected a finite number"),
    "lora_dropout": ({"lora_dropout": 1.0}, r"lora_dropout: got 1, expected at least 0 and below 1"),
    "lora_dropout, negative": ({"lora_dropout": -0.5}, r"lora_dropout: got -0\.5, expected at least 0"),
    "max_cache_depth": ({"max_cache_depth": 0}, r"max_cache_depth: got 0, expected 1 to 1048576"),
    "layer_idx": ({"layer_idx": 2**31}, r"layer_idx: got 2147483648, expected below 2147483648"),
    "hidden_size": ({"hidden_size": 0}, r"hidden_size: got 0, expected 1 to 16777216"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_is_refused(engine: Any, case: str) -> None:
    change, message = CONFIGS[case]
    config = ext.moe.MOESFTConfig(E, P, H, I, pool=engine.backend_)
    before = {name: getattr(config, name) for name in change}
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        ext.moe.AMXBF16_SFT_MOE(config)
    for name, value in before.items():
        setattr(config, name, value)
    ext.moe.AMXBF16_SFT_MOE(config)


#: Class without its end, a group size that it does not have, and what it expects.
GROUP_SIZES = [
    ("AMXBF16", 32, "0: the encoding has its own block size"),
    ("AMXInt8", 32, "0: int8 products need per-channel scales"),
    ("AMXInt4", 48, "32, 64 or 128"),
    ("Int8", 64, "0 or 32"),
    ("Int4", 16, "32, 64 or 128"),
]


@pytest.mark.parametrize(("name", "size", "expected"), GROUP_SIZES)
@pytest.mark.parametrize("end", ["MOE", "SFT_MOE"])
def test_a_group_size_is_refused(engine: Any, name: str, size: int, expected: str, end: str) -> None:
    kind = ext.moe.MOESFTConfig if end == "SFT_MOE" else ext.moe.MOEConfig
    config = kind(E, P, H, I, pool=engine.backend_)
    config.group_size = size
    with pytest.raises(ValueError, match=f"^group_size: got {size}, expected {expected}$"):
        getattr(ext.moe, f"{name}_{end}")(config)


def test_a_layer_that_trains_does_inference_too(engine: Any, student: Student, training: Any) -> None:
    moe, out = low_level_sft(engine, student, P), np.empty((T, H), bf16)
    batch, _ = training
    engine.run(moe.forward_task(*batch, out))
    assert_same_bits(out, student.layer.forward(batch))
    engine.run(moe.forward_sft_task(*batch, out, save_for_backward=False))
    assert_same_bits(out, student.wrapper(P).forward(*batch))
    assert moe.num_cached == 0


def test_all_arguments_by_name(engine: Any, student: Student, training: Any) -> None:
    (x, ids, weights), grad_output = training
    moe = low_level_sft(engine, student, P, lora_dropout=0.3, seed=5, cache_float32=True, layer_idx=2)
    skipped, out = np.array([False, True, False, False]), np.empty((T, H), np.float32)
    moe.step = 7
    engine.run(
        moe.forward_sft_task(
            hidden_states=x,
            topk_ids=ids,
            topk_weights=weights,
            out=out,
            save_for_backward=True,
            skip_experts=skipped,
        )
    )
    assert (moe.step, moe.num_cached) == (8, 1)
    assert moe.cache_bytes > 0
    gate, up, down = (np.zeros(matrix.shape, np.float32) for matrix in student.layer.matrices)
    full = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    gradients = {"grad_input": np.empty((T, H), bf16), "grad_weights": np.empty((T, P), np.float32)}
    gradients |= gradients_of(student, 0.0) | full
    engine.run(moe.backward_task(grad_output=grad_output, accumulate=True, **gradients))
    assert moe.num_cached == 0
    options = {"gpu_experts_mask": skipped, "dropout": Dropout(0.3, 5, 7, 2), "float32_cache": True}
    assert_step_close(Step(out, gradients), student, *training, **options)


def test_adapters_are_copied_when_the_task_runs(engine: Any, student: Student, training: Any) -> None:
    batch, _ = training
    moe, out = low_level_sft(engine, student, P), np.empty((T, H), bf16)
    given = {name: np.full_like(matrix, np.nan) for name, matrix in student.lora.items()}
    task = moe.update_lora_weights_task(**given)
    for name, matrix in given.items():
        matrix[...] = 2 * student.lora[name]
    engine.run(task)
    for matrix in given.values():
        matrix[...] = np.nan
    engine.run(moe.forward_sft_task(*batch, out))
    doubled = {name: 2 * matrix for name, matrix in student.lora.items()}
    expected = Student(student.layer, doubled, R, 32.0).wrapper(P).forward(*batch)
    assert_same_bits(out, expected)


def test_one_matrix_at_a_time(engine: Any, student: Student, training: Any) -> None:
    batch, _ = training
    other = draw_student(np.random.default_rng(2), (E, I, H), R).lora
    moe, now = low_level_sft(engine, student, P), dict(student.lora)
    for name in other:
        engine.run(moe.update_lora_weights_task(**{name: other[name].astype(bf16)}))
        now[name] = other[name]
        out = np.empty((T, H), bf16)
        engine.run(moe.forward_sft_task(*batch, out, False))
        assert_same_bits(out, Student(student.layer, now, R, 32.0).wrapper(P).forward(*batch), name)


LORA: dict[str, tuple[Any, type[BaseException], str]] = {
    "dtype": (
        lambda m: m.astype(np.float64),
        TypeError,
        rf"up_lora_a: got float64 \[{E}, {R}, {H}\], expected float32 or bfloat16 \[{E}, {R}, {H}\]",
    ),
    "shape": (
        lambda m: m[:, 1:].copy(),
        ValueError,
        rf"up_lora_a: got float32 \[{E}, {R - 1}, {H}\], expected",
    ),
    "order": (np.asfortranarray, TypeError, r"up_lora_a: .* expected it C-contiguous"),
    "a list": (lambda m: m.tolist(), TypeError, r"up_lora_a: got list, expected an array on the CPU"),
}


@pytest.mark.parametrize("case", LORA)
def test_adapters_are_refused(engine: Any, student: Student, training: Any, case: str) -> None:
    change, error, message = LORA[case]
    batch, _ = training
    moe, before, after = low_level_sft(engine, student, P), np.empty((T, H), bf16), np.empty((T, H), bf16)
    engine.run(moe.forward_sft_task(*batch, before, False))
    zeros = np.zeros_like(student.lora["gate_lora_a"])
    with pytest.raises(error, match=message):
        moe.update_lora_weights_task(gate_lora_a=zeros, up_lora_a=change(student.lora["up_lora_a"]))
    engine.run(moe.forward_sft_task(*batch, after, False))
    assert_same_bits(after, before)


def test_up_without_a_gate(engine: Any, training: Any) -> None:
    _, grad_output = training
    student = draw_student(np.random.default_rng(3), (E, I, H), R, "relu2")
    moe, matrix = low_level_sft(engine, student, P), np.zeros((E, R, H), np.float32)
    arrays = np.empty((T, H), bf16), np.empty((T, P), np.float32)
    message = "got one, expected None: the activation is not gated"
    with pytest.raises(ValueError, match=f"up_lora_a: {message}"):
        moe.update_lora_weights_task(up_lora_a=matrix)
    for name, shape in (("up_lora_a", (E, R, H)), ("up_lora_b", (E, I, R)), ("up_proj", (E, I, H))):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            moe.backward_task(grad_output, *arrays, **{name: np.zeros(shape, np.float32)})


BACKWARD: dict[str, tuple[dict[str, Any], type[BaseException], str]] = {
    "grad_output, None": ({"grad_output": None}, TypeError, r"grad_output: got NoneType, expected an array"),
    "grad_input, dtype": (
        {"grad_input": np.empty((T, H), np.float32)},
        TypeError,
        rf"grad_input: got float32 \[{T}, {H}\], expected bfloat16 \[{T}, {H}\]",
    ),
    "grad_weights, shape": (
        {"grad_weights": np.empty((T, H), np.float32)},
        ValueError,
        rf"grad_weights: got float32 \[{T}, {H}\], expected float32 \[{T}, {P}\]",
    ),
    "gate_proj, shape": (
        {"gate_proj": np.empty((E, H, I), np.float32)},
        ValueError,
        rf"gate_proj: got float32 \[{E}, {H}, {I}\], expected float32 \[{E}, {I}, {H}\]",
    ),
    "down_proj, dtype": (
        {"down_proj": np.empty((E, H, I), bf16)},
        TypeError,
        rf"down_proj: got bfloat16 \[{E}, {H}, {I}\], expected float32 \[{E}, {H}, {I}\]",
    ),
}


@pytest.mark.parametrize("case", BACKWARD)
def test_a_backward_task_is_refused(engine: Any, student: Student, training: Any, case: str) -> None:
    change, error, message = BACKWARD[case]
    batch, grad_output = training
    moe = low_level_sft(engine, student, P)
    engine.run(moe.forward_sft_task(*batch, np.empty((T, H), bf16)))
    arguments = {
        "grad_output": grad_output,
        "grad_input": np.empty((T, H), bf16),
        "grad_weights": np.empty((T, P), np.float32),
    }
    with pytest.raises(error, match=message):
        moe.backward_task(**{**arguments, **change})
    assert moe.num_cached == 1
    engine.run(moe.backward_task(**arguments))
    assert moe.num_cached == 0


def test_arrays_are_held_until_the_task_has_run(engine: Any, student: Student, training: Any) -> None:
    batch, grad_output = training
    moe, out = low_level_sft(engine, student, P), np.empty((T, H), np.float32)
    engine.submit(moe.update_lora_weights_task(**{name: m.copy() for name, m in student.lora.items()}))
    engine.submit(moe.forward_sft_task(*(array.copy() for array in batch), out))
    grad_input, grad_weights, gradients = (
        np.empty((T, H), bf16),
        np.empty((T, P), "f4"),
        gradients_of(student),
    )
    task = moe.backward_task(grad_output.copy(), grad_input, grad_weights, **gradients)
    del moe
    engine.submit(task)
    engine.sync()
    step = Step(out, {"grad_input": grad_input, "grad_weights": grad_weights, **gradients})
    assert_same_steps(step, train(student.wrapper(P), *training))


def test_everything_says_what_it_is() -> None:
    layer = ext.moe.AMXBF16_SFT_MOE
    things = [ext.moe.MOESFTConfig, layer, layer.update_lora_weights_task, layer.forward_sft_task]
    things += [layer.backward_task, layer.clear_cache_task, layer.num_cached, layer.cache_bytes, layer.step]
    for thing in things:
        assert thing.__doc__, thing


def test_gradients_that_are_always_written_have_to_be_given(
    engine: Any, student: Student, training: Any
) -> None:
    (x, ids, w), grad_output = training
    moe = low_level_sft(engine, student, P)
    engine.run(moe.forward_sft_task(x, ids, w, np.empty((T, H), bf16)))
    grad_input, grad_weights = np.empty((T, H), bf16), np.empty((T, P), np.float32)
    with pytest.raises(TypeError, match="grad_input: got NoneType, expected an array on the CPU"):
        moe.backward_task(grad_output, None, grad_weights)
    with pytest.raises(TypeError, match="grad_weights: got NoneType, expected an array on the CPU"):
        moe.backward_task(grad_output, grad_input, None)
    assert moe.num_cached == 1


def test_an_alpha_whose_scale_is_no_float32(engine: Any, student: Student) -> None:
    with pytest.raises(ValueError, match=r"lora_alpha: got 1e\+300, expected less: the scale"):
        low_level_sft(engine, student, P, lora_alpha=1e300)


@pytest.mark.parametrize("name", ["AMXInt8_MOE", "AMXInt4_MOE", "AMXInt8_SFT_MOE", "AMXInt4_SFT_MOE"])
@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size"])
def test_rows_whose_integer_sums_could_overflow_are_refused(engine: Any, name: str, field: str) -> None:
    kind = ext.moe.MOESFTConfig if "SFT" in name else ext.moe.MOEConfig
    config = kind(2, 1, 64, 64, pool=engine.backend_)
    setattr(config, field, 133145)
    with pytest.raises(ValueError, match=f"^{field}: got 133145, expected at most 133144: sums of int8"):
        getattr(ext.moe, name)(config)
    setattr(config, field, 133144)
    assert not getattr(ext.moe, name)(config).loaded
