"""The bytes of quantized weights by the reference."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from ktmoe_np.formats.quantized import FORMATS
from ktmoe_np.reference import pack_int4, pack_int8, quantize_int4, quantize_int8

AnyArray = NDArray[Any]


def quantized_bytes(fmt: str, weights: AnyArray) -> tuple[AnyArray, AnyArray | None]:
    """Rows and channel scales of matrices [..., N, K], as the reference has them."""
    found = FORMATS[fmt]
    if found.bits == 4:
        assert found.group_size is not None
        int4 = quantize_int4(weights, group_size=found.group_size)
        return pack_int4(int4), int4.channel_scale
    if found.group_size is None:
        int8 = quantize_int8(weights)
        return pack_int8(int8), int8.channel_scale
    return pack_int8(quantize_int8(weights, group_size=found.group_size)), None
