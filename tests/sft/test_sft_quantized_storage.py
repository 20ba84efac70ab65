"""Training on quantized weights: which methods there are, where weights come from, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converted import run
from layers import Batch, draw
from quantized_layers import METHODS
from quantized_rows import quantized_bytes
from sft_layers import Step, Student, assert_same_steps, by_name, draw_student, draw_training, train

from ktmoe_np import KTMoEWrapper, SFTGradients
from ktmoe_np.formats.methods import METHODS as TABLE
from ktmoe_np.formats.methods import find_method

AnyArray = Any

E, I, H, P, R, T = 4, 24, 41, 2, 3, 6  # noqa: E741
MAP = np.array([2, 0, 3, 0])
NAMES = ("AMXINT8", "AMXINT4", "MOE_INT8", "MOE_INT4")

every_method = pytest.mark.parametrize(("name", "group_size"), METHODS)
every_name = pytest.mark.parametrize("name", NAMES)

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("leave_no_engine")]


@pytest.fixture(scope="module")
def student() -> Student:
    return draw_student(np.random.default_rng(0), (E, I, H), R, with_biases=True)


@pytest.fixture(scope="module")
def training(student: Student) -> tuple[Batch, AnyArray]:
    return draw_training(np.random.default_rng(1), student, T, P)


def wrapper(name: str, group_size: int | None = None, **more: Any) -> Any:
    """A layer for training, without weights; `name` is the method for inference."""
    options = {"mode": "sft", "lora_rank": R, "lora_alpha": 5.0, **more}
    return KTMoEWrapper(0, E, P, H, I, method=f"{name}_SFT", group_size=group_size, **options)


def loaded(student: Student, name: str, group_size: int | None = None, *args: Any, **more: Any) -> Any:
    """A layer for training, quantized in memory, with the student's adapters."""
    return student.wrapper(P, *args, method=f"{name}_SFT", group_size=group_size, **more)


# ---- methods ----


def test_every_method_for_inference_trains() -> None:
    trained = [method.name for method in TABLE if method.mode == "sft"]
    assert len(set(trained)) == len(trained)
    for method in TABLE:
        if method.mode == "inference":
            for suffix, skips in (("_SFT", False), ("_SFT_SkipLoRA", True)):
                found = find_method(method.name + suffix, "sft")
                assert (found.weights, found.product) == (method.weights, method.product)
                assert (dict(found.formats), found.skip_lora) == (dict(method.formats), skips)
                assert list(found.formats) == list(method.formats)  # the first is the default
    assert [find_method(None, mode).name for mode in ("inference", "sft")] == ["BF16", "AMXBF16_SFT"]


