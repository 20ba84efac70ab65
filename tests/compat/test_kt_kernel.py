"""kt-kernel's calls for inference, in the orders of its tests and of SGLang's wrapper of experts."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_checkpoints
import native_checkpoints
import numpy as np
import pytest
from array_kinds import numpy_of, of_torch
from checkpoints import write_checkpoint
from int8_layers import draw_int8_layer
from layers import Batch, Layer, assert_close, assert_same_bits, bf16, draw_batch, draw_layer
from quantized_layers import quantized_layer

torch = pytest.importorskip("torch")

import ktmoe_np  # noqa: E402
from ktmoe_np.compat import arguments, inference, kt_kernel, streams, training  # noqa: E402
from ktmoe_np.compat.base import _REFUSED_NAMES  # noqa: E402
from ktmoe_np.compat.kt_kernel import KTMoEWrapper, generate_gpu_experts_masks  # noqa: E402

pytestmark = pytest.mark.crosscheck

E, I, H, P, T = 5, 24, 40, 2, 7  # noqa: E741
_NAME = re.compile(r"`(\w+)`")
ENGINE = (None, None)  # threads and sub-pools: those of the engine that other tests use


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    ktmoe_np.KTMoEWrapper.drain_deferred()
    yield
    ktmoe_np.KTMoEWrapper.drain_deferred()


@pytest.fixture(scope="module")
def layer() -> Layer:
    return draw_layer(np.random.default_rng(1), E, I, H)


def made(layer: Layer, method: str = "BF16", mask: Any = None, layer_idx: int = 0, **options: Any) -> Any:
    """A wrapper with weights, by kt-kernel's arguments in their order."""
    sizes = (layer.num_experts, options.pop("slots", P), layer.hidden_size, layer.inter_size)
    moe = KTMoEWrapper(layer_idx, *sizes, mask, *ENGINE, "", 512, method=method, **options)
    moe.load_weights_from_tensors(*map(of_torch, layer.matrices), torch.arange(layer.num_experts))
    return moe


def drawn(layer: Layer, tokens: int = T, slots: int = P, seed: int = 2) -> tuple[Batch, list[Any]]:
    batch = draw_batch(np.random.default_rng(seed), layer, tokens, slots)
    return batch, [of_torch(array) for array in batch]


def test_doctests() -> None:
    for module in (kt_kernel, inference, training, arguments, streams):
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert found.failed == 0


def test_parameters_stand_in_kt_kernels_order_with_its_defaults() -> None:
    parameters = inspect.signature(KTMoEWrapper.__new__).parameters
    names = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    assert names == [
        *("layer_idx", "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size"),
        *("gpu_experts_mask", "cpuinfer_threads", "threadpool_count", "weight_path", "chunked_prefill_size"),
        *("cpu_save", "max_deferred_experts_per_token", "method", "numa_nodes", "mode", "num_gpu_experts"),
        *("lora_rank", "lora_alpha", "lora_dropout", "max_cache_depth", "group_size", "zero_point"),
        *("full_weight_grad", "swiglu_limit", "swiglu_alpha"),
    ]
    defaults = {name: parameters[name].default for name in names[10:]}
    assert list(defaults.values())[:6] == [False, None, "AMXINT4", None, "inference", 0]
    assert list(defaults.values())[6:] == [16, 32.0, 0.0, 1, 128, True, False, 0.0, 0.0]


