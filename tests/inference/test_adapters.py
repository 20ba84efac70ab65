"""Named adapters at inference: has a token the bits of its adapter alone, whatever the others have?"""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from int8_layers import draw_int8_layer
from layers import ACTIVATIONS, AnyArray, Batch, assert_same_bits, bf16, draw_batch, num_examples, run_python
from native_layers import METHODS as NATIVE_METHODS
from quantized_layers import METHODS as QUANTIZED_METHODS
from sft_layers import SIZES, Student, draw_lora, draw_student, draw_training, low_level_sft

import ktmoe_np.inference.adapters
from ktmoe_np import DeferralChain
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.sft import export_peft

pytestmark = pytest.mark.kernels

E, I, H, P = 4, 33, 64, 2  # noqa: E741

METHODS = [
    *((f"{name}_SFT", None) for name in NATIVE_METHODS),
    *((f"{name}_SFT", size) for name, size in QUANTIZED_METHODS),
]


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.inference.adapters).failed == 0


def inference(student: Student, num_slots: int, **options: Any) -> Any:
    """The layer of a student for inference, without adapters."""
    method, group_size = student.method
    name = "BF16" if method == "AMXBF16_SFT" else method.removesuffix("_SFT")
    return student.layer.wrapper(num_slots, method=name, group_size=group_size, **options)


def adapters_of(rng: np.random.Generator, student: Student, ranks: list[int]) -> list[Student]:
    """The same layer with other adapters, of these ranks and each of a scale of its own."""
    return [
        Student(student.layer, draw_lora(rng, student.layer, rank), rank, 2.5 * (i + 1), student.method)
        for i, rank in enumerate(ranks)
    ]


def assert_rows_as_alone(moe: Any, students: list[Student], batch: Batch, chosen: AnyArray) -> None:
    """Each row of a mixed batch is that of its adapter alone, by a layer that trains it."""
    mixed = moe.forward(*batch, adapters=chosen, out=np.empty(batch.x.shape, np.float32))
    alone = [moe.forward(*batch, out=np.empty(batch.x.shape, np.float32))]
    for number, student in enumerate(students):
        trained = student.wrapper(batch.ids.shape[1])
        by_trainer = trained.forward(*batch, out=np.empty(batch.x.shape, np.float32))
        own = moe.forward(*batch, adapters=np.full(len(batch.x), number), out=np.empty_like(by_trainer))
        assert_same_bits(own, by_trainer, f"adapter {number}")
        alone.append(own)
    for t, number in enumerate(chosen):
        assert_same_bits(mixed[t], alone[int(number) + 1][t], f"token {t} with adapter {number}")


