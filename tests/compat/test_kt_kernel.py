"""kt-kernel's callers: their sequences of calls on CPU tensors, against the reference."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_kinds import numpy_of, of_torch
from gguf_checkpoints import draw_layer as draw_gguf_layer
from gguf_checkpoints import write as write_gguf
from layers import Batch, Layer, assert_close, assert_same_bits, draw_batch, draw_layer
from quantized_layers import quantized_layer
from sft_layers import Student, draw_student, draw_training

torch = pytest.importorskip("torch")

import ktmoe_np  # noqa: E402
import ktmoe_np.compat.kt_kernel  # noqa: E402
from ktmoe_np.compat.kt_kernel import KTMoEWrapper, generate_gpu_experts_masks  # noqa: E402

pytestmark = pytest.mark.crosscheck

E, I, H, P, T = 4, 64, 96, 2, 7  # noqa: E741


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.compat.kt_kernel).failed == 0


def threads() -> tuple[int, int]:
    """What the engine of this process has, as a caller has to name it."""
    config = ktmoe_np.KTMoEWrapper(0, 2, 1, 8, 8).cpu_infer.backend_.config
    return sum(config.subpool_thread_count), config.subpool_count


def wrapper(
    method: str = "BF16",
    mask: Any = None,
    path: str = "",
    sizes: tuple[int, ...] = (E, P, H, I),
    **options: Any,
) -> Any:
    """A layer, by position as far as kt-kernel's callers go."""
    layer_idx = options.pop("layer_idx", 0)
    return KTMoEWrapper(layer_idx, *sizes, mask, *threads(), path, 512, method=method, **options)


def tensors(arrays: Any) -> list[Any]:
    return [of_torch(array) for array in arrays]


def drawn(seed: int = 0, **options: Any) -> tuple[Layer, Batch]:
    rng = np.random.default_rng(seed)
    layer = draw_layer(rng, E, I, H, **options)
    return layer, draw_batch(rng, layer, T, P)


# ---- inference ----


def test_loading_and_a_pass() -> None:
    layer, batch = drawn()
    moe = wrapper()
    moe.load_weights_from_tensors(*tensors(layer.matrices), torch.arange(E))
    out = moe.forward(*tensors(batch), 0)
    assert (out.dtype, tuple(out.shape)) == (torch.bfloat16, (T, H))
    assert_close(numpy_of(out), layer, batch)
    moe.submit_forward(*tensors(batch), 0)
    assert torch.equal(moe.sync_forward(of_torch(batch.x), 0), out)
    assert moe.forward(*tensors(batch)).equal(out)
    assert moe.forward(*tensors(batch), cuda_stream=None).equal(out)


@pytest.mark.parametrize("method", ["AMXINT4", "AMXINT8", "MOE_INT4", "MOE_INT8"])
def test_quantizing_and_saving(method: str, tmp_path: Path) -> None:
    layer, batch = drawn()
    moe = wrapper(method, path=str(tmp_path), cpu_save=True, layer_idx=3)
    order = torch.tensor([2, 0, 3, 1])
    moe.load_weights_from_tensors(*tensors(layer.matrices), order)
    out = moe.forward(*tensors(batch), 0)
    expected = quantized_layer(layer, method, None)
    mapped = Batch(batch.x, numpy_of(order)[batch.ids], batch.weights)
    product = "int8" if method.startswith("AMX") else "bfloat16"
    assert_close(numpy_of(out), expected, mapped, product=product)
    again = wrapper(method, path=str(tmp_path), layer_idx=3)
    again.load_weights(physical_to_logical_map_cpu=order)
    assert torch.equal(again.forward(*tensors(batch), 0), out)


def test_masks_change_in_place() -> None:
    layer, batch = drawn()
    mask = torch.tensor([True, False, False, False])
    moe = wrapper(mask=mask)
    moe.load_weights_from_tensors(*tensors(layer.matrices), torch.arange(E))
    assert moe.num_gpu_experts == 1
    for on_gpu in ([0], [1, 3], [], [0, 1, 2, 3]):
        chosen = torch.zeros(E, dtype=torch.bool)
        chosen[on_gpu] = True
        moe.gpu_experts_mask.copy_(chosen)
        ids = np.where(np.isin(batch.ids, on_gpu), -1, batch.ids)
        assert_close(numpy_of(moe.forward(*tensors(batch), 0)), layer, Batch(batch.x, ids, batch.weights))
    assert mask.tolist() == [True, False, False, False]  # the caller's own is copied


