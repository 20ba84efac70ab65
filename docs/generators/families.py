"""Tables of the families of models: routing, the decoder, and PEFT."""

from __future__ import annotations

import inspect
import re

from ktmoe_np import KTMoEWrapper
from ktmoe_np.models import config
from ktmoe_np.sft.peft import FAMILIES, REFUSED

from .markdown import table

__all__ = ["decoders", "peft", "routing"]

_ROUTING = re.compile(r"^=+(?: +=+)+\n.*?^=+(?: +=+)+\n.*?^=+(?: +=+)+$", re.DOTALL | re.MULTILINE)


def routing() -> str:
    """Render the table of the docstring of `KTMoEWrapper.from_pretrained`."""
    found = _ROUTING.search(inspect.getdoc(KTMoEWrapper.from_pretrained) or "")
    if found is None:
        raise ValueError(
            "KTMoEWrapper.from_pretrained: got no table in its docstring, expected that of routers"
        )
    return found.group() + "\n"


def decoders() -> str:
    """Render the families that `ktmoe_np.models` runs."""
    norms = {"": "none", "head": "of each head", "all": "of all heads together"}
    rows = [
        (
            f"`{name}`",
            f"`{family.router}`",
            "always" if family.always_renormalize else "`norm_topk_prob`",
            norms[family.qk_norm],
        )
        for name, family in config._FAMILIES.items()
    ]
    return table(("model_type", "router", "weights sum to 1", "norm of queries and keys"), rows) + "\n"


def peft() -> str:
    """Render the families that PEFT adapts, and those that it cannot."""
    rows = [
        (
            f"`{name}`",
            f"`{family.fused}`",
            f"`{family.separate.experts}`" if family.separate else "",
            _rows_of_gate_and_up(family),
        )
        for name, family in sorted(FAMILIES.items())
    ]
    head = ("model_type", "fused parameters in", "one Linear per expert in", "gate and up")
    refused = [(f"`{name}`", str(reason)) for name, reason in sorted(dict(REFUSED).items())]
    return f"{table(head, rows)}\n\nRefused:\n\n{table(('model_type', 'reason'), refused)}\n"


def _rows_of_gate_and_up(family: object) -> str:
    if not family.gated:
        return "no gate"
    if family.interleaved:
        return "rows alternate"
    return "transposed" if family.swapped else "gate first"
