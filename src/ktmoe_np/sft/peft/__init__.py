"""Adapters in PEFT's format: a directory of two files, for all layers of a model."""

from .families import FAMILIES, REFUSED, SEPARATE_REFUSED, PeftFamily
from .read import import_peft
from .scale import peft_scale
from .write import export_peft

__all__ = [
    "FAMILIES",
    "REFUSED",
    "SEPARATE_REFUSED",
    "PeftFamily",
    "export_peft",
    "import_peft",
    "peft_scale",
]
