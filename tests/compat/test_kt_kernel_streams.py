"""kt-kernel's calls with CUDA streams, by a driver that needs no GPU, on tensors that say they are on one."""

from __future__ import annotations

import pytest
from fake_cuda_runs import run

pytest.importorskip("torch")

pytestmark = [pytest.mark.crosscheck, pytest.mark.subprocess]

#: Tensors of the host that call themselves those of a device, and torch's streams for the driver's.
_BEGIN = """
import contextlib, ctypes, types, torch
from array_kinds import numpy_of, of_torch
from fake_cuda import _driver
from ktmoe_np.compat import streams
from ktmoe_np.compat.kt_kernel import KTMoEWrapper

used = []
handles = types.SimpleNamespace

class OnDevice(torch.Tensor):
    is_cuda = True
    is_cpu = False
    device = torch.device("cuda:0")

    def record_stream(self, stream):
        used.append(stream.cuda_stream)

@contextlib.contextmanager
def entered(stream):
    used.append(stream.cuda_stream)
    yield

torch.cuda.stream = entered
torch.cuda.ExternalStream = lambda handle, device: handles(cuda_stream=handle)
torch.cuda.default_stream = lambda device: handles(cuda_stream=0)
torch.cuda.current_stream = lambda device=None: handles(cuda_stream=stream.cuda_stream)

def on_device(array):
    return of_torch(array).as_subclass(OnDevice)

def values(tensor):
    return numpy_of(tensor.as_subclass(torch.Tensor))

def made(**options):
    moe = KTMoEWrapper(0, 5, 2, 40, 24, None, None, None, None, 512, **{"method": "BF16", **options})
    moe.load_weights_from_tensors(*map(of_torch, layer.matrices), torch.arange(5))
    return moe

x, ids, w = map(on_device, batch)
"""


def test_passes_go_into_the_stream_of_the_call(cuda_driver: str) -> None:
    run(
        cuda_driver,
        _BEGIN,
        """
        kt, own = made(), Stream()
        for given, handle in ((own.cuda_stream, own.cuda_stream), (own, own.cuda_stream), (0, 0)):
            used.clear()
            own.stall(100)
            kt.submit_forward(x, ids, w, given)
            y = kt.sync_forward(x, given)
            assert used == [handle, handle, stream.cuda_stream]  # the last is the caller's
            _driver.fake_stream_synchronize(ctypes.c_void_p(handle))
            assert_same_bits(values(y), expected)
        used.clear()
        y = kt.forward(x, ids, w, None)
        assert used == [stream.cuda_stream] * 2  # torch's current stream, which is the caller's
        stream.synchronize()
        assert_same_bits(values(y), expected)
        y = kt.forward(x.reshape(2, 3, 40), ids.int(), w, stream.cuda_stream)
        stream.synchronize()
        assert_same_bits(values(y), expected)
        cpu = of_torch(batch.ids)
        error = raised(kt.forward, x, cpu, w, 0)
        assert error == "ValueError: topk_ids: got a tensor on cpu, expected cuda:0, as hidden_states"
        error = raised(kt.sync_forward, x, stream.cuda_stream)
        assert error.startswith("RuntimeError: sync_forward: no pass of layer 0 is pending"), error
        """,
    )


def test_a_graph_reads_the_mask_that_is_changed_in_place(cuda_driver: str) -> None:
    run(
        cuda_driver,
        _BEGIN,
        """
        kt = made()
        stream.capture(True)
        kt.submit_forward(x, ids, w, stream.cuda_stream)
        y = kt.sync_forward(x, stream.cuda_stream)
        stream.capture(False)
        for mask in ([0, 0, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 1, 1, 1]):
            kt.gpu_experts_mask.copy_(torch.tensor(mask, dtype=torch.bool))
            stream.replay()
            stream.synchronize()
            wanted = layer.forward(batch, gpu_experts_mask=np.array(mask, np.bool_))
            assert_same_bits(values(y), wanted)
        """,
    )


def test_deferred_experts_of_layers_in_a_stream(cuda_driver: str) -> None:
    run(
        cuda_driver,
        _BEGIN,
        """
        ours = [layer.wrapper(2, layer_idx=i, max_deferred_experts_per_token=d) for i, d in enumerate((1, 0))]
        wanted = [moe.forward(*batch) for moe in ours]
        kts = []
        for i, d in enumerate((1, None)):
            arguments = (i, 5, 2, 40, 24, None, None, None, None, 512, False, d, "BF16")
            kts.append(KTMoEWrapper(*arguments))
            kts[i].load_weights_from_tensors(*map(of_torch, layer.matrices))
        for kt, y in zip(kts, wanted, strict=True):
            kt.submit_forward(x, ids, w, stream.cuda_stream)
            found = kt.sync_forward(x, stream.cuda_stream)
            stream.synchronize()
            assert_same_bits(values(found), y)
        """,
    )


def test_an_adapter_is_served_in_a_stream(cuda_driver: str) -> None:
    run(
        cuda_driver,
        _BEGIN,
        """
        from sft_layers import Student, draw_lora
        student = Student(layer, draw_lora(rng, layer, 4, bf16), 4)
        wanted = student.wrapper(2).forward(*batch)
        kt = made(method="AMXBF16_SFT", mode="sft", lora_rank=4, lora_alpha=student.lora_alpha)
        names = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")
        lora = [of_torch(student.lora[name]) for name in names]
        kt.init_lora_weights(*lora, *map(torch.zeros_like, lora))
        for routed in (ids, ids.int()):
            kt.submit_forward_inference(x, routed, w, stream.cuda_stream)
            y = kt.sync_forward_inference(stream.cuda_stream)
            stream.synchronize()
            assert_same_bits(values(y), wanted)
        error = raised(kt.submit_forward_inference, x, ids[:, :1], w, stream.cuda_stream)
        assert error.startswith("ValueError: expert_ids: got int64 [6, 1], expected int64 [6, 2]"), error
        kt.submit_forward_inference(x, ids, w, 0)
        kt.sync_forward_inference(0)
        """,
    )
