"""Text to tokens and back, by a checkpoint's tokenizer.json or the header of a GGUF model."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..io.gguf.checkpoint import GgufCheckpoint, is_gguf
from ..io.json_text import MAX_JSON_BYTES, parse_json_object, read_json_object, shown
from ..io.regular_file import read_regular
from .gguf_tokenizer import build_tokenizer, naming_failures, stop_tokens

__all__ = ["Tokenizer", "load_stop_tokens", "load_tokenizer"]


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Turn a text into tokens."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Turn tokens into a text; bytes that are no UTF-8 become U+FFFD."""


class _Bytes:
    """A token for each byte, whose number is the byte's value."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        # A model may know more tokens than bytes; 0xff is no UTF-8.
        return bytes(token if token < 256 else 0xFF for token in tokens).decode(errors="replace")


class _Library:
    """A tokenizer of the package tokenizers.

    `bos` is a token that texts begin with, if the tokenizer does not add it itself.
    """

    def __init__(self, path: Path, loaded: Any, bos: int | None = None) -> None:
        self._loaded = loaded
        self._path = path
        self._bos = bos

    @classmethod
    def of_json(cls, path: Path, text: bytes) -> _Library:
        try:
            library = importlib.import_module("tokenizers")
        except ImportError as error:
            needs = "reading them needs: pip install tokenizers"
            raise ImportError(f"{path}: its tokens are more than bytes; {needs}") from error
        with naming_failures(path, "the package tokenizers refuses it"):
            return cls(path, library.Tokenizer.from_str(text.decode()))

    def encode(self, text: str) -> list[int]:
        with naming_failures(self._path, "the text cannot be encoded"):
            tokens = list(self._loaded.encode(text).ids)
        if self._bos is None or tokens[:1] == [self._bos]:  # which a chat template may have written
            return tokens
        return [self._bos, *tokens]

    def decode(self, tokens: Sequence[int]) -> str:
        with naming_failures(self._path, "the tokens cannot be decoded"):
            return str(self._loaded.decode(list(tokens)))


class _Bounded:
    """A tokenizer whose tokens the model must know."""

    def __init__(self, tokenizer: Tokenizer, path: Path, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._path = path
        self._vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        tokens = self._tokenizer.encode(text)
        most = max(tokens, default=0)
        if most >= self._vocab_size:
            raise ValueError(
                f"{self._path}: the text: got token {most}, expected at most {self._vocab_size - 1}, "
                "by the model's vocab_size"
            )
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read the tokenizer of a checkpoint.

    Parameters
    ----------
    path : str or path-like
        The checkpoint's directory, or a GGUF model.

    Returns
    -------
    Tokenizer
        With methods ``encode`` and ``decode``. ``encode`` raises ValueError for a text with tokens beyond the
        vocabulary of the model. Texts begin with the model's first token where its files say so.

    Raises
    ------
    FileNotFoundError
        No tokenizer.json there.
    ValueError
        Not a JSON object, not a tokenizer that the package tokenizers reads, or a vocab_size that is none; a
        GGUF header without a tokenizer, or with one of a kind that is not known: names the file.
    ImportError
        Its tokens are more than bytes, and the package tokenizers is missing.

    Examples
    --------
    >>> from ktmoe_np.models import EMBEDDED_MODEL
    >>> load_tokenizer(EMBEDDED_MODEL).encode("Amen.")
    [65, 109, 101, 110, 46]
    """
    if is_gguf(path):
        checkpoint = GgufCheckpoint.shared(path)
        own = _Library(checkpoint.path, *build_tokenizer(checkpoint))
        return _Bounded(own, checkpoint.path, checkpoint.info("token_embd.weight").shape[0])
    file = Path(path) / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    text = read_regular(file, MAX_JSON_BYTES)
    tokenizer: Tokenizer = (
        _Bytes() if _is_bytes(parse_json_object(text, str(file))) else _Library.of_json(file, text)
    )
    vocab_size = _vocab_size(Path(path) / "config.json")
    return tokenizer if vocab_size is None else _Bounded(tokenizer, file, vocab_size)


def load_stop_tokens(path: str | os.PathLike[str]) -> frozenset[int]:
    """The tokens that end a text: those of generation_config.json where there are some, or of config.json.

    Parameters
    ----------
    path : str or path-like
        The checkpoint's directory, or a GGUF model, whose header names them.

    Raises
    ------
    ValueError
        Not a JSON object, or something else than an integer or a list of them.
    """
    if is_gguf(path):
        return stop_tokens(GgufCheckpoint.shared(path))
    for file in (Path(path) / "generation_config.json", Path(path) / "config.json"):
        value = read_json_object(file).get("eos_token_id") if file.exists() else None
        if value is None:
            continue
        tokens = value if isinstance(value, list) else [value]
        if any(type(token) is not int for token in tokens):
            raise ValueError(
                f"{file}: eos_token_id: got {shown(value)}, expected an integer or a list of them"
            )
        return frozenset(tokens)
    return frozenset()


def _vocab_size(config: Path) -> int | None:
    """How many tokens the model knows; None where there is no config.json or it does not say."""
    value = read_json_object(config).get("vocab_size") if config.exists() else None
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{config}: vocab_size: got {shown(value)}, expected a positive integer")
    return value


def _is_bytes(content: dict[str, Any]) -> bool:
    """Whether tokens are bytes in the order of their values, without any merges."""
    model, before = content.get("model"), content.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(before, dict) or before.get("type") != "ByteLevel":
        return False
    return (
        not model.get("merges") and not content.get("added_tokens") and model.get("vocab") == _byte_letters()
    )


def _byte_letters() -> dict[str, int]:
    """Bytes as GPT-2 writes them: printable ones as they are, the others by letters from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, others = {}, 0
    for byte in range(256):
        letters[chr(byte if byte in plain else 0x100 + others)] = byte
        others += byte not in plain
    return letters
