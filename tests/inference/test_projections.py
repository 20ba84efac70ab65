"""What a layer's task takes for a projection: codes alone, or with scales and a format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layers import Batch, Layer, assert_same_bits
from low_level_sizes import E, H, I, P, T

from ktmoe_np import kt_kernel_ext as ext

pytestmark = [pytest.mark.kernels, pytest.mark.asan, pytest.mark.emulated]


def test_a_projection_is_its_codes_where_there_are_no_scales(engine: Any, layer: Layer, batch: Batch) -> None:
    config = ext.moe.MOEConfig(E, P, H, I, pool=engine.backend_)
    outs = []
    for matrices in (layer.matrices, [ext.moe.Projection(matrix) for matrix in layer.matrices]):
        moe, out = ext.moe.AMXBF16_MOE(config), np.empty((T, H), np.float32)
        engine.run(moe.load_weights_task(*matrices))
        engine.run(moe.forward_task(*batch, out))
        outs.append(out)
    assert_same_bits(*outs)


SCALES = np.ones((E, I), np.float32)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"channel_scale": SCALES}, "gate_scale: got one, expected None: bf16 has no channel scales"),
        ({"block_scales": SCALES}, "gate_scale: got one, expected None: bf16 has no block scales"),
        ({"format": "q4_0"}, "gate_format: got 'q4_0', expected one of bf16, f32, f16"),
    ],
)
def test_a_projection_has_what_the_method_does_not(
    engine: Any, layer: Layer, more: dict[str, Any], message: str
) -> None:
    moe = ext.moe.AMXBF16_MOE(ext.moe.MOEConfig(E, P, H, I, pool=engine.backend_))
    gate, up, down = layer.matrices
    with pytest.raises(ValueError, match=f"^{message}$"):
        moe.load_weights_task(ext.moe.Projection(gate, **more), up, down)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"codes": SCALES}, "up_proj"),
        ({"codes": None, "channel_scale": SCALES}, "up_scale"),
        ({"codes": None, "block_scales": SCALES}, "up_scale"),
        ({"codes": None, "format": "q4_0"}, "up_format"),
    ],
)
def test_up_without_a_gate(engine: Any, layer: Layer, given: dict[str, Any], name: str) -> None:
    config = ext.moe.MOEConfig(E, P, H, I, pool=engine.backend_)
    config.set_activation("relu2", False)
    gate, _, down = layer.matrices
    message = f"^{name}: got one, expected None: the activation is not gated$"
    with pytest.raises(ValueError, match=message):
        ext.moe.AMXBF16_MOE(config).load_weights_task(gate, ext.moe.Projection(**given), down)
