"""The public names of ``ktmoe_np``, imported at once; the package imports this at the first use of one."""

from __future__ import annotations

from . import config, reference
from .buffers import KExpertsCPUBuffer, KExpertsSFTBuffer
from .config import ActivationSpec, MoEConfig, parse_activation
from .cpuinfer import _MoEBase
from .experts import KTMoEWrapper
from .gpu.experts import GPUExperts
from .gpu.masks import generate_gpu_experts_masks
from .inference import (
    AMXMoEWrapper,
    BaseMoEWrapper,
    GeneralMoEWrapper,
    LlamafileMoEWrapper,
    NativeMoEWrapper,
)
from .kt_kernel_ext import isa_info
from .observe.stats import LayerStats
from .observe.trace import trace
from .passes.deferral import DeferralChain
from .sft import (
    AMXSFTMoEWrapper,
    BaseSFTMoEWrapper,
    LlamafileSFTMoEWrapper,
    NativeSFTMoEWrapper,
    QuantizedSFTMoEWrapper,
    SFTGradients,
)

__all__ = [
    "AMXMoEWrapper",
    "AMXSFTMoEWrapper",
    "ActivationSpec",
    "BaseMoEWrapper",
    "BaseSFTMoEWrapper",
    "DeferralChain",
    "GPUExperts",
    "GeneralMoEWrapper",
    "KExpertsCPUBuffer",
    "KExpertsSFTBuffer",
    "KTMoEWrapper",
    "LayerStats",
    "LlamafileMoEWrapper",
    "LlamafileSFTMoEWrapper",
    "MoEConfig",
    "NativeMoEWrapper",
    "NativeSFTMoEWrapper",
    "QuantizedSFTMoEWrapper",
    "SFTGradients",
    "_MoEBase",
    "config",
    "generate_gpu_experts_masks",
    "isa_info",
    "parse_activation",
    "reference",
    "trace",
]