def test_methods_that_nobody_knows() -> None:
    names = ["AMXBF16_SFT", "BF16_SFT", "AMXBF16_SFT_SkipLoRA", "BF16_SFT_SkipLoRA"]
    names += [name + suffix for name in NAMES for suffix in ("_SFT", "_SFT_SkipLoRA")]
    names += ["AMXFP8_SFT", "FP8_SFT", "AMXFP8_SFT_SkipLoRA", "FP8_SFT_SkipLoRA"]
    native = ("FP8_PERCHANNEL", "MXFP8", "RAWINT4", "GPTQ_INT4", "INT4_ZP", "MXFP4", "NVFP4", "LLAMAFILE")
    names += [name + suffix for name in native for suffix in ("_SFT", "_SFT_SkipLoRA")]
    for given in ("AMXINT4", "AMXINT3_SFT", "AMXINT4_SFT_skiplora"):
        message = f"method: got {given!r} for mode 'sft', expected one of {', '.join(names)}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            KTMoEWrapper(0, E, P, H, I, mode="sft", method=given)
    with pytest.raises(ValueError, match="method: got 'AMXINT4_SFT' for mode 'inference', expected one of B"):
        KTMoEWrapper(0, E, P, H, I, method="AMXINT4_SFT")


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("AMXINT8", 32, "None: method 'AMXINT8_SFT' has no groups"),
        ("AMXINT4", 48, "None, 32, 64 or 128 with method 'AMXINT4_SFT'"),
        ("MOE_INT8", 64, "None or 32 with method 'MOE_INT8_SFT'"),
        ("MOE_INT4", 0, "None, 32, 64 or 128 with method 'MOE_INT4_SFT'"),
    ],
)
def test_group_sizes_that_are_refused(name: str, size: int, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^group_size: got {size}, expected {expected}$"):
        wrapper(name, size)


@every_name
def test_quantized_weights_have_no_gradients(name: str, student: Student, training: Any) -> None:
    kind = name[-4:].lower()
    message = (
        f"full_weight_grad: got True, expected False: the base weights of method '{name}_SFT' are {kind}, "
        "and only those in bf16 have gradients"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        wrapper(name, full_weight_grad=True)
    batch, grad_output = training
    moe = loaded(student, name)
    expected = train(moe, batch, grad_output)
    out = moe.forward_sft(*batch, out=np.empty((T, H), np.float32))
    into = SFTGradients(np.empty(0), np.empty(0), gate_proj=np.zeros((E, I, H), np.float32))
    with pytest.raises(ValueError, match="gradients: got gate_proj, expected None there"):
        moe.backward(grad_output, gradients=into)
    assert_same_steps(Step(out, by_name(moe.backward(grad_output))), expected)


# ---- files ----


def with_the_same_bytes(name: str, group_size: int | None) -> list[tuple[str, str, int | None]]:
    """Mode, method and group size of all that write the same file as this one."""
    pairs = [other for other in METHODS if (other[0][-4:], other[1]) == (name[-4:], group_size)]
    modes = (("inference", ""), ("sft", "_SFT"), ("sft", "_SFT_SkipLoRA"))
    return [(mode, other + suffix, size) for other, size in pairs for mode, suffix in modes]


@every_method
def test_files_train_as_what_is_quantized_in_memory(
    name: str, group_size: int | None, student: Student, training: Any, tmp_path: Path
) -> None:
    expected = train(loaded(student, name, group_size, MAP), *training)
    contents = set()
    for mode, method, size in with_the_same_bytes(name, group_size):
        writer = student.layer.wrapper(P, mode=mode, method=method, group_size=size)
        file = writer.save_weights(tmp_path / method)
        contents.add(file.read_bytes())
        for path in (file, file.parent):
            moe = wrapper(name, group_size, weight_path=path)
            moe.load_weights(MAP)
            moe.init_lora_weights(**student.lora)
            for matrix in moe._experts.projections.values():
                assert not matrix.codes.flags.owndata
            assert_same_steps(train(moe, *training), expected)
            moe.load_weights()  # does nothing
            contents.add(moe.save_weights(tmp_path / "again").read_bytes())
            assert_same_steps(train(moe, *training), expected)
    assert len(contents) == 1


@pytest.mark.parametrize(("name", "fmt"), [("AMXINT4", "int4_group32"), ("MOE_INT8", "int8")])
@pytest.mark.parametrize("change", [np.asarray, list], ids=["arrays", "lists"])
def test_codes_train_as_what_is_quantized_in_memory(
    name: str, fmt: str, change: Any, student: Student, training: Any
) -> None:
    arguments = dict(student.layer.biases)
    for role, matrix in zip(("gate", "up", "down"), student.layer.matrices, strict=True):
        codes, scale = quantized_bytes(fmt, matrix)
        arguments |= {f"{role}_proj": change(codes), f"{role}_scale": change(scale)}
    moe = wrapper(name)
    moe.load_weights_from_tensors(**arguments)
    moe.init_lora_weights(**student.lora)
    assert_same_steps(train(moe, *training), train(loaded(student, name), *training))


def test_files_of_other_formats(student: Student, tmp_path: Path) -> None:
    file = student.layer.wrapper(P, method="AMXINT4", group_size=64).save_weights(tmp_path)
    for name, size, expected in (
        ("AMXINT4", None, "int4_group32"),
        ("MOE_INT4", 128, "int4_group128"),
        ("AMXINT8", None, "int8"),
        ("MOE_INT8", 32, "int8_group32"),
    ):
        moe = wrapper(name, size, weight_path=tmp_path)
        message = f"{file}: gate_proj.format: got 'int4_group64', expected '{expected}'"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            moe.load_weights()
        assert not moe.loaded
        assert moe._experts is None
    moe = wrapper("BF16", weight_path=tmp_path)
    with pytest.raises(ValueError, match="holds quantized weights, which method 'BF16_SFT' does not read"):
        moe.load_weights()


# ---- checkpoints ----


def training_of(moe: Any) -> tuple[Batch, AnyArray]:
    """Something to train with, and adapters that are not zero."""
    rng, config = np.random.default_rng(2), moe.config
    drawn = {name: draw(rng, *matrix.shape, scale=0.3) for name, matrix in moe.lora_weights.items()}
    moe.update_lora_weights(**drawn)
    routes = (T, config.num_experts_per_tok)
    x, grad_output = (draw(rng, T, config.hidden_size) for _ in range(2))
    return Batch(x, rng.integers(0, config.num_experts, routes), rng.random(routes, np.float32)), grad_output


def assert_train_alike(moe: Any, other: Any) -> None:
    assert_same_steps(train(moe, *training_of(moe)), train(other, *training_of(other)))


@pytest.mark.parametrize("given", [None, "AMXINT4_SFT", "MOE_INT4_SFT", "AMXINT4_SFT_SkipLoRA"])
def test_what_was_converted_trains(given: str | None, source: Path, target: Path) -> None:
    options: Any = {"mode": "sft", "lora_rank": R, "physical_to_logical_map": [5, 0, 1, 1, 2, 3]}
    moe: Any = KTMoEWrapper.from_pretrained(target, 1, method=given, **options)
    assert (moe.method, moe.group_size, moe.loaded) == (given or "AMXINT4_SFT", 32, True)
    assert not moe._experts.up.codes.flags.owndata
    fresh: Any = KTMoEWrapper.from_pretrained(source, 1, method=moe.method, **options)
    assert_train_alike(moe, fresh)


@pytest.mark.parametrize(
    ("name", "size"), [("AMXINT8", None), ("AMXINT4", 64), ("MOE_INT8", 32), ("MOE_INT4", 128)]
)
def test_what_was_converted_says_what_it_is(
    name: str, size: int | None, source: Path, tmp_path: Path
) -> None:
    group = [] if size is None else [f"--group-size={size}"]
    assert run(source, tmp_path / "new", "--layers=2", *group, method=name) == 0
    moe: Any = KTMoEWrapper.from_pretrained(tmp_path / "new", 2, mode="sft", lora_rank=R)
    assert (moe.method, moe.group_size) == (f"{name}_SFT", size)
    options: Any = {"mode": "sft", "lora_rank": R, "group_size": size}
    assert_train_alike(moe, KTMoEWrapper.from_pretrained(source, 2, method=moe.method, **options))


def test_what_was_converted_is_refused(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds quantized weights, which method 'AMXBF16_SFT' does not read"):
        KTMoEWrapper.from_pretrained(target, 1, method="AMXBF16_SFT", mode="sft")
    with pytest.raises(ValueError, match=r"gate_proj\.format: got 'int4_group32', expected 'int4_group64'"):
        KTMoEWrapper.from_pretrained(target, 1, mode="sft", group_size=64)
    with pytest.raises(ValueError, match="method: got 'AMXINT4' for mode 'sft', expected one of AMXBF16_SFT"):
        KTMoEWrapper.from_pretrained(target, 1, method="AMXINT4", mode="sft")
    with pytest.raises(ValueError, match="mode: got 'train', expected one of inference, sft"):
        KTMoEWrapper.from_pretrained(target, 1, mode="train")  # type: ignore[call-overload]


# ---- loading again ----


@every_name
@pytest.mark.parametrize("recompute", [False, True])
def test_loading_while_a_pass_waits_changes_nothing(
    name: str, recompute: bool, student: Student, training: Any, tmp_path: Path
) -> None:
    batch, grad_output = training
    moe = loaded(student, name, recompute=recompute, max_cache_depth=2)
    expected = train(moe, batch, grad_output)
    saved = moe.save_weights(tmp_path / "before").read_bytes()
    held = moe._experts
    out = moe.forward_sft(*batch, out=np.empty((T, H), np.float32))
    moe.forward_sft(*batch)
    others = student.layer.with_matrices(lambda matrix: matrix[::-1])
    message = "load_weights: got 2 forward passes of layer 0 that wait for their backward pass, expected none"
    with pytest.raises(RuntimeError, match=message):
        others.load_into(moe, MAP)
    moe.load_weights()  # has nothing to do
    assert moe._experts is held
    assert moe.save_weights(tmp_path / "after").read_bytes() == saved
    for _ in range(2):
        assert_same_steps(Step(out, by_name(moe.backward(grad_output))), expected)
    others.load_into(moe, MAP)
    afresh = Student(others, student.lora, R).wrapper(P, MAP, method=f"{name}_SFT")
    step = train(moe, batch, grad_output)
    assert_same_steps(step, train(afresh, batch, grad_output))
    assert not np.array_equal(step.out, expected.out)
    assert moe.save_weights(tmp_path / "after").read_bytes() != saved


def test_weights_that_are_refused_leave_those_that_are_there(student: Student, training: Any) -> None:
    moe = loaded(student, "AMXINT8")
    expected, held = train(moe, *training), moe._experts
    gate, up, down = (matrix.copy() for matrix in student.layer.matrices)
    up[1, 5, 7] = np.nan
    with pytest.raises(ValueError, match="up_proj: expert 1, row 5: got nan, expected finite weights"):
        moe.load_weights_from_tensors(gate, up, down)
    assert moe._experts is held
    assert_same_steps(train(moe, *training), expected)
