"""What the tests of training begin with: layers with random adapters, the engine on them, comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from gradient_bound import gradient_balls
from hypothesis import strategies as st
from layers import ACTIVATIONS, AnyArray, Batch, Layer, assert_same_bits, bf16, draw, draw_batch, draw_layer

from ktmoe_np import SFTGradients
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.config import parse_activation
from ktmoe_np.reference import Dropout, LoraWeights, assert_within

__all__ = [
    "RANKS",
    "SHAPES",
    "SIZES",
    "TOKENS",
    "Step",
    "Student",
    "assert_same_steps",
    "assert_step_close",
    "by_name",
    "draw_case",
    "draw_lora",
    "draw_student",
    "draw_training",
    "low_level_sft",
    "train",
]


#: What is drawn, around the steps of the kernels.
SIZES = (1, 2, 15, 16, 17, 31, 33, 45, 64, 70, 96, 129)
TOKENS = (0, 1, 2, 15, 16, 17, 33)
RANKS = (0, 1, 2, 3, 8, 16, 33)

#: Layers that are tested by name: (E, I, H, R, P, T).
SHAPES = {
    "a width of 704": (3, 704, 96, 16, 2, 9),
    "rank 1": (3, 45, 70, 1, 2, 40),
    "rank 3": (3, 70, 45, 3, 2, 40),
    "rank 33": (2, 64, 96, 33, 2, 20),
    "a rank above the widths": (2, 24, 40, 100, 2, 5),
    "a hidden size above 2048": (2, 33, 2081, 16, 2, 5),
    "an intermediate size above 4096": (1, 4111, 16, 5, 1, 3),
    "many experts for few tokens": (64, 40, 48, 8, 4, 3),
    "300 tokens on one expert": (1, 64, 96, 16, 1, 300),
}


@dataclass(frozen=True)
class Student:
    """A layer with adapters, which are under the names of `update_lora_weights`; none when the rank is 0."""

    layer: Layer
    lora: dict[str, AnyArray]
    rank: int
    lora_alpha: float = 5.0

    def wrapper(self, num_slots: int, physical_to_logical_map: Any = None, **options: Any) -> Any:
        """A `KTMoEWrapper` of mode sft, loaded and with the adapters."""
        options = {"method": "AMXBF16_SFT", "lora_rank": self.rank, "lora_alpha": self.lora_alpha, **options}
        moe = self.layer.wrapper(num_slots, physical_to_logical_map, mode="sft", **options)
        moe.init_lora_weights(**self.lora)
        return moe

    def reference(
        self,
        batch: Batch,
        *,
        physical_to_logical_map: Any = None,
        gpu_experts_mask: Any = None,
        dropout: Dropout | None = None,
    ) -> dict[str, Any]:
        """The arguments of `moe_forward_sft`, with the map and the mask taken into the ids."""
        ids = batch.ids
        if gpu_experts_mask is not None:
            ids = np.where(gpu_experts_mask[ids] & (ids >= 0), -1, ids)
        if physical_to_logical_map is not None:
            ids = np.where(ids < 0, -1, physical_to_logical_map[ids])
        lora = self.lora or draw_lora(np.random.default_rng(0), self.layer, 0)
        gated = parse_activation(self.layer.activation).gated
        without = {} if gated else {"up_lora_a": None, "up_lora_b": None}
        gate, up, down = self.layer.matrices
        return {
            "hidden_states": batch.x,
            "topk_ids": ids,
            "topk_weights": batch.weights,
            "gate_proj": gate,
            "up_proj": up,
            "down_proj": down,
            "activation": self.layer.activation,
            "lora": LoraWeights(**lora, **without, lora_alpha=self.lora_alpha),
            "dropout": dropout,
            **{name: bias for name, bias in self.layer.biases.items() if bias is not None},
        }


class Step(NamedTuple):
    """A training step: the output in float32, before its last rounding, and the gradients by name."""

    out: AnyArray
    gradients: dict[str, AnyArray]


def draw_lora(
    rng: np.random.Generator, layer: Layer, rank: int, dtype: Any = np.float32
) -> dict[str, AnyArray]:
    """Adapters that do about as much as the weights, up to lora_alpha / rank."""
    num, inter, hidden = layer.num_experts, layer.inter_size, layer.hidden_size
    shapes = {"gate": (hidden, inter), "up": (hidden, inter), "down": (inter, hidden)}
    if layer.up_proj is None:
        del shapes["up"]
    lora = {}
    for name, (columns, rows) in shapes.items():
        a = rng.standard_normal((num, rank, columns), np.float32) * columns**-0.5
        b = rng.standard_normal((num, rows, rank), np.float32) * (rank or 1) ** -0.5
        lora |= {f"{name}_lora_a": a.astype(dtype), f"{name}_lora_b": b.astype(dtype)}
    return lora


def draw_student(
    rng: np.random.Generator,
    sizes: tuple[int, int, int],
    rank: int,
    activation: Any = "silu",
    *,
    lora_alpha: float = 5.0,
    dtype: Any = np.float32,
    **options: Any,
) -> Student:
    """A layer of `sizes` E, I and H with adapters; options are those of `draw_layer`."""
    layer = draw_layer(rng, *sizes, activation, **options)
    return Student(layer, draw_lora(rng, layer, rank, dtype) if rank else {}, rank, lora_alpha)


def draw_training(
    rng: np.random.Generator, student: Student, num_tokens: int, num_slots: int
) -> tuple[Batch, AnyArray]:
    """A batch, some of whose slots are skipped, and a gradient of its output."""
    batch = draw_batch(rng, student.layer, num_tokens, num_slots)
    batch.ids[rng.random(batch.ids.shape) < 0.1] = -1
    return batch, draw(rng, num_tokens, student.layer.hidden_size)


def by_name(gradients: SFTGradients) -> dict[str, AnyArray]:
    """All gradients that there are."""
    first = {"grad_input": gradients.grad_input, "grad_weights": gradients.grad_weights}
    return {**first, **gradients.matrices}


class Drawn(NamedTuple):
    """A layer, a batch and what else both passes are tested with."""

    student: Student
    batch: Batch
    grad_output: AnyArray
    num_slots: int
    mask: AnyArray | None
    mapped: AnyArray | None
    rate: float


def draw_case(data: st.DataObject, rng: np.random.Generator) -> Drawn:
    """What hypothesis draws, by name; the numbers come from `rng`."""
    num_experts, num_slots = data.draw(st.integers(1, 5), "E"), data.draw(st.integers(1, 4), "P")
    inter, hidden = data.draw(st.sampled_from(SIZES), "I"), data.draw(st.sampled_from(SIZES), "H")
    student = draw_student(
        rng,
        (num_experts, inter, hidden),
        data.draw(st.sampled_from(RANKS), "R"),
        data.draw(st.sampled_from(ACTIVATIONS), "activation"),
        dtype=data.draw(st.sampled_from([bf16, np.float32]), "adapters"),
        with_biases=data.draw(st.booleans(), "biases"),
    )
    batch, grad_output = draw_training(rng, student, data.draw(st.sampled_from(TOKENS), "T"), num_slots)
    mask = rng.random(num_experts) < 0.5 if data.draw(st.booleans(), "masked") else None
    mapped = rng.integers(0, num_experts, num_experts) if data.draw(st.booleans(), "mapped") else None
    rate = data.draw(st.sampled_from([0.0, 0.0, 0.25, 0.9]), "dropout")
    return Drawn(student, batch, grad_output, num_slots, mask, mapped, rate)


def train(moe: Any, batch: Batch, grad_output: AnyArray, **options: Any) -> Step:
    """Forward and backward; options are those of `backward`."""
    out = moe.forward_sft(*batch, out=np.empty(batch.x.shape, np.float32))
    return Step(out, by_name(moe.backward(grad_output, **options)))


def assert_step_close(
    step: Step,
    student: Student,
    batch: Batch,
    grad_output: AnyArray,
    *,
    float32_cache: bool = False,
    **options: Any,
) -> None:
    """The step is what the reference says, to the roundings; options are those of `Student.reference`."""
    reference = student.reference(batch, **options)
    balls = gradient_balls(reference, grad_output, rounded=True, float32_cache=float32_cache)
    for name, value in {"float32 out": step.out, **step.gradients}.items():
        try:
            assert_within(value, balls[name].centre, balls[name].radius)
        except AssertionError as error:
            error.add_note(name)
            raise


def assert_same_steps(actual: Step, expected: Step, what: str = "") -> None:
    """Both steps have the same bits, and the same gradients."""
    assert_same_bits(actual.out, expected.out, f"out {what}")
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, value in expected.gradients.items():
        assert_same_bits(actual.gradients[name], value, f"{name} {what}")


def low_level_sft(engine: Any, student: Student, num_slots: int, **options: Any) -> Any:
    """The extension's layer, loaded and with the adapters, on an engine of one's own choice."""
    layer, spec = student.layer, parse_activation(student.layer.activation)
    sizes = (layer.num_experts, num_slots, layer.hidden_size, layer.inter_size)
    config = ext.moe.MOESFTConfig(*sizes, pool=engine.backend_)
    config.set_activation(spec.kind, spec.gated, spec.limit, spec.alpha, spec.beta1, spec.beta2)
    for name, value in {"lora_rank": student.rank, "lora_alpha": student.lora_alpha, **options}.items():
        setattr(config, name, value)
    moe = ext.moe.AMXBF16_SFT_MOE(config)
    engine.run(moe.load_weights_task(*layer.matrices, **layer.biases))
    engine.run(moe.update_lora_weights_task(**student.lora))
    return moe
