"""Text to tokens and back, by a checkpoint's tokenizer.json."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..io._safetensors_header import parse_json_object

__all__ = ["Tokenizer", "load_stop_tokens", "load_tokenizer"]


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Turn a text into tokens."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Turn tokens into a text; bytes that are no UTF-8 become U+FFFD."""


class _Bytes:
    """A token for each byte, whose number is the byte's value."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class _Library:
    """What the package tokenizers makes of the file."""

    def __init__(self, path: Path) -> None:
        try:
            library = importlib.import_module("tokenizers")
        except ImportError as error:
            needs = "reading them needs: pip install tokenizers"
            raise ImportError(f"{path}: its tokens are more than bytes; {needs}") from error
        self._loaded: Any = library.Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        return list(self._loaded.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._loaded.decode(list(tokens)))


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read the tokenizer of a checkpoint.

    Parameters
    ----------
    path : str or path-like
        The checkpoint's directory.

    Returns
    -------
    Tokenizer
        With methods ``encode`` and ``decode``.

    Raises
    ------
    FileNotFoundError
        No tokenizer.json there.
    ValueError
        Not a JSON object.
    ImportError
        Its tokens are more than bytes, and the package tokenizers is missing.

    Examples
    --------
    >>> from ktmoe_np.models import EMBEDDED_MODEL
    >>> load_tokenizer(EMBEDDED_MODEL).encode("Amen.")
    [65, 109, 101, 110, 46]
    """
    file = Path(path) / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    return _Bytes() if _is_bytes(parse_json_object(file.read_bytes(), str(file))) else _Library(file)


def load_stop_tokens(path: str | os.PathLike[str]) -> frozenset[int]:
    """The tokens that end a text: those of generation_config.json where there are some, or of config.json.

    Parameters
    ----------
    path : str or path-like
        The checkpoint's directory.

    Raises
    ------
    ValueError
        Not a JSON object, or something else than an integer or a list of them.
    """
    for file in (Path(path) / "generation_config.json", Path(path) / "config.json"):
        value = parse_json_object(file.read_bytes(), str(file)).get("eos_token_id") if file.exists() else None
        if value is None:
            continue
        tokens = value if isinstance(value, list) else [value]
        if any(type(token) is not int for token in tokens):
            raise ValueError(f"{file}: eos_token_id is {value!r:.80}, expected an integer or a list of them")
        return frozenset(tokens)
    return frozenset()


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
