"""Checkpoints: readers that map files into memory, and the finders of a layer's experts in them."""

from ..formats.weights import ExpertWeights, Projection
from .experts import expert_layers, load_experts
from .safetensors.checkpoint import SafetensorsCheckpoint, SafetensorsFile, TensorInfo, load_hf_config

__all__ = [
    "ExpertWeights",
    "Projection",
    "SafetensorsCheckpoint",
    "SafetensorsFile",
    "TensorInfo",
    "expert_layers",
    "load_experts",
    "load_hf_config",
]
