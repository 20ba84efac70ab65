"""Adapters in files: they come back as they were, and under the names of PEFT; nothing wrong gets in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import assert_same_bits, bf16
from sft_layers import Student, draw_student, draw_training

from ktmoe_np.io import SafetensorsFile
from ktmoe_np.io.safetensors.writer import write_safetensors
from ktmoe_np.sft import export_peft, import_peft, peft_scale
from ktmoe_np.sft.peft_families import REFUSED

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


# ---- as PEFT has them ----


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, dict[int, Student]]:
    """A directory with two layers, and these."""
    students = {3: student_of(3), 11: student_of(11)}
    layers = [student.wrapper(P, layer_idx=i, lora_dropout=0.1 * (i > 3)) for i, student in students.items()]
    export_peft(tmp_path / "peft", layers)
    return tmp_path / "peft", students


def test_layers_come_back_from_peft(exported: Any) -> None:
    path, students = exported
    layers = [blank(student, layer_idx=i) for i, student in students.items()]
    import_peft(str(path), layers[::-1])
    for moe, student in zip(layers, students.values(), strict=True):
        assert_has(moe, student)
    alone = blank(students[11], layer_idx=11)
    import_peft(path, [alone])
    assert_has(alone, students[11])


def test_the_names_of_peft(exported: Any) -> None:
    path, students = exported
    file = SafetensorsFile(path / "adapter_model.safetensors")
    assert len(file.names()) == 2 * E * 6
    for i, student in students.items():
        for expert in range(E):
            stem = f"base_model.model.model.layers.{i}.mlp.experts.{expert}"
            for projection in ("gate", "up", "down"):
                for matrix in "ab":
                    tensor = file.tensor(f"{stem}.{projection}_proj.lora_{matrix.upper()}.weight")
                    assert_same_bits(tensor, student.lora[f"{projection}_lora_{matrix}"][expert])
    down_a = file.info("base_model.model.model.layers.3.mlp.experts.0.down_proj.lora_A.weight")
    down_b = file.info("base_model.model.model.layers.3.mlp.experts.0.down_proj.lora_B.weight")
    assert (down_a.shape, down_b.shape) == ((R, I), (H, R))
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    # The layers drop out; PEFT loads no fused experts that would.
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (R, 5, 0.0)
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert config["layers_to_transform"] == [3, 11]


@pytest.mark.parametrize("model_type", ["mixtral", "minimax", "minimax_m2"])
def test_the_names_of_mixtral(tmp_path: Path, model_type: str) -> None:
    student = student_of(0)
    export_peft(tmp_path, [student.wrapper(P, layer_idx=2)], model_type=model_type)
    file = SafetensorsFile(tmp_path / "adapter_model.safetensors")
    for projection, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        tensor = file.tensor(
            f"base_model.model.model.layers.2.block_sparse_moe.experts.1.{name}.lora_B.weight"
        )
        assert_same_bits(tensor, student.lora[f"{projection}_lora_b"][1])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["w1", "w2", "w3"]
    moe = blank(student, layer_idx=2)
    import_peft(tmp_path, [moe])
    assert_has(moe, student)


@pytest.mark.parametrize("model_type", [*REFUSED, "kimi_linear", ""])
def test_families_that_peft_does_not_load(tmp_path: Path, model_type: str) -> None:
    moe = student_of(0).wrapper(P)
    why = REFUSED.get(model_type, "it is not known what PEFT makes of them")
    message = rf"model_type: got '{model_type}', expected one of qwen3_moe, .* \({why}\); save_lora_weights"
    with pytest.raises(ValueError, match=message):
        export_peft(tmp_path / "x", [moe], model_type=model_type)
    assert not list(tmp_path.iterdir())


def of_checkpoint(student: Student, path: Path, model_type: object, layer_idx: int = 0) -> Any:
    """A layer of arrays that says it is from a checkpoint of that family."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return student.wrapper(P, layer_idx=layer_idx, weight_path=path)


def test_the_family_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    student = student_of(0)
    mixtral = of_checkpoint(student, tmp_path / "mixtral", "mixtral")
    export_peft(tmp_path / "x", [mixtral])
    assert ".block_sparse_moe.experts.0.w1." in SafetensorsFile(tmp_path / "x" / _TENSORS).names()[0]
    with pytest.raises(ValueError, match=r"model_type: got 'qwen2_moe', .*shared experts or dense layers"):
        export_peft(tmp_path / "y", [of_checkpoint(student, tmp_path / "qwen2", "qwen2_moe")])
    other = of_checkpoint(student, tmp_path / "olmoe", "olmoe", layer_idx=1)
    with pytest.raises(ValueError, match="layers: got layers of mixtral and olmoe, expected one family"):
        export_peft(tmp_path / "y", [mixtral, other])
    export_peft(tmp_path / "y", [mixtral, other], model_type="olmoe")
    of_gguf = student.wrapper(P, weight_path=tmp_path / "x.gguf")
    with pytest.raises(ValueError, match=r"model_type: got None, .*x\.gguf does not say"):
        export_peft(tmp_path / "z", [of_gguf])
    for unknown in (of_checkpoint(student, tmp_path / "none", None), student.wrapper(P, weight_path="none")):
        export_peft(tmp_path / "z", [unknown])
        assert ".mlp.experts.0.gate_proj." in SafetensorsFile(tmp_path / "z" / _TENSORS).names()[0]


_TENSORS = "adapter_model.safetensors"


def test_without_a_gate(tmp_path: Path) -> None:
    student = student_of(0, "relu2", bf16)
    export_peft(tmp_path, [student.wrapper(P, lora_alpha=0.5)])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["target_modules"], config["lora_alpha"]) == (["down_proj", "gate_proj"], 0.5)
    moe = blank(student, lora_alpha=0.5)
    import_peft(tmp_path, [moe])
    assert_has(moe, student)


