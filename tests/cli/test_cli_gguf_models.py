"""`ktmoe generate`, `eval` and `finetune` with a whole model in one GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_models import byte_tokens, write_gguf_model

from ktmoe_np.cli import main
from ktmoe_np.models import EMBEDDED_MODEL, EMBEDDED_TEXT

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

PROMPT = "And God said, Let there be light: and there was"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_gguf_model(EMBEDDED_MODEL, path, tokens=byte_tokens)
    return str(path)


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = as_json(capsys, "generate", model, "--prompt", PROMPT, "--tokens=12")
    assert (value["text"], value["method"]) == (" no more a m", "LLAMAFILE")
    chat = as_json(
        capsys, "generate", model, "--chat", "--prompt", PROMPT.removesuffix(" and there was"), "--tokens=12"
    )
    assert chat["text"] == value["text"]


def test_eval(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = as_json(capsys, "eval", model, "--bytes=600")["methods"]
    (expected,) = as_json(capsys, "eval", "--methods=BF16", "--bytes=600")["methods"]
    assert (row["method"], row["activation_dtype"]) == ("LLAMAFILE", "bfloat16")
    assert row["bits_per_byte"] == expected["bits_per_byte"]


def test_finetune(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(EMBEDDED_TEXT.read_bytes()[:4000])
    options = [f"--text={tmp_path / 'text'}", "--steps=2", "--batch=2", "--window=32", "--rank=2"]
    found = [
        as_json(capsys, "finetune", path, f"--out={tmp_path / name}", *options)
        for name, path in (("a", model), ("b", str(EMBEDDED_MODEL)))
    ]
    assert found[0]["losses"] == found[1]["losses"]
    text = as_json(capsys, "generate", model, f"--adapter={tmp_path / 'a'}", "--prompt", PROMPT, "--tokens=5")
    assert text["method"] == "LLAMAFILE_SFT"


@pytest.mark.parametrize("experts", ["bf16", "q8_0"])
def test_convert(experts: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, target = tmp_path / "model.gguf", tmp_path / "int8"
    write_gguf_model(EMBEDDED_MODEL, source, experts=experts, dense="bf16", tokens=byte_tokens)
    options = ["convert", str(source), str(target), "--method=AMXINT8"]
    made = as_json(capsys, *options)
    assert [layer["status"] for layer in made["layers"]] == ["written"] * 4
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(made["rest"]["files"])
    assert [layer["status"] for layer in as_json(capsys, *options)["layers"]] == ["kept"] * 4
    assert as_json(capsys, "verify", str(target))["whole"]

    text = as_json(capsys, "generate", str(target), "--prompt", PROMPT, "--tokens=12")
    assert text["method"] == "AMXINT8"
    chat = ["--chat", "--prompt", PROMPT.removesuffix(" and there was"), "--tokens=12"]
    assert as_json(capsys, "generate", str(target), *chat)["text"] == text["text"]
    if experts == "bf16":  # the same numbers as the checkpoint's
        direct = as_json(capsys, "generate", "--method=AMXINT8", "--prompt", PROMPT, "--tokens=12")
        assert text["text"] == direct["text"]
        (ours,) = as_json(capsys, "eval", str(target), "--methods=AMXINT8", "--bytes=600")["methods"]
        (theirs,) = as_json(capsys, "eval", "--methods=AMXINT8", "--bytes=600")["methods"]
        assert ours["bits_per_byte"] == theirs["bits_per_byte"]


def test_conversions_that_are_refused(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        assert main(["convert", *arguments, "--method=AMXINT8"]) == 2
        return capsys.readouterr().err

    assert "got GGUF with --link, expected it without" in error(model, str(tmp_path / "x"), "--link")
    assert "got the source, expected a directory of its own" in error(model, str(Path(model).parent))
    other = gguf.GGUFWriter(tmp_path / "other.gguf", "deepseek2")
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.close()
    assert "got 'deepseek2', expected one of qwen3moe" in error(
        str(tmp_path / "other.gguf"), str(tmp_path / "x")
    )
    assert not (tmp_path / "x").exists()
