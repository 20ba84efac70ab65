"""The weights of a decoder, read from the tensors of a checkpoint."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..arrays.types import PathLike
from ..io.gguf.checkpoint import GgufCheckpoint, is_gguf
from ..io.safetensors.checkpoint import SafetensorsCheckpoint
from ._arithmetic import Floats
from .activation_dtypes import SequenceDtypes
from .attention import Attention
from .config import DecoderConfig
from .gguf_model import GgufTensors
from .layer import DecoderLayer
from .ranks import Experts
from .router import Router

__all__ = ["DenseTensors", "dense_names", "dense_tensors", "read_layer"]


class DenseTensors(Protocol):
    """The tensors of a decoder beside its experts."""

    def read(self, name: str, *shape: int) -> Floats:
        """Read a tensor in float32, by its name in checkpoints of transformers.

        Raises
        ------
        ValueError
            There is none, or it is of another shape or dtype: names file and tensor.
        """


class _SafetensorsTensors:
    """Those of a Hugging Face checkpoint."""

    def __init__(self, checkpoint: SafetensorsCheckpoint) -> None:
        self._checkpoint = checkpoint

    def read(self, name: str, *shape: int) -> Floats:
        self._checkpoint.info(name)  # says so when there is none
        problem = self._checkpoint.problem(name, ("BF16", "F16", "F32"), (shape,))
        if problem is not None:
            raise problem
        return self._checkpoint.tensor(name).astype(np.float32)


def dense_names(c: DecoderConfig) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes of all that is read but experts."""
    found = [
        ("model.embed_tokens.weight", (c.vocab_size, c.hidden_size)),
        ("model.norm.weight", (c.hidden_size,)),
    ]
    if not c.tie_word_embeddings:
        found.append(("lm_head.weight", (c.vocab_size, c.hidden_size)))
    for i in range(c.num_layers):
        found += [(f"model.layers.{i}.{name}", shape) for name, shape in _layer_shapes(c).items()]
    return found


def _layer_shapes(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer, but those of experts."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (c.hidden_size,),
        "self_attn.q_proj.weight": (queries, c.hidden_size),
        "self_attn.k_proj.weight": (keys, c.hidden_size),
        "self_attn.v_proj.weight": (keys, c.hidden_size),
        "self_attn.o_proj.weight": (c.hidden_size, queries),
        "post_attention_layernorm.weight": (c.hidden_size,),
        c.router: (c.num_experts, c.hidden_size),
    }
    if c.qk_norm:
        widths = (c.head_dim, c.head_dim) if c.qk_norm == "head" else (queries, keys)
        shapes |= {f"self_attn.{n}_norm.weight": (w,) for n, w in zip("qk", widths, strict=True)}
    return shapes


def dense_tensors(path: PathLike, config: DecoderConfig) -> DenseTensors:
    """Open the checkpoint at `path`, of Hugging Face or GGUF."""
    if is_gguf(path):
        return GgufTensors(GgufCheckpoint.shared(path), config.num_heads, config.num_kv_heads)
    return _SafetensorsTensors(SafetensorsCheckpoint.shared(path))


def read_layer(
    tensors: DenseTensors,
    c: DecoderConfig,
    i: int,
    experts: Experts,
    dtypes: SequenceDtypes,
) -> DecoderLayer:
    """Read all of layer i but its experts."""
    found = {name: tensors.read(f"model.layers.{i}.{name}", *s) for name, s in _layer_shapes(c).items()}

    def transposed(name: str) -> Floats:
        return found[f"self_attn.{name}_proj.weight"].T

    norms = (found["self_attn.q_norm.weight"], found["self_attn.k_norm.weight"]) if c.qk_norm else None
    attention = Attention(
        c,
        query=transposed("q"),
        key=transposed("k"),
        value=transposed("v"),
        output=transposed("o"),
        qk_norm=norms,
    )
    return DecoderLayer(
        index=i,
        eps=c.rms_norm_eps,
        input_norm=found["input_layernorm.weight"],
        attention=attention,
        expert_norm=found["post_attention_layernorm.weight"],
        router=Router(found[c.router].T, c.num_experts_per_tok, c.norm_topk_prob),
        experts=experts,
        dtypes=dtypes,
    )
