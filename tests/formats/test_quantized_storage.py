"""Quantized layers: what is loaded, what is saved, and that the one comes back as the other."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from layers import Layer, assert_close, assert_same_bits, bf16, draw_batch, draw_layer
from quantized_rows import quantized_bytes

import ktmoe_np.cli.quantized
import ktmoe_np.formats.quantized
import ktmoe_np.io.converted.layer
import ktmoe_np.layers.quantized
from ktmoe_np import AMXMoEWrapper, GeneralMoEWrapper, KTMoEWrapper
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.cli.quantized_reference import unpack_rows
from ktmoe_np.formats.methods import METHODS as REGISTRY
from ktmoe_np.formats.methods import find_method
from ktmoe_np.formats.quantized import FORMATS
from ktmoe_np.io import SafetensorsFile

E, I, H, P = 3, 24, 41, 2  # noqa: E741

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
#: Method, group size, format.
METHODS = [
    (method.name, size, fmt)
    for method in REGISTRY
    if method.mode == "inference"
    for size, fmt in method.formats.items()
]
every_method = pytest.mark.parametrize(("method", "group_size", "fmt"), METHODS)


pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("leave_no_engine")]


@pytest.fixture(scope="module")
def layer() -> Layer:
    return draw_layer(np.random.default_rng(0), E, I, H, with_biases=True)


def wrapper(method: str, group_size: int | None = None, **more: Any) -> Any:
    return KTMoEWrapper(12, E, P, H, I, method=method, group_size=group_size, **more)


def load(moe: Any, layer: Layer, **more: Any) -> Any:
    moe.load_weights_from_tensors(*layer.matrices, **{**layer.biases, **more})
    return moe


def read(file: Path) -> dict[str, Any]:
    found = SafetensorsFile(file)
    return {name: np.array(found.tensor(name)) for name in found.names()}


@every_method
def test_what_is_saved_is_what_the_reference_quantizes(
    method: str, group_size: int | None, fmt: str, layer: Layer, tmp_path: Path
) -> None:
    moe = load(wrapper(method, group_size), layer)
    assert isinstance(moe, AMXMoEWrapper if method.startswith("AMX") else GeneralMoEWrapper)
    assert moe.group_size == FORMATS[fmt].group_size
    file = moe.save_weights(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["layer-00012.safetensors"]
    tensors = read(file)
    for name, weights, bias in zip(PROJECTIONS, layer.matrices, layer.biases.values(), strict=True):
        codes, scale = quantized_bytes(fmt, weights)
        assert_same_bits(tensors.pop(f"{name}.codes"), codes)
        if scale is not None:
            assert_same_bits(tensors.pop(f"{name}.row_scale"), scale)
        assert bias is not None
        assert_same_bits(tensors.pop(f"{name}.bias"), bias.astype(np.float32))
    assert not tensors
    metadata = dict(SafetensorsFile(file).metadata)
    assert metadata == {
        "format": "ktmoe-quantized",
        "version": "1",
        "layer_idx": "12",
        **{f"{name}.format": fmt for name in PROJECTIONS},
        "group_size": str(FORMATS[fmt].group_size or "none"),
        "num_experts": str(E),
        "hidden_size": str(H),
        "moe_intermediate_size": str(I),
        "activation": "silu limit=inf alpha=1.0 beta1=1.0 beta2=1.0",
        "biases": "gate_proj up_proj down_proj",
    }


@every_method
def test_bytes_of_an_expert(
    method: str, group_size: int | None, fmt: str, layer: Layer, tmp_path: Path
) -> None:
    moe = load(wrapper(method, group_size), layer)
    tensors = read(moe.save_weights(tmp_path))
    weights = sum(array.nbytes for name, array in tensors.items() if not name.endswith("bias"))
    assert moe.expert_bytes == weights // E


@every_method
def test_saved_layers_come_back_with_the_same_bytes(
    method: str, group_size: int | None, fmt: str, layer: Layer, tmp_path: Path
) -> None:
    load(wrapper(method, group_size), layer).save_weights(tmp_path)
    for path in (tmp_path, tmp_path / "layer-00012.safetensors"):
        again = wrapper(method, group_size, weight_path=path)
        again.load_weights()
        assert again.loaded
        again.load_weights()  # does nothing
        second = again.save_weights(tmp_path / "second")
        assert second.read_bytes() == (tmp_path / "layer-00012.safetensors").read_bytes()


def test_saved_weights_are_mapped_and_held(layer: Layer, tmp_path: Path) -> None:
    load(wrapper("AMXINT4"), layer).save_weights(tmp_path)
    moe = wrapper("MOE_INT4", weight_path=tmp_path)
    moe.load_weights()
    for matrix in moe._experts.projections.values():
        assert not matrix.codes.flags.owndata
        assert not matrix.codes.flags.writeable
    codes = {name: np.array(matrix.codes) for name, matrix in moe._experts.projections.items()}
    scales = {name: np.array(matrix.channel_scale) for name, matrix in moe._experts.projections.items()}
    given = wrapper("AMXINT4")
    given.load_weights_from_tensors(
        *codes.values(), **{name.replace("proj", "scale"): scale for name, scale in scales.items()}
    )
    for name, matrix in given._experts.projections.items():
        assert np.shares_memory(matrix.codes, codes[name])
        assert np.shares_memory(matrix.channel_scale, scales[name])


@pytest.mark.parametrize("as_lists", [False, True])
def test_given_codes_are_saved(layer: Layer, tmp_path: Path, as_lists: bool) -> None:
    change = list if as_lists else np.asarray
    pairs = [quantized_bytes("int8", matrix) for matrix in layer.matrices]
    codes = [change(rows) for rows, _ in pairs]
    scales: Any = {
        f"{name}_scale": change(scale) for name, (_, scale) in zip(("gate", "up", "down"), pairs, strict=True)
    }
    moe = wrapper("AMXINT8")
    moe.load_weights_from_tensors(*codes, **layer.biases, **scales)
    file = moe.save_weights(tmp_path / "given")
    expected = load(wrapper("AMXINT8"), layer).save_weights(tmp_path / "quantized")
    assert file.read_bytes() == expected.read_bytes()


def test_codes_and_weights_may_be_mixed(layer: Layer, tmp_path: Path) -> None:
    codes, scale = quantized_bytes("int8", layer.up_proj)
    moe = wrapper("AMXINT8")
    steps: list[tuple[int, int]] = []
    moe.load_weights_from_tensors(
        layer.gate_proj,
        codes,
        layer.down_proj,
        up_scale=scale,
        **layer.biases,
        progress=lambda *step: steps.append(step),
    )
    assert steps == [(i + 1, 2 * E) for i in range(2 * E)]
    expected = load(wrapper("AMXINT8"), layer).save_weights(tmp_path / "quantized")
    assert moe.save_weights(tmp_path / "mixed").read_bytes() == expected.read_bytes()


class Foreign:
    """Arrays of somebody else, which NumPy can read one by one."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.dtype = array, array.shape, f"foreign.{array.dtype}"

    def __getitem__(self, e: int) -> Foreign:
        return Foreign(self.array[e])

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        assert len(self.shape) == 2, "all experts at once"
        return self.array


