"""kt-kernel's calls on a real GPU: the bits of the CPU, by the streams that SGLang's wrapper hands over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from array_kinds import numpy_of, of_torch
from layers import Layer, assert_close, assert_same_bits, bf16, draw_batch, draw_layer
from sft_layers import Student, draw_student, draw_training

torch = pytest.importorskip("torch")

import ktmoe_np  # noqa: E402
from ktmoe_np.compat.kt_kernel import KTMoEWrapper  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.crosscheck,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

E, I, H, P, T, R = 5, 24, 40, 2, 6, 4  # noqa: E741
NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


@pytest.fixture(autouse=True)
def _nothing_left_over() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    ktmoe_np.KTMoEWrapper.drain_deferred(0)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return draw_layer(np.random.default_rng(1), E, I, H)


@pytest.fixture(scope="module")
def student() -> Student:
    return draw_student(np.random.default_rng(1), (E, I, H), R, dtype=bf16)


def made(layer: Layer, layer_idx: int = 0, **options: Any) -> Any:
    sizes = (layer.num_experts, P, layer.hidden_size, layer.inter_size)
    named = {"method": "BF16", **options}
    moe = KTMoEWrapper(layer_idx, *sizes, named.pop("mask", None), None, None, None, 512, **named)
    moe.load_weights_from_tensors(*map(of_torch, layer.matrices), torch.arange(layer.num_experts))
    return moe


def trained(student: Student) -> Any:
    options = {"mode": "sft", "lora_rank": R, "lora_alpha": student.lora_alpha}
    sft = made(student.layer, method="AMXBF16_SFT", **options)
    lora = [of_torch(student.lora[name]) for name in NAMES]
    sft.init_lora_weights(*lora, *map(torch.zeros_like, lora))
    return sft


def drawn(layer: Layer, tokens: int = T, seed: int = 2) -> tuple[Any, list[Any]]:
    batch = draw_batch(np.random.default_rng(seed), layer, tokens, P)
    return batch, [of_torch(array).cuda() for array in batch]


def of_gpu(tensor: Any) -> Any:
    torch.cuda.synchronize()
    assert tensor.is_cuda
    return numpy_of(tensor.cpu())


@pytest.mark.parametrize("tokens", [1, T, 33])
@pytest.mark.parametrize("stream", ["default", "own", "current"])
def test_submit_and_sync(layer: Layer, tokens: int, stream: str) -> None:
    batch, (x, ids, weights) = drawn(layer, tokens)
    moe, expected = made(layer), layer.forward(batch)
    own = torch.cuda.Stream()
    handle = {"default": 0, "own": own.cuda_stream, "current": None}[stream]
    own.wait_stream(torch.cuda.current_stream())
    used = own if stream == "own" else torch.cuda.current_stream()
    for _ in range(4):
        with torch.cuda.stream(used):
            routed = ids.clone()
            moe.submit_forward(x, routed, weights, handle)
            routed[routed >= 2] = -1  # as SGLang masks them for the GPU
            result = moe.sync_forward(x, handle)
        assert_same_bits(of_gpu(result), expected)
    assert_close(of_gpu(result), layer, batch)
    assert_same_bits(of_gpu(moe.forward(x, ids, weights, handle)), expected)


def test_a_stream_beside_the_main_one(layer: Layer) -> None:
    batch, (x, ids, weights) = drawn(layer)
    mask = torch.tensor([True, False, True, False, False])
    moe, beside, done = made(layer, mask=mask), torch.cuda.Stream(), torch.cuda.Event()
    expected = layer.forward(batch, gpu_experts_mask=mask.numpy())
    for _ in range(3):
        staged = x.clone()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            moe.submit_forward(staged, ids, weights, torch.cuda.current_stream().cuda_stream)
        others = torch.zeros_like(x)
        with torch.cuda.stream(beside):
            result = moe.sync_forward(staged, torch.cuda.current_stream().cuda_stream)
            done.record(beside)
        torch.cuda.current_stream().wait_event(done)
        assert_same_bits(of_gpu(others + result), expected + bf16.type(0))


def test_a_graph_reads_the_mask_that_is_changed_in_place(layer: Layer) -> None:
    batch, (x, ids, weights) = drawn(layer)
    moe, stream, graph = made(layer), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        moe.forward(x, ids, weights, stream.cuda_stream)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        moe.submit_forward(x, ids, weights, stream.cuda_stream)
        result = moe.sync_forward(x, stream.cuda_stream)
    for mask in ([0, 0, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 1, 1, 1]):
        torch.cuda.synchronize()
        moe.gpu_experts_mask.copy_(torch.tensor(mask, dtype=torch.bool))
        graph.replay()
        expected = layer.forward(batch, gpu_experts_mask=np.array(mask, np.bool_))
        assert_same_bits(of_gpu(result), expected)


def test_other_dtypes(layer: Layer) -> None:
    batch, (x, ids, weights) = drawn(layer)
    moe, expected = made(layer), layer.forward(batch)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    for given in (x.float(), strided):
        result = moe.forward(given, ids.int(), weights.double(), 0)
        assert result.dtype is given.dtype
        assert_same_bits(of_gpu(result.bfloat16()), expected)


def test_deferred_experts() -> None:
    rng = np.random.default_rng(4)
    layers = [draw_layer(rng, E, I, H) for _ in range(3)]
    drawings = [drawn(each, seed=i) for i, each in enumerate(layers)]
    expected = []
    for i, (each, (batch, _)) in enumerate(zip(layers, drawings, strict=True)):
        ours = each.wrapper(P, layer_idx=i, max_deferred_experts_per_token=int(i < 2))
        expected.append(ours.forward(*batch))
    moes = [made(each, i, max_deferred_experts_per_token=int(i < 2)) for i, each in enumerate(layers)]
    for moe, (_, tensors), y in zip(moes, drawings, expected, strict=True):
        moe.submit_forward(*tensors, 0)
        assert_same_bits(of_gpu(moe.sync_forward(tensors[0], 0)), y)


def test_serving_an_adapter(student: Student) -> None:
    batch, (x, ids, weights) = drawn(student.layer)
    sft, expected = trained(student), student.wrapper(P).forward(*batch)
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            sft.submit_forward_inference(x, ids.int(), weights, stream.cuda_stream)
            result = sft.sync_forward_inference(stream.cuda_stream)
        assert_same_bits(of_gpu(result), expected)
    with pytest.raises(ValueError, match=r"^expert_ids: got int64 \[6, 1\], expected int64 \[6, 2\]"):
        sft.submit_forward_inference(x, ids[:, :1], weights, 0)


def test_training(student: Student) -> None:
    batch, grad_output = draw_training(np.random.default_rng(3), student, T, P)
    sft, ours = trained(student), student.wrapper(P)
    tensors = [of_torch(array).cuda() for array in batch]
    y = sft.forward(*tensors, output_device=torch.device("cuda"))
    assert_same_bits(of_gpu(y), ours.forward_sft(*batch))
    grad_input, grad_weights = sft.backward(of_torch(grad_output).cuda(), torch.device("cuda"))
    wanted = ours.backward(grad_output)
    assert_same_bits(of_gpu(grad_input), wanted.grad_input)
    assert_same_bits(of_gpu(grad_weights), wanted.grad_weights)
    assert_same_bits(numpy_of(sft.grad_down_lora_a), wanted.down_lora_a.astype(bf16))
    sft.forward(*tensors, False)
    assert sft.forward(*tensors).device.type == "cpu"


def test_tensors_on_two_devices(layer: Layer) -> None:
    moe, (_, (x, ids, weights)) = made(layer), drawn(layer)
    with pytest.raises(
        ValueError, match=r"^topk_ids: got a tensor on cpu, expected cuda:0, as hidden_states$"
    ):
        moe.forward(x, ids.cpu(), weights, 0)