@given(st.data(), st.integers(0, 2**32 - 1))
def test_a_row_is_that_of_its_adapter(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = (data.draw(st.integers(1, 5)), *(data.draw(st.sampled_from(SIZES)) for _ in range(2)))
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    student = draw_student(rng, sizes, 0, activation, with_biases=data.draw(st.booleans()))
    students = adapters_of(rng, student, data.draw(st.lists(st.sampled_from([1, 2, 8, 33]), max_size=3)))
    moe = inference(student, P, chunked_prefill_size=data.draw(st.sampled_from([3, 4096])))
    for i, each in enumerate(students):
        assert moe.add_adapter(f"a{i}", each.lora, each.lora_alpha) == i
    batch, _ = draw_training(rng, student, data.draw(st.sampled_from([0, 1, 2, 9, 40])), P)
    chosen = rng.integers(-1, len(students), len(batch.x))
    assert_rows_as_alone(moe, students, batch, chosen)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method(method: tuple[str, int | None]) -> None:
    rng = np.random.default_rng(0)
    student = draw_student(rng, (E, I, H), 0, method=method)
    students = adapters_of(rng, student, [3, 16])
    moe = inference(student, P)
    for i, each in enumerate(students):
        moe.add_adapter(str(i), each.lora, each.lora_alpha)
    batch, _ = draw_training(rng, student, 30, P)
    assert_rows_as_alone(moe, students, batch, rng.integers(-1, 2, 30))


@pytest.mark.parametrize("method", ["RAWINT4", "MOE_INT8", "LLAMAFILE"])
def test_int8_activations(method: str) -> None:
    rng = np.random.default_rng(1)
    drawn = draw_int8_layer(rng, (method, None), (E, 40, 70))
    moe = drawn.wrapper(P, activation_dtype="int8")
    student = drawn.student(rng, 5)
    moe.add_adapter("x", student.lora, student.lora_alpha)
    batch = draw_batch(rng, drawn.layer, 23, P)
    chosen = rng.integers(-1, 1, 23)
    mixed = moe.forward(*batch, adapters=chosen)
    plain, trained = moe.forward(*batch), student.wrapper(P, activation_dtype="int8").forward(*batch)
    assert_same_bits(mixed, np.where(chosen[:, None] < 0, plain, trained))


@pytest.mark.parametrize("how", ["forward", "submit_forward"])
@pytest.mark.parametrize("chunk", [4, 4096])
def test_deferred_experts(how: str, chunk: int) -> None:
    """The immediate part and what is drained are those of a batch in which all tokens have the adapter."""
    rng = np.random.default_rng(2)
    student = draw_student(rng, (E, I, H), 0)
    students = adapters_of(rng, student, [4, 7])
    batch, _ = draw_training(rng, student, 11, P)
    chosen = np.array([0, 1, -1] * 3 + [1, 1])

    def run(numbers: AnyArray | None) -> tuple[AnyArray, AnyArray]:
        moe = inference(student, P, max_deferred_experts_per_token=1, chunked_prefill_size=chunk)
        for i, each in enumerate(students):
            moe.add_adapter(str(i), each.lora, each.lora_alpha)
        chain = DeferralChain()
        if how == "forward":
            out = moe.forward(*batch, adapters=numbers, chain=chain)
        else:
            moe.submit_forward(*batch, adapters=numbers, chain=chain)
            if numbers is not None:
                numbers[:] = 5  # they were copied
            out = moe.sync_forward()
        return out, moe.drain_deferred(chain=chain)

    mixed = run(chosen.copy())
    by_adapter = [run(None), *(run(np.full(11, number)) for number in range(2))]
    for part in range(2):
        for t, number in enumerate(chosen):
            assert_same_bits(mixed[part][t], by_adapter[number + 1][part][t], f"part {part}, token {t}")


def test_scaled_inputs_masks_and_maps() -> None:
    rng = np.random.default_rng(3)
    student = draw_student(rng, (E, I, H), 0)
    (other,) = adapters_of(rng, student, [4])
    order, mask = np.array([2, 0, 3, 1]), np.array([False, True, False, False])
    batch, _ = draw_training(rng, student, 9, P)
    moe = student.layer.wrapper(P, order, gpu_experts_mask=mask)
    moe.add_adapter("x", other.lora, other.lora_alpha)
    expected = other.wrapper(P, order, gpu_experts_mask=mask).forward(*batch)
    assert_same_bits(moe.forward(*batch, adapters=np.zeros(9, np.uint8)), expected)


def test_leading_axes_and_kinds_of_ids() -> None:
    rng = np.random.default_rng(4)
    student = draw_student(rng, (E, I, H), 0)
    (other,) = adapters_of(rng, student, [4])
    moe = inference(student, P)
    moe.add_adapter("x", other.lora, other.lora_alpha)
    x, ids, weights = draw_batch(rng, student.layer, 6, P)
    chosen = np.array([0, -1, 0, -7, -1, 0])
    expected = moe.forward(x, ids, weights, adapters=chosen)
    shaped = (x.reshape(2, 3, H), ids.reshape(2, 3, P), weights.reshape(2, 3, P))
    assert_same_bits(moe.forward(*shaped, adapters=chosen.reshape(2, 3)), expected.reshape(2, 3, H))
    assert_same_bits(moe.forward(x, ids, weights, adapters=chosen.tolist()), expected)
    assert_same_bits(moe.forward(x, ids, weights, adapters=chosen.astype(np.int8)), expected)
    assert_same_bits(moe.forward(x[0], ids[0], weights[0], adapters=np.array(0)), expected[0])


def test_adapters_come_and_go() -> None:
    rng = np.random.default_rng(5)
    student = draw_student(rng, (E, I, H), 0)
    first, second = adapters_of(rng, student, [4, 6])
    moe = inference(student, P)
    batch, _ = draw_training(rng, student, 5, P)
    plain = moe.forward(*batch)
    assert moe.adapters == {}
    assert moe.add_adapter("x", first.lora, first.lora_alpha) == 0
    assert moe.add_adapter("y", second.lora, second.lora_alpha) == 1
    expected = moe.forward(*batch, adapters=np.full(5, 1))
    moe.remove_adapter("x")
    assert moe.adapters == {"y": 1}
    assert_same_bits(moe.forward(*batch, adapters=np.full(5, 1)), expected)
    with pytest.raises(
        IndexError, match=r"adapters: got 0 at \[2\], expected the id of a loaded adapter, \[1\]"
    ):
        moe.forward(*batch, adapters=np.array([1, -1, 0, 1, 1]))
    assert moe.add_adapter("x", second.lora, second.lora_alpha) == 2  # ids are not used again
    assert_same_bits(moe.forward(*batch, adapters=np.array([2, 1, 1, 2, 2])), expected)
    assert_same_bits(moe.forward(*batch), plain)


def test_matrices_that_are_missing_are_zero() -> None:
    rng = np.random.default_rng(6)
    student = draw_student(rng, (E, I, H), 0)
    (other,) = adapters_of(rng, student, [3])
    down = {name: value for name, value in other.lora.items() if name.startswith("down")}
    zeros = {name: np.zeros_like(value) for name, value in other.lora.items()}
    moe = inference(student, P)
    moe.add_adapter("down", down, 4.0)
    moe.add_adapter("whole", {**zeros, **down}, 4.0)
    batch, _ = draw_training(rng, student, 4, P)
    assert_same_bits(
        moe.forward(*batch, adapters=[0, 0, 0, 0]),
        moe.forward(*batch, adapters=[1, 1, 1, 1]),
    )


def test_from_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    student = draw_student(rng, (E, I, H), 4, lora_alpha=6.0)
    trained = student.wrapper(P, layer_idx=3)
    trained.save_lora_weights(tmp_path / "one.safetensors")
    other = draw_student(np.random.default_rng(8), (E, I, H), 4, lora_alpha=6.0).wrapper(P, layer_idx=1)
    export_peft(tmp_path / "peft", [other, trained], model_type="qwen3_moe")
    moe = inference(student, P, layer_idx=3)
    assert moe.load_adapter("file", tmp_path / "one.safetensors") == 0
    assert moe.load_adapter("directory", str(tmp_path / "peft")) == 1
    batch, _ = draw_training(rng, student, 6, P)
    expected = trained.forward(*batch)
    assert_same_bits(moe.forward(*batch, adapters=np.array([0, 1] * 3)), expected)


def test_files_that_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    student = draw_student(rng, (E, I, H), 4)
    student.wrapper(P, layer_idx=3).save_lora_weights(tmp_path / "one.safetensors")
    moe = inference(student, P, layer_idx=4)
    with pytest.raises(ValueError, match="layer_idx: got '3', expected '4'"):
        moe.load_adapter("x", tmp_path / "one.safetensors")
    with pytest.raises(FileNotFoundError, match="nothing"):
        moe.load_adapter("x", tmp_path / "nothing")
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="format: got None"):
        moe.load_adapter("x", tmp_path / "other.safetensors")
    assert moe.adapters == {}


