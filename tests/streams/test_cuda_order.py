"""Passes that share a CUDA stream: threads, slots that are still needed, and memory that is locked once."""

from __future__ import annotations

from fake_cuda_runs import run


def test_threads_that_use_one_stream(cuda_driver: str) -> None:
    run(
        cuda_driver,
        """
        from concurrent.futures import ThreadPoolExecutor
        moes = [layer.wrapper(2, layer_idx=i) for i in range(3)]

        def work(i):
            rng = np.random.default_rng(i)
            given, result = DeviceArray(draw(rng, 6, 40)), DeviceArray(np.zeros((6, 40), bf16))
            for turn in range(100):
                given.value[...] = draw(rng, 6, 40)
                if turn % 2:
                    moes[i].forward(given, ids, w, stream, out=result)
                else:
                    moes[i].submit_forward(given, ids, w, stream, out=result)
                    moes[i].sync_forward(cuda_stream=stream)
                stream.synchronize()
                assert_same_bits(result.value, moes[i].forward(given.value, *batch[1:]))

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, range(3)))
        """,
    )


def test_a_drain_does_not_overwrite_a_pass_that_is_pending(cuda_driver: str) -> None:
    said = run(
        cuda_driver,
        """
        from ktmoe_np import KTMoEWrapper
        moe = layer.wrapper(2, max_deferred_experts_per_token=1)
        expected, remaining = moe.forward(*batch), KTMoEWrapper.drain_deferred()
        rest = DeviceArray(np.zeros((6, 40), bf16))
        moe.submit_forward(x, ids, w, stream, out=out)
        print(raised(KTMoEWrapper.drain_deferred, stream, out=rest))
        moe.sync_forward(cuda_stream=stream)
        assert KTMoEWrapper.drain_deferred(stream, out=rest) is rest
        stream.synchronize()
        assert_same_bits(out.value, expected)
        assert_same_bits(rest.value, remaining)
        """,
    )
    assert said == "RuntimeError: a pass of layer 0 is pending in the stream, call sync_forward first\n"


def test_buffers_are_taken_while_a_pass_begins_with_their_output(cuda_driver: str) -> None:
    """Layer 1 is not waited for, so layer 0's deferred experts may still be computed."""
    run(
        cuda_driver,
        """
        from ktmoe_np import KTMoEWrapper
        deferring = {"max_deferred_experts_per_token": 1}
        moes = [layer.wrapper(2, layer_idx=0, **deferring), layer.wrapper(2, layer_idx=1)]
        third = layer.wrapper(2, layer_idx=2)
        expected = [moe.forward(*batch) for moe in moes] + [third.forward(*batch)]
        outs = [DeviceArray(np.zeros((6, 40), bf16)) for _ in range(3)]
        moes[0].forward(x, ids, w, stream, out=outs[0])
        moes[1].submit_forward(x, ids, w, stream, out=outs[1])
        both = (moes[1], third)
        taken = {id(buffers) for one in both for buffers in one._stream_runner.buffers_in_use()}
        third.submit_forward(x, ids, w, stream, out=outs[2])
        mine = third._stream_runner.buffers_in_use()
        assert not taken & {id(buffers) for buffers in mine}
        moes[1].sync_forward(cuda_stream=stream)
        third.sync_forward(cuda_stream=stream)
        stream.synchronize()
        for found, want in zip(outs, expected):
            assert_same_bits(found.value, want)
        """,
    )


def test_memory_is_locked_once_for_layers_and_batches_of_several_sizes(cuda_driver: str) -> None:
    run(
        cuda_driver,
        """
        wide = layer.wrapper(4, layer_idx=1)
        four = draw_batch(rng, layer, 6, 4)
        there = list(map(DeviceArray, four))
        locked = []
        for turn in range(12):
            for moe_, on_host, arrays in ((moe, batch, (x, ids, w)), (wide, four, there)):
                tokens = (6, 1, 4)[turn % 3]
                part = [DeviceArray(array.value[:tokens]) for array in arrays]
                result = DeviceArray(out.value[:tokens])
                moe_.forward(*part, stream, out=result)
                stream.synchronize()
                assert_same_bits(result.value, moe_.forward(*[array[:tokens] for array in on_host]))
            locked.append(num_locks())
        assert locked[0] == locked[-1] > 0, locked
        """,
    )


def test_an_error_is_raised_before_anything_is_done(cuda_driver: str) -> None:
    said = run(
        cuda_driver,
        """
        other = Stream()
        moe.forward(x, DeviceArray(np.full((6, 2), 5)), w, other, out=out)
        other.synchronize()
        while moe.cpu_infer.num_completed < moe.cpu_infer.num_submitted:
            time.sleep(0.001)
        before = moe.cpu_infer.num_submitted
        print(raised(moe.forward, x, ids, w, stream, out=out))
        stream.synchronize()
        assert moe.cpu_infer.num_submitted == before
        moe.forward(x, ids, w, stream, out=out)
        stream.synchronize()
        assert_same_bits(out.value, expected)
        """,
    )
    assert said.startswith("IndexError: topk_ids: got expert 5")
