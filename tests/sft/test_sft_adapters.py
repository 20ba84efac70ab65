"""Adapters of a layer in a file: they come back as they were, and nothing wrong gets in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import assert_same_bits, bf16
from sft_layers import Student, draw_student, draw_training

from ktmoe_np.io import SafetensorsFile
from ktmoe_np.io.safetensors.writer import write_safetensors
from ktmoe_np.sft import export_peft, import_peft

AnyArray = Any

E, I, H, P, R = 3, 24, 40, 2, 4  # noqa: E741


def student_of(seed: int, activation: str = "silu", dtype: Any = np.float32, rank: int = R) -> Student:
    return draw_student(np.random.default_rng(seed), (E, I, H), rank, activation, dtype=dtype)


def blank(student: Student, **options: Any) -> Any:
    """The same layer, with adapters that are not those."""
    return Student(student.layer, {}, student.rank).wrapper(P, **options)


def assert_has(moe: Any, student: Student) -> None:
    assert moe.lora_weights.keys() == student.lora.keys()
    for name, matrix in moe.lora_weights.items():
        assert_same_bits(matrix, student.lora[name], name)


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, str]], Any]) -> None:
    """The file with other tensors and metadata."""
    file = SafetensorsFile(path)
    tensors = {name: file.tensor(name).copy() for name in file.names()}
    metadata = dict(file.metadata)
    change(tensors, metadata)
    write_safetensors(path, tensors, metadata)


# ---- one layer ----


@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("dtype", [np.float32, bf16])
def test_adapters_come_back(tmp_path: Path, activation: str, dtype: Any) -> None:
    student = student_of(0, activation, dtype)
    batch, _ = draw_training(np.random.default_rng(1), student, 10, P)
    path, moe, other = tmp_path / "adapters", student.wrapper(P), blank(student)
    moe.save_lora_weights(path)
    other.load_lora_weights(str(path))
    assert_has(other, student)
    assert_same_bits(other.forward(*batch), moe.forward(*batch))
    other.save_lora_weights(path)  # over the file that it came from
    moe.load_lora_weights(path)
    assert_has(moe, student)


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    student = student_of(0)
    student.wrapper(P, layer_idx=7, lora_alpha=0.1).save_lora_weights(tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    assert file.metadata == {
        "format": "ktmoe_np.lora",
        "format_version": "1",
        "num_experts": "3",
        "hidden_size": "40",
        "moe_intermediate_size": "24",
        "lora_rank": "4",
        "lora_alpha": "0.1",
        "layer_idx": "7",
        "gated": "true",
    }
    assert {name: file.info(name).shape for name in file.names()} == {
        name: matrix.shape for name, matrix in student.lora.items()
    }
    safetensors = pytest.importorskip("safetensors.numpy")
    for name, matrix in safetensors.load_file(tmp_path / "x").items():
        assert_same_bits(matrix, student.lora[name])


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("lora_rank", {"lora_rank": 5}, 5),
        ("lora_alpha", {"lora_alpha": 5.5}, 5.5),
        ("layer_idx", {"layer_idx": 1}, 1),
    ],
)
def test_a_file_of_another_layer(tmp_path: Path, name: str, options: Any, value: Any) -> None:
    student = student_of(0)
    student.wrapper(P).save_lora_weights(tmp_path / "x")
    moe = Student(student.layer, {}, options.get("lora_rank", R)).wrapper(P, **options)
    before = moe.lora_weights
    with pytest.raises(ValueError, match=rf"x: {name}: got '.*', expected '{value}'"):
        moe.load_lora_weights(tmp_path / "x")
    for each, matrix in moe.lora_weights.items():
        assert_same_bits(matrix, before[each])


FILES: dict[str, tuple[Callable[[dict[str, Any], dict[str, str]], Any], str]] = {
    "another kind of file": (lambda t, m: m.pop("format"), r"x: format: got None, expected 'ktmoe_np\.lora'"),
    "a later version": (
        lambda t, m: m.update(format_version="2"),
        r"x: format_version: got '2', expected '1'",
    ),
    "sizes": (lambda t, m: m.update(num_experts="4"), r"x: num_experts: got '4', expected '3'"),
    "a missing tensor": (lambda t, m: t.pop("up_lora_b"), r"x: no tensor 'up_lora_b'"),
    "another tensor": (
        lambda t, m: t.update(up_lora_c=t["up_lora_b"]),
        r"x: tensor 'up_lora_c': got one, expected only gate_lora_a, gate_lora_b",
    ),
    "a shape": (
        lambda t, m: t.update(up_lora_b=t["up_lora_b"][:, 1:]),
        rf"x: tensor 'up_lora_b': got F32 \[{E}, {I - 1}, {R}\], expected F32 or BF16 \[{E}, {I}, {R}\]",
    ),
    "a dtype": (
        lambda t, m: t.update(up_lora_b=t["up_lora_b"].astype(np.float64)),
        rf"x: tensor 'up_lora_b': got F64 \[{E}, {I}, {R}\], expected F32 or BF16",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file(tmp_path: Path, case: str) -> None:
    change, message = FILES[case]
    student, path = student_of(0), tmp_path / "x"
    moe = student.wrapper(P)
    student_of(1).wrapper(P).save_lora_weights(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        moe.load_lora_weights(path)
    assert_has(moe, student)


def test_a_corrupt_file(tmp_path: Path) -> None:
    student, path = student_of(0), tmp_path / "x"
    moe = student.wrapper(P)
    moe.save_lora_weights(path)
    whole = path.read_bytes()
    for cut in (0, 7, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="x: "):
            moe.load_lora_weights(path)
    path.write_bytes(whole.replace(b"gate_lora_a", b"\xff\xfe" + b"te_lora_a", 1))
    with pytest.raises(ValueError, match="x: the header is not JSON"):
        moe.load_lora_weights(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        moe.load_lora_weights(tmp_path / "missing")
    assert_has(moe, student)


def test_adapters_for_the_other_loader_name_it(tmp_path: Path) -> None:
    student = student_of(0)
    moe = student.wrapper(P)
    peft, own = tmp_path / "peft", tmp_path / "own"
    export_peft(peft, [moe])
    own.mkdir()
    moe.save_lora_weights(own / "adapter.safetensors")
    for path, got in ((peft, "a directory"), (peft / "adapter_model.safetensors", "adapters of PEFT")):
        message = rf"{path.name}: got {got}, expected a file of save_lora_weights: import_peft\("
        with pytest.raises(ValueError, match=message):
            moe.load_lora_weights(path)
    for path, got in (
        (own / "adapter.safetensors", "a file"),
        (own, "adapter.safetensors without "),
    ):
        message = rf"{path.name}: got {got}.*, expected .*: load_lora_weights reads a file of save_lora_"
        with pytest.raises(ValueError, match=message):
            import_peft(path, [moe])
    assert_has(moe, student)


def test_a_layer_without_adapters(tmp_path: Path) -> None:
    moe = Student(student_of(0).layer, {}, 0).wrapper(P, layer_idx=5)
    message = "lora_rank: got 0, expected a layer with adapters: layer 5 has none"
    for call in (moe.save_lora_weights, moe.load_lora_weights):
        with pytest.raises(ValueError, match=message):
            call(tmp_path / "x")
    for exchange in (export_peft, import_peft):
        with pytest.raises(ValueError, match=message):
            exchange(tmp_path / "y", [moe])
    assert not list(tmp_path.iterdir())
