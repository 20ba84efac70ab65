"""The layers of experts for training, their gradients, and adapters in files."""

from .adapters import export_peft, import_peft, peft_scale
from .amx import AMXSFTMoEWrapper
from .base import BaseSFTMoEWrapper
from .gradients import SFTGradients
from .llamafile import LlamafileSFTMoEWrapper
from .native import NativeSFTMoEWrapper
from .options import SFTOptions
from .quantized import QuantizedSFTMoEWrapper

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
