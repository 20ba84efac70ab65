"""What the tests of training begin with: layers with random adapters, the engine on them, comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from gradient_bound import gradient_balls
from hypothesis import strategies as st
from layers import (
    ACTIVATIONS,
    POOLS,
    AnyArray,
    Batch,
    Layer,
    assert_same_bits,
    bf16,
    draw,
    draw_batch,
    draw_layer,
)
from native_layers import METHODS as NATIVE_METHODS
from native_layers import NativeLayer, draw_native_layer
from quantized_layers import product_of, quantized_layer

from ktmoe_np import SFTGradients
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.config import parse_activation
from ktmoe_np.formats.encodings import NATIVE_FORMATS, NativeFormat
from ktmoe_np.formats.methods import find_method
from ktmoe_np.formats.quantized import FORMATS
from ktmoe_np.layers.base import to_engine
from ktmoe_np.layers.quantize_task import quantize_projection
from ktmoe_np.reference import Dropout, LoraWeights, assert_within

__all__ = [
    "BF16",
    "RANKS",
    "SHAPES",
    "SIZES",
    "THREAD_CASES",
    "TOKENS",
    "Method",
    "Step",
    "Student",
    "assert_drawn_case",
    "assert_same_on_any_threads",
    "assert_same_steps",
    "assert_step_close",
    "assert_tokens_alone_are_as_in_batch",
    "by_name",
    "draw_case",
    "draw_lora",
    "draw_student",
    "draw_training",
    "joined",
    "low_level_inference",
    "low_level_sft",
    "per_matrix",
    "train",
]

#: A method and its group size.
Method = tuple[str, int | None]
BF16: Method = ("AMXBF16_SFT", None)

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

    layer: Layer  # before it is quantized
    lora: dict[str, AnyArray]
    rank: int
    lora_alpha: float = 5.0
    method: Method = BF16

    def wrapper(self, num_slots: int, physical_to_logical_map: Any = None, **options: Any) -> Any:
        """A `KTMoEWrapper` of mode sft, loaded and with the adapters."""
        method, group_size = self.method
        own = {"lora_rank": self.rank, "lora_alpha": self.lora_alpha}
        options = {"method": method, "group_size": group_size, **own, **options}
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
        method, group_size = self.method
        gate, up, down = quantized_layer(self.layer, method, group_size).matrices
        return {
            "hidden_states": batch.x,
            "topk_ids": ids,
            "topk_weights": batch.weights,
            "gate_proj": gate,
            "up_proj": up,
            "down_proj": down,
            "product": product_of(method),
            "activation": self.layer.activation,
            "scale_inputs": self.layer.scale_inputs,
            "lora": LoraWeights(**lora, **without, lora_alpha=self.lora_alpha),
            "dropout": dropout,
            **{name: bias for name, bias in self.layer.biases.items() if bias is not None},
        }


class Step(NamedTuple):
    """A training step: the output in float32, before its last rounding, and the gradients by name."""

    out: AnyArray
    gradients: dict[str, AnyArray]


def per_matrix(step: Step) -> dict[str, AnyArray]:
    """The gradients of matrices, which are sums over tokens."""
    return {name: v for name, v in step.gradients.items() if name not in ("grad_input", "grad_weights")}


def joined(parts: Sequence[Step]) -> Step:
    """The step of micro-batches: rows one behind the other, gradients of matrices added."""
    gradients = {
        name: np.concatenate([part.gradients[name] for part in parts])
        for name in ("grad_input", "grad_weights")
    }
    added = {name: sum(part.gradients[name] for part in parts) for name in per_matrix(parts[0])}
    return Step(np.concatenate([part.out for part in parts]), gradients | added)


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
    method: Method = BF16,
    **options: Any,
) -> Student:
    """A layer of `sizes` E, I and H with adapters; options are those of the function that draws it."""
    inference = method[0].partition("_SFT")[0]
    if inference in NATIVE_METHODS:
        layer: Layer = draw_native_layer(rng, inference, *sizes, activation, **options)
    else:
        layer = draw_layer(rng, *sizes, activation, **options)
    return Student(layer, draw_lora(rng, layer, rank, dtype) if rank else {}, rank, lora_alpha, method)


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


def draw_case(data: st.DataObject, rng: np.random.Generator, methods: Sequence[Method] = (BF16,)) -> Drawn:
    """What hypothesis draws, by name; the numbers come from `rng`."""
    num_experts, num_slots = data.draw(st.integers(1, 5), "E"), data.draw(st.integers(1, 4), "P")
    inter, hidden = data.draw(st.sampled_from(SIZES), "I"), data.draw(st.sampled_from(SIZES), "H")
    student = draw_student(
        rng,
        (num_experts, inter, hidden),
        data.draw(st.sampled_from(RANKS), "R"),
        data.draw(st.sampled_from(ACTIVATIONS), "activation"),
        dtype=data.draw(st.sampled_from([bf16, np.float32]), "adapters"),
        method=data.draw(st.sampled_from(methods), "method"),
        with_biases=data.draw(st.booleans(), "biases"),
    )
    if data.draw(st.booleans(), "scaled inputs"):
        student = replace(student, layer=replace(student.layer, scale_inputs=True))
    batch, grad_output = draw_training(rng, student, data.draw(st.sampled_from(TOKENS), "T"), num_slots)
    mask = rng.random(num_experts) < 0.5 if data.draw(st.booleans(), "masked") else None
    mapped = rng.integers(0, num_experts, num_experts) if data.draw(st.booleans(), "mapped") else None
    rate = data.draw(st.sampled_from([0.0, 0.0, 0.25, 0.9]), "dropout")
    return Drawn(student, batch, grad_output, num_slots, mask, mapped, rate)


def assert_tokens_alone_are_as_in_batch(
    moe: Any, batch: Batch, grad_output: AnyArray, rng: np.random.Generator
) -> None:
    """Steps of some of 40 tokens have the bits that these have in a step of all."""
    whole = train(moe, batch, grad_output)
    order = rng.permutation(40)
    for rows in (slice(0, 1), slice(7, 8), slice(39, 40), slice(5, 14), slice(5, 23), order):
        part = train(moe, batch.rows(rows), grad_output[rows].copy())
        assert_same_bits(part.out, whole.out[rows])
        for name in ("grad_input", "grad_weights"):
            assert_same_bits(part.gradients[name], whole.gradients[name][rows], name)


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
            assert_within(value, balls[name].center, balls[name].radius)
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
    own = {"lora_rank": student.rank, "lora_alpha": student.lora_alpha}
    config = _config_of(ext.moe.MOESFTConfig, engine, student, num_slots, own | options)
    moe = getattr(ext.moe, find_method(student.method[0], "sft").layer)(config)
    engine.run(moe.load_weights_task(**_encoded(engine, student), **student.layer.biases))
    if student.lora:
        engine.run(moe.update_lora_weights_task(**student.lora))
    return moe


def low_level_inference(engine: Any, student: Student, num_slots: int, **options: Any) -> Any:
    """The extension's layer for inference, loaded, without the adapters, on an engine of one's own choice."""
    config = _config_of(ext.moe.MOEConfig, engine, student, num_slots, options)
    name = student.method[0].removesuffix("_SFT")
    moe = getattr(ext.moe, find_method(name, "inference").layer)(config)
    engine.run(moe.load_weights_task(**_encoded(engine, student), **student.layer.biases))
    return moe


def _config_of(kind: Any, engine: Any, student: Student, num_slots: int, options: dict[str, Any]) -> Any:
    layer, spec = student.layer, parse_activation(student.layer.activation)
    sizes = (layer.num_experts, num_slots, layer.hidden_size, layer.inter_size)
    config = kind(*sizes, pool=engine.backend_)
    config.set_activation(spec.kind, spec.gated, spec.limit, spec.alpha, spec.beta1, spec.beta2)
    own = {"group_size": student.method[1] or 0, "scale_inputs": layer.scale_inputs}
    for name, value in {**own, **options}.items():
        setattr(config, name, value)
    return config


def _encoded(engine: Any, student: Student) -> dict[str, Any]:
    """The weights as the extension takes them: quantized by a method that does, or in their encoding."""
    method, group_size = student.method
    fmt = find_method(method, "sft").formats.get(group_size)
    encoded: dict[str, Any] = {}
    if isinstance(student.layer, NativeLayer):
        found = find_method(method, "sft")
        weights = found.encodings.get(group_size, found.weights)
        if weights == "gguf":
            return _in_blocks(student.layer)
        return _in_encoding(NATIVE_FORMATS[weights], student.layer)
    for name, matrix in zip(("gate", "up", "down"), student.layer.matrices, strict=True):
        if fmt is None or matrix is None:
            encoded[f"{name}_proj"] = matrix
        else:
            made = quantize_projection(engine, FORMATS[fmt], name, matrix, matrix.shape)
            encoded[f"{name}_proj"] = to_engine(made)
    return encoded


def _in_encoding(fmt: NativeFormat, layer: NativeLayer) -> dict[str, Any]:
    encoded: dict[str, Any] = {"up_proj": None}
    for name, matrix in zip(("gate", "up", "down"), layer.matrices, strict=True):
        if matrix is not None:
            given = (layer.arguments.get(f"{name}_{role}") for role in ("proj", "scale", "global_scale"))
            zero = layer.arguments.get(f"{name}_zero")
            encoded[f"{name}_proj"] = to_engine(fmt.matrices(name, *given, matrix.shape, zero))
    return encoded


def _in_blocks(layer: NativeLayer) -> dict[str, Any]:
    encoded: dict[str, Any] = {"up_proj": None}
    for name in ("gate", "up", "down"):
        if f"{name}_format" in layer.arguments:
            rows, kind = layer.arguments[f"{name}_proj"], layer.arguments[f"{name}_format"].lower()
            encoded[f"{name}_proj"] = ext.moe.Projection(
                rows.view(bf16) if kind == "bf16" else rows, format=kind
            )
    return encoded


def _low_level_step(
    engine: Any, student: Student, batch: Batch, grad_output: AnyArray, **options: Any
) -> Step:
    """A step with all gradients that the method has, on an engine of one's own choice."""
    moe = low_level_sft(engine, student, batch.ids.shape[1], **options)
    out = np.full(batch.x.shape, np.nan, np.float32)
    engine.run(moe.forward_sft_task(*batch, out))
    matrices = dict(student.lora)
    if student.method == BF16:
        gate, up, down = student.layer.matrices
        matrices |= {"gate_proj": gate, "down_proj": down, **({} if up is None else {"up_proj": up})}
    gradients = {name: np.full(value.shape, np.nan, np.float32) for name, value in matrices.items()}
    grad_input, grad_weights = np.full_like(batch.x, np.nan), np.full_like(batch.weights, np.nan)
    engine.run(moe.backward_task(grad_output, grad_input, grad_weights, **gradients))
    return Step(out, {"grad_input": grad_input, "grad_weights": grad_weights, **gradients})


