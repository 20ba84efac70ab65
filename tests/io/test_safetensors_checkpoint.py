"""Checkpoints of one or many safetensors files, and the config.json beside them."""

from __future__ import annotations

import copy
import gc
import json
import os
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint, write_safetensors
from numpy.typing import NDArray

from ktmoe_np import KTMoEWrapper
from ktmoe_np.io import SafetensorsCheckpoint, SafetensorsFile, load_hf_config
from ktmoe_np.io.safetensors import checkpoint as safetensors

AnyArray = NDArray[Any]


def same_bytes(a: AnyArray, b: AnyArray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("num_shards", [1, 3])
def test_checkpoints(tmp_path: Path, num_shards: int) -> None:
    layers = write_checkpoint(tmp_path, "qwen3_moe", [0, 1, 2], 2, 3, 5, num_shards=num_shards)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert len(checkpoint.names()) == 1 + 3 * (2 * 3 + 2)
    assert "embed_tokens.weight" in checkpoint
    assert "nothing" not in checkpoint
    gate = layers[2]["gate_proj"]
    assert gate is not None
    name = "model.layers.2.mlp.experts.1.gate_proj.weight"
    assert same_bytes(checkpoint.tensor(name), gate[1])
    assert checkpoint.info(name)[:2] == ("BF16", (3, 5))
    assert checkpoint.file_of(name).parent == tmp_path
    for read in (checkpoint.tensor, checkpoint.info, checkpoint.file_of):
        with pytest.raises(ValueError, match="no tensor 'nothing'"):
            read("nothing")


def opened_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the names of the files that are opened from here on."""
    opened: list[str] = []
    original = SafetensorsFile.__init__

    def spy(self: SafetensorsFile, path: Path) -> None:
        opened.append(Path(path).name)
        original(self, path)

    monkeypatch.setattr(SafetensorsFile, "__init__", spy)
    return opened


def test_with_an_index_only_the_needed_shards_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0, 1, 2], 2, 3, 5, num_shards=5)
    opened = opened_files(monkeypatch)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert "embed_tokens.weight" in checkpoint
    assert opened == []
    for _ in range(2):
        checkpoint.tensor("embed_tokens.weight")
    assert opened == ["model-00001-of-00005.safetensors"]


def test_a_file_or_loose_files_are_checkpoints(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"a": np.zeros(2)})
    write_safetensors(tmp_path / "two.safetensors", {"b": np.ones(2)})
    assert SafetensorsCheckpoint(tmp_path / "one.safetensors").names() == ("a",)
    both = SafetensorsCheckpoint(tmp_path)
    assert set(both.names()) == {"a", "b"}
    assert both.file_of("b").name == "two.safetensors"
    write_safetensors(tmp_path / "three.safetensors", {"b": np.ones(2)})
    with pytest.raises(ValueError, match=r"two\.safetensors: tensor 'b' is in .*three\.safetensors too"):
        SafetensorsCheckpoint(tmp_path)


def test_model_safetensors_comes_before_an_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], 2, 3, 5, num_shards=2)
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(2)})
    assert SafetensorsCheckpoint(tmp_path).names() == ("a",)


def test_missing_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory"):
        SafetensorsCheckpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors file and no model\.safetensors\.index"):
        SafetensorsCheckpoint(tmp_path)
    write_checkpoint(tmp_path, "qwen3_moe", [0], 2, 3, 5, num_shards=2)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors"):
        checkpoint.tensor("embed_tokens.weight")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "got list, expected a JSON object"),
        ({}, "weight_map: got NoneType, expected an object"),
        ({"weight_map": {"a": 3}}, "the shard of tensor 'a': got 3, expected a string"),
        (
            {"weight_map": {"a": "../x.safetensors"}},
            r"the shard of tensor 'a': got '\.\./x\.safetensors', expected a file name inside",
        ),
        (
            {"weight_map": {"a": "/etc/passwd"}},
            "the shard of tensor 'a': got '/etc/passwd', expected a file name inside",
        ),
        ({"weight_map": {"a": ""}}, "the shard of tensor 'a': got '', expected a file name inside"),
        ({"weight_map": {"a": "."}}, r"the shard of tensor 'a': got '\.', expected a file name inside"),
        (
            {"weight_map": {"a": "sub/../../x"}},
            r"the shard of tensor 'a': got 'sub/\.\./\.\./x', expected a file name inside",
        ),
        (
            {"weight_map": {"a": "x\0.safetensors"}},
            r"the shard of tensor 'a': got 'x\\x00\.safetensors', expected a file name inside",
        ),
        (
            {"weight_map": {"a": "\x1b[2J"}},
            r"the shard of tensor 'a': got '\\x1b\[2J', expected a file name inside",
        ),
        (
            {"weight_map": {"a": "x" * 10**5}},
            "the shard of tensor 'a': got 'x{299}, expected a file name inside",
        ),
        ({"weight_map": {"a": "\ud800"}}, "is not JSON: a string has half a surrogate pair"),
        ({"weight_map": {"a": float("nan")}}, "is not JSON: NaN is not a JSON number"),
    ],
)
def test_wrong_indices(tmp_path: Path, index: Any, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json:? " + message):
        SafetensorsCheckpoint(tmp_path)


def test_an_index_may_lie_about_a_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], 2, 3, 5, num_shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    changed = copy.deepcopy(index)
    changed["weight_map"]["embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(changed))
    with pytest.raises(
        ValueError, match=r"model-00002-of-00002\.safetensors: no tensor 'embed_tokens.weight'"
    ):
        SafetensorsCheckpoint(tmp_path).tensor("embed_tokens.weight")


def test_config_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_hf_config(tmp_path)
    write_checkpoint(tmp_path, "qwen3_moe", [0], 2, 3, 5)
    assert load_hf_config(tmp_path)["hidden_size"] == 5
    assert load_hf_config(tmp_path / "model.safetensors")["num_experts"] == 2
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: got list, expected a JSON object"):
        load_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_hf_config(tmp_path)


def replaced(path: Path) -> None:
    """Put another file in a file's place, which is like it but for what a rename changes."""
    other, status = path.with_name("other"), path.stat()
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("how", ["replaced", "written to", "no index"])
def test_a_shared_checkpoint_is_read_once_and_anew_when_it_changes(
    how: str, num_shards: int, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], 2, 4, 8, num_shards=num_shards)
    if how == "no index":
        (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    held = SafetensorsCheckpoint.shared(tmp_path)
    for path in sorted(path for path in tmp_path.iterdir() if path.name != "config.json"):
        assert SafetensorsCheckpoint.shared(str(tmp_path)) is held
        if how == "written to":
            os.utime(path, ns=(1, 1))
        else:
            replaced(path)
        now = SafetensorsCheckpoint.shared(tmp_path)
        assert now is not held
        held = now


def test_the_index_of_a_shared_checkpoint_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], 2, 4, 8, num_shards=2)
    reads = []
    read = safetensors._read_index
    monkeypatch.setattr(safetensors, "_read_index", lambda path: reads.append(path) or read(path))
    held = [SafetensorsCheckpoint.shared(tmp_path)]
    replaced(tmp_path / "model-00001-of-00002.safetensors")
    held += [SafetensorsCheckpoint.shared(tmp_path), SafetensorsCheckpoint(tmp_path)]
    assert len(set(held)) == 3
    assert len(reads) == 1


