"""kt-kernel's callers on tensors of a real GPU: the bits of the CPU, by the stream that they name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from array_kinds import of_torch
from layers import Batch, Layer, draw_batch, draw_layer
from sft_layers import draw_student, draw_training

torch = pytest.importorskip("torch")

import ktmoe_np  # noqa: E402
from ktmoe_np.compat.kt_kernel import KTMoEWrapper, generate_gpu_experts_masks  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.crosscheck,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

E, I, H, P, T = 4, 64, 96, 2, 7  # noqa: E741


def wrapper(method: str = "BF16", mask: Any = None, **options: Any) -> Any:
    config = ktmoe_np.KTMoEWrapper(0, 2, 1, 8, 8).cpu_infer.backend_.config
    threads = sum(config.subpool_thread_count), config.subpool_count
    layer_idx = options.pop("layer_idx", 0)
    return KTMoEWrapper(layer_idx, E, P, H, I, mask, *threads, "", 512, method=method, **options)


def drawn() -> tuple[Layer, Batch]:
    rng = np.random.default_rng(0)
    layer = draw_layer(rng, E, I, H)
    return layer, draw_batch(rng, layer, T, P)


@pytest.mark.parametrize("named", [True, False])
def test_a_layer_of_a_hybrid_decoder(named: bool) -> None:
    """Submit, compute the GPU's own experts meanwhile, sync; masks change between passes."""
    layer, batch = drawn()
    arrays = [of_torch(array) for array in batch]
    mask = generate_gpu_experts_masks(torch.ones(1, E, device="cuda"), 1)[0].cuda()
    moe = wrapper(mask=mask)
    moe.load_weights_from_tensors(*map(of_torch, layer.matrices), torch.arange(E))
    expected = moe.forward(*arrays, 0)
    there = [array.cuda() for array in arrays]
    stream = torch.cuda.Stream() if named else torch.cuda.default_stream()
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        moe.submit_forward(*there, stream.cuda_stream)
        _ = there[0] @ there[0].T
        out = moe.sync_forward(there[0], stream.cuda_stream)
    stream.synchronize()
    assert out.device.type == "cuda"
    assert torch.equal(out.cpu(), expected)
    moe.gpu_experts_mask.fill_(False)
    with torch.cuda.stream(stream):
        whole = moe.forward(*there, stream.cuda_stream)
    stream.synchronize()
    assert torch.equal(whole.cpu(), moe.forward(*arrays, 0))


def test_training() -> None:
    student = draw_student(np.random.default_rng(1), (E, I, H), 3)
    batch, grad_output = draw_training(np.random.default_rng(2), student, T, P)
    arrays, grad = [of_torch(array) for array in batch], of_torch(grad_output)
    moe = wrapper("AMXBF16_SFT", mode="sft", lora_rank=3, lora_alpha=student.lora_alpha)
    moe.load_weights_from_tensors(*map(of_torch, student.layer.matrices), torch.arange(E))
    names = [f"{role}_lora_{part}" for role in ("gate", "up", "down") for part in "ab"]
    lora = [of_torch(student.lora[name]).cuda() for name in names]
    gradients = [torch.zeros_like(matrix) for matrix in lora]
    moe.init_lora_weights(*lora, *gradients)
    expected = moe.forward(*arrays)
    wanted = [*moe.backward(grad), *(g.clone().cpu() for g in gradients)]
    device = torch.device("cuda")
    out = moe.forward(*(array.cuda() for array in arrays), True, device)
    assert torch.equal(out.cpu(), expected)
    found = [*moe.backward(grad.cuda(), device), *gradients]
    assert all(
        a.device.type == "cuda" and torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True)
    )
    stream = torch.cuda.current_stream()
    moe.submit_forward_inference(*(array.cuda() for array in arrays), stream.cuda_stream)
    served = moe.sync_forward_inference(stream.cuda_stream)
    stream.synchronize()
    assert torch.equal(served.cpu(), expected)