def test_sources_of_other_kinds_give_the_same_file(layer: Layer, tmp_path: Path) -> None:
    expected = load(wrapper("AMXINT4"), layer).save_weights(tmp_path / "0").read_bytes()
    changes = [
        lambda w: w.astype(np.float32),
        list,
        lambda w: [np.ascontiguousarray(m.T).T for m in w],  # the last axis has gaps
        Foreign,
        lambda w: np.concatenate([w, w], axis=1)[:, : w.shape[1]],  # rows of experts are strided
    ]
    for number, change in enumerate(changes, 1):
        moe = load(wrapper("AMXINT4"), layer.with_matrices(change))
        assert moe.save_weights(tmp_path / str(number)).read_bytes() == expected


def test_the_map_is_no_part_of_the_file(layer: Layer, tmp_path: Path) -> None:
    plain = load(wrapper("AMXINT8"), layer).save_weights(tmp_path / "plain")
    mapped = load(wrapper("AMXINT8"), layer, physical_to_logical_map=[2, 0, 0])
    assert mapped.save_weights(tmp_path / "mapped").read_bytes() == plain.read_bytes()


def test_layers_without_gate_or_biases(tmp_path: Path) -> None:
    layer = draw_layer(np.random.default_rng(1), E, I, H, activation="relu2")
    moe = load(wrapper("AMXINT4", activation="relu2"), layer)
    tensors = read(moe.save_weights(tmp_path))
    names = [f"{name}.{part}" for name in ("gate_proj", "down_proj") for part in ("codes", "row_scale")]
    assert sorted(tensors) == sorted(names)
    again = wrapper("AMXINT4", activation="relu2", weight_path=tmp_path)
    again.load_weights()
    assert again.loaded


