"""The layers of experts for training, their gradients, and adapters in files."""

from .base import BaseSFTMoEWrapper
from .gradients import SFTGradients
from .options import SFTOptions
from .peft import export_peft, import_peft, peft_scale
from .wrappers import (
    AMXSFTMoEWrapper,
    LlamafileSFTMoEWrapper,
    NativeSFTMoEWrapper,
    QuantizedSFTMoEWrapper,
)

__all__ = [
    "AMXSFTMoEWrapper",
    "BaseSFTMoEWrapper",
    "LlamafileSFTMoEWrapper",
    "NativeSFTMoEWrapper",
    "QuantizedSFTMoEWrapper",
    "SFTGradients",
    "SFTOptions",
    "export_peft",
    "import_peft",
    "peft_scale",
]
