"""Layers of some of a checkpoint's experts: the bits of the whole layer, and nothing read of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import NAMINGS, write_checkpoint, write_safetensors
from layers import bf16
from native_checkpoints import ENCODINGS, LAYER, draw_layer, put_layer

from ktmoe_np import KTMoEWrapper
from ktmoe_np.cli import main
from ktmoe_np.config import MoEConfig
from ktmoe_np.formats import gptq
from ktmoe_np.formats.quantized import FORMATS
from ktmoe_np.io import SafetensorsCheckpoint, SafetensorsFile, load_experts
from ktmoe_np.io import experts as io_experts
from ktmoe_np.io import native as io_native
from ktmoe_np.io.converted.layer import load_quantized
from ktmoe_np.io.native import load_native
from ktmoe_np.layers import quantize_task

E, I, H, P = 6, 32, 64, 2  # noqa: E741
CHOSEN = (5, 0, 3)

both_modes = pytest.mark.parametrize("mode", ["inference", "sft"])


def assert_parts_of(path: Path, layer_idx: int, mode: str, hidden: int = H, **more: Any) -> Any:
    """The chosen experts give the bits that they give in the whole layer; the layer of them is returned."""
    options = {"mode": mode, **({"lora_rank": 4} if mode == "sft" else {}), **more}
    whole: Any = KTMoEWrapper.from_pretrained(path, layer_idx, **options)
    part: Any = KTMoEWrapper.from_pretrained(path, layer_idx, experts=CHOSEN, **options)
    assert part.config.num_experts == len(CHOSEN)
    assert part.method == whole.method
    rng = np.random.default_rng(1)
    x = (2.0**-8 * rng.standard_normal((7, hidden))).astype(bf16)
    ids, weights = rng.integers(0, len(CHOSEN), (7, P)), rng.standard_normal((7, P), np.float32)
    ids[:3, 0] = range(3)
    if mode == "sft":
        part.init_lora_weights()
        whole.init_lora_weights()  # B is zero, so the base alone is seen
    results = part.forward(x, ids, weights), whole.forward(x, np.array(CHOSEN)[ids], weights)
    # Scales may be any bytes, so some results are NaN.
    np.testing.assert_array_equal(*(y.astype(np.float32) for y in results))
    assert np.any(results[0].astype(np.float32) != 0)
    return part


@both_modes
@pytest.mark.parametrize("naming", NAMINGS)
def test_numbers_in_every_naming(tmp_path: Path, naming: str, mode: str) -> None:
    write_checkpoint(tmp_path, naming, [1], E=E, I=I, H=H, num_experts_per_tok=P, num_shards=2)
    assert_parts_of(tmp_path, 1, mode)


@both_modes
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_native_encoding(tmp_path: Path, encoding: str, mode: str) -> None:
    put_native(tmp_path, encoding)
    assert_parts_of(tmp_path, LAYER, mode, 160)


def put_native(path: Path, encoding: str) -> None:
    put_layer(path, draw_layer(encoding, E, 96, 160))
    sizes = {"num_experts": E, "num_experts_per_tok": P, "hidden_size": 160, "moe_intermediate_size": 96}
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **sizes}))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_selecting_later_is_loading_some(tmp_path: Path, encoding: str) -> None:
    put_layer(tmp_path, draw_layer(encoding, E, 96, 160, biases=encoding == "fp8"))
    config = MoEConfig(E, P, 160, 96)
    part = load_native(tmp_path, LAYER, config, experts=CHOSEN)
    later = load_native(tmp_path, LAYER, config).select(CHOSEN)
    assert (part.method, part.group_size) == (later.method, later.group_size)
    assert part.projections.keys() == later.projections.keys()
    for name, projection in part.projections.items():
        for what, value in vars(projection).items():
            other = getattr(later.projections[name], what)
            assert (value is None) == (other is None), what
            for array, twin in zip(value or (), other or (), strict=True) if isinstance(value, list) else ():
                assert array.tobytes() == twin.tobytes(), what
            if isinstance(value, np.ndarray):
                assert (value.dtype, value.tobytes()) == (other.dtype, other.tobytes()), what


@both_modes
@pytest.mark.parametrize("naming", ["stacked", "fused", "ungated", "single"])
def test_every_naming_of_gguf(tmp_path: Path, naming: str, mode: str) -> None:
    pytest.importorskip("gguf")
    import gguf_checkpoints

    from ktmoe_np.io.gguf.experts import load_gguf

    kinds = {"gate": "q4_0", "up": "q4_0", "down": "q8_0"}
    bias = None if naming == "single" else "f32"
    layer = gguf_checkpoints.draw_layer(kinds, E, I, H, naming, bias=bias)
    keys = {"embedding_length": H, "expert_feed_forward_length": I, "expert_count": E, "expert_used_count": P}
    architecture = "nemotron_h_moe" if naming == "ungated" else "qwen3moe"
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    path = tmp_path / "model.gguf"
    gguf_checkpoints.write(path, layer.tensors, metadata, architecture=architecture)
    assert_parts_of(path, gguf_checkpoints.LAYER, mode)
    config = gguf_checkpoints.config_of(E, I, H, "relu2" if naming == "ungated" else "silu")
    found = load_gguf(path, gguf_checkpoints.LAYER, config, CHOSEN)
    read = {name for name in layer.tensors if naming != "single" or name.split(".")[-2] in "503"}
    assert set(found.names) == read
    with pytest.raises(IndexError, match="experts: got expert 6 at 0, expected 0 to 5"):
        load_gguf(path, gguf_checkpoints.LAYER, config, [6])


@both_modes
@pytest.mark.parametrize("method", ["AMXINT8", "AMXINT4", "MOE_INT8", "MOE_INT4"])
@pytest.mark.parametrize("naming", ["qwen3_moe", "gpt_oss"])
def test_quantized_at_load_and_before(tmp_path: Path, naming: str, method: str, mode: str) -> None:
    source, target = tmp_path / "model", tmp_path / "converted"
    write_checkpoint(source, naming, [1], E=E, I=I, H=H, num_experts_per_tok=P)
    assert main(["convert", str(source), str(target), "--method", method]) == 0
    named = method if mode == "inference" else f"{method}_SFT"
    at_load = assert_parts_of(source, 1, mode, method=named)
    before = assert_parts_of(target, 1, mode)
    files = [moe.save_weights(tmp_path / name) for moe, name in ((at_load, "a"), (before, "b"))]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("naming", ["qwen3_moe", "llama4"])
def test_what_is_read_is_said_and_views_stay_views(tmp_path: Path, naming: str) -> None:
    write_checkpoint(tmp_path, naming, [0], E=E, I=I, H=H)
    config = MoEConfig(E, P, H, I)
    whole, part = load_experts(tmp_path, 0, config), load_experts(tmp_path, 0, config, CHOSEN)
    for name, projection in part.projections.items():
        assert len(projection.codes) == len(CHOSEN)
        for matrix, e in zip(projection.codes, CHOSEN, strict=True):
            assert np.array_equal(matrix.view(np.uint16), whole.projections[name].codes[e].view(np.uint16))
            assert matrix.flags.owndata is False
    assert len(part.names) == (3 * len(CHOSEN) if naming == "qwen3_moe" else 2)
    assert set(part.names) <= set(whole.names)
    assert load_experts(tmp_path, 0, experts=CHOSEN).num_experts == len(CHOSEN)  # sizes of the tensors


def test_only_the_chosen_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed, converted or quantized."""
    moved: list[Any] = []

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (moved.append(given), function(*given))[1]

    monkeypatch.setattr(io_experts, "_transposed", counting(io_experts._transposed))
    monkeypatch.setattr(io_native, "_unpack", counting(io_native._unpack))
    monkeypatch.setattr(gptq, "_convert", counting(gptq._convert))
    monkeypatch.setattr(quantize_task, "_matrix", counting(quantize_task._matrix))
    write_checkpoint(tmp_path, "llama4", [0], E=E, I=I, H=H)
    KTMoEWrapper.from_pretrained(tmp_path, 0, experts=CHOSEN)
    assert len(moved) == 3 * len(CHOSEN)
    KTMoEWrapper.from_pretrained(tmp_path, 0, method="MOE_INT8", experts=CHOSEN)
    assert len(moved) == 9 * len(CHOSEN)
    for encoding in ("gptq", "awq"):
        moved.clear()
        (tmp_path / encoding).mkdir()
        put_native(tmp_path / encoding, encoding)
        KTMoEWrapper.from_pretrained(tmp_path / encoding, LAYER, experts=CHOSEN)
        assert len(moved) == 3 * len(CHOSEN)