def test_what_others_write(exported: Any) -> None:
    """Other prefixes, float16, modules that are not experts, and a config with everything in it."""
    path, students = exported

    def change(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        for name in list(tensors):
            half = tensors.pop(name).astype(np.float16)
            tensors[name.replace("model.model.layers", "language_model.layers")] = half
        tensors["base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"] = np.zeros((R, H), "f4")
        metadata.clear()

    rewritten(path / "adapter_model.safetensors", change)
    config = json.loads((path / "adapter_config.json").read_text())
    config |= {"rank_pattern": {}, "alpha_pattern": None, "use_rslora": None, "revision": "main"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    moe = blank(students[3], layer_idx=3)
    import_peft(path, [moe])
    for name, matrix in moe.lora_weights.items():
        assert_same_bits(matrix, students[3].lora[name].astype(np.float16).astype(np.float32))


_NAME = "base_model.model.model.layers.3.mlp.experts.1.up_proj.lora_B.weight"

PEFT: dict[str, tuple[Callable[[dict[str, Any], dict[str, str]], Any], str]] = {
    "a missing tensor": (lambda t, m: t.pop(_NAME), rf"no tensor '{_NAME}'"),
    "a shape": (
        lambda t, m: t.update({_NAME: t[_NAME].T}),
        rf"tensor '{_NAME}': got F32 \[{R}, {I}\], expected F32 or BF16 or F16 \[{I}, {R}\]",
    ),
    "a dtype": (
        lambda t, m: t.update({_NAME: t[_NAME].astype(np.int8)}),
        rf"tensor '{_NAME}': got I8 \[{I}, {R}\], expected F32 or BF16 or F16",
    ),
    "two of a kind": (
        lambda t, m: t.update({_NAME.removeprefix("base_model.model."): t[_NAME]}),
        r"tensor '.*layers\.3\.mlp\.experts\.1\.up_proj\.lora_B\.weight' is there as '.*' too",
    ),
}


@pytest.mark.parametrize("case", PEFT)
def test_wrong_tensors_of_peft(exported: Any, case: str) -> None:
    path, students = exported
    change, message = PEFT[case]
    rewritten(path / "adapter_model.safetensors", change)
    layers = [student_of(i).wrapper(P, layer_idx=i) for i in (11, 3)]
    with pytest.raises(ValueError, match="adapter_model.safetensors: " + message):
        import_peft(path, layers)
    for moe, i in zip(layers, (11, 3), strict=True):
        assert_has(moe, students[i])


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 8}, r"r: got 8, expected 4"),
    "scale": ({"lora_alpha": 6}, r"lora_alpha: got 6, expected 5\.0"),
    "kind": ({"peft_type": "LOHA"}, r"peft_type: got 'LOHA', expected 'LORA'"),
    "scaled by the root": ({"use_rslora": True}, r"use_rslora: got True, expected False"),
    "dora": ({"use_dora": True}, r"use_dora: got True, expected False"),
    "biases": ({"lora_bias": True}, r"lora_bias: got True, expected False"),
    "transposed": ({"fan_in_fan_out": True}, r"fan_in_fan_out: got True, expected False"),
    "ranks": ({"rank_pattern": {"up_proj": 2}}, r"rank_pattern: got \{'up_proj': 2\}, expected \{\}"),
    "scales": ({"alpha_pattern": {"up_proj": 2}}, r"alpha_pattern: got \{'up_proj': 2\}, expected \{\}"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_configs_of_peft(exported: Any, case: str) -> None:
    path, students = exported
    change, message = CONFIGS[case]
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | change))
    moe = students[3].wrapper(P, layer_idx=3)
    with pytest.raises(ValueError, match=r"adapter_config\.json: " + message):
        import_peft(path, [moe])
    assert_has(moe, students[3])


def test_files_of_peft_that_are_not_there(exported: Any, tmp_path: Path) -> None:
    path, students = exported
    moe = students[3].wrapper(P, layer_idx=3)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        import_peft(tmp_path / "missing", [moe])
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        import_peft(path, [moe])
    (path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config\.json: got list, expected a JSON object"):
        import_peft(path, [moe])
    assert_has(moe, students[3])


def test_rank_and_scale_of_adapters(exported: Any) -> None:
    path, students = exported
    assert peft_scale(path) == (R, students[3].lora_alpha)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("r", 0, "r: got 0, expected a positive integer"),
        ("r", "4", "r: got '4', expected a positive integer"),
        ("lora_alpha", None, "lora_alpha: got None, expected a number"),
        ("lora_alpha", float("nan"), "lora_alpha: got nan, expected a number"),
    ],
)
def test_wrong_ranks_and_scales(exported: Any, name: str, value: Any, message: str) -> None:
    path = exported[0] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=f"adapter_config.json: {message}"):
        peft_scale(exported[0])


def test_layers_that_do_not_belong_together(tmp_path: Path) -> None:
    student = student_of(0)
    one, same = student.wrapper(P, layer_idx=1), student.wrapper(P, layer_idx=1)
    scaled = student.wrapper(P, layer_idx=2, lora_alpha=6.0)
    for exchange in (export_peft, import_peft):
        with pytest.raises(ValueError, match="layers: got none, expected one or more"):
            exchange(tmp_path / "x", [])
        with pytest.raises(ValueError, match=r"layers: got layer_idx \[1, 1\], expected every number once"):
            exchange(tmp_path / "x", [one, same])
        with pytest.raises(ValueError, match=r"\(lora_rank, lora_alpha\) \[\(4, 5\.0\), \(4, 6\.0\)\], exp"):
            exchange(tmp_path / "x", [one, scaled])
    assert not list(tmp_path.iterdir())