def test_a_shard_that_comes_later(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], 2, 4, 8, num_shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "coming")
    first = SafetensorsCheckpoint.shared(tmp_path)
    with pytest.raises(FileNotFoundError, match=shard.name):
        first.tensor("model.layers.0.norm")
    (tmp_path / "coming").rename(shard)
    assert SafetensorsCheckpoint.shared(tmp_path).tensor("model.layers.0.norm").shape == (8,)
    assert first.tensor("model.layers.0.norm").shape == (8,)


def test_a_shard_that_is_replaced_before_it_is_opened(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], 2, 4, 8, num_shards=2)
    checkpoint = SafetensorsCheckpoint.shared(tmp_path)
    replaced(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: got another file than when"):
        checkpoint.tensor("model.layers.0.norm")
    assert SafetensorsCheckpoint.shared(tmp_path).tensor("model.layers.0.norm").shape == (8,)


def test_a_shard_that_is_touched_or_rewritten_before_it_is_opened(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], 2, 4, 8, num_shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    touched, rewritten = SafetensorsCheckpoint(tmp_path), SafetensorsCheckpoint(tmp_path)
    os.utime(shard, ns=(1, 1))
    assert touched.tensor("model.layers.0.norm").shape == (8,)
    write_checkpoint(tmp_path / "wider", "qwen3_moe", [0], 2, 4, 16, num_shards=2)
    shard.write_bytes((tmp_path / "wider" / shard.name).read_bytes())
    with pytest.raises(ValueError, match=f"{shard.name}: got another file than when"):
        rewritten.tensor("model.layers.0.norm")


def test_a_layer_reads_a_replaced_shard_while_another_holds_the_old_one(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_checkpoint(tmp_path / f"{seed}", "qwen3_moe", [0], 2, 32, 32, seed, num_shards=2)
    batch = np.ones((1, 32), ml_dtypes.bfloat16), np.array([[0, 1]]), np.ones((1, 2), np.float32)
    old, other = (KTMoEWrapper.from_pretrained(tmp_path / f"{seed}") for seed in (0, 1))
    first, second = old.forward(*batch), other.forward(*batch)
    assert not same_bytes(first, second)
    for shard in (tmp_path / "1").glob("*.safetensors"):
        shard.replace(tmp_path / "0" / shard.name)
    new = KTMoEWrapper.from_pretrained(tmp_path / "0")
    assert same_bytes(new.forward(*batch), second)
    assert same_bytes(old.forward(*batch), first)


def test_a_shared_checkpoint_is_let_go_with_its_last_holder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], 2, 4, 8)
    holder = weakref.ref(SafetensorsCheckpoint.shared(tmp_path))
    gc.collect()
    assert holder() is None