def test_files_of_other_experts_stay_closed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], E=60, I=I, H=H, num_shards=10)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    load_experts(checkpoint, 0, MoEConfig(60, P, H, I), [40, 41])
    assert "1 of 10 files open" in repr(checkpoint)
    moe: Any = KTMoEWrapper(0, 2, P, H, I, weight_path=tmp_path)
    for shard in sorted(tmp_path.glob("*.safetensors"))[:3]:
        shard.write_bytes(b"")  # never opened, so nobody minds
    moe.load_experts([40, 41], 60)
    assert moe.loaded


def test_native_files_of_other_experts_stay_closed(tmp_path: Path) -> None:
    layer = draw_layer("fp8", 10, 32, 64)
    weight_map = {}
    for e in range(10):
        file = f"model-{e}.safetensors"
        own = {name: array for name, array in layer.tensors.items() if f".experts.{e}." in name}
        write_safetensors(tmp_path / file, own)
        weight_map |= dict.fromkeys(own, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = SafetensorsCheckpoint(tmp_path)
    config = MoEConfig(10, P, 64, 32, layer_idx=LAYER)
    found = load_native(checkpoint, LAYER, config, experts=[7, 5])
    assert "5 of 10 files open" in repr(checkpoint)  # two, and three that tell the encoding
    assert {name.split(".experts.")[1][0] for name in found.names} == {"5", "7"}


def test_the_whole_layer_is_checked(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], E=E, I=I, H=H)
    moe: Any = KTMoEWrapper(0, 3, P, H, I, weight_path=tmp_path)
    with pytest.raises(ValueError, match=r"experts\.6\.gate_proj.*got none"):
        moe.load_experts(CHOSEN, 7)
    with pytest.raises(ValueError, match=r"experts\.5.*got one, expected 5 experts"):
        moe.load_experts([0, 1, 2], 5)
    moe.load_experts(CHOSEN, E)
    moe.load_experts([1, 2, 4], E)  # loaded already
    moe.load_experts("nothing that is looked at", E)


