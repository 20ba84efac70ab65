"""What `repr` shows: one line about sizes and state, of objects that are half made too."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_safetensors

from ktmoe_np import DeferralChain, GPUExperts, KExpertsCPUBuffer, KExpertsSFTBuffer, KTMoEWrapper, MoEConfig
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.io import SafetensorsCheckpoint, SafetensorsFile, load_experts
from ktmoe_np.io.gguf.checkpoint import GgufCheckpoint
from ktmoe_np.models import EMBEDDED_MODEL, MoEDecoder, loss_and_gradients

SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "moe_intermediate_size": 32}
ONES = {
    "gate": np.ones((4, 32, 64), ml_dtypes.bfloat16),
    "down": np.ones((4, 64, 32), ml_dtypes.bfloat16),
}
BATCH = (np.ones((3, 64), ml_dtypes.bfloat16), np.array([[0, 1]] * 3), np.ones((3, 2), np.float32))


def make(**options: Any) -> Any:
    return KTMoEWrapper(layer_idx=5, **SIZES, activation="relu2", **options)


def loaded(**options: Any) -> Any:
    moe = make(**options)
    moe.load_weights_from_tensors(ONES["gate"], None, ONES["down"])
    return moe


def test_wrappers() -> None:
    moe = make()
    sizes = "E=4 P=2 H=64 I=32 relu2"
    assert repr(moe) == f"<NativeMoEWrapper layer 5: BF16, {sizes}, not loaded>"
    moe.load_weights_from_tensors(ONES["gate"], None, ONES["down"])
    assert repr(moe) == f"<NativeMoEWrapper layer 5: BF16, {sizes}, loaded>"
    grouped = make(method="AMXINT4", group_size=64)
    assert repr(grouped) == f"<AMXMoEWrapper layer 5: AMXINT4 in groups of 64, {sizes}, not loaded>"


def test_wrappers_for_training_count_saved_passes() -> None:
    sft = loaded(mode="sft", method="BF16_SFT", lora_rank=3, max_cache_depth=2)
    assert repr(sft).endswith("loaded, lora_rank 3, 0 of 2 passes saved>")
    sft.forward_sft(*BATCH)
    assert repr(sft).endswith("loaded, lora_rank 3, 1 of 2 passes saved>")
    gradients = sft.backward(BATCH[0])
    assert repr(sft).endswith("loaded, lora_rank 3, 0 of 2 passes saved>")
    assert repr(gradients).startswith(
        "<SFTGradients grad_input bfloat16 [3, 64], grad_weights float32 [3, 2], gate_lora_a float32 [4, 3, "
    )


def test_tickets_and_chains() -> None:
    moe = loaded(max_deferred_experts_per_token=1)
    chain = DeferralChain()
    assert repr(chain) == "<DeferralChain empty>"
    moe.forward(*BATCH, chain=chain)
    assert repr(chain) == "<DeferralChain with deferred experts of layer 5>"
    KTMoEWrapper.drain_deferred(chain=chain)
    assert repr(chain) == "<DeferralChain empty>"
    out = np.empty((3, 64), ml_dtypes.bfloat16)
    ticket = moe.cpu_infer.submit(moe._layer.forward_task(*BATCH, out))
    moe.cpu_infer.wait(ticket)
    assert repr(ticket) == f"Ticket({ticket.number})"


def test_engines() -> None:
    config = ext.WorkerPoolConfig(2, [0, 0], [1, 2])
    assert (
        repr(config)
        == "WorkerPoolConfig(subpool_count=2, subpool_numa_map=[0, 0], subpool_thread_count=[1, 2])"
    )
    engine = make().cpu_infer
    pool = engine.backend_
    threads = f"{pool.num_threads} threads in {pool.num_subpools} sub-pools"
    nodes = f"NUMA nodes {list(pool.config.subpool_numa_map)}"
    assert repr(pool) == f"<WorkerPool {threads}, {nodes}>"
    assert (
        re.fullmatch(r"<CPUInfer (.*), (\d+) of (\d+) tasks completed>", repr(engine))[1]
        == f"{threads}, {nodes}"
    )
    ended = ext.CPUInfer(1)
    ended.shutdown()
    assert repr(ended).endswith("0 of 0 tasks completed>")


def test_buffers() -> None:
    slot = KExpertsCPUBuffer.get_buffer(3, 64, 2)[0]
    assert re.fullmatch(
        r"<BatchBuffers T=3 H=64 P=2, (used by no task|last used by Ticket\(\d+\))>", repr(slot)
    )
    sft = loaded(mode="sft", method="BF16_SFT", reuse_buffers=True)
    slots = KExpertsSFTBuffer.get_buffer(3, 64, 2)
    assert repr(slots[1]) == "<SFTBatchBuffers T=3 H=64 P=2, nothing in use>"
    sft.submit_forward_sft(*BATCH)
    assert repr(slots[1]) == "<SFTBatchBuffers T=3 H=64 P=2, output in use>"
    sft.sync_forward_sft()
    matrices = KExpertsSFTBuffer.get_matrices(sft, {"gate_lora_a": (4, 16, 64)})
    assert repr(matrices) == "<MatrixSet gate_lora_a float32 [4, 16, 64]>"


def test_experts_of_a_gpu() -> None:
    mask = np.array([False, True, False, True])
    gpu = GPUExperts(make().config, mask, ONES["gate"][mask], None, ONES["down"][mask])
    assert repr(gpu) == "<GPUExperts layer 5: 2 of 4 experts, H=64 I=32 relu2, NumPy arrays>"


def test_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": np.zeros(2, np.float32), "b": np.zeros((2, 3), np.float32)})
    assert repr(SafetensorsFile(path)) == f"<SafetensorsFile {str(path)!r}: 2 tensors>"
    opened = f"<SafetensorsCheckpoint {str(tmp_path)!r}: 2 tensors, 1 of 1 files open>"
    assert repr(SafetensorsCheckpoint(tmp_path)) == opened
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3moe")
    writer.add_tensor("output.weight", np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shown = repr(GgufCheckpoint(tmp_path / "model.gguf"))
    assert shown == f"<GgufCheckpoint {str(tmp_path / 'model.gguf')!r}: 1 tensors in 1 file>"


def test_experts_of_a_checkpoint() -> None:
    experts = load_experts(EMBEDDED_MODEL, 0)
    inter, hidden = experts.gate.codes[0].shape
    assert repr(experts).startswith(
        f"<ExpertWeights gate_proj 16 x bfloat16 [{inter}, {hidden}], up_proj 16 x "
    )
    assert repr(experts.down).startswith(f"<Projection codes 16 x bfloat16 [{hidden}, {inter}]")


def test_decoders() -> None:
    model = MoEDecoder.from_pretrained(mode="sft", lora_rank=2)
    c = model.config
    expected = (
        f"{c.num_layers} layers of {c.num_experts} experts, {c.num_experts_per_tok} per token, AMXBF16_SFT"
    )
    assert expected in repr(model)
    cache = model.new_cache()
    model.forward([list(b"In the")], [cache])
    assert repr(cache) == f"<KVCache 6 tokens in {c.num_layers} layers>"
    _, kept = model.forward_sft([list(b"In the"), list(b"In")])
    assert repr(kept) == "<TrainingPass 1: [6, 2] tokens>"
    assert "1 forward passes saved" in repr(model)
    model.clear_cache()
    assert re.match(
        r"<Loss \d\.\d{4} bits per token over 5 tokens", repr(loss_and_gradients(model, [list(b"In the")]))
    )


def test_configs_can_be_evaluated_again() -> None:
    config = MoEConfig(**SIZES)
    shown = repr(config)
    assert shown.startswith("MoEConfig(num_experts=4, num_experts_per_tok=2, hidden_size=64,")
    assert "\n" not in shown


@pytest.mark.parametrize(
    "made",
    [
        make,
        lambda: make(mode="sft", method="BF16_SFT"),
        DeferralChain,
        lambda: KExpertsCPUBuffer.get_buffer(1, 2, 1)[0],
        lambda: KExpertsSFTBuffer.get_buffer(1, 2, 1)[0],
        lambda: SafetensorsCheckpoint(EMBEDDED_MODEL),
        lambda: SafetensorsFile(EMBEDDED_MODEL / "model.safetensors"),
        lambda: load_experts(EMBEDDED_MODEL, 0),
        MoEDecoder.from_pretrained,
    ],
)
def test_of_an_object_that_is_half_made(made: Callable[[], Any]) -> None:
    """A constructor that failed leaves an object without attributes, which a traceback may show."""
    example = made()
    kind = type(example)
    assert repr(object.__new__(kind)) == f"<{kind.__name__}>"
    shown = repr(example)
    assert shown.startswith(f"<{kind.__name__} ")
    assert "\n" not in shown
    assert len(shown) < 300


def test_a_path_with_a_line_break(tmp_path: Path) -> None:
    directory = tmp_path / "a\nb"
    directory.mkdir()
    write_safetensors(directory / "model.safetensors", {"a": np.zeros(2, np.float32)})
    assert "\n" not in repr(SafetensorsCheckpoint(directory))
