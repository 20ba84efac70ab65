"""A block in JAX learns with our experts as it does with those of the reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from layers import draw_layer

from ktmoe_np.reference import LoraWeights, moe_backward, moe_forward_sft
from ktmoe_np.sft.gradients import LORA_NAMES

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

from jax_block import HIDDEN, PER_TOKEN, first_parameters, train  # noqa: E402

from ktmoe_np.jax import lora_parameters, moe_sft  # noqa: E402

pytestmark = pytest.mark.crosscheck

NUM_EXPERTS, INTER, RANK, ALPHA, STEPS = 6, 16, 4, 8.0, 50


class ReferenceExperts:
    """The same layer by the reference, called back by the program."""

    def __init__(self, layer: Any) -> None:
        self._matrices = layer.matrices
        self.call = jax.custom_vjp(self._forward)
        self.call.defvjp(lambda *operands: (self._forward(*operands), operands), self._backward)

    def _saved(self, lora: Any, x: Any, ids: Any, weights: Any) -> Any:
        adapters = LoraWeights(**{name: np.asarray(lora[name]) for name in LORA_NAMES}, lora_alpha=ALPHA)
        rows = (np.asarray(part).reshape(-1, part.shape[-1]) for part in (x, ids, weights))
        return moe_forward_sft(*rows, *self._matrices, lora=adapters)

    def _forward(self, lora: Any, x: Any, ids: Any, weights: Any) -> Any:
        def compute(*operands: Any) -> Any:
            return self._saved(*operands)[0].reshape(operands[1].shape)

        return jax.pure_callback(compute, jax.ShapeDtypeStruct(x.shape, x.dtype), lora, x, ids, weights)

    def _backward(self, kept: Any, grad: Any) -> Any:
        lora, x, ids, weights = kept

        def compute(lora: Any, x: Any, ids: Any, weights: Any, grad: Any) -> Any:
            _, cache = self._saved(lora, x, ids, weights)
            found = moe_backward(cache, np.asarray(grad).reshape(-1, grad.shape[-1]))
            by_lora = {name: getattr(found, name) for name in LORA_NAMES}
            return by_lora, found.grad_input.reshape(x.shape), found.grad_weights.reshape(weights.shape)

        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (lora, x, weights))
        by_lora, by_x, by_weights = jax.pure_callback(compute, like, lora, x, ids, weights, grad)
        return by_lora, by_x, None, by_weights


def test_a_block_learns_as_with_the_experts_of_the_reference() -> None:
    layer = draw_layer(np.random.default_rng(0), NUM_EXPERTS, INTER, HIDDEN)
    sft = layer.wrapper(PER_TOKEN, mode="sft", method="AMXBF16_SFT", lora_rank=RANK, lora_alpha=ALPHA)
    parameters = first_parameters(lora_parameters(sft), NUM_EXPERTS)
    ours = train(parameters, partial(moe_sft, sft), STEPS)
    theirs = train(parameters, ReferenceExperts(layer).call, STEPS)
    assert ours[-1] < 0.1 * ours[0]
    # A token whose experts are nearly tied may go to others, from where on the two learn their own ways.
    np.testing.assert_allclose(ours[:10], theirs[:10], rtol=1e-3)
    np.testing.assert_allclose(ours, theirs, atol=0.02)
