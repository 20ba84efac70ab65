"""The extension used directly, with arrays from any library."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from array_kinds import DLPackOnly, of_jax, of_torch
from layers import (
    ACTIVATIONS,
    Batch,
    Layer,
    assert_close,
    assert_same_bits,
    bf16,
    draw_batch,
    draw_layer,
    low_level_moe,
)
from low_level_sizes import E, H, I, P, T

from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.config import parse_activation

pytestmark = [pytest.mark.kernels, pytest.mark.asan, pytest.mark.emulated]

AnyArray = Any


def test_as_the_documentation_has_it(layer: Layer, batch: Batch) -> None:
    gate, up, down = layer.matrices
    x, ids, w = batch
    out = np.empty((T, H), bf16)
    node = min(ext.topology()["node_cpus"])

    engine = ext.CPUInfer(
        ext.WorkerPoolConfig(subpool_count=1, subpool_numa_map=[node], subpool_thread_count=[2])
    )
    cfg = ext.moe.MOEConfig(expert_num=E, num_experts_per_tok=P, hidden_size=H, intermediate_size=I)
    cfg.pool = engine.backend_
    moe = ext.moe.AMXBF16_MOE(cfg)
    engine.submit(moe.load_weights_task(gate, up, down))
    engine.sync()
    engine.submit(moe.forward_task(x, ids, w, out))
    engine.sync()

    assert_close(out, layer, batch)
    assert_same_bits(out, layer.forward(batch))


def test_all_arguments_by_name(engine: Any, layer: Layer, batch: Batch) -> None:
    rng = np.random.default_rng(2)
    full = draw_layer(rng, E, I, H, with_biases=True)
    order, skipped = rng.permutation(E), np.array([False, True, False, False])
    config = ext.moe.MOEConfig(E, P, H, I, 3, engine.backend_)
    moe = ext.moe.AMXBF16_MOE(config)
    assert not moe.loaded
    gate, up, down = full.matrices
    task = moe.load_weights_task(
        gate_proj=gate, up_proj=up, down_proj=down, physical_to_logical_map=order, **full.biases
    )
    assert not moe.loaded  # made, not run
    engine.run(task)
    assert moe.loaded
    base, out = rng.standard_normal((T, H), np.float32), np.empty((T, H), np.float32)
    x, ids, weights = batch
    engine.run(
        moe.forward_task(
            hidden_states=x,
            topk_ids=ids,
            topk_weights=weights,
            out=out,
            incremental=False,
            base=base,
            skip_experts=skipped,
        )
    )
    options = {"base": base, "gpu_experts_mask": skipped, "physical_to_logical_map": order}
    assert_close(out, full, batch, **options)


@pytest.mark.parametrize("out_dtype", [bf16, np.dtype(np.float32)])
@pytest.mark.parametrize("base_dtype", [bf16, np.dtype(np.float32)])
def test_base_and_out_have_dtypes_of_their_own(
    engine: Any, layer: Layer, batch: Batch, out_dtype: Any, base_dtype: Any
) -> None:
    base = np.random.default_rng(3).standard_normal((T, H), np.float32).astype(base_dtype)
    kept, out = base.copy(), np.empty((T, H), out_dtype)
    engine.run(low_level_moe(engine, layer, P).forward_task(*batch, out, base=base))
    assert_close(out, layer, batch, base=base)
    assert_same_bits(base, kept)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_with_their_parameters(engine: Any, activation: Any) -> None:
    layer = draw_layer(np.random.default_rng(4), E, I, H, activation, scale=3.0)
    batch = draw_batch(np.random.default_rng(5), layer, T, P)
    out = np.empty((T, H), np.float32)
    engine.run(low_level_moe(engine, layer, P).forward_task(*batch, out))
    assert_close(out, layer, batch)


def test_the_activation_is_silu_unless_said_otherwise(engine: Any, layer: Layer, batch: Batch) -> None:
    plain = ext.moe.AMXBF16_MOE(ext.moe.MOEConfig(E, P, H, I, pool=engine.backend_))
    config = ext.moe.MOEConfig(E, P, H, I, pool=engine.backend_)
    config.set_activation("silu")
    named = ext.moe.AMXBF16_MOE(config)
    for moe in (plain, named):
        out = np.empty((T, H), np.float32)
        engine.run(moe.load_weights_task(*layer.matrices))
        engine.run(moe.forward_task(*batch, out))
        assert_close(out, layer, batch)


@pytest.mark.parametrize("kind", [info.name for info in ext.activations() if info.gated])
def test_an_activation_by_its_name_alone_has_its_models_parameters(engine: Any, kind: str) -> None:
    layer = draw_layer(np.random.default_rng(6), E, I, H, kind, scale=12.0)
    batch = draw_batch(np.random.default_rng(7), layer, T, P)
    assert layer.activation == parse_activation(kind).name
    config = ext.moe.MOEConfig(E, P, H, I, pool=engine.backend_)
    config.set_activation(kind)
    moe, out = ext.moe.AMXBF16_MOE(config), np.empty((T, H), np.float32)
    engine.run(moe.load_weights_task(*layer.matrices))
    engine.run(moe.forward_task(*batch, out))
    assert_close(out, layer, batch)


def test_a_config_is_copied(engine: Any, layer: Layer, batch: Batch) -> None:
    config = ext.moe.MOEConfig(E, P, H, I, pool=engine.backend_)
    moe = ext.moe.AMXBF16_MOE(config)
    config.hidden_size = config.intermediate_size = config.expert_num = 1
    config.pool = None
    out = np.empty((T, H), bf16)
    engine.run(moe.load_weights_task(*layer.matrices))
    engine.run(moe.forward_task(*batch, out))
    assert_same_bits(out, layer.forward(batch))


# ---- arrays of others ----


LIBRARIES: dict[str, Callable[[AnyArray], Any]] = {
    "torch": of_torch,
    "jax": of_jax,
    "DLPack": DLPackOnly,
}


@pytest.mark.crosscheck
@pytest.mark.parametrize("library", LIBRARIES)
def test_inputs_and_weights_of_another_library(engine: Any, layer: Layer, batch: Batch, library: str) -> None:
    of_library = LIBRARIES[library]
    theirs = [of_library(matrix) for matrix in layer.matrices]
    moe, out = (
        ext.moe.AMXBF16_MOE(ext.moe.MOEConfig(E, P, H, I, pool=engine.backend_)),
        np.empty((T, H), bf16),
    )
    engine.run(moe.load_weights_task(*theirs))
    engine.run(moe.forward_task(*(of_library(array) for array in batch), out))
    assert_same_bits(out, layer.forward(batch))
    lists = [[of_library(expert) for expert in matrix] for matrix in layer.matrices]
    engine.run(moe.load_weights_task(*lists))
    del theirs, lists
    out[...] = 0
    engine.run(moe.forward_task(*batch, out))
    assert_same_bits(out, layer.forward(batch))


@pytest.mark.crosscheck
def test_weights_of_torch_are_not_copied(engine: Any, layer: Layer, batch: Batch) -> None:
    theirs = [of_torch(matrix) for matrix in layer.matrices]
    moe, out = (
        ext.moe.AMXBF16_MOE(ext.moe.MOEConfig(E, P, H, I, pool=engine.backend_)),
        np.empty((T, H), bf16),
    )
    engine.run(moe.load_weights_task(*theirs))
    theirs[2].zero_()
    engine.run(moe.forward_task(*batch, out))
    assert not out.astype(np.float32).any()


@pytest.mark.crosscheck
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_output_of_torch(engine: Any, layer: Layer, batch: Batch, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    moe, out = low_level_moe(engine, layer, P), torch.full((T, H), 3.0, dtype=getattr(torch, dtype))
    engine.run(moe.forward_task(*batch, out))
    expected = layer.forward(batch, out=np.empty((T, H), np.float32))
    np.testing.assert_array_equal(out.float().numpy(), expected.astype(dtype).astype(np.float32))
    engine.run(moe.forward_task(*batch, out, incremental=True))
    assert not np.array_equal(out.float().numpy(), expected.astype(dtype).astype(np.float32))


@pytest.mark.crosscheck
def test_tensors_of_torch_that_cannot_be_read(engine: Any, layer: Layer, batch: Batch) -> None:
    torch = pytest.importorskip("torch")
    moe, out = low_level_moe(engine, layer, P), np.empty((T, H), bf16)
    x = of_torch(batch.x)
    with pytest.raises(TypeError, match="hidden_states: got Tensor, expected an array on the CPU"):
        moe.forward_task(x.to("meta"), *batch[1:], out)
    with pytest.raises(
        TypeError, match=rf"hidden_states: got .*float16 \[{T}, {H}\], expected bfloat16 \[T, {H}\]"
    ):
        moe.forward_task(x.half(), *batch[1:], out)
    with pytest.raises(TypeError, match=r"hidden_states: .* expected it C-contiguous"):
        moe.forward_task(x.T.contiguous().T, *batch[1:], out)
    with pytest.raises(TypeError, match=rf"topk_ids: got .*int32 \[{T}, {P}\], expected int64"):
        moe.forward_task(x, of_torch(batch.ids).int(), batch.weights, out)
    conjugate = torch.zeros((T, H), dtype=torch.complex64).conj()
    with pytest.raises(TypeError, match="hidden_states: got"):
        moe.forward_task(conjugate, *batch[1:], out)


def test_a_subclass_of_an_array(engine: Any, layer: Layer, batch: Batch) -> None:
    class Named(np.ndarray):
        pass

    out = np.empty((T, H), bf16)
    moe = low_level_moe(engine, layer.with_matrices(lambda array: array.view(Named)), P)
    engine.run(moe.forward_task(*(array.view(Named) for array in batch), out))
    assert_same_bits(out, layer.forward(batch))


# ---- configs that cannot be ----

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        name: ({name: value}, rf"{name}: got {value}, expected 1 to 16777216")
        for name, value in itertools.product(
            ("expert_num", "num_experts_per_tok", "hidden_size", "intermediate_size"), (0,)
        )
    },
    "negative": ({"hidden_size": -1}, r"hidden_size: got -1, expected 1 to 16777216"),
    "huge": ({"expert_num": 2**24 + 1}, r"expert_num: got 16777217, expected 1 to 16777216"),
    "layer_idx": ({"layer_idx": -1}, r"layer_idx: got -1, expected 0 or more"),
    "pool": ({"pool": None}, r"pool: got none, expected the backend_ of a CPUInfer"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_is_refused(engine: Any, case: str) -> None:
    change, message = CONFIGS[case]
    sizes = {"expert_num": E, "num_experts_per_tok": P, "hidden_size": H, "intermediate_size": I}
    config = ext.moe.MOEConfig(**{**sizes, "pool": engine.backend_, **change})
    with pytest.raises(ValueError, match=message):
        ext.moe.AMXBF16_MOE(config)
    for name, value in {**sizes, "layer_idx": 0, "pool": engine.backend_}.items():
        setattr(config, name, value)
    assert not ext.moe.AMXBF16_MOE(config).loaded


NO_UNGATED_FORM = "activation: got .* without a gate, expected one of silu, gelu_tanh, relu2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "relu2"}, "activation: got relu2 with a gate, expected gated=False"),
        ({"kind": "gelu", "gated": False}, NO_UNGATED_FORM),
        ({"kind": "situ", "gated": False}, NO_UNGATED_FORM),
        ({"kind": "silu", "limit": 0.0}, "activation: got limit 0, expected above 0"),
        ({"kind": "silu", "limit": float("nan")}, "activation: got limit .*nan, expected above 0"),
        ({"kind": "situ", "beta1": -1.0}, "activation: got beta1 -1, beta2 25, expected both above 0"),
        ({"kind": "situ", "beta2": 0.0}, "activation: got beta1 4, beta2 0, expected both above 0"),
    ],
)
def test_an_activation_is_refused(engine: Any, arguments: dict[str, Any], message: str) -> None:
    config = ext.moe.MOEConfig(E, P, H, I, pool=engine.backend_)
    config.set_activation(**arguments)
    with pytest.raises(ValueError, match=message):
        ext.moe.AMXBF16_MOE(config)


def test_an_activation_that_is_unknown() -> None:
    names = ", ".join(sorted(info.name for info in ext.activations()))
    with pytest.raises(ValueError, match=f"activation: got 'tanh', expected one of {names}"):
        ext.moe.MOEConfig().set_activation("tanh")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, [], []), "subpool_count: got 0, expected at least 1"),
        ((-1, [], []), "subpool_count: got -1, expected at least 1"),
        (
            (2, [0], [1, 1]),
            r"subpool_numa_map: got 1 entries, expected one for each sub-pool \(subpool_count = 2\)",
        ),
        (
            (1, [0], [1, 1]),
            r"subpool_thread_count: got 2 entries, expected one for each sub-pool \(subpool_count",
        ),
        ((1, [0], [0]), r"subpool_thread_count\[0\]: got 0, expected 1 to 4096"),
        ((2, [0, 0], [1, -3]), r"subpool_thread_count\[1\]: got -3, expected 1 to 4095"),
        (
            (1, [999], [1]),
            r"subpool_numa_map\[0\]: got 999, expected a NUMA node with CPUs that this process may u",
        ),
        ((1, [-1], [1]), r"subpool_numa_map\[0\]: got -1, expected a NUMA node .* may use: {nodes}$"),
    ],
)
def test_threads_are_refused(arguments: Any, message: str) -> None:
    nodes = ", ".join(map(str, sorted(ext.topology()["node_cpus"])))
    with pytest.raises(ValueError, match=message.replace("{nodes}", nodes)):
        ext.CPUInfer(ext.WorkerPoolConfig(*arguments))


@pytest.mark.parametrize("number", [0, -1, 4097])
def test_no_threads_at_all(number: int) -> None:
    with pytest.raises(ValueError, match=f"num_threads: got {number}, expected 1 to 4096"):
        ext.CPUInfer(number)


def test_what_only_a_layer_or_an_engine_makes() -> None:
    for kind in (ext.Task, ext.WorkerPool, ext.moe.MoE_Interface):
        with pytest.raises(TypeError, match="no constructor"):
            kind()


def test_everything_says_what_it_is() -> None:
    things = [ext, ext.moe, ext.CPUInfer, ext.WorkerPoolConfig, ext.WorkerPool, ext.Task, ext.moe.MOEConfig]
    things += [
        ext.moe.AMXBF16_MOE,
        ext.moe.MoE_Interface.forward_task,
        ext.moe.MoE_Interface.load_weights_task,
    ]
    things += [
        ext.CPUInfer.submit,
        ext.CPUInfer.sync,
        ext.CPUInfer.wait,
        ext.CPUInfer.run,
        ext.CPUInfer.shutdown,
    ]
    for thing in things:
        assert thing.__doc__, thing


class Exporting(np.ndarray):
    """An array whose protocol shows other memory than its own."""

    def __dlpack__(self, **options: Any) -> Any:
        return np.full(self.shape, 7, self.dtype).__dlpack__(**options)

    def view(self, *_: Any) -> Any:
        return np.full(self.shape, 7, np.uint16)


def test_the_memory_of_a_subclass_is_its_own(engine: Any) -> None:
    for dtype in (np.float32, bf16):
        source = np.zeros(1000, dtype)
        out = np.ones(1000, dtype)
        engine.copy(np.ndarray.view(source, Exporting), out)
        assert_same_bits(out, source)
