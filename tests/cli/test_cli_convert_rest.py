"""`ktmoe convert`: directories that run, with copies of what is not quantized or with links to it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import NAMINGS, write_checkpoint
from cli_runs import only_error
from converted import E, H, I, name_of, names_in, run, said

from ktmoe_np import KTMoEWrapper
from ktmoe_np.cli import main
from ktmoe_np.io import SafetensorsCheckpoint, SafetensorsFile
from ktmoe_np.io.converted import rest
from ktmoe_np.models import EMBEDDED_MODEL, MoEDecoder

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("leave_no_engine")]

PROMPT = "And God said, Let there be light"

ways = pytest.mark.parametrize("more", [(), ("--link",)], ids=["copy", "link"])


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- whole models ----


@ways
def test_a_directory_runs(tmp_path: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "int4"
    assert run(EMBEDDED_MODEL, target, *more) == 0
    assert "All else that the model needs was " in said(capsys)
    made = as_json(capsys, "generate", str(target), "--prompt", PROMPT, "--tokens=12")
    assert made["method"] == "AMXINT4"
    own = ("--prompt", PROMPT, "--tokens=12", "--experts", str(target))
    assert as_json(capsys, "generate", str(EMBEDDED_MODEL), *own)["text"] == made["text"]
    text = tmp_path / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth. " * 8)
    found = as_json(capsys, "eval", str(target), "--text", str(text), "--methods=AMXINT4")
    expected = as_json(capsys, "eval", str(EMBEDDED_MODEL), "--text", str(text), "--methods=AMXINT4")
    assert [row["bits_per_byte"] for row in found["methods"]] == [
        row["bits_per_byte"] for row in expected["methods"]
    ]


@ways
def test_a_directory_is_fine_tuned(
    tmp_path: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    target, out = tmp_path / "int8", tmp_path / "adapter"
    assert run(EMBEDDED_MODEL, target, *more, method="AMXINT8") == 0
    said(capsys)
    text = tmp_path / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth. " * 40)
    options = ("--text", str(text), "--out", str(out), "--steps=2", "--rank=4", "--batch=2", "--window=16")
    assert main(["finetune", str(target), *options]) == 0
    capsys.readouterr()
    model = MoEDecoder.from_pretrained(target, adapter=out)
    assert {layer.method for layer in model.experts} == {"AMXINT8_SFT"}


@ways
@pytest.mark.parametrize("naming", ["granitemoe", "gpt_oss", "mixtral", "nemotron_h", "gemma4", "llama4"])
def test_all_tensors_but_those_of_experts(tmp_path: Path, naming: str, more: tuple[str, ...]) -> None:
    source, target = tmp_path / "model", tmp_path / "int8"
    write_checkpoint(source, naming, [0, 2], E=E, I=I, H=H, num_shards=3)
    assert run(source, target, *more, method="MOE_INT8") == 0
    original, made = SafetensorsCheckpoint(source), SafetensorsCheckpoint(target)
    prefix = NAMINGS[naming][0]
    dense = {"embed_tokens.weight"}
    dense |= {f"{prefix}.{layer}.{name}" for layer in (0, 2) for name in ("router.weight", "norm")}
    assert set(made.names()) == (set(original.names()) if more else dense)
    for name in dense:
        found, tensor = made.tensor(name), original.tensor(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.tobytes() == tensor.tobytes()


def test_a_copy_is_what_transformers_looks_for(target: Path) -> None:
    file = SafetensorsFile(target / "model.safetensors")
    assert file.metadata["format"] == "pt"
    assert all(".experts." not in name for name in file.names())
    moe = KTMoEWrapper.from_pretrained(target, 1)
    assert (moe.method, moe.loaded) == ("AMXINT4", True)
    with pytest.raises(ValueError, match="holds quantized weights, which method 'BF16' does not read"):
        KTMoEWrapper.from_pretrained(target, 1, "BF16")


# ---- again, and over what is there ----


def test_what_is_the_same_stays(source: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in names_in(target) if name != "ktmoe.json"]
    before = {name: (target / name).stat().st_mtime_ns for name in names if name != "config.json"}
    assert run(source, target) == 0
    said(capsys)
    assert {name: (target / name).stat().st_mtime_ns for name in before} == before
    data = bytearray((target / "model.safetensors").read_bytes())
    data[-1] ^= 0xFF
    (target / "model.safetensors").write_bytes(data)
    assert run(source, target) == 0
    assert (target / "model.safetensors").read_bytes() != data


def test_files_beside_the_tensors(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{ }",
        "generation_config.json": '{"eos_token_id": 1}',
        "chat_template.jinja": "{{ messages }}",
        "merges.txt": "a b",
        "vocab.json": "{}",
    }
    for name, text in {**wanted, "README.md": "a model", "trainer_state.json": "{}"}.items():
        (source / name).write_text(text)
    (source / "tokenizer_folder").mkdir()
    target = tmp_path / "int4"
    report = as_json(capsys, "convert", str(source), str(target), "--method=AMXINT4")
    assert {name: (target / name).read_text() for name in wanted} == wanted
    expected = {"config.json", "ktmoe.json", *map(name_of, range(3)), "model.safetensors", *wanted}
    assert set(names_in(target)) == expected
    assert set(report["rest"]["files"]) == {"model.safetensors", "config.json", *wanted}
    sizes = [(target / name).stat().st_size for name in report["rest"]["files"]]
    assert (report["rest"]["bytes"], report["rest"]["linked"]) == (sum(sizes), False)


def test_links(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "tokenizer.json").write_text("{}")
    target = tmp_path / "int4"
    report = as_json(capsys, "convert", str(source), str(target), "--method=AMXINT4", "--link")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    copied = {"model.safetensors.index.json", "config.json", "tokenizer.json"}
    assert (set(report["rest"]["files"]), report["rest"]["linked"]) == ({*shards, *copied}, True)
    assert all((target / name).samefile(source / name) for name in shards)
    # Small files are changed in place by editors and tokenizers: the source's must not change with them.
    assert not any((target / name).samefile(source / name) for name in copied)
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in copied)
    assert run(source, target, "--link") == 0
    assert KTMoEWrapper.from_pretrained(target, 1, "BF16").loaded  # of the source's file, by its link
    assert KTMoEWrapper.from_pretrained(target, 1).method == "AMXINT4"


def test_another_file_system_gets_symbolic_links(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "int4"
    assert run(source, target, "--link") == 0
    shard = "model-00001-of-00002.safetensors"
    assert (target / shard).is_symlink()
    assert (target / shard).resolve() == (source / shard).resolve()
    assert run(source, target, "--link") == 0


def test_links_of_a_cache_are_followed(source: Path, tmp_path: Path) -> None:
    snapshot, target = tmp_path / "snapshot", tmp_path / "int4"
    snapshot.mkdir()
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert run(snapshot, target, "--link") == 0
    for file in source.iterdir():
        assert (target / file.name).samefile(file) == (file.suffix == ".safetensors")
        assert not (target / file.name).is_symlink()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_become_copies_and_the_source_stays(tmp_path: Path, link: Any) -> None:
    source, target = tmp_path / "model", tmp_path / "int4"
    write_checkpoint(source, "qwen3_moe", [0], E, I, H)
    (source / "tokenizer.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    target.mkdir()
    for name in before:
        link(source / name, target / name)
    assert run(source, target) == 0
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert not any((target / name).samefile(source / name) for name in before)
    assert run(source, target, "--link") == 0
    assert (target / "model.safetensors").samefile(source / "model.safetensors")


def test_a_link_to_somewhere_else_is_not_written_through(source: Path, tmp_path: Path) -> None:
    target, other = tmp_path / "int4", tmp_path / "other.json"
    (source / "tokenizer.json").write_text('{"a": 1}')
    other.write_text("{}")
    target.mkdir()
    for name in ("tokenizer.json", "config.json"):
        (target / name).symlink_to(other)
    assert run(source, target) == 0
    assert other.read_text() == "{}"
    assert (target / "tokenizer.json").read_text() == '{"a": 1}'
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_the_file_that_a_source_links_to_stays(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    full, view = tmp_path / "full", tmp_path / "view"
    write_checkpoint(full, "qwen3_moe", [0], E, I, H)
    view.mkdir()
    for file in full.iterdir():
        (view / file.name).symlink_to(file)
    for file in full.iterdir():
        if file.name != name:  # of which the view has its own
            (view / file.name).unlink()
            (view / file.name).write_bytes(file.read_bytes())
    before = {file.name: file.read_bytes() for file in full.iterdir()}
    for more in ((), ("--link",)):
        assert run(view, full, *more) == 2
        assert f"got the source's own {name} in it, expected a directory of its own" in only_error(capsys)
    assert {file.name: file.read_bytes() for file in full.iterdir()} == before


def test_tensors_of_another_model_are_left_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "int4"
    write_checkpoint(target, "qwen3_moe", [0], E, I, H)
    for more in ((), ("--link",)):
        assert run(source, target, *more) == 2
        assert "got model.safetensors in it, expected a directory of its own" in only_error(capsys)
    assert run(source, source) == 2
    assert "got the source, expected a directory of its own" in only_error(capsys)


def test_a_copy_of_another_model_is_replaced(source: Path, target: Path, tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(source)
    (target / "model.safetensors").unlink()
    write_checkpoint(tmp_path / "other", "qwen3_moe", [0], E, I, H, seed=1)
    rest.copy_rest(SafetensorsCheckpoint(tmp_path / "other"), target)
    rest.copy_rest(checkpoint, target)
    made = SafetensorsCheckpoint(target)
    assert np.array_equal(made.tensor("model.layers.2.norm"), checkpoint.tensor("model.layers.2.norm"))
