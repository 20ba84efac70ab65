"""Deferred experts in CUDA streams, batches whose size a graph reads, and the slots that passes share."""

from __future__ import annotations

import pytest
from fake_cuda_runs import run

#: Four layers that defer, what the host makes of them, and a pass of them in the stream.
LAYERS = """
from dataclasses import replace
from ktmoe_np import KTMoEWrapper
numbers, deferred = {numbers}, {deferred}
layers = [replace(draw_layer(rng, 5, 24, 40), scale_inputs={scale_inputs}) for _ in numbers]
batches = [draw_batch(rng, one, 6, 4) for one in layers]
moes = [
    one.wrapper(4, layer_idx=i, max_deferred_experts_per_token=d)
    for one, i, d in zip(layers, numbers, deferred, strict=True)
]

def on_host():
    outs = [moe.forward(*batch) for moe, batch in zip(moes, batches, strict=True)]
    remaining = KTMoEWrapper.drain_deferred()
    return outs + ([] if remaining is None else [remaining])

on_device = [[DeviceArray(array) for array in batch] for batch in batches]
outs = [DeviceArray(np.zeros((6, 40), bf16)) for _ in range(len(moes) + 1)]

def in_stream():
    for i, (moe, batch, out) in enumerate(zip(moes, on_device, outs)):
        if i % 2:
            assert moe.forward(*batch, stream, out=out) is out
            continue
        moe.submit_forward(*batch, stream, out=out)
        assert moe.sync_forward(cuda_stream=stream) is out
    return KTMoEWrapper.drain_deferred(stream, out=outs[-1])

def check(expected):
    stream.synchronize()
    for found, want in zip(outs, expected):
        assert_same_bits(found.value, want)
"""


def layers(numbers: list[int], deferred: list[int], *, scale_inputs: bool = False) -> str:
    return LAYERS.format(numbers=numbers, deferred=deferred, scale_inputs=scale_inputs)


@pytest.mark.parametrize(
    ("numbers", "deferred"),
    [
        ([0, 1, 2, 3], [2, 2, 2, 2]),
        ([0, 1, 2, 3], [1, 4, 2, 0]),
        ([1, 3, 5, 7], [3, 3, 3, 0]),  # all would use the same slot
    ],
)
@pytest.mark.parametrize("scale_inputs", [False, True])
def test_the_bits_are_those_of_the_host(
    cuda_driver: str, numbers: list[int], deferred: list[int], scale_inputs: bool
) -> None:
    run(
        cuda_driver,
        layers(numbers, deferred, scale_inputs=scale_inputs),
        """
        expected = on_host()
        for _ in range(3):
            drained = in_stream()
            assert (drained is None) == (deferred[-1] == 0)
            check(expected)
        """,
    )


def test_a_graph_with_deferred_experts(cuda_driver: str) -> None:
    run(
        cuda_driver,
        layers([0, 1, 2, 3], [2, 2, 2, 1]),
        """
        stream.capture(True)
        in_stream()
        stream.capture(False)
        for _ in range(4):
            for batch, there in zip(batches, on_device):
                batch.x[...] = there[0].value[...] = draw(rng, 6, 40)
            expected = on_host()
            stream.replay()
            check(expected)
        """,
    )


def test_a_pass_that_was_not_drained(cuda_driver: str) -> None:
    said = run(
        cuda_driver,
        layers([0, 1], [2, 2]),
        """
        expected = on_host()
        in_order = lambda i: moes[i].forward(*on_device[i], stream, out=outs[i])
        in_order(0)
        print(raised(in_order, 0))
        small = [DeviceArray(array[:5]) for array in batches[1]]
        print(raised(moes[1].forward, *small, stream, out=DeviceArray(outs[1].value[:5])))
        print(raised(KTMoEWrapper.drain_deferred, stream))
        print(raised(KTMoEWrapper.drain_deferred, out=outs[0]))
        moes[1].forward(*batches[1])  # the host's chain is another
        KTMoEWrapper.drain_deferred()
        in_order(1)
        KTMoEWrapper.drain_deferred(stream, out=outs[2])
        check(expected)
        assert KTMoEWrapper.drain_deferred(stream, out=outs[2]) is None
        """,
    )
    assert said.splitlines() == [
        "RuntimeError: layer 0: the deferred experts of layer 0 are left over from the pass before; call "
        "drain_deferred() after the last layer of a pass",
        "ValueError: hidden_states: got [5, 40], expected [6, 40] like the deferred output of layer 0",
        "TypeError: out: got None, expected an array on the device to write to: a DeviceArray cannot be made",
        "ValueError: out: got one without a cuda_stream, expected None",
    ]


