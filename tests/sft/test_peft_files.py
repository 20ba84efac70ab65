"""Adapters in PEFT's files, one Linear per expert: under the names of the family; nothing wrong gets in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import assert_same_bits, bf16
from sft_layers import Student, draw_student

from ktmoe_np.io import SafetensorsFile
from ktmoe_np.io.safetensors.writer import write_safetensors
from ktmoe_np.sft import export_peft, import_peft, peft_scale
from ktmoe_np.sft.peft import REFUSED, SEPARATE_REFUSED

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


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, dict[int, Student]]:
    """A directory with two layers, and these."""
    students = {3: student_of(3), 11: student_of(11)}
    layers = [student.wrapper(P, layer_idx=i, lora_dropout=0.1 * (i > 3)) for i, student in students.items()]
    export_peft(tmp_path / "peft", layers, layout="per_expert")
    return tmp_path / "peft", students


def test_layers_come_back_from_peft(exported: Any) -> None:
    path, students = exported
    layers = [blank(student, layer_idx=i) for i, student in students.items()]
    import_peft(str(path), layers[::-1])
    for moe, student in zip(layers, students.values(), strict=True):
        assert_has(moe, student)
    alone = blank(students[11], layer_idx=11)
    import_peft(path, [alone], strict=False)
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
    export_peft(tmp_path, [student.wrapper(P, layer_idx=2)], layout="per_expert", model_type=model_type)
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


@pytest.mark.parametrize("model_type", [*REFUSED, "no_such", ""])
def test_families_that_peft_does_not_adapt(tmp_path: Path, model_type: str) -> None:
    moe = student_of(0).wrapper(P)
    why = REFUSED.get(model_type, "it is not known how PEFT adapts them")
    message = rf"model_type: got '{model_type}', expected one of qwen3_moe, .* \({why}\); save_lora_weights"
    for layout in ("fused", "per_expert"):
        with pytest.raises(ValueError, match=message):
            export_peft(tmp_path / "x", [moe], layout=layout, model_type=model_type)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model_type", SEPARATE_REFUSED)
def test_families_without_a_linear_per_expert(tmp_path: Path, model_type: str) -> None:
    moe = student_of(0).wrapper(P)
    why = SEPARATE_REFUSED[model_type]
    message = rf"model_type: got '{model_type}', expected one of qwen3_moe, .* \({why}\); 'fused' works"
    with pytest.raises(ValueError, match=message):
        export_peft(tmp_path / "x", [moe], layout="per_expert", model_type=model_type)
    assert not list(tmp_path.iterdir())


def test_a_layout_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout: got 'both', expected 'fused' or 'per_expert'"):
        export_peft(tmp_path / "x", [student_of(0).wrapper(P)], layout="both")  # type: ignore[arg-type]


def of_checkpoint(student: Student, path: Path, model_type: object, layer_idx: int = 0) -> Any:
    """A layer of arrays that says it is from a checkpoint of that family."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return student.wrapper(P, layer_idx=layer_idx, weight_path=path)


def first_name(path: Path) -> str:
    return SafetensorsFile(path / _TENSORS).names()[0]