@pytest.mark.parametrize(
    ("matrices", "alpha", "error", "message"),
    [
        ({}, 1.0, ValueError, "matrices: got none, expected at least one of gate_lora_a"),
        (
            {"gate_lora_c": np.zeros((E, 2, H))},
            1.0,
            ValueError,
            "matrices: got 'gate_lora_c', expected names",
        ),
        (
            {"gate_lora_a": np.zeros((2, H))},
            1.0,
            ValueError,
            r"gate_lora_a: got shape \[2, 64\], expected three",
        ),
        (
            {"gate_lora_a": np.zeros((E, 2, H + 1), np.float32)},
            1.0,
            ValueError,
            r"gate_lora_a: got float32 \[4, 2, 65\], expected float32 or bfloat16 \[4, 2, 64\]",
        ),
        ({"gate_lora_a": np.zeros((E, 2, H))}, 1.0, TypeError, "gate_lora_a: got float64"),
        (
            {"gate_lora_a": np.zeros((E, 2, H), bf16)},
            np.inf,
            ValueError,
            "lora_alpha: got inf, expected a finite",
        ),
        ({"gate_lora_a": np.zeros((E, 0, H), bf16)}, 1.0, ValueError, "gate_lora_a: got one, expected None"),
    ],
)
def test_matrices_that_are_refused(
    matrices: dict[str, AnyArray], alpha: float, error: type[Exception], message: str
) -> None:
    moe = inference(draw_student(np.random.default_rng(0), (E, I, H), 0), P)
    with pytest.raises(error, match=message):
        moe.add_adapter("x", matrices, alpha)
    assert moe.adapters == {}


