"""A text to learn: most of it to learn from, its end to measure by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..models import Tokenizer

__all__ = ["TextPart", "TrainingText", "read_training_text"]

#: The held-out part of the text: its last tenth, of which so many letters are measured.
_HELD_OUT, _MAX_MEASURED = 10, 16384


@dataclass(frozen=True)
class TextPart:
    """A part of a text."""

    tokens: NDArray[np.int64]
    tokens_per_byte: float

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer) -> TextPart:
        """Encode a text that is not empty."""
        tokens = np.array(tokenizer.encode(text), np.int64)
        return cls(tokens, len(tokens) / len(text.encode()))


@dataclass(frozen=True)
class TrainingText:
    """The training text and the held-out text."""

    learned: TextPart
    held_out: TextPart
    sha256: str  #: of the file


def read_training_text(file: Path, tokenizer: Tokenizer, window: int, vocab_size: int) -> TrainingText:
    """Read a text of which windows of that many tokens, and the one behind, are to be learned.

    Raises
    ------
    ValueError
        Not UTF-8, too short, or of tokens that the model does not have: names the file.
    OSError
        The file cannot be read.
    """
    data = file.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8: {error.reason} at byte {error.start}") from error
    cut = len(text) - len(text) // _HELD_OUT
    parts = [TextPart.of(part or " ", tokenizer) for part in (text[:cut], text[cut : cut + _MAX_MEASURED])]
    for part, least, what in zip(parts, (window + 1, 2), ("first nine tenths", "last tenth"), strict=True):
        if len(part.tokens) < least:
            raise ValueError(f"{file}: got {len(part.tokens)} tokens in its {what}, expected {least} or more")
        if part.tokens.max() >= vocab_size:
            raise ValueError(
                f"{file}: got token {part.tokens.max()}, expected 0 to {vocab_size - 1}: the tokenizer is "
                "another model's"
            )
    learned, held_out = parts
    return TrainingText(learned, held_out, hashlib.sha256(data).hexdigest())