def test_the_family_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    student = student_of(0)
    mixtral = of_checkpoint(student, tmp_path / "mixtral", "mixtral")
    export_peft(tmp_path / "x", [mixtral], layout="per_expert")
    assert ".block_sparse_moe.experts.0.w1." in first_name(tmp_path / "x")
    with pytest.raises(ValueError, match=r"model_type: got 'qwen2_moe', .*shared experts or dense layers"):
        export_peft(
            tmp_path / "y", [of_checkpoint(student, tmp_path / "qwen2", "qwen2_moe")], layout="per_expert"
        )
    other = of_checkpoint(student, tmp_path / "olmoe", "olmoe", layer_idx=1)
    with pytest.raises(ValueError, match="layers: got layers of mixtral and olmoe, expected one family"):
        export_peft(tmp_path / "y", [mixtral, other])
    export_peft(tmp_path / "y", [mixtral, other], model_type="olmoe")
    of_gguf = student.wrapper(P, weight_path=tmp_path / "x.gguf")
    with pytest.raises(ValueError, match=r"model_type: got None, .*x\.gguf does not say"):
        export_peft(tmp_path / "z", [of_gguf])
    granite = of_checkpoint(student, tmp_path / "granite", "granitemoe")
    for layer in (of_gguf, mixtral):  # what the adapters are for counts
        export_peft(tmp_path / "z", [layer], base_model_name_or_path=tmp_path / "granite")
        assert ".block_sparse_moe.experts." in first_name(tmp_path / "z")
    config = json.loads((tmp_path / "z" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "granite")
    import_peft(
        tmp_path / "z",
        [
            of_gguf,
        ],
    )
    export_peft(tmp_path / "z", [granite], base_model_name_or_path="someone/model")
    for unknown in (of_checkpoint(student, tmp_path / "none", None), student.wrapper(P, weight_path="none")):
        export_peft(tmp_path / "z", [unknown], layout="per_expert")
        assert ".mlp.experts.0.gate_proj." in first_name(tmp_path / "z")


_TENSORS = "adapter_model.safetensors"


def test_without_a_gate(tmp_path: Path) -> None:
    student = student_of(0, "relu2", bf16)
    export_peft(tmp_path, [student.wrapper(P, lora_alpha=0.5)], layout="per_expert")
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
    before = moe.lora_weights
    message = r"tensor '.*self_attn\.q_proj.*': got it and 18 more, expected experts of layers \[3\] alone"
    with pytest.raises(ValueError, match=message):
        import_peft(path, [moe])
    for name, matrix in moe.lora_weights.items():
        assert_same_bits(matrix, before[name])
    import_peft(path, [moe], strict=False)
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
        r"tensor '.*layers\.3\.mlp\.experts\.1\.up_proj\.lora_B\.weight': got it as '.*' too, expected one",
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
    "rank": ({"r": 8}, r"r: got 8, expected 4, that of the layers"),
    "scale": ({"lora_alpha": 6}, r"lora_alpha: got 6\.0, expected 5\.0"),
    "kind": ({"peft_type": "LOHA"}, r"peft_type: got 'LOHA', expected 'LORA'"),
    "no kind": ({"peft_type": None}, r"peft_type: got None, expected 'LORA'"),
    "scaled by the root": ({"use_rslora": True}, r"use_rslora: got True, expected False"),
    "dora": ({"use_dora": True}, r"use_dora: got True, expected False"),
    "biases": ({"lora_bias": True}, r"lora_bias: got True, expected False"),
    "transposed": ({"fan_in_fan_out": True}, r"fan_in_fan_out: got True, expected False"),
    "several ranks": (
        {"rank_pattern": {"up_proj": 2}},
        r"rank_pattern, alpha_pattern: got \[\(2, 5\.0\), \(4, 5\.0\)\] for modules of experts, expected one",
    ),
    "several scales": (
        {"alpha_pattern": {r".*\.experts\.1\..*": 2}},
        r"rank_pattern, alpha_pattern: got \[\(4, 2\.0\), \(4, 5\.0\)\] for modules of experts, expected one",
    ),
    "no pattern": ({"rank_pattern": {"(": 2}}, r"rank_pattern: got '\(', expected a pattern: missing"),
    "no patterns": ({"rank_pattern": [1]}, r"rank_pattern: got \[1\], expected an object"),
    "no rank": ({"rank_pattern": {"x": 0.5}}, r"rank_pattern: got 0\.5, expected a positive integer"),
    "no scale": ({"alpha_pattern": {"x": "1"}}, r"alpha_pattern: got '1', expected a number"),
    "biases of the model": ({"bias": "all"}, r"bias: got 'all', expected 'none'"),
    "whole modules": ({"modules_to_save": ["gate"]}, r"modules_to_save: got \['gate'\], expected None"),
    "numbers of layers": (
        {"layer_replication": [[0, 2]]},
        r"layer_replication: got \[\[0, 2\]\], expected None",
    ),
    "quantized inputs": ({"use_qalora": True}, r"use_qalora: got True, expected False"),
    "other base weights": (
        {"init_lora_weights": "pissa_niter_16"},
        r"init_lora_weights: got 'pissa_niter_16', expected adapters for the base weights as they are",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_configs_of_peft(exported: Any, case: str) -> None:
    path, students = exported
    change, message = CONFIGS[case]
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | change))
    moe = students[3].wrapper(P, layer_idx=3)
    with pytest.raises(ValueError, match=r"adapter_config\.json: " + message):
        import_peft(path, [moe], strict=False)
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
