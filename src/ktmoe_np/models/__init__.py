"""Language models in NumPy whose experts are layers of this library, and one that comes with the package.

`MoEDecoder` is also the example of how the operators are embedded in a program without a framework.
"""

from .cache import KVCache
from .chat import ChatTemplate, load_chat_template
from .config import DecoderConfig
from .decoder import MoEDecoder, TrainingPass
from .embedded import EMBEDDED_MODEL, EMBEDDED_TEXT
from .generation import bits_per_token, generate
from .tokenizer import Tokenizer, load_stop_tokens, load_tokenizer
from .training import Loss, loss_and_gradients

__all__ = [
    "EMBEDDED_MODEL",
    "EMBEDDED_TEXT",
    "ChatTemplate",
    "DecoderConfig",
    "KVCache",
    "Loss",
    "MoEDecoder",
    "Tokenizer",
    "TrainingPass",
    "bits_per_token",
    "generate",
    "load_chat_template",
    "load_stop_tokens",
    "load_tokenizer",
    "loss_and_gradients",
]
