"""Does it learn? A student takes on a teacher's adapters, as the reference does, step by step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from layers import Batch, assert_same_bits, bf16, draw, draw_batch
from sft_layers import BF16, Method, draw_lora, draw_student, train

from ktmoe_np import KTMoEWrapper
from ktmoe_np.cli.adam import Adam
from ktmoe_np.reference import LoraWeights, moe_backward, moe_forward_sft

pytestmark = pytest.mark.kernels

AnyArray = Any

E, I, H, P, R, T = 4, 16, 32, 2, 4, 64  # noqa: E741
RATE, EPSILON = 5e-3, 1e-5
NUM_BATCHES, EPOCHS = 8, 15

#: Of the loss of the first epoch, so much is left in the last one.
LEFT = 0.5

#: How far the losses of engine and reference may differ: early, and at all. Both evaluations round to
#: bfloat16 at the same places, so at first they hardly differ. A gradient that falls to the other side of a
#: rounding moves a weight by up to RATE / 2^8, and that grows with every step: by the end to 0.003, as the
#: reference in float32 differs from itself in float64. Without the gradient of one matrix it is 0.03 early.
APART_EARLY, APART = 1e-3, 1e-2
EARLY = 5 * NUM_BATCHES


def optimizer(weights: dict[str, AnyArray]) -> Adam:
    return Adam(weights, RATE, betas=(0.9, 0.99), eps=EPSILON)


class Task:
    """What is to be learned: the same batches for all who learn."""

    def __init__(self, activation: str, method: Method = BF16) -> None:
        rng = np.random.default_rng(0)
        self.student = draw_student(rng, (E, I, H), R, activation, method=method, scale=1.0)
        teacher = replace(self.student, lora=draw_lora(rng, self.student.layer, R)).wrapper(P)
        self.batches = [draw_batch(rng, self.student.layer, T, P) for _ in range(NUM_BATCHES)]
        self.targets = [teacher.forward(*batch).astype(np.float32) for batch in self.batches]
        self.first = {k: m if k.endswith("a") else np.zeros_like(m) for k, m in self.student.lora.items()}

    def loss(self, out: AnyArray, step: int) -> tuple[float, AnyArray]:
        """Half the mean squared distance to the teacher, and its gradient."""
        difference = out.astype(np.float32) - self.targets[step % NUM_BATCHES]
        return float(np.square(difference).mean() / 2), (difference / difference.size).astype(bf16)

    def learn(self, one_step: Any) -> list[float]:
        """The losses of `one_step(weights, batch, step)`, which gives loss and gradients."""
        weights, losses = {name: matrix.copy() for name, matrix in self.first.items()}, []
        adam = optimizer(weights)
        for step in range(EPOCHS * NUM_BATCHES):
            loss, gradients = one_step(weights, self.batches[step % NUM_BATCHES], step)
            losses.append(loss)
            adam.step(gradients)
        return losses

    def engine(self, **options: Any) -> list[float]:
        moe = replace(self.student, lora={}).wrapper(P, **options)

        def one_step(weights: dict[str, AnyArray], batch: Batch, step: int) -> Any:
            moe.update_lora_weights(**weights)
            loss, grad_output = self.loss(moe.forward_sft(*batch), step)
            return loss, moe.backward(grad_output).matrices

        return self.learn(one_step)

    def reference(self) -> list[float]:
        student = self.student

        def one_step(weights: dict[str, AnyArray], batch: Batch, step: int) -> Any:
            up = {} if "up_lora_a" in weights else {"up_lora_a": None, "up_lora_b": None}
            lora = LoraWeights(**weights, **up, lora_alpha=student.lora_alpha)
            out, cache = moe_forward_sft(**{**student.reference(batch), "lora": lora})
            loss, grad_output = self.loss(out, step)
            return loss, vars(moe_backward(cache, grad_output))

        return self.learn(one_step)


def of_epochs(losses: list[float]) -> AnyArray:
    """The mean loss of each epoch, as a part of the first one's."""
    means = np.reshape(losses, (EPOCHS, NUM_BATCHES)).mean(axis=1)
    relative: AnyArray = means / means[0]
    return relative


def assert_same_course(losses: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(losses[:EARLY], expected[:EARLY], rtol=APART_EARLY)
    np.testing.assert_allclose(losses, expected, rtol=APART)


@pytest.mark.parametrize(
    ("activation", "method"),
    [("silu", BF16), ("relu2", BF16), ("silu", ("AMXINT4_SFT", 32)), ("silu", ("MOE_INT8_SFT", None))],
)
def test_a_student_learns_as_the_reference_does(activation: str, method: Method) -> None:
    task = Task(activation, method)
    losses = task.engine()
    assert (np.diff(of_epochs(losses)) < 0).all()
    assert of_epochs(losses)[-1] < LEFT
    assert_same_course(losses, task.reference())
    # However it is kept, it is the same.
    assert task.engine(recompute=True, max_cache_depth=3) == losses


def test_it_learns_with_dropout() -> None:
    assert of_epochs(Task("silu").engine(lora_dropout=0.1, seed=3))[-1] < 1.5 * LEFT


def test_micro_batches_learn_the_same() -> None:
    task = Task("silu")
    moe = replace(task.student, lora={}).wrapper(P)

    def one_step(weights: dict[str, AnyArray], batch: Batch, step: int) -> Any:
        moe.update_lora_weights(**weights)
        loss, grad_output = task.loss(moe.forward(*batch), step)
        gradients = None
        for rows in (slice(0, 10), slice(10, 40), slice(40, T)):
            moe.forward_sft(*batch.rows(rows))
            gradients = moe.backward(grad_output[rows], gradients=gradients, accumulate=gradients is not None)
        return loss, gradients.matrices

    assert_same_course(task.learn(one_step), task.engine())


def test_base_weights_learn() -> None:
    """Gradients of the base weights go downhill too."""
    rng = np.random.default_rng(1)
    student = draw_student(rng, (E, I, H), 0, scale=1.0)
    batch = draw_batch(rng, student.layer, T, P)
    target = student.wrapper(P).forward(*batch).astype(np.float32)
    names = ("gate_proj", "up_proj", "down_proj")
    weights = {
        name: value.astype(np.float32) + np.float32(0.05) * rng.standard_normal(value.shape, np.float32)
        for name, value in zip(names, student.layer.matrices, strict=True)
    }
    moe, adam, losses = student.wrapper(P, full_weight_grad=True), optimizer(weights), []
    for _ in range(30):
        moe.load_weights_from_tensors(**{name: value.astype(bf16) for name, value in weights.items()})
        difference = moe.forward_sft(*batch).astype(np.float32) - target
        losses.append(float(np.square(difference).mean()))
        adam.step(moe.backward((difference / difference.size).astype(bf16)).matrices)
    assert losses[-1] < 0.1 * losses[0]


def test_a_layer_of_a_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0, 2], E, I, H)
    moe: Any = KTMoEWrapper.from_pretrained(tmp_path, 2, mode="sft", lora_rank=R, lora_alpha=5.0)
    assert (type(moe).__name__, moe.method, moe.loaded) == ("NativeSFTMoEWrapper", "AMXBF16_SFT", True)
    same: Any = KTMoEWrapper.from_pretrained(tmp_path, 2)
    rng = np.random.default_rng(0)
    x, ids = draw(rng, 5, H), rng.integers(0, E, (5, P))
    batch = Batch(x, ids, rng.random((5, P), np.float32))
    assert_same_bits(moe.forward(*batch), same.forward(*batch))
    assert train(moe, batch, x).gradients["gate_lora_b"].any()