def test_names_and_ids_that_are_refused() -> None:
    rng = np.random.default_rng(9)
    student = draw_student(rng, (E, I, H), 0)
    (other,) = adapters_of(rng, student, [4])
    moe = inference(student, P)
    batch, _ = draw_training(rng, student, 3, P)
    with pytest.raises(
        IndexError, match=r"adapters: got 0 at \[0\], expected the id of a loaded adapter, \[\],"
    ):
        moe.forward(*batch, adapters=[0, -1, -1])
    with pytest.raises(ValueError, match="name: got 'x', expected one of none, as none is loaded"):
        moe.remove_adapter("x")
    moe.add_adapter("x", other.lora)
    with pytest.raises(ValueError, match="name: got 'x', expected another"):
        moe.add_adapter("x", other.lora)
    with pytest.raises(ValueError, match="name: got 'x', expected another"):
        moe.load_adapter("x", "nowhere")
    with pytest.raises(TypeError, match="name: got int, expected a string"):
        moe.add_adapter(3, other.lora)
    with pytest.raises(ValueError, match="name: got 'y', expected one of 'x'"):
        moe.remove_adapter("y")
    with pytest.raises(ValueError, match=r"adapters: got shape \[2\], expected \[3\]"):
        moe.forward(*batch, adapters=[0, 0])
    with pytest.raises(TypeError, match=r"adapters: got float64 \[3\], expected an integer dtype"):
        moe.forward(*batch, adapters=np.zeros(3))
    with pytest.raises(ValueError, match="adapters: got some with a cuda_stream, expected None"):
        moe.forward(*batch, 0, adapters=[0, 0, 0])
    with pytest.raises(ValueError, match="adapters: got some with a cuda_stream, expected None"):
        moe.submit_forward(*batch, 0, adapters=[0, 0, 0])


def test_an_adapter_of_a_pending_pass_stays() -> None:
    rng = np.random.default_rng(10)
    student = draw_student(rng, (E, I, H), 0)
    first, second = adapters_of(rng, student, [4, 5])
    moe = inference(student, P)
    moe.add_adapter("x", first.lora)
    moe.add_adapter("y", second.lora)
    batch, _ = draw_training(rng, student, 3, P)
    expected = moe.forward(*batch, adapters=[0, 0, -1])
    moe.submit_forward(*batch, adapters=[0, 0, -1])
    moe.remove_adapter("y")
    with pytest.raises(RuntimeError, match="remove_adapter: a pass of layer 0 with 'x' is pending"):
        moe.remove_adapter("x")
    assert_same_bits(moe.sync_forward(), expected)
    moe.remove_adapter("x")
    assert moe.adapters == {}


@pytest.mark.engine
def test_the_extension_checks_for_itself() -> None:
    rng = np.random.default_rng(11)
    student = draw_student(rng, (E, I, H), 0)
    (other,) = adapters_of(rng, student, [4])
    engine = ext.CPUInfer(2)
    moe = low_level_sft(engine, student, P)
    batch, _ = draw_training(rng, student, 3, P)
    out = np.full((3, H), 7, bf16)

    def run(numbers: list[int], layer: Any = moe) -> None:
        engine.run(layer.forward_tasks(*batch, out, 2, adapters=np.array(numbers, np.int32)))

    with pytest.raises(
        IndexError, match=r"adapters: got 0 at \[0\], expected the number of a loaded adapter"
    ):
        run([0, 0, 0])
    assert (out == 7).all()
    with pytest.raises(ValueError, match="number: got 4294967295, expected at most 536870909"):
        engine.run(moe.set_adapter_task(2**32 - 1, 4, 1.0))
    engine.run(moe.set_adapter_task(2, 4, 1.0, **other.lora))
    with pytest.raises(IndexError, match=r"adapters: got 1 at \[0\]"):
        run([1, 2, 2])
    run([2, -1, 2])
    engine.run(moe.remove_adapter_task(2))
    engine.run(moe.remove_adapter_task(9))
    with pytest.raises(IndexError, match=r"adapters: got 2 at \[0\]"):
        run([2, -1, 2])
    with pytest.raises(ValueError, match=r"adapters: got int32 \[2\], expected int32 \[3\]"):
        run([-1, -1])
    engine.shutdown()


@pytest.mark.subprocess
@pytest.mark.skipif(num_examples(5) == 1, reason="the short profile")
def test_threads_do_not_matter() -> None:
    program = """
        import numpy as np, sys
        sys.path[:0] = %r
        from sft_layers import draw_student, draw_training, draw_lora
        rng = np.random.default_rng(0)
        student = draw_student(rng, (6, 48, 80), 0)
        lora = [draw_lora(rng, student.layer, rank) for rank in (3, 8)]
        batch, _ = draw_training(rng, student, 50, 2)
        moe = student.layer.wrapper(2, cpuinfer_threads=%d, threadpool_count=%d)
        for i, matrices in enumerate(lora):
            moe.add_adapter(str(i), matrices)
        y = moe.forward(*batch, adapters=np.arange(50) %% 3 - 1)
        print(y.view(np.uint16).tobytes().hex())
    """
    found = {
        run_python(program % ([str(Path(__file__).parents[1] / "support")], threads, pools)).stdout
        for threads, pools in ((1, 1), (3, 1), (4, 2))
    }
    assert len(found) == 1
