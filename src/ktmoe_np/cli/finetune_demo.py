"""`ktmoe finetune-demo`: adapters learn what a teacher's adapters do, by Adam in NumPy, checked and drawn."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arrays.checks import Array, bfloat16
from ..experts import KTMoEWrapper
from ..reference import LoraWeights, moe_backward, moe_forward_sft
from ..sft.gradients import lora_shapes
from .adam import Adam
from .plot import check_plot, draw_loss
from .progress import Progress
from .table import wrap
from .terminal import say, say_json

__all__ = ["run"]

#: A small layer: its shape, and the tokens of a step.
_EXPERTS, _PER_TOKEN, _HIDDEN, _INTER, _TOKENS = 16, 4, 128, 64, 512
_ALPHA = 4.0
_RATE = 1e-2

#: The loss has to fall to this fraction of the first one in the default number of steps.
_GOAL, _GOAL_STEPS = 0.01, 300

#: Steps that the reference takes too, and how far its losses may lie from the engine's.
_CHECKED_STEPS, _CHECKED_WITHIN = 20, 0.01


@dataclass
class _Course:
    """The results."""

    losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def follows_reference(self) -> bool:
        pairs = zip(self.losses, self.reference_losses, strict=False)
        return all(abs(ours - theirs) <= _CHECKED_WITHIN * theirs for ours, theirs in pairs)


def run(arguments: argparse.Namespace) -> int:
    """Train; 0 when the loss fell as it should and the first steps are the reference's, else 1."""
    if arguments.plot:
        check_plot(arguments.plot)
    course = _train(arguments)
    fraction = course.losses[-1] / course.losses[0]
    learned = arguments.steps < _GOAL_STEPS or fraction <= _GOAL
    right = learned and course.follows_reference
    if arguments.plot:
        draw_loss(arguments.plot, course.losses, course.reference_losses)
    if arguments.json:
        report = {
            "right": right,
            "losses": course.losses,
            "reference_losses": course.reference_losses,
            "ms_per_step": 1e3 * float(np.median(course.seconds)),
            "rank": arguments.rank,
        }
        say_json(report)
    else:
        say(_text(course, arguments, fraction))
        if arguments.plot:
            say(f"The curve is drawn in {arguments.plot}")
    return 0 if right else 1


def _train(arguments: argparse.Namespace) -> _Course:
    rng = np.random.default_rng(arguments.seed)
    weights = _base_weights(rng)
    moe: Any = KTMoEWrapper(
        layer_idx=0,
        num_experts=_EXPERTS,
        num_experts_per_tok=_PER_TOKEN,
        hidden_size=_HIDDEN,
        moe_intermediate_size=_INTER,
        cpuinfer_threads=arguments.threads,
        method="AMXBF16_SFT",
        mode="sft",
        lora_rank=arguments.rank,
        lora_alpha=_ALPHA,
    )
    moe.load_weights_from_tensors(*weights)
    shapes = lora_shapes(moe.config, arguments.rank)
    teacher = {name: _scaled(rng, shape) for name, shape in shapes.items()}
    student = {
        name: value if name.endswith("_a") else np.zeros_like(value)
        for name, value in ((name, _scaled(rng, shape)) for name, shape in shapes.items())
    }
    course, adam, reference = _Course(), Adam(student, _RATE), _ReferenceStudent(weights, student)
    with Progress(arguments.steps) as progress:
        for step in range(arguments.steps):
            label = f"loss {course.losses[-1]:.3g}" if course.losses else "first step"
            progress.step(f"step {step + 1}: {label}")
            batch = _draw_batch(rng)
            moe.update_lora_weights(**teacher)
            target = moe.forward(*batch).astype(np.float32)
            if step < _CHECKED_STEPS:
                course.reference_losses.append(reference.step(batch, target))
            began = time.perf_counter()
            moe.update_lora_weights(**student)
            loss, grad = _loss(moe.forward_sft(*batch), target)
            gradients = moe.backward(grad)
            adam.step({name: getattr(gradients, name) for name in student})
            course.seconds.append(time.perf_counter() - began)
            course.losses.append(loss)
    return course


def _base_weights(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    shapes = ((_EXPERTS, _INTER, _HIDDEN), (_EXPERTS, _INTER, _HIDDEN), (_EXPERTS, _HIDDEN, _INTER))
    gate, up, down = (_scaled(rng, shape).astype(bfloat16) for shape in shapes)
    return gate, up, down


def _scaled(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Numbers that leave the size of what they are multiplied with."""
    scaled: Array = rng.standard_normal(shape) / np.sqrt(shape[-1])
    return scaled.astype(np.float32)


def _draw_batch(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    x = rng.standard_normal((_TOKENS, _HIDDEN)).astype(np.float32).astype(bfloat16)
    scores = rng.standard_normal((_TOKENS, _EXPERTS))
    ids = np.argsort(-scores, axis=1)[:, :_PER_TOKEN]
    chosen = np.exp(np.take_along_axis(scores, ids, axis=1))
    return x, ids, (chosen / chosen.sum(axis=1, keepdims=True)).astype(np.float32)


def _loss(out: Array, target: Array) -> tuple[float, Array]:
    """Half the squared distance to the teacher, by token, and its gradient (bfloat16, unscaled by tokens)."""
    difference = out.astype(np.float32) - target
    return float(0.5 * np.mean(np.square(difference).sum(axis=1))), difference.astype(bfloat16)


class _ReferenceStudent:
    """The same student, trained by the NumPy reference."""

    def __init__(self, weights: tuple[Array, Array, Array], student: dict[str, Array]) -> None:
        self._weights = weights
        self._student = {name: value.copy() for name, value in student.items()}
        self._adam = Adam(self._student, _RATE)

    def step(self, batch: tuple[Array, Array, Array], target: Array) -> float:
        """Take one step; the loss before it."""
        lora = LoraWeights(**self._student, lora_alpha=_ALPHA)
        out, cache = moe_forward_sft(*batch, *self._weights, lora=lora)
        loss, grad = _loss(out, target)
        gradients = moe_backward(cache, grad)
        self._adam.step({name: getattr(gradients, name) for name in self._student})
        return loss


def _text(course: _Course, arguments: argparse.Namespace, fraction: float) -> str:
    about = wrap(
        f"A layer of {_EXPERTS} experts ({_HIDDEN} wide, {_INTER} inside, {_PER_TOKEN} per token) learns "
        f"adapters of rank {arguments.rank} from a teacher that has some: Adam in NumPy, {_TOKENS} fresh "
        "tokens per step."
    )
    every = max(1, len(course.losses) // 10)
    steps = [*range(0, len(course.losses) - 1, every), len(course.losses) - 1]
    rows = [f"{step + 1:6d}   {course.losses[step]:10.5f}" for step in dict.fromkeys(steps)]
    agreement = "agree" if course.follows_reference else "DO NOT AGREE"
    end = wrap(
        f"The loss fell to {100 * fraction:.2g} % of the first; "
        f"{1e3 * float(np.median(course.seconds)):.1f} ms per step. The first {len(course.reference_losses)} "
        f"losses {agreement} with those of the NumPy reference within {100 * _CHECKED_WITHIN:g} %."
    )
    return "\n".join([about, "", "  step         loss", *rows, "", end])