def test_the_page_for_users() -> None:
    page = (Path(__file__).parents[2] / "docs" / "from-kt-kernel.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})
    table = page[page.index("## Parameters") : page.index("## Methods")]
    named = [
        name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in _NAME.findall(cell)
    ]
    assert named == list(inspect.signature(KTMoEWrapper.__new__).parameters)[1:]
    for kind, title in ((kt_kernel.InferenceExperts, "inference"), (kt_kernel.TrainingExperts, "training")):
        section = page[page.index(f"## Layers for {title}") :].split("\n## ")[0]
        rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        there = {name for cell in rows for name in _NAME.findall(cell)}
        known = {*dir(kind), *_REFUSED_NAMES, "gpu_experts_mask", "cuda_stream", "generate_gpu_experts_masks"}
        assert there <= known


# ---- passes ----


@pytest.mark.parametrize("tokens", [0, 1, T])
@pytest.mark.parametrize("cuda_stream", [0, None])
def test_submit_and_sync(layer: Layer, tokens: int, cuda_stream: Any) -> None:
    moe = made(layer)
    batch, tensors = drawn(layer, tokens)
    moe.submit_forward(*tensors, cuda_stream)
    for tensor in tensors:
        tensor.fill_(-1)  # the caller may write to them
    result = moe.sync_forward(tensors[0], cuda_stream)
    assert result.dtype is torch.bfloat16
    assert_close(numpy_of(result), layer, batch)
    again = moe.forward(*map(of_torch, batch), cuda_stream)
    assert_same_bits(numpy_of(again), numpy_of(result))


@pytest.mark.parametrize("method", ["AMXINT8", "AMXINT4", "MOE_INT8", "MOE_INT4"])
def test_weights_that_are_quantized(layer: Layer, method: str) -> None:
    batch, tensors = drawn(layer)
    moe = made(layer, method)
    group_size = moe.layer.group_size
    product = "int8" if method.startswith("AMX") else "bfloat16"
    quantized = quantized_layer(layer, method, group_size)
    result = numpy_of(moe.forward(*tensors, 0))
    assert moe.activation_dtype == product
    expected = layer.forward(batch, method=method)
    assert_same_bits(result, expected)
    if product == "bfloat16":
        assert_close(result, quantized, batch)


def test_tensors_of_other_kinds(layer: Layer) -> None:
    moe = made(layer)
    _, (x, ids, weights) = drawn(layer)
    expected = numpy_of(moe.forward(x, ids, weights, 0))
    for dtype in (torch.float32, torch.float16):
        result = moe.forward(x.to(dtype), ids.int(), weights.double(), 0)
        assert result.dtype is dtype
    assert_same_bits(numpy_of(moe.forward(x.float(), ids.int(), weights.double(), 0).bfloat16()), expected)
    strided = [torch.stack([each, each], dim=-1)[..., 0] for each in (x, ids, weights)]
    assert not strided[0].is_contiguous()
    assert_same_bits(numpy_of(moe.forward(*strided, 0)), expected)
    result = moe.forward(x.reshape(1, T, H).requires_grad_(), ids, weights.requires_grad_(), 0)
    assert not result.requires_grad
    assert_same_bits(numpy_of(result), expected)


def test_numpy_arrays_beside_tensors(layer: Layer) -> None:
    moe = made(layer)
    batch, (x, ids, weights) = drawn(layer)
    expected = numpy_of(moe.forward(x, ids, weights, 0))
    assert_same_bits(numpy_of(moe.forward(x, batch.ids, batch.weights, 0)), expected)


def test_weights_of_a_map(layer: Layer) -> None:
    batch, tensors = drawn(layer)
    logical = np.array([4, 2, 0, 1, 1])
    moe = KTMoEWrapper(0, E, P, H, I, None, *ENGINE, "", 512, method="BF16")
    moe.load_weights_from_tensors(*map(of_torch, layer.matrices), torch.from_numpy(logical).int())
    mapped = batch._replace(ids=logical[batch.ids])
    assert_close(numpy_of(moe.forward(*tensors, 0)), layer, mapped)


@pytest.mark.parametrize(
    ("limit", "alpha", "activation"),
    [
        (0.0, 0.0, "silu"),
        (0.75, 0.0, {"kind": "silu", "limit": 0.75}),
        (0.75, 1.25, {"kind": "swigluoai", "limit": 0.75, "alpha": 1.25}),
        (0.0, 1.25, {"kind": "swigluoai", "limit": float("inf"), "alpha": 1.25}),
    ],
)
def test_swiglu_numbers(limit: float, alpha: float, activation: Any) -> None:
    layer = draw_layer(np.random.default_rng(3), E, I, H, activation)
    batch, tensors = drawn(layer)
    moe = made(layer, swiglu_limit=limit, swiglu_alpha=alpha)
    assert (moe.swiglu_limit, moe.swiglu_alpha) == (limit, alpha)
    assert_close(numpy_of(moe.forward(*tensors, 0)), layer, batch)


# ---- masks ----


def test_a_mask_that_is_changed_in_place(layer: Layer) -> None:
    batch, tensors = drawn(layer)
    given = torch.tensor([True, False, True, False, False])
    moe = made(layer, mask=given)
    given.fill_(True)  # the wrapper has its own
    for mask in ([1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]):
        moe.gpu_experts_mask.copy_(torch.tensor(mask, dtype=torch.bool))
        assert moe.num_gpu_experts == sum(mask)
        result = numpy_of(moe.forward(*tensors, 0))
        assert_close(result, layer, batch, gpu_experts_mask=np.array(mask, np.bool_))
        moe.submit_forward(*tensors, 0)
        assert_same_bits(numpy_of(moe.sync_forward(tensors[0], 0)), result)


def test_a_number_of_experts_is_a_mask_of_the_first(layer: Layer) -> None:
    batch, tensors = drawn(layer)
    moe = made(layer, num_gpu_experts=2)
    assert moe.gpu_experts_mask.tolist() == [True, True, False, False, False]
    mask = np.arange(E) < 2
    assert_close(numpy_of(moe.forward(*tensors, 0)), layer, batch, gpu_experts_mask=mask)
    assert made(layer, mask=torch.from_numpy(mask), num_gpu_experts=2).num_gpu_experts == 2


def test_generated_masks() -> None:
    freq = torch.tensor([[0.1, 0.5, 0.3, 0.8], [0.2, 0.4, 0.9, 0.1]])
    expected = [[False, True, False, True], [False, False, True, False]]
    for given in (freq, freq.bfloat16(), (freq * 10).int(), freq.T.contiguous().T):
        masks = generate_gpu_experts_masks(given, 3)
        assert masks.dtype is torch.bool
        assert masks.tolist() == expected
    for number, chosen in ((-3, 0), (0, 0), (8, 8), (99, 8)):
        assert int(generate_gpu_experts_masks(freq, number).sum()) == chosen


# ---- deferred experts ----


def test_experts_that_are_deferred_as_in_the_main_interface() -> None:
    rng = np.random.default_rng(4)
    layers = [draw_layer(rng, E, I, H) for _ in range(3)]
    drawings = [drawn(each, slots=4, seed=i) for i, each in enumerate(layers)]
    number = (2, 2, 0)  # the last layer defers none
    ours = [
        each.wrapper(4, layer_idx=i, max_deferred_experts_per_token=d)
        for i, (each, d) in enumerate(zip(layers, number, strict=True))
    ]
    expected = [moe.forward(*batch) for moe, (batch, _) in zip(ours, drawings, strict=True)]
    moes = [
        made(each, layer_idx=i, max_deferred_experts_per_token=d or None, slots=4)
        for i, (each, d) in enumerate(zip(layers, number, strict=True))
    ]
    for moe, (_, tensors), y in zip(moes, drawings, expected, strict=True):
        moe.submit_forward(*tensors, 0)
        assert_same_bits(numpy_of(moe.sync_forward(tensors[0], 0)), y)
    assert ktmoe_np.KTMoEWrapper.drain_deferred() is None
    batch, tensors = drawings[0]
    now, later = moes[0].select_deferred_experts(tensors[1], tensors[2], 2)
    parts = [layers[0].forward(batch._replace(ids=numpy_of(ids))) for ids in (now, later)]
    assert_same_bits(expected[0], parts[0])
    whole = np.where(numpy_of(now) < 0, numpy_of(later), numpy_of(now))
    assert_same_bits(whole, batch.ids)


def test_splits_of_slots(layer: Layer) -> None:
    moe = made(layer)
    ids = torch.tensor([[3, 1, 4], [0, -1, 2]], dtype=torch.int32)
    scores = torch.tensor([[0.2, 0.5, 0.2], [0.1, 0.9, 0.3]])
    for kept, expected in {
        0: [[-1, -1, -1], [-1, -1, -1]],
        1: [[-1, 1, -1], [-1, -1, -1]],
        2: [[3, 1, -1], [-1, -1, 2]],
        9: [[3, 1, 4], [0, -1, 2]],
        -1: [[-1, -1, -1], [-1, -1, -1]],
    }.items():
        now, later = moe.select_deferred_experts(ids, scores, kept)
        assert now.dtype is later.dtype is torch.int32
        assert now.tolist() == expected
        assert (now + later).tolist() == (ids - 1).tolist()


def test_a_number_above_the_slots_defers_all(layer: Layer) -> None:
    assert made(layer, max_deferred_experts_per_token=9).max_deferred_experts_per_token == P


# ---- files ----


def test_a_checkpoint_is_quantized_saved_and_read_again(tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path, "qwen3_moe", [3], E, I, H)[3]
    layer = Layer(weights["gate_proj"], weights["up_proj"], weights["down_proj"])
    batch, tensors = drawn(layer)
    arguments = (3, E, P, H, I, None, *ENGINE, str(tmp_path), 512)
    moe = KTMoEWrapper(*arguments, True, method="AMXINT8")
    moe.load_weights(torch.arange(E))
    moe.load_weights(torch.arange(E))  # is loaded
    (file,) = tmp_path.glob("layer-*.safetensors")
    expected = layer.forward(batch, method="AMXINT8")
    assert_same_bits(numpy_of(moe.forward(*tensors, 0)), expected)
    before = file.stat().st_mtime_ns
    for saves in (True, False):
        again = KTMoEWrapper(*arguments, saves, method="AMXINT8")
        again.load_weights(None)
        assert_same_bits(numpy_of(again.forward(*tensors, 0)), expected)
    assert file.stat().st_mtime_ns == before


def test_tensors_are_quantized_and_saved(layer: Layer, tmp_path: Path) -> None:
    batch, tensors = drawn(layer)
    arguments = (0, E, P, H, I, None, *ENGINE, tmp_path / "new", 512)
    moe = KTMoEWrapper(*arguments, cpu_save=True, method="AMXINT4")
    moe.load_weights_from_tensors(*map(of_torch, layer.matrices), torch.arange(E))
    again = KTMoEWrapper(*arguments, method="AMXINT4")
    again.load_weights(torch.arange(E))
    assert_same_bits(numpy_of(again.forward(*tensors, 0)), layer.forward(batch, method="AMXINT4"))


@pytest.mark.parametrize(("kind", "dtype"), [("q4_k", "int8"), ("f16", "bfloat16")])
def test_gguf_takes_activations_as_kt_kernel_does(tmp_path: Path, kind: str, dtype: str) -> None:
    drawing = gguf_checkpoints.draw_layer(kind, E, 256, 256)
    gguf_checkpoints.write(tmp_path / "model.gguf", drawing.tensors)
    arguments = (gguf_checkpoints.LAYER, E, P, 256, 256, None, *ENGINE, tmp_path / "model.gguf", 512)
    moe = KTMoEWrapper(*arguments, method="LLAMAFILE")
    moe.load_weights()
    assert moe.activation_dtype == dtype
    sizes = Layer(np.empty((E, 256, 256), bf16), None, np.empty((E, 256, 256), bf16))
    batch, tensors = drawn(sizes)
    plain = ktmoe_np.KTMoEWrapper(gguf_checkpoints.LAYER, E, P, 256, 256, method="LLAMAFILE")
    plain.weight_path = tmp_path / "model.gguf"
    plain.load_weights()
    found = numpy_of(moe.forward(*tensors, 0))
    assert_same_bits(found, plain.forward(*batch, activation_dtype=dtype))
    other = KTMoEWrapper(*arguments, method="LLAMAFILE", activation_dtype="bfloat16")
    other.load_weights()
    assert other.activation_dtype == "bfloat16"
    assert_same_bits(numpy_of(other.forward(*tensors, 0)), plain.forward(*batch))


def test_int4_codes_take_int8_activations() -> None:
    drawing = draw_int8_layer(np.random.default_rng(5), ("RAWINT4", 32), (E, 64, 96))
    batch, tensors = drawn(drawing.layer)
    moe = KTMoEWrapper(0, E, P, 96, 64, None, *ENGINE, None, 512, method="RAWINT4")
    drawing.layer.load_into(moe.layer)
    assert moe.activation_dtype == "int8"
    drawing.assert_close(numpy_of(moe.forward(*tensors, 0)), batch)


@pytest.mark.parametrize(
    ("encoding", "method", "group_size"),
    [("rawint4", "RAWINT4", 32), ("awq", "INT4_ZP", 32), ("awq_128", "INT4_ZP", 128)],
)
def test_group_sizes_are_the_checkpoints(tmp_path: Path, encoding: str, method: str, group_size: int) -> None:
    native_checkpoints.put_layer(tmp_path, native_checkpoints.draw_layer(encoding, 2, 128, 256))
    number = native_checkpoints.LAYER
    moe = KTMoEWrapper(number, 2, P, 256, 128, None, *ENGINE, tmp_path, 512, method=method)
    moe.load_weights(torch.arange(2))
    assert moe.layer.group_size == group_size
    dtype = "int8" if method == "RAWINT4" else "bfloat16"
    assert moe.activation_dtype == dtype
    options = {"weight_path": tmp_path, "method": method, "group_size": group_size}
    ours = ktmoe_np.KTMoEWrapper(number, 2, P, 256, 128, **options)
    ours.load_weights()
    sizes = Layer(np.empty((2, 128, 256), bf16), None, np.empty((2, 256, 128), bf16))
    batch, tensors = drawn(sizes)
    found = numpy_of(moe.forward(*tensors, 0))
    assert_same_bits(found, ours.forward(*batch, activation_dtype=dtype))


# ---- what SGLang calls ----


@pytest.mark.parametrize("version", ["a number of experts", "a mask"])
def test_a_model_of_sglang(tmp_path: Path, version: str) -> None:
    """Layers by keyword from a checkpoint; ids are overwritten once they are submitted."""
    weights = write_checkpoint(tmp_path, "qwen3_moe", [0, 1], E, I, H)
    masks = generate_gpu_experts_masks(torch.tensor([[3.0, 2.0, 1.0, 1.0, 1.0]] * 2), 4)
    for number in range(2):
        gpu = {"num_gpu_experts": 2} if version == "a number of experts" else {}
        if not gpu:
            gpu = {"gpu_experts_mask": masks[number], "numa_nodes": None}
            gpu |= {"swiglu_limit": 0.0, "swiglu_alpha": 0.0}
        moe = KTMoEWrapper(
            layer_idx=number,
            num_experts=E,
            num_experts_per_tok=P,
            hidden_size=H,
            moe_intermediate_size=I,
            cpuinfer_threads=None,
            threadpool_count=None,
            weight_path=str(tmp_path),
            chunked_prefill_size=512,
            method="BF16",
            max_deferred_experts_per_token=0,
            **gpu,
        )
        moe.load_weights(torch.arange(E, dtype=torch.int64))
        layer = Layer(*(weights[number][name] for name in ("gate_proj", "up_proj", "down_proj")))
        batch, (x, ids, scores) = drawn(layer, seed=number)
        moe.submit_forward(x, ids, scores, 0)
        ids[ids >= 2] = -1
        output = numpy_of(moe.sync_forward(x, 0))
        assert_close(output, layer, batch, gpu_experts_mask=np.arange(E) < 2)


def test_weights_of_an_expert_for_gpus(layer: Layer) -> None:
    moe = made(layer)
    w13 = [torch.empty(I, H, dtype=torch.bfloat16) for _ in range(2)]
    w2 = [torch.empty(H, I // 2, dtype=torch.bfloat16) for _ in range(2)]
    for scales in (None, []):
        moe.submit_write_weight_scale_to_buffer(2, 3, w13, scales, w2, scales)
        moe.sync_write_weight_scale_to_buffer()
        for i in range(2):
            rows = slice(i * I // 2, (i + 1) * I // 2)
            gate, up, down = (matrix[3] for matrix in layer.matrices)
            assert_same_bits(numpy_of(w13[i]), np.concatenate([gate[rows], up[rows]]))
            assert_same_bits(numpy_of(w2[i]), np.ascontiguousarray(down[:, rows]))


def test_batch_sizes_that_stay_allocated(layer: Layer) -> None:
    moe = made(layer)
    try:
        for holder in (KTMoEWrapper, moe):
            holder.set_capture_batch_sizes([1, 2, 4])
            assert ktmoe_np.KTMoEWrapper.get_capture_batch_sizes() == [1, 2, 4]
            assert holder.get_capture_batch_sizes() == [1, 2, 4]
            holder.clear_buffer_cache()
        KTMoEWrapper.clear_sft_buffer_cache()
    finally:
        KTMoEWrapper.set_capture_batch_sizes([])


def test_attributes(layer: Layer) -> None:
    moe = made(layer, layer_idx=3)
    names = ("layer_idx", "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size")
    assert [getattr(moe, name) for name in names] == [3, E, P, H, I]
    assert (moe.method, moe.chunked_prefill_size, moe.cpu_save, moe.weight_path) == ("BF16", 512, False, None)
    assert moe.cpu_infer is moe.layer.cpu_infer
    assert repr(moe).startswith("<InferenceExperts of ")