def test_a_wrong_id_among_the_deferred_ones(cuda_driver: str) -> None:
    """Nothing is computed of the pass, nor of the one that would begin with what it leaves."""
    said = run(
        cuda_driver,
        layers([0, 1], [2, 0]),
        """
        expected = on_host()
        where = np.argmin(batches[0].weights[3])
        there = on_device[0][1].value
        kept, there[3, where] = there[3, where], 5
        for moe, arrays, out in zip(moes, on_device, outs):
            while (error := raised(moe.submit_forward, *arrays, stream, out=out)) != "nothing":
                print(error)  # of the layer before
            print(raised(moe.sync_forward, cuda_stream=stream))
        stream.synchronize()
        assert np.isnan(outs[0].value.astype(np.float32)).all()
        assert np.isnan(outs[1].value.astype(np.float32)).all()
        print(raised(moe.cpu_infer.sync))
        there[3, where] = kept
        in_stream()
        check(expected)
        """,
    )
    error = "IndexError: topk_ids: got expert 5 at [3, "
    assert any(line.startswith(error) for line in said.splitlines()), said


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_a_graph_reads_the_number_of_tokens(cuda_driver: str, dtype: str) -> None:
    said = run(
        cuda_driver,
        f"dtype = np.{dtype}",
        """
        number, narrow = DeviceArray(np.array([6], dtype)), DeviceArray(batch.ids.astype(dtype))
        stream.capture(True)
        moe.forward(x, narrow, w, stream, out=out, num_tokens=number)
        stream.capture(False)
        for used in (6, 4, 0, 1):
            number.value[0] = used
            stream.replay()
            stream.synchronize()
            assert_same_bits(out.value[:used], expected[:used])
            assert not out.value[used:].any()
        for used in (7, -1):
            number.value[0] = used
            stream.replay()
            stream.synchronize()
            assert np.isnan(out.value.astype(np.float32)).all()
            print(raised(moe.cpu_infer.sync))
        """,
    )
    assert said.splitlines() == [
        "IndexError: num_tokens: got 7, expected 0 to 6",
        "IndexError: num_tokens: got -1, expected 0 to 6",
    ]


def test_passes_that_wait_for_their_sync_share_no_buffers(cuda_driver: str) -> None:
    run(
        cuda_driver,
        """
        moes = [layer.wrapper(2, layer_idx=i) for i in (0, 2, 4, 6)]
        given = [DeviceArray(draw(rng, 6, 40)) for _ in moes]
        outs = [DeviceArray(np.zeros((6, 40), bf16)) for _ in moes]
        for _ in range(20):
            for one, there, result in zip(moes, given, outs):
                one.submit_forward(there, ids, w, stream, out=result)
            for i in (2, 0, 3, 1):
                moes[i].sync_forward(cuda_stream=stream)
            stream.synchronize()
            for one, result in zip(given, outs):
                assert_same_bits(result.value, moe.forward(one.value, *batch[1:]))
        gc.collect()
        moe.cpu_infer.sync()
        assert num_locked() <= 4  # those of the stream, and what the last passes had for themselves
        moes[0].submit_forward(given[0], ids, w, stream, out=outs[0])
        stream.synchronize()
        moe.cpu_infer.sync()
        del moes[0]  # and with it the pass that no call waits for any more
        gc.collect()
        moes[1].forward(given[2], ids, w, stream, out=outs[2])
        """,
    )
