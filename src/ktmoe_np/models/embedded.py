"""Paths of the packaged model and of a text that it was not trained on."""

from __future__ import annotations

from pathlib import Path

__all__ = ["EMBEDDED_MODEL", "EMBEDDED_TEXT"]

#: A Hugging Face checkpoint; its README.md says what it is made from.
EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "embedded"

#: Alice's Adventures in Wonderland.
EMBEDDED_TEXT = EMBEDDED_MODEL / "alice.txt"
