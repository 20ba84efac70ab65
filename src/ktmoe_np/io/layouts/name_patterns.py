"""How checkpoints name and lay out the experts of a layer: a table, one row per naming scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

__all__ = ["NAME_PATTERNS", "PREFIXES", "NamePattern"]

#: What stands before a layer's own names; {layer} is its number.
PREFIXES = (
    "model.layers.{layer}.",
    "model.language_model.layers.{layer}.",
    "language_model.model.layers.{layer}.",
    "backbone.layers.{layer}.",
    "layers.{layer}.",
    "thinker.model.layers.{layer}.",
    "model.llm.layers.{layer}.",
)


@dataclass(frozen=True)
class NamePattern:
    """One way of pattern and laying out the experts of a layer.

    Parameters
    ----------
    tensors : mapping of str to str
        Role to name behind the layer's prefix. A name with ``{e}`` is a tensor for each expert, one without
        holds all of them along a first axis. Roles: ``down`` with ``gate`` and ``up``, with ``gate`` alone
        (not gated: the one projection), or with ``gate_up`` (both, along the output rows).
    biases : mapping of str to str
        The like for biases, which may be absent.
    needs_biases : bool
        Whether the row counts only when biases are there.
    interleaved : bool
        Rows of ``gate_up`` alternate, gate first; otherwise all of gate come first.
    transposed : bool
        Matrices are ``[K, N]`` instead of ``[N, K]``.
    """

    tensors: Mapping[str, str]
    biases: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    transposed: bool = False
    needs_biases: bool = False

    @property
    def gated(self) -> bool:
        """Whether an expert has two first projections."""
        return set(self.tensors) != {"gate", "down"}

    @property
    def per_expert(self) -> bool:
        """Whether every expert has its own tensors."""
        return "{e}" in self.tensors["down"]


def _separate(container: str, **projections: str) -> NamePattern:
    """One tensor for each expert and projection."""
    return NamePattern(
        {role: f"{container}.{{e}}.{name}.weight" for role, name in projections.items()},
        {role: f"{container}.{{e}}.{name}.bias" for role, name in projections.items()},
    )


def _fused(gate_up: str, down: str) -> NamePattern:
    """Gate and up of all experts in one tensor, down in another."""
    return NamePattern(
        {"gate_up": gate_up, "down": down}, {"gate_up": f"{gate_up}_bias", "down": f"{down}_bias"}
    )


_CONTAINERS = (
    "mlp.experts",  # Qwen, DeepSeek, GLM, OLMoE, ERNIE, Hunyuan, ...
    "block_sparse_moe.experts",  # Mixtral, Phi-MoE, MiniMax, Kimi-Linear
    "ffn.experts",  # DeepSeek-V4
    "feed_forward.experts",  # LFM2, Jamba
    "mixer.experts",  # Nemotron-H
    "experts",  # Mistral-Large
)

_SEPARATE = tuple(
    _separate(container, gate=gate, up=up, down=down)
    for container in _CONTAINERS
    for gate, up, down in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
)

_MLP_FUSED = _fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_BLOCK_FUSED = _fused("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj")
_LLAMA_FUSED = _fused("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")

#: Of rows with the same names the first that the shapes fit counts: shapes tell transposed from not.
NAME_PATTERNS = (
    *_SEPARATE,
    _separate("mixer.experts", gate="up_proj", down="down_proj"),  # Nemotron-H: not gated
    replace(_MLP_FUSED, transposed=True, interleaved=True, needs_biases=True),  # gpt-oss in bfloat16
    _MLP_FUSED,  # Qwen3.5
    replace(_MLP_FUSED, transposed=True),  # Qwen3-VL-MoE
    _fused("experts.gate_up_proj", "experts.down_proj"),  # Gemma-4
    replace(_LLAMA_FUSED, transposed=True),  # Llama-4
    _BLOCK_FUSED,  # GraniteMoeSWA
    _fused("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),  # Granite
    _fused("mlp.input_linear.weight", "mlp.output_linear.weight"),  # JetMoE
    replace(_fused("mlp.experts.fc1.weight", "mlp.experts.fc2.weight"), transposed=True),  # Aria
    replace(_fused("mlp.experts.w13_weight", "mlp.experts.w2_weight"), interleaved=True),  # Inkling
    NamePattern(  # Step-3.x
        {"gate": "moe.gate_proj.weight", "up": "moe.up_proj.weight", "down": "moe.down_proj.weight"}
    ),
)
