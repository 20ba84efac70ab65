"""kt-kernel's calls for training, in the orders of its tests, and for serving an adapter as SGLang does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_kinds import numpy_of, of_torch
from checkpoints import write_checkpoint
from gradient_bound import gradient_balls
from layers import AnyArray, Batch, Layer, assert_same_bits, bf16
from sft_layers import Student, by_name, draw_lora, draw_student, draw_training

torch = pytest.importorskip("torch")

from ktmoe_np.compat.kt_kernel import KTMoEWrapper  # noqa: E402
from ktmoe_np.reference import assert_within  # noqa: E402

pytestmark = pytest.mark.crosscheck

E, I, H, R, P, T = 3, 45, 70, 4, 2, 6  # noqa: E741
NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


@pytest.fixture(scope="module")
def student() -> Student:
    return draw_student(np.random.default_rng(1), (E, I, H), R, dtype=bf16)


def made(student: Student, method: str = "AMXBF16_SFT", **options: Any) -> Any:
    """A wrapper with weights, without adapters."""
    layer = student.layer
    sizes = (layer.num_experts, P, layer.hidden_size, layer.inter_size)
    named = {"method": method, "mode": "sft", "lora_rank": student.rank, "lora_alpha": student.lora_alpha}
    sft = KTMoEWrapper(0, *sizes, None, None, None, "", 512, **{**named, **options})
    sft.load_weights_from_tensors(*map(of_torch, layer.matrices), torch.arange(layer.num_experts))
    return sft


def adapters(student: Student, dtype: Any = None) -> tuple[list[Any], list[Any]]:
    """Six adapters, and six tensors for gradients with something else in them."""
    lora = [of_torch(student.lora[name]) for name in NAMES]
    lora = lora if dtype is None else [each.to(dtype) for each in lora]
    return lora, [torch.full_like(each, 7.0) for each in lora]


def drawn(student: Student, tokens: int = T, seed: int = 2) -> tuple[Batch, AnyArray, list[Any], Any]:
    batch, grad_output = draw_training(np.random.default_rng(seed), student, tokens, P)
    return batch, grad_output, [of_torch(array) for array in batch], of_torch(grad_output)


def expected(student: Student, batch: Batch, grad_output: AnyArray) -> tuple[AnyArray, dict[str, AnyArray]]:
    """Of the main interface."""
    sft = student.wrapper(P)
    return sft.forward_sft(*batch), by_name(sft.backward(grad_output))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_is_what_the_reference_says(student: Student, dtype: Any) -> None:
    sft, (lora, gradients) = made(student), adapters(student, dtype)
    sft.init_lora_weights(*lora, *gradients)
    batch, grad_output, tensors, grad = drawn(student)
    y = sft.forward(*tensors, save_for_backward=True)
    grad_input, grad_weights = sft.backward(grad)
    out, wanted = expected(student, batch, grad_output)
    assert_same_bits(numpy_of(y), out)
    assert_same_bits(numpy_of(grad_input), wanted["grad_input"])
    assert_same_bits(numpy_of(grad_weights), wanted["grad_weights"])
    balls = gradient_balls(student.reference(batch), grad_output, rounded=True)
    for name, tensor in zip(NAMES, gradients, strict=True):
        written = numpy_of(tensor)
        assert_same_bits(written, wanted[name].astype(written.dtype), name)
        slack = np.abs(wanted[name]) * (2.0**-8 if dtype is torch.bfloat16 else 0.0)
        assert_within(written.astype(np.float32), balls[name].center, balls[name].radius + slack)


def test_gradients_are_overwritten_and_adapters_read_again(student: Student) -> None:
    sft, (lora, gradients) = made(student), adapters(student)
    sft.init_lora_weights(*lora, *gradients)
    batch, grad_output, tensors, grad = drawn(student)
    other = Student(student.layer, draw_lora(np.random.default_rng(9), student.layer, R, bf16), R)
    other = Student(other.layer, other.lora, R, student.lora_alpha)
    before = numpy_of(sft.forward_sft(*tensors, False)).copy()
    for tensor, name in zip(lora, NAMES, strict=True):
        tensor.copy_(of_torch(other.lora[name]))
    assert_same_bits(numpy_of(sft.forward_sft(*tensors, False)), before)
    sft.update_lora_weights()
    out, wanted = expected(other, batch, grad_output)
    for _ in range(2):
        assert_same_bits(numpy_of(sft.forward_sft(*tensors)), out)
        sft.backward(grad)
        for tensor, name in zip(gradients, NAMES, strict=True):
            assert_same_bits(numpy_of(tensor), wanted[name].astype(bf16), name)
    sft.forward_sft(*tensors)
    sft.backward(grad, optimizer_grad_scale=0.5)
    assert_same_bits(numpy_of(gradients[0]), (0.5 * wanted["gate_lora_a"]).astype(bf16))


def test_an_optimizer_of_parameters(student: Student) -> None:
    sft, (lora, gradients) = made(student), adapters(student, torch.float32)
    lora = [torch.nn.Parameter(each) for each in lora]
    sft.init_lora_weights(*lora, *gradients)
    assert sft.gate_lora_a is lora[0]
    assert sft.grad_down_lora_b is gradients[5]
    batch, grad_output, tensors, grad = drawn(student)
    _, wanted = expected(student, batch, grad_output)
    optimizer = torch.optim.SGD(lora, lr=0.5)
    for times in (1, 2):  # micro-batches add up
        sft.forward(*tensors)
        sft.backward(grad)
        for parameter, gradient, name in zip(lora, gradients, NAMES, strict=True):
            assert parameter.grad.data_ptr() == gradient.data_ptr()
            assert_same_bits(numpy_of(parameter.grad), times * wanted[name], name)
    before = [each.detach().clone() for each in lora]
    optimizer.step()
    assert_same_bits(numpy_of(lora[1]), numpy_of(before[1]) - wanted["gate_lora_b"])
    optimizer.zero_grad()
    sft.update_lora_weights()
    sft.forward(*tensors)
    sft.backward(grad)
    moved = {name: numpy_of(each) for name, each in zip(NAMES, lora, strict=True)}
    now = Student(student.layer, moved, R, student.lora_alpha)
    assert_same_bits(numpy_of(gradients[3]), expected(now, batch, grad_output)[1]["up_lora_b"])


def test_what_is_submitted_may_be_written_to(student: Student) -> None:
    sft, (lora, gradients) = made(student), adapters(student)
    sft.init_lora_weights(*lora, *gradients)
    batch, grad_output, tensors, grad = drawn(student)
    out, wanted = expected(student, batch, grad_output)
    sft.submit_forward(*tensors)
    for tensor in tensors:
        tensor.fill_(0)
    y = sft.sync_forward(torch.device("cpu"))
    assert_same_bits(numpy_of(y), out)
    sft.submit_backward_repack()
    sft.wait_backward_repack()
    sft.submit_backward_async(grad, torch.device("cpu"), 2.0)
    grad.fill_(0)
    grad_input, grad_weights = sft.sync_backward()
    assert_same_bits(numpy_of(grad_input), wanted["grad_input"])
    assert_same_bits(numpy_of(grad_weights), wanted["grad_weights"])
    assert_same_bits(numpy_of(gradients[2]), (2 * wanted["up_lora_a"]).astype(bf16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_serving(student: Student, dtype: Any) -> None:
    sft, (lora, gradients) = made(student), adapters(student)
    sft.init_lora_weights(*lora, *gradients)
    batch, _, (x, ids, weights), _ = drawn(student)
    expected_x = x.to(dtype).bfloat16()
    out = student.wrapper(P).forward(numpy_of(expected_x), batch.ids, batch.weights)
    x = x.to(dtype)
    sft.submit_forward_inference(x, ids, weights, 0)
    x.fill_(0)
    y = sft.sync_forward_inference(0)
    assert y.dtype is dtype
    assert_same_bits(numpy_of(y), numpy_of(of_torch(out).to(dtype)))
    assert all((each == 7).all() for each in gradients)


def test_an_adapter_of_sglang(tmp_path: Path) -> None:
    """A base from a checkpoint, adapters after it, and passes for serving."""
    weights = write_checkpoint(tmp_path, "qwen3_moe", [2], E, I, H)[2]
    layer = Layer(weights["gate_proj"], weights["up_proj"], weights["down_proj"])
    student = Student(layer, draw_lora(np.random.default_rng(4), layer, R, bf16), R)
    sft = KTMoEWrapper(
        layer_idx=2,
        num_experts=E,
        num_experts_per_tok=P,
        hidden_size=H,
        moe_intermediate_size=I,
        gpu_experts_mask=torch.zeros(E, dtype=torch.bool),
        cpuinfer_threads=None,
        threadpool_count=None,
        numa_nodes=None,
        weight_path=str(tmp_path),
        chunked_prefill_size=512,
        method="AMXBF16_SFT",
        mode="sft",
        num_gpu_experts=0,
        lora_rank=R,
        lora_alpha=student.lora_alpha,
        max_cache_depth=1,
    )
    sft.load_weights(torch.arange(E))
    lora, _ = adapters(student)
    sft.init_lora_weights(*lora, *map(torch.zeros_like, lora))
    batch, _, tensors, _ = drawn(student)
    for _ in range(3):
        sft.submit_forward_inference(*tensors, 0)
        assert_same_bits(numpy_of(sft.sync_forward_inference(0)), student.wrapper(P).forward(*batch))


def test_masks(student: Student) -> None:
    sft, (lora, gradients) = made(student, num_gpu_experts=1), adapters(student, torch.float32)
    sft.init_lora_weights(*lora, *gradients)
    batch, grad_output, tensors, grad = drawn(student)
    for mask in ([True, False, False], [False, True, True]):
        sft.gpu_experts_mask.copy_(torch.tensor(mask))
        ours = student.wrapper(P, gpu_experts_mask=np.array(mask))
        assert_same_bits(numpy_of(sft.forward(*tensors)), ours.forward_sft(*batch))
        grad_input, _ = sft.backward(grad)
        wanted = ours.backward(grad_output)
        assert_same_bits(numpy_of(grad_input), wanted.grad_input)
        assert_same_bits(numpy_of(gradients[5]), wanted.down_lora_b)


@pytest.mark.parametrize(
    ("method", "ours", "group_size"),
    [
        ("INT8_SFT", "AMXINT8_SFT", None),
        ("AMXINT8_SFT", "AMXINT8_SFT", None),
        ("AMXINT4_SFT", "AMXINT4_SFT", 32),
        ("AMXINT4_KGroup_SFT", "AMXINT4_SFT", 128),
    ],
)
def test_bases_that_are_quantized(student: Student, method: str, ours: str, group_size: int | None) -> None:
    sft, (lora, gradients) = made(student, method, zero_point=False), adapters(student)
    sft.init_lora_weights(*lora, *gradients)
    batch, grad_output, tensors, grad = drawn(student)
    other = Student(student.layer, student.lora, R, student.lora_alpha, (ours, group_size))
    out, wanted = expected(other, batch, grad_output)
    assert sft.method == method
    assert_same_bits(numpy_of(sft.forward(*tensors)), out)
    assert_same_bits(numpy_of(sft.backward(grad)[0]), wanted["grad_input"])
    assert_same_bits(numpy_of(gradients[4]), wanted["down_lora_a"].astype(bf16))


def test_a_base_without_gradients_of_adapters(student: Student) -> None:
    sft = made(student, "AMXBF16_SFT_SkipLoRA")
    sft.update_lora_weights()  # there are none
    batch, grad_output, tensors, grad = drawn(student)
    plain = student.layer.forward(batch)
    assert_same_bits(numpy_of(sft.forward(*tensors)), plain)
    grad_input, _ = sft.backward(grad)
    assert grad_input.shape == (T, H)
    lora, gradients = adapters(student)
    sft.init_lora_weights(*lora, *gradients)
    sft.forward(*tensors)
    sft.backward(grad)
    assert all((each == 7).all() for each in gradients)
    skipping = Student(student.layer, student.lora, R, student.lora_alpha, ("AMXBF16_SFT_SkipLoRA", None))
    assert_same_bits(numpy_of(sft.forward(*tensors)), expected(skipping, batch, grad_output)[0])


def test_attributes(student: Student) -> None:
    sft = made(student, lora_dropout=0.25, max_cache_depth=2, group_size=32)
    assert (sft.lora_rank, sft.lora_alpha, sft.lora_scaling) == (R, 5.0, 1.25)
    assert (sft.lora_dropout, sft.max_cache_depth, sft.group_size, sft.zero_point) == (0.25, 2, 32, True)
    assert sft.gate_lora_a is None
    assert sft.grad_up_lora_b is None
    sft.load_weights(None)  # is loaded
