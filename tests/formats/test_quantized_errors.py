"""What quantized layers are refused for: files that are damaged or of others, weights, codes and scales."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import Layer, draw_layer
from quantized_rows import quantized_bytes

from ktmoe_np import KTMoEWrapper
from ktmoe_np.config import MoEConfig
from ktmoe_np.formats.quantized import FORMATS
from ktmoe_np.io import SafetensorsFile
from ktmoe_np.io.converted.layer import check_codes, load_quantized
from ktmoe_np.io.safetensors.writer import write_safetensors
from ktmoe_np.layers.quantized import QuantizedWeights

E, I, H, P = 4, 24, 41, 2  # noqa: E741
NAME = "layer-00012.safetensors"
ROW = {name: fmt.row_bytes(H) for name, fmt in FORMATS.items()}

Tensors = dict[str, Any]
Metadata = dict[str, str]


pytestmark = pytest.mark.usefixtures("leave_no_engine")


@pytest.fixture(scope="module")
def layer() -> Layer:
    return draw_layer(np.random.default_rng(0), E, I, H, with_biases=True)


def wrapper(method: str = "AMXINT4", group_size: int | None = None, **more: Any) -> Any:
    return KTMoEWrapper(12, E, P, H, I, method=method, group_size=group_size, **more)


def save(layer: Layer, directory: Path, method: str = "AMXINT4", group_size: int | None = None) -> Path:
    moe = wrapper(method, group_size)
    moe.load_weights_from_tensors(*layer.matrices, **layer.biases)
    file: Path = moe.save_weights(directory)
    return file


def rewrite(path: Path, change: Callable[[Tensors, Metadata], object]) -> None:
    """Write a file again with other tensors or metadata."""
    file = SafetensorsFile(path)
    tensors = {name: np.array(file.tensor(name)) for name in file.names()}
    metadata = dict(file.metadata)
    change(tensors, metadata)
    write_safetensors(path, tensors, metadata)


def refused(path: Path, message: str, method: str = "AMXINT4", group_size: int | None = None) -> None:
    """The file is refused by name, and the layer stays as it was."""
    moe = wrapper(method, group_size, weight_path=path.parent)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: {message}")):
        moe.load_weights()
    assert not moe.loaded


# ---- files ----

METADATA = {
    "format": ("'x'", "'ktmoe-quantized'"),
    "version": ("'2'", "'1'"),
    "layer_idx": ("'13'", "'12'"),
    "gate_proj.format": ("'int8'", "'int4_group32'"),
    "up_proj.format": ("'int4_group64'", "'int4_group32'"),
    "down_proj.format": ("'int8_group32'", "'int4_group32'"),
    "group_size": ("'64'", "'32'"),
    "num_experts": ("'8'", f"'{E}'"),
    "hidden_size": ("'42'", f"'{H}'"),
    "moe_intermediate_size": ("'32'", f"'{I}'"),
    "activation": (
        "'silu limit=7.0 alpha=1.0 beta1=1.0 beta2=1.0'",
        "'silu limit=inf alpha=1.0 beta1=1.0 beta2=1.0'",
    ),
    "biases": ("'none'", "'gate_proj up_proj down_proj'"),
}


def test_the_table_names_every_field(layer: Layer, tmp_path: Path) -> None:
    assert METADATA.keys() == SafetensorsFile(save(layer, tmp_path)).metadata.keys()


@pytest.mark.parametrize("field", METADATA)
def test_fields_that_are_wrong_or_missing(field: str, layer: Layer, tmp_path: Path) -> None:
    path = save(layer, tmp_path)
    got, expected = METADATA[field]
    rewrite(path, lambda tensors, metadata: metadata.update({field: got.strip("'")}))
    refused(path, f"{field}: got {got}, expected {expected}")
    rewrite(path, lambda tensors, metadata: metadata.pop(field))
    refused(path, f"{field}: got none in the metadata, expected {expected}")


def test_fields_that_nobody_knows(layer: Layer, tmp_path: Path) -> None:
    path = save(layer, tmp_path)
    rewrite(path, lambda tensors, metadata: metadata.update(color="red"))
    refused(path, "'color': got one in the metadata, expected only format, version, layer_idx")


TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "codes, missing": (
        lambda t: t.pop("up_proj.codes"),
        f"tensor 'up_proj.codes': got none, expected U8 [{E}, {I}, {ROW['int4_group32']}]",
    ),
    "scales, missing": (
        lambda t: t.pop("down_proj.row_scale"),
        f"tensor 'down_proj.row_scale': got none, expected F32 [{E}, {H}]",
    ),
    "biases, missing": (
        lambda t: t.pop("gate_proj.bias"),
        "biases: got 'gate_proj up_proj down_proj', expected 'up_proj down_proj'",
    ),
    "codes, shape": (
        lambda t: t.update({"gate_proj.codes": t["gate_proj.codes"][:, :, 1:]}),
        f"tensor 'gate_proj.codes': got U8 [{E}, {I}, {ROW['int4_group32'] - 1}], "
        f"expected U8 [{E}, {I}, {ROW['int4_group32']}]",
    ),
    "codes, dtype": (
        lambda t: t.update({"gate_proj.codes": t["gate_proj.codes"].view(np.int8)}),
        f"tensor 'gate_proj.codes': got I8 [{E}, {I}, {ROW['int4_group32']}], expected U8",
    ),
    "scales, shape": (
        lambda t: t.update({"up_proj.row_scale": t["up_proj.row_scale"][1:]}),
        f"tensor 'up_proj.row_scale': got F32 [{E - 1}, {I}], expected F32 [{E}, {I}]",
    ),
    "biases, dtype": (
        lambda t: t.update({"up_proj.bias": t["up_proj.bias"].astype(np.float64)}),
        f"tensor 'up_proj.bias': got F64 [{E}, {I}], expected F32 [{E}, {I}]",
    ),
    "one more": (
        lambda t: t.update(router=np.ones(3, np.float32)),
        "tensor 'router': got one, expected only gate_proj.codes, gate_proj.row_scale, gate_proj.bias, up",
    ),
    "scales, NaN": (
        lambda t: t["up_proj.row_scale"].__setitem__((3, 17), np.nan),
        "tensor 'up_proj.row_scale': expert 3, row 17: got nan, expected finite scales",
    ),
    "scales, infinite": (
        lambda t: t["down_proj.row_scale"].__setitem__((0, 5), -np.inf),
        "tensor 'down_proj.row_scale': expert 0, row 5: got -inf, expected finite scales",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_wrong(case: str, layer: Layer, tmp_path: Path) -> None:
    change, message = TENSORS[case]
    path = save(layer, tmp_path)
    rewrite(path, lambda tensors, metadata: change(tensors))
    refused(path, message)


@pytest.mark.parametrize("method", ["AMXINT8", "MOE_INT8", "MOE_INT8, 32", "AMXINT4, 64"])
def test_files_of_other_methods(method: str, layer: Layer, tmp_path: Path) -> None:
    name, _, size = method.partition(", ")
    path = save(layer, tmp_path, name, int(size) if size else None)
    other = SafetensorsFile(path).metadata["gate_proj.format"]
    refused(path, f"gate_proj.format: got '{other}', expected 'int4_group32'")


def test_methods_that_read_no_such_files(
    layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(layer, tmp_path)
    monkeypatch.undo()  # what a double is made of serves no other class
    for where in (tmp_path, path):
        with pytest.raises(
            ValueError, match=rf"{where}: holds quantized weights, which method 'BF16' does no"
        ):
            wrapper("BF16", weight_path=where).load_weights()


def test_files_that_are_cut_off_or_not_there(layer: Layer, tmp_path: Path) -> None:
    path = save(layer, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    moe = wrapper(weight_path=tmp_path)
    with pytest.raises(ValueError, match=rf"{NAME}: tensor .* the file is cut off"):
        moe.load_weights()
    path.write_bytes(whole[:5])
    with pytest.raises(ValueError, match=rf"{NAME}: 5 bytes are too short"):
        moe.load_weights()
    path.rename(tmp_path / "layer-00003.safetensors")
    with pytest.raises(FileNotFoundError, match=rf"{NAME}: no such file; layers that are there: 3"):
        moe.load_weights()
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory"):
        wrapper(weight_path=tmp_path / "nowhere").load_weights()
    with pytest.raises(RuntimeError, match="weight_path: got None, expected a checkpoint to load from"):
        wrapper().load_weights()


#: Format, method and group size, what is written over at [expert, row, byte] of gate_proj, and the message.
PAIRS = -(-H // 2)
CODES = [
    ("int8", "AMXINT8", None, 40, 0x80, "code -128, expected -127 to 127"),
    ("int8_group32", "MOE_INT8", 32, 0, 0x80, "code -128, expected -127 to 127"),
    ("int8_group32", "MOE_INT8", 32, slice(H + 4, H + 8), 0xFF, "scale nan, expected a finite number"),
    ("int4_group32", "AMXINT4", None, PAIRS, 0, "multiplier 0, expected -15 to 15 and not 0"),
    ("int4_group64", "AMXINT4", 64, PAIRS, 16, "multiplier 16, expected -15 to 15 and not 0"),
    ("int4_group128", "MOE_INT4", 128, PAIRS, 0xF0, "multiplier -16, expected -15 to 15 and not 0"),
    ("int4_group32", "MOE_INT4", None, PAIRS - 1, 0x11, "unused bits 1, expected 0"),
]


@pytest.mark.parametrize(("fmt", "method", "size", "at", "value", "message"), CODES)
def test_codes_that_cannot_be(
    fmt: str, method: str, size: int | None, at: Any, value: int, message: str, layer: Layer, tmp_path: Path
) -> None:
    path, config = save(layer, tmp_path, method, size), MoEConfig(E, P, H, I, layer_idx=12)
    found = FORMATS[fmt]
    check_codes(path, load_quantized(path, config, found), config, found)
    rewrite(path, lambda t, m: t["gate_proj.codes"].__setitem__((3, 17, at), value))
    experts = load_quantized(path, config, found)
    with pytest.raises(
        ValueError, match=rf"{NAME}: tensor 'gate_proj.codes': expert 3, row 17: got {message}"
    ):
        check_codes(path, experts, config, found)


# ---- arrays ----


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Layer], dict[str, Any]]:
    """Arguments with another array in the place of one, of bfloat16 weights."""

    def arguments(layer: Layer) -> dict[str, Any]:
        all_ = {"gate_proj": layer.gate_proj, "up_proj": layer.up_proj, "down_proj": layer.down_proj}
        return {**all_, name: change(all_.get(name))}

    return arguments


def coded(name: str, change: Callable[[Any], Any]) -> Callable[[Layer], dict[str, Any]]:
    """Arguments with another array in the place of one, of codes and scales."""

    def arguments(layer: Layer) -> dict[str, Any]:
        all_: dict[str, Any] = {}
        for role, matrix in zip(("gate", "up", "down"), layer.matrices, strict=True):
            all_[f"{role}_proj"], all_[f"{role}_scale"] = quantized_bytes("int4_group32", matrix)
        return {**all_, name: change(all_[name])}

    return arguments


def with_value(at: tuple[int, ...], value: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        other = array.copy()
        other[at] = value
        return other

    return change


def replaced(items: list[Any], value: Any) -> list[Any]:
    return [*items[:-1], value]


ARRAYS: dict[str, tuple[Callable[[Layer], dict[str, Any]], type[BaseException], str]] = {
    "NaN": (
        changed("gate_proj", with_value((3, 17, 5), np.nan)),
        ValueError,
        r"gate_proj: expert 3, row 17: got nan, expected finite weights",
    ),
    "infinity": (
        changed("down_proj", lambda w: list(with_value((1, 2, 3), np.inf)(w))),
        ValueError,
        r"down_proj: expert 1, row 2: got inf, expected finite weights",
    ),
    "dtype": (
        changed("gate_proj", lambda w: w.astype(np.float64)),
        TypeError,
        rf"gate_proj: got float64 \[{I}, {H}\] for expert 0, "
        rf"expected bfloat16 or float32 or float16 \[{I}, {H}\]",
    ),
    "shape": (
        changed("up_proj", lambda w: w[1:]),
        ValueError,
        rf"up_proj: got bfloat16 \[{E - 1}, {I}, {H}\], "
        rf"expected bfloat16 or float32 or float16 \[{E}, {I}, {H}\]",
    ),
    "shape of one": (
        changed("down_proj", lambda w: replaced(list(w), w[0].T)),
        ValueError,
        rf"down_proj: got bfloat16 \[{I}, {H}\] for expert 3, "
        rf"expected bfloat16 or float32 or float16 \[{H}, {I}\]",
    ),
    "None": (changed("gate_proj", lambda _: None), TypeError, r"gate_proj: got NoneType, expected an array"),
    "None of one": (
        changed("gate_proj", lambda w: replaced(list(w), None)),
        TypeError,
        r"gate_proj\[3\]: got NoneType, expected an array on the CPU \(NumPy, or with __dlpack__\)",
    ),
    "number": (
        changed("up_proj", lambda w: w[0:0].tolist()),
        ValueError,
        r"up_proj: got 0 arrays, expected 4",
    ),
    "scales of weights": (
        changed("up_scale", lambda _: np.ones((E, I), np.float32)),
        ValueError,
        r"up_scale: got one, expected None: up_proj is bfloat16, and quantized weights are uint8",
    ),
    "codes, dtype": (
        coded("gate_proj", lambda w: w.view(np.int8)),
        ValueError,
        r"gate_scale: got one, expected None: gate_proj is int8, and quantized weights are uint8",
    ),
    "codes, shape": (
        coded("gate_proj", lambda w: w[:, :, 1:]),
        ValueError,
        rf"gate_proj: got uint8 \[{E}, {I}, 22\], expected uint8 \[{E}, {I}, 23\]",
    ),
    "codes, number": (
        coded("gate_proj", lambda w: list(w[1:])),
        ValueError,
        r"gate_proj: got 3 arrays, expected 4",
    ),
    "codes, dtype of one": (
        coded("gate_proj", lambda w: replaced(list(w), w[0].view(np.int8))),
        TypeError,
        rf"gate_proj: got int8 \[{I}, 23\], expected uint8 \[{I}, 23\]",
    ),
    "scales, None": (
        coded("down_scale", lambda _: None),
        TypeError,
        r"down_scale: got NoneType, expected an array on the CPU \(NumPy, or with __dlpack__\)",
    ),
    "scales, dtype": (
        coded("down_scale", lambda s: s.astype(np.float64)),
        TypeError,
        rf"down_scale: got float64 \[{E}, {H}\], expected float32 \[{E}, {H}\]",
    ),
    "scales, shape": (
        coded("down_scale", lambda s: s[:, 1:]),
        ValueError,
        rf"down_scale: got float32 \[{E}, {H - 1}\], expected float32 \[{E}, {H}\]",
    ),
    "scales, NaN": (
        coded("up_scale", with_value((2, 9), np.nan)),
        ValueError,
        r"up_scale: expert 2, row 9: got nan, expected finite scales",
    ),
    "map, shape": (
        changed("physical_to_logical_map", lambda _: np.arange(E - 1)),
        ValueError,
        rf"physical_to_logical_map: got int64 \[{E - 1}\], expected int64 \[{E}\]",
    ),
    "map, entry": (
        changed("physical_to_logical_map", lambda _: [0, 1, E, -1]),
        IndexError,
        rf"physical_to_logical_map: got expert {E} at 2, expected 0 to {E - 1}",
    ),
    "map, dtype": (
        changed("physical_to_logical_map", lambda _: np.ones(E)),
        TypeError,
        rf"physical_to_logical_map: got float64 \[{E}\], expected an integer dtype",
    ),
    "bias, dtype": (
        changed("up_bias", lambda _: np.ones((E, I))),
        TypeError,
        rf"up_bias: got float64 \[{E}, {I}\], expected float32 or bfloat16 \[{E}, {I}\]",
    ),
    "bias, shape": (
        changed("down_bias", lambda _: np.ones((E, I), np.float32)),
        ValueError,
        rf"down_bias: got float32 \[{E}, {I}\], expected float32 or bfloat16 \[{E}, {H}\]",
    ),
    "bias, a list": (
        changed("gate_bias", lambda _: [0.0]),
        TypeError,
        r"gate_bias: got list, expected an array on the CPU \(NumPy, or with __dlpack__\)",
    ),
    "scales, infinite": (
        coded("up_scale", lambda s: list(with_value((2, 9), np.inf)(s))),
        ValueError,
        r"up_scale: expert 2, row 9: got inf, expected finite scales",
    ),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_are_refused(case: str, layer: Layer) -> None:
    arguments, error, message = ARRAYS[case]
    moe = wrapper()
    with pytest.raises(error, match=f"^{message}$"):
        moe.load_weights_from_tensors(**arguments(layer))
    assert not moe.loaded


def test_scales_beside_rows_that_contain_theirs(layer: Layer) -> None:
    codes, _ = quantized_bytes("int8_group32", layer.gate_proj)
    scale = np.ones((E, I), np.float32)
    with pytest.raises(
        ValueError, match=r"gate_scale: got one, expected None: rows of int8_group32 contain their scales$"
    ):
        wrapper("MOE_INT8", 32).load_weights_from_tensors(
            codes, layer.up_proj, layer.down_proj, gate_scale=scale
        )


def test_up_projections_that_are_not_used(layer: Layer) -> None:
    moe = wrapper(activation="relu2")
    with pytest.raises(ValueError, match="up_proj: got one, expected None: the activation is not gated"):
        moe.load_weights_from_tensors(*layer.matrices)
    with pytest.raises(ValueError, match="up_bias: got one, expected None: the activation is not gated"):
        moe.load_weights_from_tensors(layer.gate_proj, None, layer.down_proj, up_bias=np.ones((E, I)))
    with pytest.raises(ValueError, match="up_scale: got one, expected None: the activation is not gated"):
        moe.load_weights_from_tensors(layer.gate_proj, None, layer.down_proj, up_scale=np.ones((E, I)))


# ---- options, saving ----


@pytest.mark.parametrize(
    ("method", "size", "error", "message"),
    [
        ("AMXINT8", 32, ValueError, r"group_size: got 32, expected None: method 'AMXINT8' has no groups"),
        (
            "AMXINT4",
            48,
            ValueError,
            r"group_size: got 48, expected None, 32, 64 or 128 with method 'AMXINT4'",
        ),
        (
            "MOE_INT4",
            0,
            ValueError,
            r"group_size: got 0, expected None, 32, 64 or 128 with method 'MOE_INT4'",
        ),
        ("MOE_INT8", 64, ValueError, r"group_size: got 64, expected None or 32 with method 'MOE_INT8'"),
        ("MOE_INT8", "32", TypeError, r"group_size: got '32', expected an integer or None"),
        ("MOE_INT8", True, TypeError, r"group_size: got True, expected an integer or None"),
    ],
)
def test_group_sizes_that_are_refused(method: str, size: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrapper(method, size)


def test_saving_is_refused(layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = wrapper()
    with pytest.raises(RuntimeError, match="save_weights: no weights are loaded; call load_weights first"):
        moe.save_weights(tmp_path / "new")
    monkeypatch.setattr(QuantizedWeights, "_spans_nodes", lambda self: True)
    moe.load_weights_from_tensors(*layer.matrices)
    with pytest.raises(RuntimeError, match="save_weights: every NUMA node has its own rows of the weights"):
        moe.save_weights(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    (tmp_path / "file").write_bytes(b"")
    moe = wrapper()
    moe.load_weights_from_tensors(*layer.matrices)
    with pytest.raises(FileExistsError, match="file"):
        moe.save_weights(tmp_path / "file")