@pytest.mark.parametrize(
    ("experts", "num_experts", "error", "said"),
    [
        ([0, 1], E, ValueError, "experts: got 2, expected 3, the layer's num_experts"),
        ([0, 1, 1], E, ValueError, "experts: got expert 1 twice, expected different ones"),
        ([0, 1, 6], E, IndexError, "experts: got expert 6 at 2, expected 0 to 5"),
        ([-1, 1, 2], E, IndexError, "experts: got expert -1 at 0, expected 0 to 5"),
        ([[0, 1, 2]], E, ValueError, r"experts: got shape \[1, 3\], expected \[n\] with n of at least 1"),
        (np.zeros(0, np.int64), E, ValueError, r"experts: got shape \[0\]"),
        ([0.5, 1, 2], E, TypeError, "experts: got float64"),
        ([0, 1, 2], 0, ValueError, "num_experts: got 0, expected at least 1"),
        ([0, 1, 2], "6", TypeError, "num_experts: got '6', expected an integer"),
    ],
)
def test_bad_experts(tmp_path: Path, experts: Any, num_experts: Any, error: type, said: str) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], E=E, I=I, H=H)
    moe: Any = KTMoEWrapper(0, 3, P, H, I, weight_path=tmp_path)
    with pytest.raises(error, match=f"^{said}"):
        moe.load_experts(experts, num_experts)
    assert not moe.loaded


def test_bad_experts_of_the_loaders(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "numbers", "qwen3_moe", [0], E=E, I=I, H=H)
    with pytest.raises(IndexError, match="experts: got expert 9 at 0"):
        load_experts(tmp_path / "numbers", 0, experts=[9])
    put_native(tmp_path, "fp8")
    with pytest.raises(ValueError, match="experts: got expert 2 twice"):
        load_native(tmp_path, LAYER, MoEConfig(E, P, 160, 96), experts=[2, 2])


def test_errors_name_the_checkpoints_expert(tmp_path: Path) -> None:
    layer = draw_layer("nvfp4_modelopt", E, 96, 160)
    (name,) = [n for n in layer.tensors if ".5.up_proj" in n and n.endswith("weight_scale_2")]
    layer.tensors[name] = np.full_like(layer.tensors[name], np.inf)
    put_layer(tmp_path, layer)
    config = MoEConfig(E, P, 160, 96)
    with pytest.raises(ValueError, match=r"experts\.5\.up_proj.*for expert 5"):
        load_native(tmp_path, LAYER, config, experts=[0, 5])
    load_native(tmp_path, LAYER, config, experts=[0, 4])


def test_scales_of_converted_experts_are_checked_of_those_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], E=E, I=I, H=H)
    moe: Any = KTMoEWrapper.from_pretrained(tmp_path, 0, method="AMXINT8")
    moe.load_weights()
    path = moe.save_weights(tmp_path / "int8")
    file = SafetensorsFile(path)
    data = bytearray(path.read_bytes())
    at = len(data) - max(file.info(name).end for name in file.names())  # where tensors begin
    at += file.info("up_proj.row_scale").begin + 4 * (4 * I + 7)
    data[at : at + 4] = np.float32(np.inf).tobytes()
    path.write_bytes(data)
    fmt = FORMATS["int8"]
    with pytest.raises(ValueError, match=r"'up_proj.row_scale': expert 4, row 7: got"):
        load_quantized(path, moe.config, fmt, [0, 4])
    with pytest.raises(IndexError, match="experts: got expert 7"):
        load_quantized(path, moe.config, fmt, [7])
    assert load_quantized(path, moe.config, fmt, CHOSEN).num_experts == len(CHOSEN)


def test_without_a_path_or_with_a_map(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="weight_path: got None"):
        KTMoEWrapper(0, 3, P, H, I).load_experts(CHOSEN, E)
    write_checkpoint(tmp_path, "qwen3_moe", [0], E=E, I=I, H=H)
    with pytest.raises(ValueError, match="physical_to_logical_map: got one, expected None"):
        KTMoEWrapper.from_pretrained(tmp_path, 0, experts=CHOSEN, physical_to_logical_map=[0, 1, 2])
    with pytest.raises(IndexError, match="experts: got expert 6 at 1"):
        KTMoEWrapper.from_pretrained(tmp_path, 0, experts=[0, 6])
