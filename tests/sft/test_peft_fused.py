"""Fused adapters of PEFT's target_parameters: their products are those of our matrices, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import assert_same_bits, bf16
from sft_layers import Student, draw_student

from ktmoe_np.io import SafetensorsFile
from ktmoe_np.io.safetensors.writer import write_safetensors
from ktmoe_np.sft import export_peft, import_peft, peft_scale

AnyArray = Any

E, I, H, P, R, ALPHA = 3, 24, 40, 2, 4, 5.0  # noqa: E741

STEM = "base_model.model.model.layers.3.mlp.experts"
GATE_UP, DOWN = f"{STEM}.base_layer", STEM


def draw(*shape: int, seed: int = 0) -> AnyArray:
    return np.random.default_rng([seed, *shape]).normal(0, 1, shape).astype(np.float32)


def written(path: Path, tensors: dict[str, AnyArray], **config: Any) -> Path:
    """A directory with the files of PEFT."""
    path.mkdir(exist_ok=True)
    write_safetensors(path / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, **config}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def fused(rank: int = R, down_rank: int = R, h: int = H, i: int = I) -> dict[str, AnyArray]:
    """Adapters as PEFT trains them: one A for gate and up."""
    return {
        f"{GATE_UP}.lora_A.weight": draw(E * rank, h),
        f"{GATE_UP}.lora_B.weight": draw(2 * i, rank * E),
        f"{DOWN}.lora_A.weight": draw(E * down_rank, i),
        f"{DOWN}.lora_B.weight": draw(h, down_rank * E),
    }


def layer(rank: int = R, alpha: float = ALPHA, activation: str = "silu", **options: Any) -> Any:
    """A layer 3 whose adapters are those of its seed."""
    student = draw_student(np.random.default_rng(0), (E, I, H), rank, activation)
    options = {"layer_idx": 3, "lora_alpha": alpha, **options}
    return Student(student.layer, {}, rank).wrapper(P, **options)


def delta(a: AnyArray, b: AnyArray, rank: int) -> AnyArray:
    """What PEFT adds to a parameter [E, N, K], but for the scale."""
    a, b = (x.astype(np.float64) for x in (a, b))
    return np.einsum("ore,eri->eoi", b.reshape(len(b), rank, E), a.reshape(E, rank, -1))


def product(moe: Any, role: str) -> AnyArray:
    """The same of a layer's adapters."""
    lora = {name: x.astype(np.float64) for name, x in moe.lora_weights.items()}
    return lora[f"{role}_lora_b"] @ lora[f"{role}_lora_a"]


def tensors_of(path: Path) -> dict[str, AnyArray]:
    file = SafetensorsFile(path / "adapter_model.safetensors")
    return {name: file.tensor(name).copy() for name in file.names()}


def deltas_of(path: Path, stem: str = STEM) -> tuple[AnyArray, AnyArray]:
    """Of the first parameter and of down, as PEFT would have them."""
    config, tensors = json.loads((path / "adapter_config.json").read_text()), tensors_of(path)
    ranks = config["rank_pattern"].get(r".*\.gate_up_proj", config["r"]), config["r"]
    first, down = (
        delta(tensors[f"{stem}{inner}.lora_A.weight"], tensors[f"{stem}{inner}.lora_B.weight"], rank)
        for inner, rank in zip((".base_layer", ""), ranks, strict=True)
    )
    return first, down