def assert_drawn_case(case: Drawn, wrapped: Student, *, seed: int, cache_dtype: Any, **options: Any) -> None:
    """A step of the case by the layer that `wrapped` makes is what the reference says."""
    options |= {"seed": seed, "lora_dropout": case.rate, "cache_dtype": cache_dtype}
    moe = wrapped.wrapper(case.num_slots, case.mapped, gpu_experts_mask=case.mask, **options)
    step = train(moe, case.batch, case.grad_output)
    assert (moe.num_cached, moe.step) == (0, 1)
    assert_step_close(
        step,
        case.student,
        case.batch,
        case.grad_output,
        float32_cache=cache_dtype == np.float32,
        gpu_experts_mask=case.mask,
        physical_to_logical_map=case.mapped,
        dropout=Dropout(case.rate, seed) if case.rate else None,
    )


#: What the law of threads is tried on: seed, (E, I, H), T, P, R and activation; and options.
THREAD_CASES = (
    st.tuples(
        st.integers(0, 2**32 - 1),
        st.sampled_from([(3, 45, 70), (8, 96, 160), (5, 192, 130), (3, 7, 9), (2, 300, 33)]),
        st.sampled_from([1, 2, 16, 45, 90]),
        st.integers(1, 3),
        st.sampled_from([0, 1, 3, 16, 33]),
        st.sampled_from(ACTIVATIONS),
    ),
    st.sampled_from([{}, {"recompute": True}, {"cache_float32": True}, {"lora_dropout": 0.3}]),
)


def assert_same_on_any_threads(
    engines: Sequence[Any], student: Student, batch: Batch, grad_output: AnyArray, **options: Any
) -> None:
    """A step has the same bits on the engines of `POOLS`; options are those of the extension's config."""
    steps = [_low_level_step(engine, student, batch, grad_output, **options) for engine in engines]
    for pool, step in zip(POOLS, steps, strict=True):
        assert_same_steps(step, steps[0], f"threads {pool}")