def test_deferred_experts_reach_the_next_layer() -> None:
    layer, batch = drawn()
    first, second = (wrapper(layer_idx=i, max_deferred_experts_per_token=d) for i, d in ((0, 1), (1, None)))
    for moe in (first, second):
        moe.load_weights_from_tensors(*tensors(layer.matrices), torch.arange(E))
    out = []
    for moe in (first, second):
        moe.submit_forward(*tensors(batch), 0)
        out.append(moe.sync_forward(of_torch(batch.x), 0).float())
    whole = wrapper()
    whole.load_weights_from_tensors(*tensors(layer.matrices), torch.arange(E))
    plain = whole.forward(*tensors(batch), 0).float()
    immediate, deferred = first.select_deferred_experts(*tensors((batch.ids, batch.weights)), P - 1)
    now, later = (
        whole.forward(of_torch(batch.x), ids, of_torch(batch.weights), 0) for ids in (immediate, deferred)
    )
    assert torch.equal(out[0], now.float())
    torch.testing.assert_close(out[1], plain + later.float(), rtol=2e-2, atol=2e-2)


def test_ids_are_split_by_scores() -> None:
    moe = wrapper()
    ids, scores = torch.tensor([[3, 1, 2, 0]]), torch.tensor([[0.2, 0.5, 0.2, 0.1]])
    for protected, now in ((-1, []), (0, []), (1, [1]), (2, [3, 1]), (3, [3, 1, 2]), (9, [3, 1, 2, 0])):
        immediate, deferred = moe.select_deferred_experts(ids, scores, protected)
        assert [i for i in immediate[0].tolist() if i >= 0] == now
        assert torch.equal(torch.maximum(immediate, deferred), ids)
        assert ((immediate < 0) != (deferred < 0)).all()


