"""Headers of many tensors: linear in time, or refused with the number."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any

import pytest
from gguf_checkpoints import raw, raw_key, raw_string, raw_tensor

from ktmoe_np import KTMoEWrapper
from ktmoe_np.io import SafetensorsFile
from ktmoe_np.io.gguf.experts import GgufCheckpoint, gguf_config
from ktmoe_np.io.gguf.values import GgufCursor
from ktmoe_np.io.inspect import inspect_checkpoint
from ktmoe_np.io.safetensors import header as _safetensors_header

QWEN3: dict[bytes, int] = {
    b"expert_count": 2,
    b"expert_used_count": 1,
    b"embedding_length": 4,
    b"expert_feed_forward_length": 2,
}


def gguf_keys(*more: bytes, **changes: int) -> list[bytes]:
    sizes = {**QWEN3, **{name.encode(): value for name, value in changes.items()}}
    keys = [raw_key(b"qwen3moe." + name, 10, pack("<Q", value)) for name, value in sizes.items()]
    return [raw_key(b"general.architecture", 8, raw_string(b"qwen3moe")), *keys, *more]


def write_gguf(path: Path, num_layers: int, *more: bytes, **changes: int) -> None:
    """Experts of float32 in every layer, stacked."""
    shapes = {b"gate": (4, 2, 2), b"up": (4, 2, 2), b"down": (2, 4, 2)}
    entries = []
    for layer in range(num_layers):
        for role, shape in shapes.items():
            name = b"blk.%d.ffn_%s_exps.weight" % (layer, role)
            entries.append(raw_tensor(name, shape, 0, 64 * len(entries)))
    path.write_bytes(raw(gguf_keys(*more, **changes), entries, data=64 * len(entries)))


def write_safetensors(path: Path, num_layers: int) -> None:
    """Experts of bfloat16 in every layer, each its own tensor."""
    header: dict[str, Any] = {}
    for layer in range(num_layers):
        for e in range(2):
            for name, shape in {"gate_proj": (2, 4), "up_proj": (2, 4), "down_proj": (4, 2)}.items():
                span = [16 * len(header), 16 * len(header) + 16]
                tensor = f"model.layers.{layer}.mlp.experts.{e}.{name}.weight"
                header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": span}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16 * len(header)))
    sizes = {"num_experts": 2, "num_experts_per_tok": 1, "hidden_size": 4, "moe_intermediate_size": 2}
    path.with_name("config.json").write_text(json.dumps(sizes))


@pytest.mark.serial
@pytest.mark.parametrize("write", [write_gguf, write_safetensors], ids=["gguf", "safetensors"])
def test_time_grows_with_the_number_of_layers(tmp_path: Path, write: Callable[[Path, int], None]) -> None:
    seconds = []
    for num_layers in (50, 400):
        path = tmp_path / ("model.gguf" if write is write_gguf else "model.safetensors")
        path.unlink(missing_ok=True)
        write(path, num_layers)
        inspect_checkpoint(path)
        begin = time.process_time()
        assert len(inspect_checkpoint(path).layers) == num_layers
        seconds.append(time.process_time() - begin)
    # 8 times the layers; squared it would be 64 times the time.
    assert seconds[1] < 25 * seconds[0]


def test_safetensors_of_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _safetensors_header._MAX_TENSORS == 2**20
    monkeypatch.setattr(_safetensors_header, "_MAX_TENSORS", 1000)  # a million takes a while to write
    entry = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(entry % i for i in range(1001)) + b"}"
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(
        ValueError, match=r"x\.safetensors: the header: got 1001 tensors, expected at most 1000"
    ):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_safetensors_of_a_name_without_end(tmp_path: Path) -> None:
    text = json.dumps({"a" * 2**16: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(
        ValueError, match=r"tensor 'a{79}: got a name of 65536 letters, expected at most 65535"
    ) as error:
        SafetensorsFile(tmp_path / "x.safetensors")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("what", "counts", "most"), [("tensors", (2**20 + 1, 0), 2**20), ("keys", (0, 2**16 + 1), 2**16)]
)
def test_gguf_of_too_many_entries(tmp_path: Path, what: str, counts: tuple[int, int], most: int) -> None:
    (tmp_path / "x.gguf").write_bytes(raw(counts=counts, data=24 * max(counts)))
    with pytest.raises(
        ValueError, match=rf"x\.gguf: the header: got {max(counts)} {what}, expected at most {most}"
    ):
        GgufCheckpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize("size", ["expert_count", "embedding_length", "expert_feed_forward_length"])
@pytest.mark.parametrize("value", [10**9, 2**32 - 1, 2**63, 2**64 - 1])
def test_a_layer_of_gguf_too_large_for_its_file(tmp_path: Path, size: str, value: int) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, 1, **{size: value})
    message = (
        f"x.gguf: got .*{value}" if value < 2**31 else f"x.gguf: .*: got {value}, expected at most 2147483647"
    )
    with pytest.raises(ValueError, match=message):
        KTMoEWrapper.from_pretrained(path)
    with pytest.raises(ValueError, match=r"x\.gguf"):
        inspect_checkpoint(path)


def test_more_experts_of_a_token_than_a_gguf_model_has(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, 1, expert_used_count=3)
    for read in (KTMoEWrapper.from_pretrained, inspect_checkpoint):
        with pytest.raises(
            ValueError, match=r"x\.gguf: num_experts_per_tok: got 3, expected at most num_experts, 2"
        ):
            read(path)


def test_a_value_of_one_layer_is_decoded_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays with a value for each layer would be decoded once for each layer."""
    path = tmp_path / "x.gguf"
    limits = pack("<IQ", 6, 1000) + b"".join(pack("<f", i / 8) for i in range(1000))
    write_gguf(path, 1, raw_key(b"qwen3moe.swiglu_clamp_exp", 9, limits))
    checkpoint = GgufCheckpoint(path)
    taken: list[int] = []
    take = GgufCursor.take

    def counted(self: GgufCursor, count: int, what: str) -> memoryview:
        taken.append(count)
        return take(self, count, what)

    monkeypatch.setattr(GgufCursor, "take", counted)
    assert gguf_config(checkpoint, 999).activation.limit == 999 / 8
    assert max(taken) < 1000
    names = pack("<IQ", 8, 2) + raw_string(b"a") + raw_string(b"bc")
    write_gguf(tmp_path / "y.gguf", 1, raw_key(b"names", 9, names))
    assert GgufCheckpoint(tmp_path / "y.gguf").metadata_of_layer("names", 1) == "bc"
