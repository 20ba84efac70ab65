"""Products that take int8 activations in CUDA streams: the bits of the host, for a layer or for a call."""

from __future__ import annotations

import pytest
from fake_cuda_runs import run

#: A layer in two wrappers, and what the host makes of it in either dtype.
LAYER = """
options = {"method": "MOE_INT8"}
moe, made = layer.wrapper(2, **options), layer.wrapper(2, activation_dtype="int8", **options)
in_bf16 = moe.forward(*batch)
in_int8 = moe.forward(*batch, activation_dtype="int8")
assert not np.array_equal(in_bf16, in_int8)

def check(expected):
    stream.synchronize()
    assert_same_bits(out.value, expected)
    out.value[...] = 0
"""


def test_the_bits_are_those_of_the_host(cuda_driver: str) -> None:
    run(
        cuda_driver,
        LAYER,
        """
        for _ in range(2):  # prepared passes of all kinds are kept side by side
            for dtype, expected in ((None, in_bf16), ("int8", in_int8), ("bfloat16", in_bf16)):
                assert moe.forward(x, ids, w, stream, out=out, activation_dtype=dtype) is out
                check(expected)
                moe.submit_forward(x, ids, w, stream, out=out, activation_dtype=dtype)
                moe.sync_forward(cuda_stream=stream)
                check(expected)
            for dtype, expected in ((None, in_int8), (np.int8, in_int8), (bf16, in_bf16)):
                made.forward(x, ids, w, stream, out=out, activation_dtype=dtype)
                check(expected)
        """,
    )


def test_a_graph_keeps_what_it_was_captured_with(cuda_driver: str) -> None:
    run(
        cuda_driver,
        LAYER,
        """
        stream.capture(True)
        moe.forward(x, ids, w, stream, out=out, activation_dtype="int8")
        stream.capture(False)
        moe.forward(x, ids, w, stream, out=out)
        check(in_bf16)
        for _ in range(2):
            x.value[...] = draw(rng, 6, 40)
            stream.replay()
            check(made.forward(x.value, *batch[1:]))
        """,
    )


@pytest.mark.parametrize("dtypes", [("int8", "int8"), ("int8", "bfloat16"), ("bfloat16", "int8")])
def test_deferred_experts(cuda_driver: str, dtypes: tuple[str, str]) -> None:
    run(
        cuda_driver,
        f"dtypes = {dtypes}",
        """
        from ktmoe_np import KTMoEWrapper
        layers = [draw_layer(rng, 5, 24, 40) for _ in dtypes]
        batches = [draw_batch(rng, one, 6, 4) for one in layers]

        def wrappers(*own):
            options = {"method": "MOE_INT8", "max_deferred_experts_per_token": 2}
            return [
                one.wrapper(4, layer_idx=i, activation_dtype=dtype, **options)
                for i, (one, dtype) in enumerate(zip(layers, own))
            ]

        expected = [moe.forward(*batch) for moe, batch in zip(wrappers(*dtypes), batches)]
        expected.append(KTMoEWrapper.drain_deferred())
        moes, there = wrappers(None, None), [[DeviceArray(array) for array in batch] for batch in batches]
        outs = [DeviceArray(np.zeros((6, 40), bf16)) for _ in range(3)]
        for asked in (dtypes, dtypes[::-1], dtypes):
            for moe, batch, result, dtype in zip(moes, there, outs, asked):
                moe.submit_forward(*batch, stream, out=result, activation_dtype=dtype)
                moe.sync_forward(cuda_stream=stream)
            KTMoEWrapper.drain_deferred(stream, out=outs[-1])
            stream.synchronize()
        for found, want in zip(outs, expected):
            assert_same_bits(found.value, want)
        """,
    )


def test_what_a_layer_does_not_have_is_refused_at_once(cuda_driver: str) -> None:
    said = run(
        cuda_driver,
        """
        quantized = layer.wrapper(2, method="AMXINT8")
        wanted = quantized.forward(*batch)
        for call in (moe.forward, moe.submit_forward):
            print(raised(call, x, ids, w, stream, out=out, activation_dtype="int8"))
        for call in (quantized.forward, quantized.submit_forward):
            print(raised(call, x, ids, w, stream, out=out, activation_dtype="bfloat16"))
        print(raised(moe.forward, x, ids, w, stream, out=out, activation_dtype="int4"))
        print(raised(moe.sync_forward, cuda_stream=stream))
        stream.synchronize()
        assert not out.value.any()
        moe.forward(x, ids, w, stream, out=out)
        stream.synchronize()
        assert_same_bits(out.value, expected)
        quantized.forward(x, ids, w, stream, out=out, activation_dtype="int8")
        stream.synchronize()
        assert_same_bits(out.value, wanted)
        """,
    )
    no_integers = (
        "ValueError: activation_dtype: got int8, expected bfloat16: bf16 weights are not integers with scales"
    )
    no_bfloat16 = (
        "ValueError: activation_dtype: got bfloat16, expected int8: the method multiplies int8 activations; "
        "MOE_INT8 and MOE_INT4 take the same weights with bfloat16"
    )
    assert said.splitlines() == [
        *[no_integers] * 2,
        *[no_bfloat16] * 2,
        "ValueError: activation_dtype: got 'int4', expected None, 'bfloat16' or 'int8'",
        "RuntimeError: sync_forward: no pass of layer 0 is pending in a stream, call submit_forward first",
    ]


def test_weights_that_replace_others_are_asked_again(cuda_driver: str) -> None:
    said = run(
        cuda_driver,
        """
        from ktmoe_np import KTMoEWrapper
        moe = KTMoEWrapper(0, 5, 2, 64, 32, method="LLAMAFILE")
        rows = rng.standard_normal((5, 32, 64), np.float32)
        down = np.ascontiguousarray(rows.reshape(5, 64, 32))
        blocks = np.zeros((5, 64, 34), np.uint8)
        blocks[..., :2] = np.float16([0.01]).view(np.uint8)
        blocks[..., 2:] = rng.integers(0, 256, (5, 64, 32))
        batch = draw(rng, 6, 64), batch.ids, batch.weights
        there, out = [DeviceArray(array) for array in batch], DeviceArray(np.zeros((6, 64), bf16))
        moe.load_weights_from_tensors(rows, rows, blocks, down_format="Q8_0")
        wanted = moe.forward(*batch, activation_dtype="int8")
        moe.forward(*there, stream, out=out, activation_dtype="int8")
        stream.synchronize()
        assert_same_bits(out.value, wanted)
        moe.load_weights_from_tensors(rows, rows, down)
        print(raised(moe.forward, *there, stream, out=out, activation_dtype="int8"))
        moe.forward(*there, stream, out=out)
        stream.synchronize()
        assert_same_bits(out.value, moe.forward(*batch))
        """,
    )
    expected = "got int8, expected bfloat16: f32 weights are not integers with scales"
    assert said.splitlines() == [f"ValueError: activation_dtype: {expected}"]