def test_activations_are_those_of_kt_kernel(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for kinds, dtype in (("q4_0", "int8"), ("bf16", "bfloat16")):
        layer = draw_gguf_layer(kinds, E, I, H)
        path = tmp_path / f"{kinds}.gguf"
        write_gguf(path, layer.tensors, {})
        moe = wrapper("LLAMAFILE", path=str(path), layer_idx=5)
        moe.load_weights(torch.arange(E))
        x = torch.from_numpy(rng.standard_normal((T, H)).astype(np.float32)).bfloat16()
        ids, weights = torch.from_numpy(rng.integers(0, E, (T, P))), torch.rand(T, P)
        expected = moe.moe.forward(x, ids, weights, activation_dtype=dtype)
        assert torch.equal(moe.forward(x, ids, weights, 0), expected)


@pytest.mark.parametrize(
    ("limit", "alpha", "activation"),
    [
        (0.0, 0.0, "silu"),
        (1.25, 0.0, {"kind": "silu", "limit": 1.25}),
        (1.25, 0.75, {"kind": "swigluoai", "limit": 1.25, "alpha": 0.75}),
        (0.0, 0.75, {"kind": "swigluoai", "alpha": 0.75}),
    ],
)
def test_activation_functions(limit: float, alpha: float, activation: Any) -> None:
    layer, batch = drawn(activation=activation)
    moe = wrapper(swiglu_limit=limit, swiglu_alpha=alpha)
    moe.load_weights_from_tensors(*tensors(layer.matrices), torch.arange(E))
    assert_close(numpy_of(moe.forward(*tensors(batch), 0)), layer, batch)


def test_an_expert_for_gpus() -> None:
    layer, _ = drawn()
    moe = wrapper()
    moe.load_weights_from_tensors(*tensors(layer.matrices), torch.arange(E))
    w13 = [torch.empty(I, H, dtype=torch.bfloat16) for _ in range(2)]
    w2 = [torch.empty(H, I // 2, dtype=torch.bfloat16) for _ in range(2)]
    moe.submit_write_weight_scale_to_buffer(2, 1, w13, None, w2, None)
    moe.sync_write_weight_scale_to_buffer()
    gate, up, down = (numpy_of(matrix)[1] for matrix in tensors(layer.matrices))
    for i, rows in enumerate((slice(0, I // 2), slice(I // 2, I))):
        assert_same_bits(numpy_of(w13[i]), np.concatenate([gate[rows], up[rows]]))
        assert_same_bits(numpy_of(w2[i]), np.ascontiguousarray(down[:, rows]))


def test_masks_by_frequency() -> None:
    freq = torch.tensor([[0.1, 0.5, 0.3, 0.8], [0.2, 0.4, 0.9, 0.1]])
    masks = generate_gpu_experts_masks(freq, 3)
    assert masks.tolist() == [[False, True, False, True], [False, False, True, False]]
    assert masks.dtype is torch.bool
    assert not generate_gpu_experts_masks(freq, -3).any()
    assert generate_gpu_experts_masks(freq.bfloat16(), 99).all()
    assert generate_gpu_experts_masks(torch.tensor([[3, 1]]), 1).tolist() == [[True, False]]


def test_capture_batch_sizes() -> None:
    before = KTMoEWrapper.get_capture_batch_sizes()
    KTMoEWrapper.set_capture_batch_sizes([1, 4])
    assert KTMoEWrapper.get_capture_batch_sizes() == [1, 4]
    KTMoEWrapper.set_capture_batch_sizes(before)
    KTMoEWrapper.clear_buffer_cache()
    KTMoEWrapper.clear_sft_buffer_cache()


# ---- training ----


def trained(student: Student, method: str = "AMXBF16_SFT", **options: Any) -> Any:
    own = {"mode": "sft", "lora_rank": student.rank, "lora_alpha": student.lora_alpha, **options}
    moe = wrapper(method, **own)
    moe.load_weights_from_tensors(*tensors(student.layer.matrices), torch.arange(E))
    return moe


def lora_and_gradients(student: Student, dtype: Any = None) -> tuple[list[Any], list[Any]]:
    lora = [of_torch(student.lora[name]).to(dtype or torch.float32) for name in sorted_names(student)]
    return lora, [torch.full_like(matrix, 7) for matrix in lora]


def sorted_names(student: Student) -> list[str]:
    return [f"{role}_lora_{part}" for role in ("gate", "up", "down") for part in "ab"]


@pytest.fixture
def student() -> Student:
    return draw_student(np.random.default_rng(4), (E, I, H), 3)


def test_a_training_step(student: Student) -> None:
    moe = trained(student)
    lora, gradients = lora_and_gradients(student)
    moe.init_lora_weights(*lora, *gradients)
    batch, grad_output = draw_training(np.random.default_rng(5), student, T, P)
    sft = student.wrapper(P)
    expected, backward = sft.forward_sft(*batch), sft.backward(grad_output)
    assert_same_bits(numpy_of(moe.forward(*tensors(batch))), expected)
    grad_input, grad_weights = moe.backward(of_torch(grad_output))
    assert_same_bits(numpy_of(grad_input), backward.grad_input)
    assert_same_bits(numpy_of(grad_weights), backward.grad_weights)
    for name, found in zip(sorted_names(student), gradients, strict=True):
        assert_same_bits(numpy_of(found), backward.matrices[name], name)


def test_an_optimizer_changes_the_tensors_in_place(student: Student) -> None:
    moe = trained(student)
    lora, gradients = lora_and_gradients(student, torch.bfloat16)
    moe.init_lora_weights(*lora, *gradients)
    batch, grad_output = draw_training(np.random.default_rng(5), student, T, P)
    before = moe.forward(*tensors(batch), save_for_backward=False)
    lora[1].mul_(2)
    assert torch.equal(moe.forward(*tensors(batch), False), before)  # not yet
    moe.update_lora_weights()
    after = moe.forward(*tensors(batch), True)
    assert not torch.equal(after, before)
    moe.backward(of_torch(grad_output))
    changed = {name: numpy_of(value) for name, value in zip(sorted_names(student), lora, strict=True)}
    sft = Student(student.layer, changed, 3, student.lora_alpha).wrapper(P)
    assert_same_bits(numpy_of(after), sft.forward_sft(*batch))
    expected = sft.backward(grad_output).matrices
    for name, found in zip(sorted_names(student), gradients, strict=True):
        assert torch.equal(found, torch.from_numpy(expected[name]).bfloat16()), name


def test_submitted_passes(student: Student) -> None:
    moe = trained(student)
    lora, gradients = lora_and_gradients(student)
    moe.init_lora_weights(*lora, *gradients)
    batch, grad_output = draw_training(np.random.default_rng(5), student, T, P)
    expected = moe.forward(*tensors(batch))
    gradients_expected = [t.clone() for t in moe.backward(of_torch(grad_output))]
    lora_expected = [t.clone() for t in gradients]
    for tensor in gradients:
        tensor.fill_(7)
    moe.submit_forward(*tensors(batch), True)
    assert torch.equal(moe.sync_forward(), expected)
    moe.submit_backward_async(of_torch(grad_output))
    for found, value in zip(moe.sync_backward(torch.device("cpu")), gradients_expected, strict=True):
        assert torch.equal(found, value)
    for found, value in zip(gradients, lora_expected, strict=True):
        assert torch.equal(found, value)
    moe.submit_forward_inference(*tensors(batch), 0)
    assert torch.equal(moe.sync_forward_inference(0), expected)
    assert moe.moe.num_cached == 0


@pytest.mark.parametrize("method", ["INT8_SFT", "AMXINT4_SFT", "AMXINT4_KGroup_SFT", "AMXINT8_SFT_SkipLoRA"])
def test_methods_of_training(method: str, student: Student) -> None:
    options = {"group_size": 64, "zero_point": False} if "KGroup" in method else {}
    moe = trained(student, method, **options)
    moe.init_lora_weights(*(part for half in lora_and_gradients(student) for part in half))
    batch, grad_output = draw_training(np.random.default_rng(5), student, T, P)
    name = {"INT8_SFT": "AMXINT8_SFT", "AMXINT4_KGroup_SFT": "AMXINT4_SFT"}.get(method, method)
    ours = Student(student.layer, student.lora, 3, student.lora_alpha, (name, options.get("group_size")))
    sft = ours.wrapper(P)
    assert_same_bits(numpy_of(moe.forward(*tensors(batch))), sft.forward_sft(*batch))
    assert_same_bits(numpy_of(moe.backward(of_torch(grad_output))[0]), sft.backward(grad_output).grad_input)


def test_experts_on_a_gpu_are_skipped(student: Student) -> None:
    moe = trained(student, num_gpu_experts=2)
    moe.init_lora_weights(*(part for half in lora_and_gradients(student) for part in half))
    batch, _ = draw_training(np.random.default_rng(5), student, T, P)
    sft = student.wrapper(P, gpu_experts_mask=np.arange(E) < 2)
    assert_same_bits(numpy_of(moe.forward(*tensors(batch), False)), sft.forward(*batch))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "INT3"}, "method: got 'INT3' for mode 'inference', expected one of BF16"),
        ({"method": "SYCL_GPTQ_INT4"}, "expected one of .*: it computes on a SYCL device"),
        ({"method": "BF16", "mode": "train"}, "mode: got 'train', expected one of inference, sft"),
        (
            {"method": "AMXINT4", "mode": "sft"},
            "method: got 'AMXINT4' for mode 'sft', expected one of AMXBF16_SFT",
        ),
        ({"method": "AMXINT4_1_SFT", "mode": "sft"}, "int4 weights with an offset are INT4_ZP here"),
        ({"method": "AMXINT4_KGroup_SFT", "mode": "sft"}, "zero_point: got True with AMXINT4_KGroup_SFT"),
        (
            {"method": "AMXBF16_SFT", "mode": "sft", "num_gpu_experts": 5},
            "num_gpu_experts: got 5, expected 0 to 4",
        ),
        (
            {"method": "BF16", "mask": torch.zeros(3, dtype=torch.bool)},
            r"gpu_experts_mask: got torch.bool \[3\]",
        ),
        (
            {"method": "BF16", "mask": torch.zeros(4)},
            r"gpu_experts_mask: got torch.float32 \[4\], expected torch.bool",
        ),
    ],
)
def test_layers_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapper(**options)


def test_pointers_are_refused(student: Student) -> None:
    layer, batch = drawn()
    moe = wrapper()
    x, ids, weights = tensors(batch)
    with pytest.raises(
        TypeError, match="gate_proj: got the number 4096, expected a tensor: a pointer has no size"
    ):
        moe.load_weights_from_tensors(4096, 4096, 4096, torch.arange(E))
    moe.load_weights_from_tensors(*tensors(layer.matrices))
    with pytest.raises(TypeError, match=r"w13_weight_ptrs\[0\]: got the number 4096, expected a tensor"):
        moe.submit_write_weight_scale_to_buffer(1, 0, [4096], None, [4096], None)
    with pytest.raises(TypeError, match="topk_ids: got list, expected a tensor"):
        moe.forward(x, ids.tolist(), weights, 0)
    with pytest.raises(
        ValueError, match="cuda_stream: got 7, expected 0 or None: the tensors are on the CPU"
    ):
        moe.forward(x, ids, weights, 7)
    with pytest.raises(ValueError, match="cpu_save: got True with BF16, expected False"):
        wrapper(path="x", cpu_save=True).load_weights_from_tensors(*tensors(layer.matrices))
    sft = trained(student)
    with pytest.raises(RuntimeError, match="update_lora_weights: there are no tensors yet"):
        sft.update_lora_weights()
    lora, gradients = lora_and_gradients(student)
    with pytest.raises(TypeError, match="grad_gate_lora_a: got the number 1, expected a tensor"):
        sft.init_lora_weights(*lora, 1, *gradients[1:])
    with pytest.raises(
        ValueError, match=r"grad_gate_lora_a: got torch.float32 \[4, 3, 95\], expected floats"
    ):
        sft.init_lora_weights(*lora, gradients[0][:, :, 1:], *gradients[1:])
    with pytest.raises(RuntimeError, match="no pass of layer 0 is pending"):
        sft.sync_forward_inference(0)
