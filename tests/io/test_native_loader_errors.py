"""What is wrong with native experts is said by file, tensor, what was found and what was expected."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_checkpoints import ENCODINGS, LAYER, config_of, draw_layer, put_layer
from numpy.typing import NDArray

from ktmoe_np.io.native import load_native, native_method

AnyArray = NDArray[Any]
Change = Callable[[dict[str, AnyArray]], object]

E, I, H = 3, 96, 160  # noqa: E741

EXPERTS = f"model.layers.{LAYER}.mlp.experts"
UP = f"{EXPERTS}.1.up_proj"
DOWN = f"{EXPERTS}.2.down_proj"


def put(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Change:
    return lambda tensors: tensors.update({name: np.zeros(shape, dtype)})


def hold(name: str, *values: float, dtype: Any = np.float32) -> Change:
    return lambda tensors: tensors.update({name: np.array(values, dtype)})


def drop(pattern: str) -> Change:
    """Take away every tensor whose name has the pattern."""
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if re.search(pattern, name)]


def drop_then(pattern: str, change: Change) -> Change:
    return lambda tensors: (drop(pattern)(tensors), change(tensors))


def hold_all(name: str, shape: tuple[int, ...], value: float, dtype: Any = np.int32) -> Change:
    """Of one value everywhere."""
    return lambda tensors: tensors.update({name: np.full(shape, value, dtype)})


NOT_SYMMETRIC = (
    r"2\.down_proj\.qzeros': got zeros of weights that are not symmetric, expected 7 in every nibble, or 8 "
    r"in every nibble \(checkpoint_format gptq_v2\); method INT4_ZP takes others$"
)
DESC_ACT = (
    r"1\.up_proj\.g_idx': got another order than groups of 64 neighbors, expected arange\(K\) // 64: "
    r"weights quantized with desc_act are not supported, since .*; quantize with desc_act=False$"
)

WRONG_TENSORS: list[tuple[str, Change, str]] = [
    # Missing
    ("fp8", drop(rf"{UP}\.weight$"), r"1\.up_proj\.weight': got none, expected F8_E4M3 \[96, 160\]"),
    (
        "fp8",
        drop(rf"{UP}\.weight_scale_inv"),
        r"1\.up_proj\.weight_scale_inv': got none, expected F32 or BF16 or F8_E8M0 \[1, 2\]",
    ),
    ("fp8", drop("scale"), r"0\.gate_proj\.weight_scale_inv': got none, expected F32 or .* \[1, 2\]"),
    (
        "fp8_channel",
        drop(rf"{DOWN}\.weight_scale"),
        r"2\.down_proj\.weight_scale': got none, "
        r"expected F32 or BF16 \[160, 1\] or \[160\] or \[1\] or \[\]",
    ),
    ("mxfp8", drop(rf"{UP}\.weight_scale"), r"scale_inv': got none, expected U8 or F8_E8M0 \[96, 5\]"),
    ("rawint4", drop(rf"{UP}\.weight_packed"), r"weight_packed': got none, expected I32 \[96, 20\]"),
    ("rawint4", drop("weight_scale"), r"0\.gate_proj\.weight_scale': got none, expected BF16 \[96, 5\]"),
    ("rawint4", drop(rf"{UP}\.weight_shape"), r"weight_shape': got none, expected I64 or I32 \[2\]"),
    ("gptq", drop(rf"{UP}\.qweight"), r"1\.up_proj\.qweight': got none, expected I32 \[20, 96\]"),
    (
        "gptq",
        drop("scales"),
        r"0\.gate_proj\.scales': got none, "
        r"expected F16 or BF16 \[5, 96\] or \[3, 96\] or \[2, 96\] or \[1, 96\]$",
    ),
    ("gptq", drop("qzeros"), r"qzeros': got none, expected I32 \[5, 12\] or \[3, 12\] or \[2, 12\] or "),
    ("gptq", drop(rf"{UP}\.g_idx"), r"1\.up_proj\.g_idx': got none, expected I32 \[160\]"),
    (
        "mxfp4_packed",
        drop(rf"{UP}\.weight_scale"),
        r"weight_scale': got none, expected U8 or F8_E8M0 \[96, 5\]",
    ),
    (
        "mxfp4_deepseek_v4",
        drop(rf"{UP}\.scale"),
        r"1\.up_proj\.scale': got none, expected U8 or F8_E8M0 \[96, 5\]",
    ),
    ("nvfp4_modelopt", drop("weight_scale$"), r"weight_scale': got none, expected F8_E4M3 \[96, 10\]"),
    (
        "nvfp4_modelopt",
        drop(rf"{UP}\.weight_scale_2"),
        r"weight_scale_2': got none, expected F32 \[\] or \[1\]",
    ),
    ("nvfp4_packed", drop("global"), r"weight_global_scale': got none, expected F32 \[\] or \[1\]"),
    (
        "gpt_oss",
        drop("gate_up_proj_blocks"),
        r"gate_up_proj_blocks': got none, expected U8 \[3, 192, 5, 16\]",
    ),
    (
        "gpt_oss",
        drop("down_proj_scales"),
        r"down_proj_scales': got none, expected U8 or F8_E8M0 \[3, 160, 3\]",
    ),
    ("gpt_oss", drop("gate_up_proj_bias"), r"gate_up_proj_bias': got none, expected BF16 .* \[3, 192\]"),
    ("step", drop("up_proj.weight_scale_inv"), r"moe\.up_proj\.weight_scale_inv': got none, .* \[3, 1, 2\]"),
    ("fp8", drop(r"gate_proj"), r"0\.gate_proj\.weight': got none"),
    ("fp8", drop(r"experts\.1\."), r"experts\.1\.gate_proj\.weight': got none"),
    # Another shape
    (
        "fp8",
        put(f"{UP}.weight_scale_inv", (2, 2)),
        r"got F32 \[2, 2\], expected F32 or BF16 or F8_E8M0 \[1, 2\]",
    ),
    (
        "fp8",
        put(f"{UP}.weight", (160, 96), ml_dtypes.float8_e4m3fn),
        r"up_proj\.weight': got F8_E4M3 \[160, 96\], expected F8_E4M3 \[96, 160\]",
    ),
    (
        "fp8_channel",
        put(f"{UP}.weight_scale", (160, 1)),
        r"got F32 \[160, 1\], expected F32 or BF16 \[96, 1\]",
    ),
    (
        "rawint4",
        put(f"{UP}.weight_packed", (96, 40), np.int32),
        r"got I32 \[96, 40\], expected I32 \[96, 20\]",
    ),
    ("rawint4", put(f"{UP}.weight_shape", (3,), np.int64), r"got I64 \[3\], expected I64 or I32 \[2\]"),
    ("gpt_oss", put(f"{EXPERTS}.down_proj_blocks", (3, 160, 48), np.uint8), r"expected U8 \[3, 160, 3, 16\]"),
    ("gpt_oss", put(f"{EXPERTS}.down_proj_blocks", (2, 160, 3, 16), np.uint8), r"got U8 \[2, 160, 3, 16\]"),
    ("nvfp4_packed", put(f"{UP}.weight_global_scale", (2,)), r"got F32 \[2\], expected F32 \[\] or \[1\]"),
    ("fp8", put(f"{UP}.bias", (96,)), r"0\.gate_proj\.bias': got none, expected BF16 or F16 or F32 \[96\]"),
    # GPTQ of another number of bits: 2, 3 and 8
    ("gptq", put(f"{UP}.qweight", (10, 96), np.int32), r"got I32 \[10, 96\], expected I32 \[20, 96\]"),
    ("gptq", put(f"{UP}.qweight", (15, 96), np.int32), r"got I32 \[15, 96\], expected I32 \[20, 96\]"),
    ("gptq", put(f"{UP}.qweight", (40, 96), np.int32), r"got I32 \[40, 96\], expected I32 \[20, 96\]"),
    # Groups of another size than any that is taken
    (
        "gptq",
        put(f"{UP}.scales", (10, 96), np.float16),
        r"up_proj\.scales': got F16 \[10, 96\], expected F16 or",
    ),
    (
        "gptq",
        put(f"{UP}.qzeros", (3, 24), np.int32),
        r"up_proj\.qzeros': got I32 \[3, 24\], expected I32 \[5, 12",
    ),
    # Another dtype
    (
        "gptq",
        put(f"{UP}.scales", (3, 96)),
        r"up_proj\.scales': got F32 \[3, 96\], expected F16 or BF16 \[5, 96\]",
    ),
    ("gptq", put(f"{UP}.g_idx", (160,), np.int64), r"g_idx': got I64 \[160\], expected I32 \[160\]"),
    ("fp8", put(f"{UP}.weight", (96, 160)), r"got F32 \[96, 160\], expected F8_E4M3 \[96, 160\]"),
    ("fp8", put(f"{DOWN}.weight", (160, 96), ml_dtypes.bfloat16), r"got BF16 \[160, 96\], expected F8_E4M3"),
    ("fp8", put(f"{UP}.weight_scale_inv", (1, 2), np.float16), r"got F16 \[1, 2\], expected F32 or BF16"),
    ("mxfp8", put(f"{UP}.weight_scale_inv", (96, 5)), r"got F32 \[96, 5\], expected U8 or F8_E8M0 \[96, 5\]"),
    ("rawint4", put(f"{UP}.weight_scale", (96, 5)), r"got F32 \[96, 5\], expected BF16 \[96, 5\]"),
    ("nvfp4_modelopt", put(f"{UP}.weight_scale", (96, 10), np.uint8), r"got U8 \[96, 10\], expected F8_E4M3"),
    (
        "mxfp4_packed",
        put(f"{UP}.weight_packed", (96, 20), np.int32),
        r"got I32 \[96, 20\], expected U8 \[96, 80\]",
    ),
    # Other contents
    (
        "rawint4",
        hold(f"{UP}.weight_shape", 160, 96, dtype=np.int64),
        r"got \[160, 96\], expected \[96, 160\]",
    ),
    (
        "nvfp4_packed",
        hold(f"{UP}.weight_global_scale", 0),
        r"got 0\.0 for expert 1, expected a finite number with a finite reciprocal",
    ),
    (
        "nvfp4_packed",
        hold(f"{UP}.weight_global_scale", 1e-45),
        "expected a finite number with a finite recip",
    ),
    ("nvfp4_packed", hold(f"{UP}.weight_global_scale", np.inf), "got inf for expert 1, expected a finite"),
    (
        "nvfp4_modelopt",
        hold(f"{UP}.weight_scale_2", np.nan),
        "got nan for expert 1, expected a finite number$",
    ),
    (
        "gptq",
        hold_all(f"{UP}.qzeros", (2, 12), 0x77777777),
        r"qzeros': got 2 groups, expected 3 as of the scales",
    ),
    ("gptq", hold_all(f"{DOWN}.qzeros", (2, 20), 0x66666666), NOT_SYMMETRIC),
    ("gptq", hold_all(f"{DOWN}.qzeros", (2, 20), 0x77777778), NOT_SYMMETRIC),
    ("gptq_v2", lambda tensors: tensors[f"{DOWN}.qzeros"].put(3, 0x77777777), NOT_SYMMETRIC),
    ("gptq", lambda tensors: tensors[f"{UP}.g_idx"].put([0, 159], [2, 0]), DESC_ACT),
    ("gptq", hold_all(f"{UP}.g_idx", (160,), 0), DESC_ACT),
    (
        "gptq_bf16",
        hold_all(f"{UP}.scales", (5, 96), 2.0**20, ml_dtypes.bfloat16),
        r"up_proj\.scales': got 1\.04858e\+06, expected numbers that float16 has$",
    ),
    # More than there should be
    (
        "fp8",
        put(f"{EXPERTS}.3.up_proj.weight", (1,)),
        r"experts\.3\.up_proj\.weight': got one, expected 3 exp",
    ),
    (
        "fp8",
        put(f"{EXPERTS}.7.up_proj.weight_scale_inv", (1,)),
        r"weight_scale_inv': got one, expected 3",
    ),
    (
        "rawint4",
        put(f"{UP}.weight_zero_point", (96, 5), np.int32),
        r"weight_zero_point': got one, expected none: RAWINT4 takes only symmetric weights in groups",
    ),
    (
        "rawint4",
        put(f"{DOWN}.weight_g_idx", (96,), np.int32),
        "weight_g_idx': got one, expected none: RAWINT4 takes only",
    ),
]


@pytest.mark.parametrize(("encoding", "change", "message"), WRONG_TENSORS)
def test_wrong_tensors(tmp_path: Path, encoding: str, change: Change, message: str) -> None:
    layer = draw_layer(encoding, E, I, H)
    change(layer.tensors)
    put_layer(tmp_path, layer)
    with pytest.raises(ValueError, match=message) as raised:
        load_native(tmp_path, LAYER, config_of(E, I, H))
    assert str(raised.value).startswith(f"{tmp_path}")
    assert f"layers.{LAYER}." in str(raised.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((E - 1, I, H), r"tensor '.*experts\.2\.gate_proj\.weight_packed': got one, expected 2 experts"),
        (
            (E + 1, I, H),
            r"tensor '.*experts\.3\.gate_proj\.weight_packed': got none, expected U8 \[96, 80\]",
        ),
        ((E, I + 32, H), r"gate_proj\.weight_packed': got U8 \[96, 80\], expected U8 \[128, 80\]"),
        ((E, I, H + 32), r"gate_proj\.weight_packed': got U8 \[96, 80\], expected U8 \[96, 96\]"),
        ((E, I + 1, H), "got moe_intermediate_size 97, expected a multiple of 32 for MXFP4"),
        ((E, I, H + 1), "got hidden_size 161, expected a multiple of 32 for MXFP4"),
    ],
)
def test_other_sizes_than_the_config(tmp_path: Path, sizes: tuple[int, int, int], message: str) -> None:
    put_layer(tmp_path, draw_layer("mxfp4_packed", E, I, H))
    with pytest.raises(ValueError, match=message):
        load_native(tmp_path, LAYER, config_of(*sizes))


def test_another_number_of_fused_experts(tmp_path: Path) -> None:
    put_layer(tmp_path, draw_layer("gpt_oss", E, I, H))
    message = r"gate_up_proj_blocks': got U8 \[3, 192, 5, 16\], expected U8 \[4, 192, 5, 16\]"
    with pytest.raises(ValueError, match=message):
        load_native(tmp_path, LAYER, config_of(E + 1, I, H))


@pytest.mark.parametrize(
    ("naming", "other", "message"),
    [
        ("mixer", "nemotron", "'backbone.layers.5.' have a gate, but activation relu2 is not gated"),
        ("nemotron", "mixer", "'backbone.layers.5.' have no gate, but activation silu is gated"),
    ],
)
def test_other_projections_than_the_activation(tmp_path: Path, naming: str, other: str, message: str) -> None:
    put_layer(tmp_path, draw_layer("fp8", E, I, H, naming))
    with pytest.raises(ValueError, match=message):
        load_native(tmp_path, LAYER, config_of(E, I, H, other))


def test_a_lost_gate_is_missed(tmp_path: Path) -> None:
    """Experts with a gate are not read as experts without one."""
    layer = draw_layer("fp8", E, I, H, "mixer")
    drop(r"experts\.0\.gate_proj")(layer.tensors)
    put_layer(tmp_path, layer)
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj\.weight': got none"):
        load_native(tmp_path, LAYER, config_of(E, I, H, "mixer"))


#: Methods for other contents of the same tensors: the caller's word decides.
ALIKE = {
    "rawint4": ("INT4_ZP",),
    "rawint4_i32": ("INT4_ZP",),
    "gptq": ("INT4_ZP",),
    "gptq_bf16": ("INT4_ZP",),
    "gptq_v2": ("INT4_ZP",),
    "gptq_zeros": ("GPTQ_INT4",),
    "gptq_zeros_v2": ("GPTQ_INT4",),
}


def test_zero_points_for_a_method_without_them(tmp_path: Path) -> None:
    put_layer(tmp_path, draw_layer("gptq_zeros", E, I, H))
    with pytest.raises(ValueError, match="got zeros of weights that are not symmetric"):
        load_native(tmp_path, LAYER, config_of(E, I, H), "GPTQ_INT4")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_another_method(tmp_path: Path, encoding: str) -> None:
    layer = draw_layer(encoding, E, I, H)
    put_layer(tmp_path, layer)
    methods = {method for method, _ in ENCODINGS.values()}
    for method in methods - {layer.method, *ALIKE.get(encoding, ())}:
        message = f"the experts of layer {LAYER}: got {layer.method}, expected {method}"
        with pytest.raises(ValueError, match=message) as raised:
            load_native(tmp_path, LAYER, config_of(E, I, H), method)
        assert str(tmp_path) in str(raised.value)


def test_an_unknown_method(tmp_path: Path) -> None:
    message = "method: got 'BF16', expected one of the native formats: FP8, FP8_PERCHANNEL, MXFP8, RAWINT4"
    with pytest.raises(ValueError, match=message):
        load_native(tmp_path, LAYER, config_of(E, I, H), "BF16")


def test_the_method_says_what_is_missing(tmp_path: Path) -> None:
    """Codes without scales may be of more than one format."""
    layer = draw_layer("fp8", E, 128, 128)
    drop("scale")(layer.tensors)
    put_layer(tmp_path, layer)
    expected = {
        "FP8": r"weight_scale_inv': got none, expected F32 or BF16 or F8_E8M0 \[1, 1\]",
        "FP8_PERCHANNEL": r"weight_scale': got none, expected F32 or BF16 \[128, 1\]",
        "MXFP8": r"weight_scale_inv': got none, expected U8 or F8_E8M0 \[128, 4\]",
    }
    for method, message in expected.items():
        with pytest.raises(ValueError, match=message):
            load_native(tmp_path, LAYER, config_of(E, 128, 128), method)


def test_layers_that_are_not_native(tmp_path: Path) -> None:
    for naming in ("qwen3_moe", "qwen3_5_moe", "gpt_oss"):
        write_checkpoint(tmp_path / naming, naming, [0], E, I, H)
        message = r"tensor '.*layers\.0\.mlp\.experts\..*': got BF16, expected weights of FP8, .*, NVFP4"
        for method in (None, "FP8"):
            with pytest.raises(ValueError, match=message):
                load_native(tmp_path / naming, 0, config_of(E, I, H), method)


def test_layers_without_experts(tmp_path: Path) -> None:
    put_layer(tmp_path, draw_layer("rawint4", E, I, H))
    for number in (LAYER - 1, LAYER + 1, -1):
        assert native_method(tmp_path, number) is None
        message = f"layer {number} has no known experts; layers with experts: {LAYER}$"
        with pytest.raises(ValueError, match=message):
            load_native(tmp_path, number, config_of(E, I, H))
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="layer 0 has no known experts; layers with experts: none"):
        load_native(tmp_path, 0, config_of(E, I, H))


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory"):
        load_native(tmp_path / "nowhere", 0, config_of(E, I, H))
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory"):
        native_method(tmp_path / "nowhere", 0)


DTYPES = [np.float32, np.float16, np.int64, np.int32, np.int8, np.uint8, ml_dtypes.bfloat16]
DTYPES += [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu]


@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_always_named(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever tensors are missing or others: nothing but a ValueError, and one unless it does not matter."""
    encoding = data.draw(st.sampled_from(sorted(ENCODINGS)))
    layer = draw_layer(encoding, 2, 64, 96, biases=data.draw(st.booleans()) and encoding != "step")
    names = [name for name in layer.tensors if not name.endswith("input_scale")]
    missing, others = [], []
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        array = layer.tensors.pop(name)
        if data.draw(st.booleans()):
            missing.append(name)
            continue
        shapes = st.one_of(st.just(list(array.shape)), st.lists(st.integers(0, 5), max_size=4))
        put(name, tuple(data.draw(shapes)), data.draw(st.sampled_from(DTYPES)))(layer.tensors)
        found = layer.tensors[name]
        are_bytes = {found.dtype, array.dtype} == {np.dtype(np.int8), np.dtype(np.uint8)}  # of codes
        if found.shape != array.shape or (found.dtype != array.dtype and not are_bytes):
            others.append(name)
    put_layer(tmp_path, layer)
    method = data.draw(st.sampled_from([None, layer.method]))
    native_method(tmp_path, LAYER)
    caught = None
    try:
        load_native(tmp_path, LAYER, config_of(2, 64, 96), method)
    except ValueError as error:
        caught = str(error)
    if caught is not None:
        assert str(tmp_path) in caught
        return
    # All biases, or orders of a projection, may be missing together; scales and biases may have more than one
    # dtype or shape.
    assert all(name.endswith(("bias", "g_idx")) for name in missing), missing
    assert all(name.endswith(("scale", "scale_inv", "scales", "scale_2", "bias")) for name in others), others


@given(st.sampled_from(sorted(ENCODINGS)), st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_that_is_cut_off(tmp_path: Path, encoding: str, data: st.DataObject) -> None:
    path = put_layer(tmp_path, draw_layer(encoding, 2, 64, 96))
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        load_native(path, LAYER, config_of(2, 64, 96))


def test_a_missing_shard(tmp_path: Path) -> None:
    layer = draw_layer("mxfp4_packed", E, I, H)
    index = {"weight_map": dict.fromkeys(layer.tensors, "a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors"):
        load_native(tmp_path, LAYER, config_of(E, I, H))


def test_an_expert_of_another_format(tmp_path: Path) -> None:
    """The first expert does not speak for the layer."""
    layer, other = draw_layer("mxfp8", E, I, H), draw_layer("fp8", E, I, H)
    layer.tensors |= {name: array for name, array in other.tensors.items() if ".experts.0." in name}
    put_layer(tmp_path, layer)
    assert native_method(tmp_path, LAYER) == "MXFP8"
    message = r"0\.gate_proj\.weight_scale_inv': got F32 \[1, 2\], expected U8 or F8_E8M0 \[96, 5\]"
    with pytest.raises(ValueError, match=message):
        load_native(tmp_path, LAYER, config_of(E, I, H))
