"""Training passes in CUDA streams: the bits of the host, in pinned memory, and errors that become NaN."""

from __future__ import annotations

import pytest
from fake_cuda_runs import run

#: A layer with adapters, a step on the host, and the same arrays on the device.
STEP = """
from sft_layers import draw_student, draw_training
from ktmoe_np import KExpertsSFTBuffer
from ktmoe_np.arrays.device import device_array
from ktmoe_np.arrays.spec import ArraySpec
from ktmoe_np.sft.stream import DeviceBatch, stream_backward, stream_forward

student = draw_student(rng, (5, 24, 40), 3)
sft = student.wrapper(2)

def on_device(value):
    return device_array(DeviceArray(value), "x", ArraySpec((), ("...",)), stream.cuda_stream)

class Step:
    def __init__(self, tokens):
        self.batch, self.grad_output = draw_training(rng, student, tokens, 2)
        plain = student.wrapper(2)
        self.out, self.gradients = plain.forward_sft(*self.batch), plain.backward(self.grad_output)
        lora = {name: on_device(value) for name, value in student.lora.items()}
        self.there = DeviceBatch(*map(on_device, self.batch), lora)
        self.grad_there = on_device(self.grad_output)
        wanted = [self.gradients.grad_input, self.gradients.grad_weights, *self.gradients.matrices.values()]
        self.wanted, self.found = wanted, [on_device(np.zeros_like(each)) for each in wanted]
        self.out_there = on_device(np.zeros_like(self.out))

    def forward(self, save=True):
        self.number = stream_forward(sft, stream.cuda_stream, self.there, self.out_there, save)

    def backward(self, num=None):
        results = self.found[:num]
        stream_backward(sft, stream.cuda_stream, self.there, self.number, self.grad_there, results)

    def check(self, num=None):
        stream.synchronize()
        assert_same_bits(self.out_there.owner.value, self.out)
        for found, wanted in zip(self.found[:num], self.wanted[:num]):
            assert_same_bits(found.owner.value, wanted)
"""


def test_the_bits_are_those_of_the_host(cuda_driver: str) -> None:
    run(
        cuda_driver,
        STEP,
        """
        for tokens in (6, 1, 9, 6):
            step = Step(tokens)
            step.forward()
            step.backward()
            step.check()
        step.forward(save=False)
        assert step.number == 0
        step.backward(2)  # repeats the pass; gradients of rows alone
        step.check(2)
        assert num_locked() > 0
        """,
    )


def test_nobody_waits_and_buffers_are_used_in_turn(cuda_driver: str) -> None:
    run(
        cuda_driver,
        STEP,
        """
        steps = [Step(6) for _ in range(3)]
        for step in steps:
            step.forward(), step.backward()
        locks = num_locks()
        stream.synchronize()
        stream.stall(200)
        begin = time.perf_counter()
        for step in steps:  # the saved pass of all but the last is gone when they go back
            step.forward()
        for step in steps:
            step.backward()
        assert time.perf_counter() - begin < 0.15
        for step in steps:
            step.check()
        assert num_locks() == locks
        """,
    )


def test_memory_lives_until_the_stream_is_done(cuda_driver: str) -> None:
    run(
        cuda_driver,
        STEP,
        """
        step = Step(6)
        stream.stall(100)
        step.forward(), step.backward()
        KExpertsSFTBuffer.clear_buffer_cache()
        gc.collect()
        step.check()
        moe.cpu_infer.sync()
        del step
        gc.collect()
        """,
    )


def test_an_error_is_that_of_a_later_call(cuda_driver: str) -> None:
    said = run(
        cuda_driver,
        STEP,
        """
        step = Step(6)
        step.there.rows[1].owner.value[2, 1] = 5
        step.forward()
        stream.synchronize()
        assert np.isnan(step.out_there.owner.value.astype(np.float32)).all()
        print(raised(step.forward))
        step.backward()
        stream.synchronize()
        assert all(np.isnan(found.owner.value.astype(np.float32)).all() for found in step.found)
        print(raised(step.backward))
        """,
    )
    expected = "IndexError: topk_ids: got expert 5 at [2, 1], expected ids below 5"
    assert all(line.startswith(expected) for line in said.splitlines())
    assert len(said.splitlines()) == 2


@pytest.mark.crosscheck
def test_tensors_of_torch(cuda_driver: str) -> None:
    """What the operators of torch do for tensors of a device, here tensors of the CPU."""
    pytest.importorskip("torch")
    run(
        cuda_driver,
        STEP,
        """
        import torch
        from array_kinds import numpy_of, of_torch
        from ktmoe_np.arrays.device import _of_torch
        from ktmoe_np.torch import lora_parameters, streams

        streams.device_array = lambda value, name, spec, handle: _of_torch(value)[0]
        torch.cuda.current_stream = lambda device: stream
        step = Step(6)
        lora = [p.detach() for p in lora_parameters(sft).values()]
        tensors = [of_torch(array) for array in step.batch]
        grad = of_torch(step.grad_output)
        for with_lora in (True, False):
            out, number = streams.forward_in_stream(sft, *tensors, lora, True, None)
            found = streams.backward_in_stream(sft, *tensors, lora, int(number), grad, with_lora, None)
            stream.synchronize()
            assert_same_bits(numpy_of(out), step.out)
            assert len(found) == (8 if with_lora else 2)
            for one, wanted in zip(found, step.wanted):
                assert_same_bits(numpy_of(one), wanted)
        assert streams.stream_of(out) is None
        told = raised(streams.stream_of, out.to("meta"))
        assert told.startswith("NotImplementedError: hidden_states: got a tensor on meta, expected")
        """,
    )
