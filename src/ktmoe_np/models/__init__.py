"""Language models in NumPy whose experts are layers of this library, and one that comes with the package.

`MoEDecoder` is also the example of how the operators are embedded in a program without a framework.
"""

from .cache import KVCache
from .config import DecoderConfig
from .decoder import MoEDecoder
from .embedded import EMBEDDED_MODEL, EMBEDDED_TEXT
from .generation import bits_per_token, generate
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "EMBEDDED_MODEL",
    "EMBEDDED_TEXT",
    "DecoderConfig",
    "KVCache",
    "MoEDecoder",
    "Tokenizer",
    "bits_per_token",
    "generate",
    "load_tokenizer",
]