@pytest.mark.parametrize("naming", ["qwen3_moe", "gpt_oss", "nemotron_h", "qwen3_5_moe"])
def test_checkpoints_are_quantized_when_they_are_loaded(naming: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    drawn = write_checkpoint(model, naming, [5], E=E, I=32, H=64)[5]
    moe = KTMoEWrapper.from_pretrained(model, 5, method="AMXINT8")
    tensors = read(moe.save_weights(tmp_path / "saved"))  # type: ignore[attr-defined]
    for name in PROJECTIONS:
        weights = drawn[name]
        if weights is not None:
            assert_same_bits(tensors[f"{name}.codes"], quantized_bytes("int8", weights)[0])
    biases = [name for name in tensors if name.endswith(".bias")]
    assert len(biases) == (3 if naming == "gpt_oss" else 0)


def test_progress_of_a_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [12], E=E, I=I, H=H)
    moe = wrapper("AMXINT4", weight_path=tmp_path)
    steps: list[tuple[int, int]] = []
    moe.load_weights(progress=lambda done, total: steps.append((done, total)))
    assert steps == [(i + 1, 3 * E) for i in range(3 * E)]
    moe.load_weights(progress=lambda done, total: steps.append((done, total)))
    assert len(steps) == 3 * E


def test_an_interrupted_load_changes_nothing(layer: Layer) -> None:
    moe = wrapper("AMXINT8")

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(moe, layer, progress=stop)
    assert not moe.loaded
    with pytest.raises(RuntimeError, match="no weights are loaded"):
        moe.save_weights("nowhere")


def test_bfloat16_is_read_in_place(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    right = ext.quantize_task
    monkeypatch.setattr(
        ext,
        "quantize_task",
        lambda f, w, *a, **k: (seen.append(w), right(f, w, *a, **k))[1],
    )
    load(wrapper("AMXINT8"), layer)
    assert len(seen) == 3 * E
    assert all(w.dtype == bf16 for w in seen)
    assert np.shares_memory(seen[1], layer.gate_proj[1])


def test_row_bytes_are_those_of_the_extension() -> None:
    for name, fmt in FORMATS.items():
        for k in (1, 2, 31, 32, 33, 64, 127, 128, 129, 2048):
            assert ext.quantized_row_bytes(name, k) == fmt.row_bytes(k)


@every_method
def test_saved_and_quantized_layers_compute_the_same(
    method: str, group_size: int | None, fmt: str, layer: Layer, tmp_path: Path
) -> None:
    batch = draw_batch(np.random.default_rng(1), layer, 5, P)
    moe = load(wrapper(method, group_size), layer)
    expected = moe.forward(*batch)
    moe.save_weights(tmp_path)
    again = wrapper(method, group_size, weight_path=tmp_path)
    again.load_weights()
    assert_same_bits(again.forward(*batch), expected)
    decoded = layer.with_matrices(lambda w: unpack_rows(FORMATS[fmt], *quantized_bytes(fmt, w), w.shape[-1]))
    product = "int8" if method.startswith("AMX") else "bfloat16"
    assert_close(expected, decoded, batch, product=product)


def test_files_say_that_inputs_are_scaled(layer: Layer, tmp_path: Path) -> None:
    batch = draw_batch(np.random.default_rng(3), layer, 7, P)
    before = load(wrapper("AMXINT4", scale_inputs=True), layer)
    file = before.save_weights(tmp_path)
    assert SafetensorsFile(file).metadata["scale_inputs"] == "true"
    after = wrapper("AMXINT4", weight_path=tmp_path, scale_inputs=True)
    after.load_weights()
    assert_same_bits(after.forward(*batch), before.forward(*batch))
    plain = wrapper("AMXINT4", weight_path=tmp_path)
    with pytest.raises(ValueError, match="scale_inputs: got 'true', expected 'false'"):
        plain.load_weights()


def test_files_that_do_not_say_whether_inputs_are_scaled(layer: Layer, tmp_path: Path) -> None:
    """Those of earlier versions: the weights are the same."""
    file = load(wrapper("MOE_INT8"), layer).save_weights(tmp_path)
    assert "scale_inputs" not in SafetensorsFile(file).metadata
    scaled = wrapper("MOE_INT8", weight_path=tmp_path, scale_inputs=True)
    scaled.load_weights()
    assert scaled.loaded


def test_examples() -> None:
    for module in (ktmoe_np.formats.quantized, ktmoe_np.io.converted.layer, ktmoe_np.cli.quantized):
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert found.failed == 0


def test_examples_of_layers() -> None:
    assert doctest.testmod(ktmoe_np.layers.quantized).failed == 0


def test_default_group_sizes() -> None:
    defaults = dict.fromkeys(("BF16", "AMXINT8", "MOE_INT8")) | {"AMXINT4": 32, "MOE_INT4": 32}
    for name, size in defaults.items():
        assert find_method(name, "inference").resolve_group_size(None) == size