# ---- reading ----


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bf16])
def test_one_a_for_gate_and_up(tmp_path: Path, dtype: Any) -> None:
    tensors = {name: x.astype(dtype) for name, x in fused().items()}
    written(tmp_path, tensors)
    assert peft_scale(tmp_path) == (R, ALPHA)
    moe = layer()
    import_peft(tmp_path, [moe])
    lora = moe.lora_weights
    assert_same_bits(lora["gate_lora_a"], lora["up_lora_a"])
    both = delta(tensors[f"{GATE_UP}.lora_A.weight"], tensors[f"{GATE_UP}.lora_B.weight"], R)
    np.testing.assert_allclose(product(moe, "gate"), both[:, :I], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(product(moe, "up"), both[:, I:], rtol=1e-12, atol=1e-12)
    down = delta(tensors[f"{DOWN}.lora_A.weight"], tensors[f"{DOWN}.lora_B.weight"], R)
    np.testing.assert_allclose(product(moe, "down"), down, rtol=1e-12, atol=1e-12)


def test_rows_that_alternate(tmp_path: Path) -> None:
    tensors = fused()
    written(tmp_path, tensors)
    both = delta(tensors[f"{GATE_UP}.lora_A.weight"], tensors[f"{GATE_UP}.lora_B.weight"], R)
    moe = layer(activation="swigluoai")
    with pytest.raises(ValueError, match="model_type: got None, expected the family: with activation swiglu"):
        import_peft(tmp_path, [moe])
    import_peft(tmp_path, [moe], model_type="gpt_oss")
    np.testing.assert_allclose(product(moe, "gate"), both[:, 0::2], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(product(moe, "up"), both[:, 1::2], rtol=1e-12, atol=1e-12)
    import_peft(tmp_path, [moe], model_type="minimax_m3_vl_text")
    np.testing.assert_allclose(product(moe, "up"), both[:, I:], rtol=1e-12, atol=1e-12)
    # The model that the adapters name says it too.
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt_oss"}')
    written(tmp_path, tensors, base_model_name_or_path=str(tmp_path / "model"))
    import_peft(tmp_path, [moe])
    np.testing.assert_allclose(product(moe, "up"), both[:, 1::2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(H, I), (24, 24), (48, 24), (24, 48)])
def test_a_and_b_by_shape(tmp_path: Path, sizes: tuple[int, int]) -> None:
    """Of transposed weights that PEFT takes as they stand A and B change places; also of square ones."""
    h, i = sizes
    tensors = fused(h=h, i=i)
    student = draw_student(np.random.default_rng(0), (E, i, h), R)
    moes = [Student(student.layer, {}, R).wrapper(P, layer_idx=3) for _ in range(2)]
    import_peft(written(tmp_path, tensors), [moes[0]])
    swapped = {}
    for stem in (GATE_UP, DOWN):
        a = tensors[f"{stem}.lora_A.weight"].reshape(E, R, -1)
        b = tensors[f"{stem}.lora_B.weight"].reshape(-1, R, E).transpose(2, 0, 1)
        swapped[f"{stem}.lora_A.weight"] = b.transpose(0, 2, 1).reshape(E * R, -1)
        swapped[f"{stem}.lora_B.weight"] = a.transpose(2, 1, 0).reshape(-1, R * E)
    import_peft(written(tmp_path, swapped), [moes[1]])
    for name, matrix in moes[0].lora_weights.items():
        assert_same_bits(moes[1].lora_weights[name], matrix, name)


@pytest.mark.parametrize(("rank", "down_rank"), [(3 * R, R), (R, 3 * R), (2 * R, R)])
def test_several_ranks(tmp_path: Path, rank: int, down_rank: int) -> None:
    """The smaller is filled up with zeros; gate and up trained as one stay one."""
    tensors = fused(rank, down_rank)
    ranks = {r".*\.gate_up_proj": rank, "experts.down_proj": down_rank}
    alphas = {name: ALPHA * each / R for name, each in ranks.items()}
    written(tmp_path, tensors, r=77, rank_pattern=ranks, alpha_pattern=alphas)
    most = max(rank, down_rank)
    assert peft_scale(tmp_path) == (most, ALPHA * most / R)
    moe = layer(most, ALPHA * most / R)
    import_peft(tmp_path, [moe])
    both = delta(tensors[f"{GATE_UP}.lora_A.weight"], tensors[f"{GATE_UP}.lora_B.weight"], rank)
    down = delta(tensors[f"{DOWN}.lora_A.weight"], tensors[f"{DOWN}.lora_B.weight"], down_rank)
    for role, expected in (("gate", both[:, :I]), ("up", both[:, I:]), ("down", down)):
        np.testing.assert_allclose(product(moe, role), expected, rtol=1e-12, atol=1e-12)


def test_ungated_experts_of_one_linear_each(tmp_path: Path) -> None:
    """Their first projection is called up."""
    tensors = {}
    for e in range(E):
        for name, n, k in (("up_proj", I, H), ("down_proj", H, I)):
            stem = f"base_model.model.backbone.layers.3.mixer.experts.{e}.{name}"
            tensors[f"{stem}.lora_A.weight"] = draw(R, k, seed=e)
            tensors[f"{stem}.lora_B.weight"] = draw(n, R, seed=e)
    moe = layer(activation="relu2")
    import_peft(written(tmp_path, tensors), [moe])
    for e in range(E):
        assert_same_bits(moe.lora_weights["gate_lora_a"][e], draw(R, H, seed=e))
        assert_same_bits(moe.lora_weights["down_lora_b"][e], draw(H, R, seed=e))


# ---- writing ----


@pytest.mark.parametrize(
    ("model_type", "stem"),
    [
        (None, "mlp.experts"),
        ("granitemoe", "block_sparse_moe.experts"),
        ("gpt_oss", "mlp.experts"),
        ("llama4_text", "feed_forward.experts"),
        ("gemma4_text", "experts"),
    ],
)
def test_what_is_written(tmp_path: Path, model_type: str | None, stem: str) -> None:
    student = draw_student(np.random.default_rng(0), (E, I, H), R)
    moe = student.wrapper(P, layer_idx=3, lora_dropout=0.1)
    export_peft(tmp_path, [moe], model_type=model_type)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.gate_up_proj", "experts.down_proj"]
    assert config["target_modules"] == []
    assert config["rank_pattern"] == {r".*\.gate_up_proj": 2 * R}
    assert config["alpha_pattern"] == {r".*\.gate_up_proj": 2 * student.lora_alpha}
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (R, student.lora_alpha, 0.0)
    first, down = deltas_of(tmp_path, f"base_model.model.model.layers.3.{stem}")
    if model_type == "llama4_text":  # of weights [E, K, N], as they stand
        first, down = first.transpose(0, 2, 1), down.transpose(0, 2, 1)
    halves = (first[:, 0::2], first[:, 1::2]) if model_type == "gpt_oss" else (first[:, :I], first[:, I:])
    for role, got in zip(("gate", "up", "down"), (*halves, down), strict=True):
        np.testing.assert_allclose(got, product(moe, role), rtol=1e-12, atol=1e-12)
    assert peft_scale(tmp_path) == (R, student.lora_alpha)
    other = layer(alpha=student.lora_alpha)
    import_peft(tmp_path, [other], model_type=model_type)
    for name, matrix in student.lora.items():
        assert_same_bits(other.lora_weights[name], matrix, name)


def test_ungated_experts(tmp_path: Path) -> None:
    student = draw_student(np.random.default_rng(0), (E, I, H), R, "relu2", dtype=bf16)
    moe = student.wrapper(P, layer_idx=3)
    export_peft(tmp_path, [moe])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.up_proj", "experts.down_proj"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    first, down = deltas_of(tmp_path, "base_model.model.model.layers.3.mixer.experts")
    np.testing.assert_allclose(first, product(moe, "gate"), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(down, product(moe, "down"), rtol=1e-12, atol=1e-12)
    other = layer(alpha=student.lora_alpha, activation="relu2")
    import_peft(tmp_path, [other])
    for name, matrix in student.lora.items():
        assert_same_bits(other.lora_weights[name], matrix, name)
    message = "layers: got layer 3 with no gate, expected a gate, as its family has"
    with pytest.raises(ValueError, match=message):
        export_peft(tmp_path, [moe], model_type="qwen3_moe")


# ---- errors ----

_A, _B = f"{GATE_UP}.lora_A.weight", f"{DOWN}.lora_B.weight"

WRONG: dict[str, tuple[dict[str, AnyArray | None], str]] = {
    "no down": (
        {f"{DOWN}.lora_A.weight": None, _B: None},
        r"layer 3: got no lora_A of down, expected adapters of both experts\.gate_up_proj and experts\.down",
    ),
    "no gate and up": ({_A: None}, r"layer 3: got no lora_A of gate and up, expected adapters of both"),
    "a dtype": (
        {_A: np.zeros((E * R, H), np.int8)},
        rf"tensor '{_A}': got I8 \[12, 40\], expected F32 or BF16",
    ),
    "axes": ({_A: np.zeros((E, R, H), "f4")}, rf"tensor '{_A}': got F32 \[3, 4, 40\], expected .* matrix"),
    "sizes that do not fit": (
        {_A: draw(E * R, H + 1)},
        r"tensor '.*lora_B\.weight': got 48 rows and 41 columns of its A beside 40 and 24 of down",
    ),
    "a rank": (
        {_A: draw(10, H)},
        rf"tensor '{_A}': got 10 rows and 12 columns of its B, expected 4 of each expert in both, its rank",
    ),
    "another number of experts": (
        {_A: draw(2 * R, H), f"{GATE_UP}.lora_B.weight": draw(2 * I, 2 * R)},
        r"layer 3: got 2 and 3 experts with a gate of 40 inputs and 24 inside, expected 3 with a gate",
    ),
    "no gate": (
        {f"{GATE_UP}.lora_B.weight": draw(I, R * E)},
        r"layer 3: got 3 and 3 experts without a gate of 40 inputs and 24 inside, expected 3 with a gate",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors(tmp_path: Path, case: str) -> None:
    change, message = WRONG[case]
    tensors = {name: x for name, x in (fused() | change).items() if x is not None}
    moe = layer()
    before = moe.lora_weights
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: {message}"):
        import_peft(written(tmp_path, tensors), [moe])
    for name, matrix in moe.lora_weights.items():
        assert_same_bits(matrix, before[name])


def test_layers_that_there_are_none_of(tmp_path: Path) -> None:
    written(tmp_path, fused())
    with pytest.raises(ValueError, match=r"got it and 3 more, expected experts of layers \[4\] alone"):
        import_peft(tmp_path, [layer(layer_idx=4)])
    with pytest.raises(ValueError, match=r"no tensor 'base_model.*layers\.4\.mlp"):
        import_peft(tmp_path, [layer(layer_idx=4)], strict=False)


def test_scales_that_no_layer_has(tmp_path: Path) -> None:
    written(tmp_path, fused(), alpha_pattern={"experts.down_proj": 6})
    message = (
        r"alpha_pattern: got \(rank, alpha\) \(4, 5\.0\) of gate and up and \(4, 6\.0\) of down in layer 3"
    )
    with pytest.raises(ValueError, match=message):
        peft_scale(tmp_path)
    other = {name.replace("layers.3", "layers.4"): x for name, x in fused().items()}
    written(tmp_path, fused() | other, alpha_pattern={r".*layers\.4\..*": 6})
    message = r"alpha_pattern: got \(rank, alpha\) \[\(4, 5\.0\), \(4, 6\.0\)\] of layers, expected the same"
    with pytest.raises(ValueError, match=message):
        peft_scale(tmp_path)
    # Patterns of what is not there change nothing.
    written(tmp_path, {"base_model.model.lm_head.lora_A.weight": draw(2, 3)}, alpha_pattern={"lm_head": 6})
    assert peft_scale(tmp_path) == (R, ALPHA)


def test_rows_in_another_order_are_found_out(tmp_path: Path) -> None:
    """B of gate and up is block-diagonal in one order of rows only."""
    student = draw_student(np.random.default_rng(0), (E, I, H), R)
    export_peft(tmp_path, [student.wrapper(P, layer_idx=3)], model_type="gpt_oss")
    message = r"layer 3: got rank 8 of gate and up together, expected at most 4, or 8 with B block-diagonal"
    with pytest.raises(ValueError, match=message):
        import_peft(tmp_path, [layer(alpha=student.lora_alpha)])
