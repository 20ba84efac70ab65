"""Tokenizers that the package tokenizers refuses, or that know tokens that the model does not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ktmoe_np.models import EMBEDDED_MODEL, load_stop_tokens, load_tokenizer


class PanicException(BaseException):
    """What the package raises where its own code fails, by its name."""


class _Loaded:
    """As much as is needed of tokenizers.Tokenizer."""

    tokens: list[int] = [0, 9]  # noqa: RUF012
    raises: BaseException | None = None

    @classmethod
    def from_str(cls, text: str) -> _Loaded:
        if "refused" in text:
            raise Exception("Model missing.")
        return cls()

    def encode(self, text: str) -> Any:
        if self.raises is not None:
            raise self.raises
        return SimpleNamespace(ids=self.tokens)

    def decode(self, tokens: list[int]) -> str:
        if self.raises is not None:
            raise self.raises
        return "text"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose tokenizer needs the package, and a package."""
    package = ModuleType("tokenizers")
    package.Tokenizer = type("Tokenizer", (_Loaded,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tokenizers", package)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def test_a_file_that_the_package_refuses(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"refused": 1}')
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: the package tokenizers refuses it: Model missing"
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize("call", [lambda t: t.encode("a"), lambda t: t.decode([1])], ids=["encode", "decode"])
@pytest.mark.parametrize("error", [PanicException("index out of bounds"), OverflowError("too large")])
def test_what_the_package_raises(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[Any], Any], error: BaseException
) -> None:
    tokenizer = load_tokenizer(folder)
    monkeypatch.setattr(sys.modules["tokenizers"].Tokenizer, "raises", error)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: the .* cannot be .*coded: {error}"):
        call(tokenizer)
    monkeypatch.setattr(sys.modules["tokenizers"].Tokenizer, "raises", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        call(tokenizer)


@pytest.mark.crosscheck
def test_the_real_package_refuses(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    for text in ("{}", '{"model": {"type": "Nope"}}', '{"model": {"type": "WordLevel", "vocab": {"a": -1}}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json: the package tokenizers refuses it"):
            load_tokenizer(tmp_path)


def test_tokens_beyond_the_vocabulary(folder: Path) -> None:
    assert load_tokenizer(folder).encode("a") == [0, 9]  # the size of the vocabulary is unknown
    (folder / "config.json").write_text('{"vocab_size": 10}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a") == [0, 9]
    assert tokenizer.decode([0]) == "text"
    (folder / "config.json").write_text('{"vocab_size": 9}')
    message = r"tokenizer\.json: the text: got token 9, expected at most 8, by the model's vocab_size"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder).encode("a")


@pytest.mark.parametrize("value", ["8", 0, -1, 8.0, True, [8]])
def test_a_vocabulary_without_a_size(folder: Path, value: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"vocab_size": value}))
    with pytest.raises(ValueError, match=r"config\.json: vocab_size: got .*, expected a positive integer"):
        load_tokenizer(folder)


def test_bytes_of_a_model_that_knows_more_or_fewer_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((Path(EMBEDDED_MODEL) / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text('{"vocab_size": 300}')
    assert load_tokenizer(tmp_path).decode([65, 256, 299, 66]) == "A��B"
    (tmp_path / "config.json").write_text('{"vocab_size": 128}')
    assert load_tokenizer(tmp_path).encode("a") == [97]
    with pytest.raises(ValueError, match=r"tokenizer\.json: the text: got token 195, expected at most 127"):
        load_tokenizer(tmp_path).encode("é")


@pytest.mark.parametrize("text", ['{"eos_token_id": 1' + "0" * 400 + "}", '{"eos_token_id": ["\\ud800"]}'])
def test_stop_tokens_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_stop_tokens(tmp_path)
