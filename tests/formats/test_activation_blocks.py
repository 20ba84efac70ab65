"""Which formats int8 activations are for, by all the names that they have in the package."""

from __future__ import annotations

import doctest

import pytest

import ktmoe_np.formats.activation_blocks
from ktmoe_np import KTMoEWrapper
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.formats.activation_blocks import ACTIVATION_BLOCKS, integer_projections
from ktmoe_np.formats.encodings import NATIVE_FORMATS
from ktmoe_np.formats.gguf import GGUF_FORMATS
from ktmoe_np.formats.quantized import FORMATS
from ktmoe_np.layers.gguf import GgufWeights


def test_doctests() -> None:
    result = doctest.testmod(ktmoe_np.formats.activation_blocks)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_format_is_known() -> None:
    assert {*GGUF_FORMATS, *NATIVE_FORMATS, *FORMATS} <= set(ACTIVATION_BLOCKS)


def test_formats_of_the_same_name_agree() -> None:
    for info in ext.formats():
        assert (ACTIVATION_BLOCKS[info.name] > 0) == (info.activation_block > 0)
    floats = {"f32", "f16", "bf16", "fp8", "fp8_perchannel", "mxfp8"}
    assert {name for name, block in ACTIVATION_BLOCKS.items() if not block} == floats
    assert integer_projections({"gate_proj": "fp8", "down_proj": "bf16"}) == []


def test_types_of_a_gguf_layer_are_known_when_it_is_loaded() -> None:
    moe = KTMoEWrapper(0, 1, 1, 32, 32, method="LLAMAFILE")
    assert isinstance(moe, GgufWeights)
    with pytest.raises(RuntimeError, match=r"^formats: nothing is loaded, and GGUF tensors carry their own"):
        _ = moe.formats
