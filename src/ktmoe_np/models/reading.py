"""The weights of a decoder, read from the tensors of a checkpoint."""

from __future__ import annotations

import numpy as np

from ..inference.base import BaseMoEWrapper
from ..io.safetensors.checkpoint import SafetensorsCheckpoint
from ..sft.base import BaseSFTMoEWrapper
from ._arithmetic import Floats
from .activation_dtypes import SequenceDtypes
from .attention import Attention
from .config import DecoderConfig
from .layer import DecoderLayer
from .router import Router

__all__ = ["read_layer", "read_tensor"]


def read_tensor(checkpoint: SafetensorsCheckpoint, name: str, *shape: int) -> Floats:
    """Read a tensor in float32, of that shape in the checkpoint.

    Raises
    ------
    ValueError
        There is none, or it is of another shape or dtype: names file and tensor.
    """
    checkpoint.info(name)  # says so when there is none
    problem = checkpoint.problem(name, ("BF16", "F16", "F32"), (shape,))
    if problem is not None:
        raise problem
    return checkpoint.tensor(name).astype(np.float32)


def read_layer(
    checkpoint: SafetensorsCheckpoint,
    c: DecoderConfig,
    i: int,
    experts: BaseMoEWrapper | BaseSFTMoEWrapper,
    dtypes: SequenceDtypes,
) -> DecoderLayer:
    """Read all of layer i but its experts."""

    def read(name: str, *shape: int) -> Floats:
        return read_tensor(checkpoint, f"model.layers.{i}.{name}", *shape)

    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    qk_norm = None
    if c.qk_norm:
        widths = (c.head_dim, c.head_dim) if c.qk_norm == "head" else (queries, keys)
        qk_norm = (
            read("self_attn.q_norm.weight", widths[0]),
            read("self_attn.k_norm.weight", widths[1]),
        )
    attention = Attention(
        c,
        query=read("self_attn.q_proj.weight", queries, c.hidden_size).T,
        key=read("self_attn.k_proj.weight", keys, c.hidden_size).T,
        value=read("self_attn.v_proj.weight", keys, c.hidden_size).T,
        output=read("self_attn.o_proj.weight", c.hidden_size, queries).T,
        qk_norm=qk_norm,
    )
    router = Router(read(c.router, c.num_experts, c.hidden_size).T, c.num_experts_per_tok, c.norm_topk_prob)
    return DecoderLayer(
        index=i,
        eps=c.rms_norm_eps,
        input_norm=read("input_layernorm.weight", c.hidden_size),
        attention=attention,
        expert_norm=read("post_attention_layernorm.weight", c.hidden_size),
        router=router,
        experts=experts,
        dtypes=dtypes,
    )
