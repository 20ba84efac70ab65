"""Layers under autograd on a real GPU: the bits of the CPU, by the tensors' stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_kinds import numpy_of, of_torch
from layers import assert_same_bits
from sft_layers import Student, draw_student, draw_training

torch = pytest.importorskip("torch")

from ktmoe_np.torch import MoEExperts, lora_parameters, moe_forward, moe_sft  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.crosscheck,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

E, I, H, R, P, T = 3, 45, 70, 4, 2, 6  # noqa: E741


@pytest.fixture(scope="module")
def student() -> Student:
    return draw_student(np.random.default_rng(1), (E, I, H), R)


def drawn(student: Student, tokens: int = T, seed: int = 2) -> tuple[list[Any], Any]:
    batch, grad_output = draw_training(np.random.default_rng(seed), student, tokens, P)
    return [of_torch(array).cuda() for array in batch], of_torch(grad_output).cuda()


def step(sft: Any, arrays: list[Any], grad_output: Any) -> list[Any]:
    """The output and all gradients."""
    lora = {
        name: torch.nn.Parameter(p.detach().to(grad_output.device))
        for name, p in lora_parameters(sft).items()
    }
    x, ids, weights = arrays
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = moe_sft(sft, lora, x, ids, weights)
    y.backward(grad_output)
    return [y.detach(), x.grad, weights.grad, *(p.grad for p in lora.values())]


def assert_same(on_gpu: list[Any], on_cpu: list[Any]) -> None:
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert one.is_cuda
        assert_same_bits(numpy_of(one.cpu()), numpy_of(other))


@pytest.mark.parametrize("tokens", [1, T, 33])
def test_steps_have_the_bits_of_the_cpu(student: Student, tokens: int) -> None:
    arrays, grad_output = drawn(student, tokens)
    on_gpu = step(student.wrapper(P), arrays, grad_output)
    assert_same(on_gpu, step(student.wrapper(P), [a.cpu() for a in arrays], grad_output.cpu()))


def test_steps_in_a_stream_of_their_own(student: Student) -> None:
    arrays, grad_output = drawn(student)
    expected = step(student.wrapper(P), [a.cpu() for a in arrays], grad_output.cpu())
    sft, stream = student.wrapper(P), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [step(sft, arrays, grad_output) for _ in range(8)]
    stream.synchronize()
    for each in found:
        assert_same(each, expected)


def test_passes_go_back_in_another_order(student: Student) -> None:
    sft = student.wrapper(P)
    lora = {name: p.detach().cuda() for name, p in lora_parameters(sft).items()}
    drawings = [drawn(student, tokens, seed) for tokens, seed in ((6, 2), (9, 3))]
    xs = [arrays[0].clone().requires_grad_() for arrays, _ in drawings]
    ys = [moe_sft(sft, lora, x, *arrays[1:]) for x, (arrays, _) in zip(xs, drawings, strict=True)]
    for i in (0, 1):
        ys[i].backward(drawings[i][1])
        expected = step(student.wrapper(P), [a.cpu() for a in drawings[i][0]], drawings[i][1].cpu())
        assert_same_bits(numpy_of(xs[i].grad.cpu()), numpy_of(expected[1]))


def test_other_dtypes_are_cast_on_the_device(student: Student) -> None:
    (x, ids, weights), _ = drawn(student)
    moe = student.layer.wrapper(P)
    expected = moe.forward(x.cpu(), ids.cpu(), weights.cpu())
    found = moe.forward(x.float(), ids.short(), weights.double(), torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert found.dtype is torch.bfloat16
    assert_same_bits(numpy_of(found.cpu()), numpy_of(expected))
    lead = [each.reshape(2, 3, -1) for each in (x, ids, weights)]
    assert_same_bits(numpy_of(moe_forward(moe, *lead).cpu()), numpy_of(expected).reshape(2, 3, H))


def test_a_module_moves_to_the_device(student: Student) -> None:
    (x, ids, weights), grad_output = drawn(student)
    experts = MoEExperts(student.wrapper(P))
    expected = experts(x.cpu(), ids.cpu(), weights.cpu())
    experts.cuda()
    y = experts(x, ids, weights)
    assert_same_bits(numpy_of(y.detach().cpu()), numpy_of(expected.detach()))
    y.backward(grad_output)
    assert all(p.grad.is_cuda for p in experts.lora.values())


def test_an_error_is_that_of_a_later_call(student: Student) -> None:
    (x, ids, weights), _ = drawn(student)
    sft = student.wrapper(P)
    lora = {name: p.detach().cuda() for name, p in lora_parameters(sft).items()}
    y = moe_sft(sft, lora, x, ids + E, weights)
    torch.cuda.synchronize()
    assert y.isnan().all()
    with pytest.raises(IndexError, match=r"^topk_ids: got expert "):
        moe_sft(sft, lora, x, ids, weights)


def test_a_model_trains_on_the_device(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from torch_models import VOCAB, saved_model, tiny_model

    from ktmoe_np.torch import replace_experts

    path, model = saved_model("qwen3_moe", tmp_path), tiny_model("qwen3_moe").requires_grad_(False)
    replace_experts(model, path, mode="sft", lora_rank=2)
    model.cuda()
    tokens = torch.randint(0, VOCAB, (2, 9), device="cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
