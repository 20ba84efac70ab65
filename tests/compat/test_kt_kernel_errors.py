"""Bad input of kt-kernel's interface is named, and what it accepts and this library does not, too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_kinds import of_torch
from layers import Layer, bf16, draw_batch, draw_layer

torch = pytest.importorskip("torch")

from ktmoe_np import KTMoEWrapper as Main  # noqa: E402
from ktmoe_np.compat.base import _REFUSED_NAMES  # noqa: E402
from ktmoe_np.compat.kt_kernel import KTMoEWrapper, generate_gpu_experts_masks  # noqa: E402

pytestmark = pytest.mark.crosscheck

E, I, H, P, T, R = 3, 8, 16, 2, 4, 2  # noqa: E741
SFT = {"method": "AMXBF16_SFT", "mode": "sft", "lora_rank": R}


@pytest.fixture(scope="module")
def layer() -> Layer:
    return draw_layer(np.random.default_rng(1), E, I, H)


def made(mask: Any = None, **options: Any) -> Any:
    return KTMoEWrapper(0, E, P, H, I, mask, None, None, None, 512, **{"method": "BF16", **options})


def loaded(layer: Layer, **options: Any) -> Any:
    moe = made(**options)
    moe.load_weights_from_tensors(*map(of_torch, layer.matrices), torch.arange(E))
    return moe


def batch_of(layer: Layer) -> list[Any]:
    return [of_torch(array) for array in draw_batch(np.random.default_rng(2), layer, T, P)]


def six(dtype: Any = torch.bfloat16) -> list[Any]:
    shapes = [(E, R, H), (E, I, R), (E, R, H), (E, I, R), (E, R, I), (E, H, R)]
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


# ---- the factory ----


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"method": "NONE"}, ValueError, "method: got 'NONE' for mode 'inference', expected one of BF16"),
        ({"mode": "train"}, ValueError, "mode: got 'train', expected one of inference, sft"),
        ({"method": "SYCL_GPTQ_INT4"}, ValueError, "method: got 'SYCL_GPTQ_INT4', expected GPTQ_INT4: exp"),
        (
            {**SFT, "method": "AMXINT4_1_SFT"},
            ValueError,
            "method: got 'AMXINT4_1_SFT', expected AMXINT4_SFT:",
        ),
        (
            {**SFT, "method": "AMXINT4_1KGroup_SFT_SkipLoRA"},
            ValueError,
            "method: got 'AMXINT4_1KGroup_SFT_SkipLoRA', expected AMXINT4_SFT: weights that are quantized",
        ),
        (
            {**SFT, "method": "AMXINT4_KGroup_SFT"},
            ValueError,
            "zero_point: got True with method 'AMXINT4_KGroup_SFT', expected False",
        ),
        (
            {**SFT, "method": "AMXINT4_KGroup_SFT", "zero_point": False, "group_size": 256},
            ValueError,
            "group_size: got 256, expected None, 32, 64 or 128 with method 'AMXINT4_SFT'",
        ),
        (
            {"swiglu_limit": -1.0},
            ValueError,
            "swiglu_limit: got -1.0, expected 0 for none, or a finite number",
        ),
        (
            {"swiglu_limit": float("nan")},
            ValueError,
            "swiglu_limit: got nan, expected 0 for none, or a finite",
        ),
        ({"swiglu_alpha": "1"}, TypeError, "swiglu_alpha: got '1', expected 0 for none, or a finite number"),
        ({"num_gpu_experts": 4}, ValueError, "num_gpu_experts: got 4, expected at most num_experts, 3"),
        ({"num_gpu_experts": -1}, ValueError, "num_gpu_experts: got -1, expected 0 or more"),
        (
            {"cpu_save": True},
            ValueError,
            "cpu_save: got True with method 'BF16', expected False: only weights",
        ),
        (
            {"cpu_save": True, "method": "AMXINT8"},
            ValueError,
            "weight_path: got None with cpu_save=True, expected a directory to write to",
        ),
        (
            {"max_deferred_experts_per_token": -1},
            ValueError,
            "max_deferred_experts_per_token: got -1, expected 0 or more",
        ),
        ({**SFT, "lora_rank": 0}, ValueError, "lora_rank: got 0, expected 1 or more"),
        (
            {**SFT, "full_weight_grad": True},
            ValueError,
            "full_weight_grad: got True, expected False: gradients",
        ),
        ({**SFT, "max_cache_depth": 0}, ValueError, "max_cache_depth: got 0, expected 1 or more"),
        ({"activation_dtype": "int8"}, ValueError, "activation_dtype: "),
    ],
)
def test_arguments(options: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        made(**options)


def test_sizes() -> None:
    with pytest.raises(TypeError, match=r"^num_experts_per_tok: got '2', expected an integer"):
        KTMoEWrapper(0, E, "2", H, I, method="BF16")
    with pytest.raises(ValueError, match=r"^swiglu_limit: got 10{400}, expected 0 for none, or a finite"):
        made(swiglu_limit=10**400)
    assert made(swiglu_limit=np.float32(0.5)).swiglu_limit == 0.5


def test_chunks_have_a_token() -> None:
    with pytest.raises(ValueError, match=r"^chunked_prefill_size: got 0, expected 1 or more$"):
        KTMoEWrapper(0, E, P, H, I, None, None, None, None, 0, method="BF16")


@pytest.mark.parametrize(
    ("mask", "number", "kind", "message"),
    [
        (2, 0, TypeError, "gpu_experts_mask: got 2, expected a mask, or None and num_gpu_experts=2 for the"),
        ([True], 0, TypeError, "gpu_experts_mask: got list, expected a tensor"),
        (torch.zeros(E), 0, TypeError, "gpu_experts_mask: got torch.float32 [3], expected torch.bool [3]"),
        (
            torch.zeros(2, dtype=torch.bool),
            0,
            ValueError,
            "gpu_experts_mask: got torch.bool [2], expected torch.bool [3]",
        ),
        (
            torch.ones(E, dtype=torch.bool),
            1,
            ValueError,
            "num_gpu_experts: got 1 with a gpu_experts_mask of 3, expected the same number",
        ),
    ],
)
def test_masks(mask: Any, number: int, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        made(mask, num_gpu_experts=number)


def test_an_engine_of_other_threads() -> None:
    moe = made()
    threads = sum(moe.cpu_infer.backend_.config.subpool_thread_count)
    with pytest.raises(RuntimeError, match=rf"^cpuinfer_threads: got {threads + 1}, but the engine"):
        KTMoEWrapper(0, E, P, H, I, None, threads + 1, None, None, 512, method="BF16")


@pytest.mark.parametrize(
    ("freq", "number", "kind", "message"),
    [
        (torch.zeros(3), 1, ValueError, "activation_freq: got shape [3], expected [L, E]"),
        (torch.full((1, 2), torch.nan), 1, ValueError, "activation_freq: got a NaN, expected numbers"),
        ([[1.0]], 1, TypeError, "activation_freq: got list, expected a tensor"),
        (torch.ones(1, 2), 1.5, TypeError, "num_gpu_experts: got 1.5, expected an integer"),
    ],
)
def test_frequencies(freq: Any, number: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        generate_gpu_experts_masks(freq, number)


# ---- names ----


def test_names_that_there_are_not(layer: Layer) -> None:
    moe, sft = loaded(layer), loaded(layer, **SFT)
    for wrapper in (moe, sft):
        for name in _REFUSED_NAMES:
            with pytest.raises(AttributeError, match=rf"^{name}: got a name of kt-kernel, expected ."):
                getattr(wrapper, name)
    with pytest.raises(AttributeError, match=r"^nothing: got an unknown name, expected one of InferenceExp"):
        _ = moe.nothing
    with pytest.raises(AttributeError, match=r"^sync_write_weight_scale_to_buffer: got an unknown name, exp"):
        sft.sync_write_weight_scale_to_buffer()


# ---- weights ----


def test_weights(layer: Layer, tmp_path: Path) -> None:
    tensors = [of_torch(matrix) for matrix in layer.matrices]
    moe = made()
    with pytest.raises(TypeError, match=r"^up_proj: got the number 4096, expected a tensor: an address says"):
        moe.load_weights_from_tensors(tensors[0], 4096, tensors[2], torch.arange(E))
    with pytest.raises(TypeError, match=r"^physical_to_logical_map_cpu: got the number 4096, expected a ten"):
        moe.load_weights_from_tensors(*tensors, 4096)
    with pytest.raises(IndexError, match=r"^physical_to_logical_map: "):
        moe.load_weights_from_tensors(*tensors, torch.tensor([0, 1, 3]))
    with pytest.raises(RuntimeError, match=r"^weight_path: got None, expected a checkpoint"):
        moe.load_weights(torch.arange(E))
    with pytest.raises(RuntimeError, match=r"^forward: layer 0 has no weights, load"):
        moe.forward(*batch_of(layer), 0)
    gone = KTMoEWrapper(0, E, P, H, I, None, None, None, str(tmp_path / "gone"), 512, method="RAWINT4")
    with pytest.raises(FileNotFoundError):
        gone.load_weights(torch.arange(E))


# ---- passes ----


def test_streams(layer: Layer) -> None:
    moe, batch = loaded(layer), batch_of(layer)
    for call in (lambda: moe.forward(*batch, 5), lambda: moe.submit_forward(*batch, 5)):
        with pytest.raises(
            ValueError, match=r"^cuda_stream: got 0x5, expected 0 or None: tensors are on the"
        ):
            call()
    with pytest.raises(ValueError, match=r"^cuda_stream: got 0x5, expected 0 or None"):
        moe.sync_forward(batch[0], 5)
    with pytest.raises(TypeError, match=r"^cuda_stream: got 'default', expected a torch or CuPy stream"):
        moe.forward(*batch, "default")
    with pytest.raises(ValueError, match=r"^hidden_states: got a tensor on meta, expected cpu or cuda$"):
        moe.forward(batch[0].to("meta"), *batch[1:], 0)


def test_batches(layer: Layer) -> None:
    moe, (x, ids, weights) = loaded(layer), batch_of(layer)
    with pytest.raises(TypeError, match=r"^topk_ids: got the number 140, expected a tensor: an address says"):
        moe.forward(x, 140, weights, 0)
    with pytest.raises(TypeError, match=r"^hidden_states: got NoneType, expected a tensor$"):
        moe.submit_forward(None, ids, weights, 0)
    with pytest.raises(ValueError, match=r"^topk_ids: got a tensor on meta, expected cpu, as hidden_states$"):
        moe.forward(x, ids.to("meta"), weights, 0)
    with pytest.raises(ValueError, match=r"^hidden_states: got "):
        moe.forward(x[:, 1:], ids, weights, 0)
    with pytest.raises(IndexError, match=r"^topk_ids: got expert 3 "):
        moe.forward(x, torch.full_like(ids, E), weights, 0)
    with pytest.raises(RuntimeError, match=r"^sync_forward: "):
        moe.sync_forward(x, 0)
    moe.submit_forward(x, ids, weights, 0)
    with pytest.raises(RuntimeError, match=r"^submit_forward: a pass of layer 0 is pending, call sync_fo"):
        moe.submit_forward(x, ids, weights, 0)
    moe.sync_forward(x, 0)


def test_splits(layer: Layer) -> None:
    moe = made()
    with pytest.raises(ValueError, match=r"^expert_scores: got \[3\] with expert_ids \[1, 3\], expected \[T"):
        moe.select_deferred_experts(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3), 1)
    with pytest.raises(TypeError, match=r"^protected_k: got 1.5, expected an integer"):
        moe.select_deferred_experts(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3), 1.5)


def test_addresses_of_buffers(layer: Layer) -> None:
    moe, tensor = loaded(layer), torch.empty(2 * I, H, dtype=torch.bfloat16)
    with pytest.raises(
        TypeError, match=r"^w13_weight_ptrs\[0\]: got the number \d+, expected a tensor: an ad"
    ):
        moe.submit_write_weight_scale_to_buffer(1, 0, [tensor.data_ptr()], [], [tensor.data_ptr()], [])
    with pytest.raises(
        TypeError, match=r"^w2_scale_ptrs\[0\]: got the number 0, expected a tensor: an addre"
    ):
        moe.submit_write_weight_scale_to_buffer(1, 0, [tensor], [], [tensor], [0])
    with pytest.raises(RuntimeError, match=r"^sync_write_weight_scale_to_buffer: "):
        moe.sync_write_weight_scale_to_buffer()


# ---- training ----


def test_a_map_of_experts_that_are_trained(layer: Layer) -> None:
    sft = made(**SFT)
    with pytest.raises(
        ValueError, match=r"^physical_to_logical_map_cpu: got \[0, 2, 1\], expected 0 to 2 in"
    ):
        sft.load_weights_from_tensors(*map(of_torch, layer.matrices), torch.tensor([0, 2, 1]))


def test_adapters(layer: Layer) -> None:
    sft = loaded(layer, **SFT)
    lora, gradients = six(), six()
    for call in (
        lambda: sft.forward(*batch_of(layer)),
        lambda: sft.submit_forward(*batch_of(layer)),
        lambda: sft.submit_forward_inference(*batch_of(layer), 0),
        sft.update_lora_weights,
        lambda: sft.backward(batch_of(layer)[0]),
        lambda: sft.submit_backward_async(batch_of(layer)[0]),
    ):
        with pytest.raises(
            RuntimeError, match=r"^layer 0 has no adapters yet, call init_lora_weights first$"
        ):
            call()
    with pytest.raises(ValueError, match=r"^up_lora_a: got .*\[3, 2, 15\], expected .*\[3, 2, 16\]"):
        sft.init_lora_weights(*lora[:2], lora[2][..., 1:].contiguous(), *lora[3:], *gradients)
    with pytest.raises(TypeError, match=r"^gate_lora_b: got int64"):
        sft.init_lora_weights(lora[0], lora[1].long(), *lora[2:], *gradients)
    with pytest.raises(TypeError, match=r"^down_lora_b: got the number 64, expected a tensor"):
        sft.init_lora_weights(*lora[:5], 64, *gradients)
    one = torch.nn.Parameter(lora[0])
    with pytest.raises(
        ValueError, match=r"^gate_lora_a to down_lora_b: got 1 parameters, expected 6 or none"
    ):
        sft.init_lora_weights(one, *lora[1:], *gradients)
    assert sft.gate_lora_a is None


def test_gradients(layer: Layer) -> None:
    sft = loaded(layer, **SFT)
    lora, gradients = six(), six()
    meta, half = gradients[0].to("meta"), gradients[5].half()
    expected = re.escape("expected torch.bfloat16 or torch.float32 [3, 2, 16] on the CPU")
    with pytest.raises(TypeError, match=rf"^grad_gate_lora_a: got torch.bfloat16 .* on meta, {expected}$"):
        sft.init_lora_weights(*lora, meta, *gradients[1:])
    with pytest.raises(
        TypeError, match=r"^grad_down_lora_b: got torch.float16 \[3, 16, 2\] on cpu, expected"
    ):
        sft.init_lora_weights(*lora, *gradients[:5], half)
    with pytest.raises(ValueError, match=r"^grad_up_lora_a: got torch.bfloat16 \[3, 8, 2\], expected"):
        sft.init_lora_weights(*lora, *gradients[:2], gradients[1], *gradients[3:])
    parameters = [torch.nn.Parameter(each) for each in six(torch.float32)]
    with pytest.raises(
        TypeError, match=r"^grad_gate_lora_a: got torch.bfloat16 .*, expected torch.float32 \["
    ):
        sft.init_lora_weights(*parameters, *gradients)


def test_training_passes(layer: Layer) -> None:
    sft, (x, ids, weights) = loaded(layer, **SFT), batch_of(layer)
    sft.init_lora_weights(*six(), *six())
    with pytest.raises(
        RuntimeError, match=r"^sync_forward_inference: no pass of layer 0 is pending, call sub"
    ):
        sft.sync_forward_inference(0)
    sft.submit_forward_inference(x, ids, weights, 0)
    for call in (
        lambda: sft.submit_forward_inference(x, ids, weights, 0),
        lambda: sft.submit_forward(x, ids, weights),
        sft.sync_forward,
    ):
        with pytest.raises(
            RuntimeError, match=r"^submit_forward_inference: a pass of layer 0 is pending, call"
        ):
            call()
    sft.sync_forward_inference(0)
    with pytest.raises(TypeError, match=r"^weights: got the number 7, expected a tensor"):
        sft.forward(x, ids, 7)
    with pytest.raises(RuntimeError, match=r"^backward: got no saved forward pass of layer 0, expected"):
        sft.backward(x)
    sft.forward(x, ids, weights)
    for scale in (0.0, -1.0, float("inf")):
        for call in (sft.backward, sft.submit_backward_async):
            with pytest.raises(
                ValueError, match=rf"^optimizer_grad_scale: got {scale}, expected a finite num"
            ):
                call(x, optimizer_grad_scale=scale)
    with pytest.raises(
        TypeError, match=r"^optimizer_grad_scale: got None, expected a finite number above 0$"
    ):
        sft.backward(x, None, None)
    with pytest.raises(RuntimeError, match=r"^sync_backward: "):
        sft.sync_backward()
    with pytest.raises(ValueError, match=r"^grad_output: "):
        sft.backward(x[1:])
    assert sft.layer.num_cached == 1  # is still saved
    sft.backward(x)


def test_the_main_interface_reads_no_tensors_again(layer: Layer) -> None:
    sft = Main(0, E, P, H, I, method="AMXBF16_SFT", mode="sft", lora_rank=R)
    sft.load_weights_from_tensors(*layer.matrices)
    sft.init_lora_weights(gate_lora_a=np.ones((E, R, H), bf16))
    assert sft.lora_weights["gate_lora_a"].dtype == bf16
