"""CUDA streams that submit passes and wait for them, by a driver that needs no GPU."""

from __future__ import annotations

from fake_cuda_runs import run


def test_a_pass_in_a_stream(cuda_driver: str) -> None:
    run(
        cuda_driver,
        """
        result = moe.forward(x, ids, w, cuda_stream=stream, out=out)
        assert result is out
        stream.synchronize()
        assert_same_bits(out.value, expected)
        assert num_locked() == 1
        moe.forward(x, ids, w, cuda_stream=stream.cuda_stream, out=out)
        stream.synchronize()
        assert num_locked() == 1
        """,
    )


def test_the_default_stream_and_parts_of_a_batch(cuda_driver: str) -> None:
    run(
        cuda_driver,
        """
        from fake_cuda import _driver
        small = layer.wrapper(2, chunked_prefill_size=4)
        small.forward(x, ids, w, cuda_stream=0, out=out)
        _driver.fake_stream_synchronize(None)
        assert_same_bits(out.value, expected)
        """,
    )


def test_layers_follow_each_other_without_waiting(cuda_driver: str) -> None:
    run(
        cuda_driver,
        """
        layers = [draw_layer(rng, 5, 24, 40) for _ in range(5)]
        moes = [one.wrapper(2, layer_idx=i) for i, one in enumerate(layers)]
        outs, before = [x], batch.x
        stream.stall(200)
        for moe in moes:
            outs.append(DeviceArray(np.zeros((6, 40), bf16)))
            moe.submit_forward(outs[-2], ids, w, stream, out=outs[-1])
            assert moe.sync_forward(cuda_stream=stream) is outs[-1]
        assert not any(one.value.any() for one in outs[1:])  # nothing has waited
        stream.synchronize()
        for moe, found in zip(moes, outs[1:], strict=True):
            before = moe.forward(before, *batch[1:])
            assert_same_bits(found.value, before)
        """,
    )


def test_a_graph_repeats_a_pass_on_new_numbers(cuda_driver: str) -> None:
    run(
        cuda_driver,
        """
        stream.capture(True)
        moe.forward(x, ids, w, cuda_stream=stream, out=out)
        stream.capture(False)
        stream.synchronize()
        assert not out.value.any()
        for _ in range(3):
            x.value[...] = draw(rng, 6, 40)
            stream.replay()
            stream.synchronize()
            assert_same_bits(out.value, moe.forward(x.value, *batch[1:]))
        """,
    )


def test_exceptions_come_with_a_sync(cuda_driver: str) -> None:
    said = run(
        cuda_driver,
        """
        wrong = DeviceArray(np.full((6, 2), 5))
        moe.submit_forward(x, wrong, w, stream, out=out)
        stream.synchronize()
        while moe.cpu_infer.num_completed < moe.cpu_infer.num_submitted:
            time.sleep(0.001)
        print(raised(moe.sync_forward, cuda_stream=stream))
        stream.synchronize()
        assert np.isnan(out.value.astype(np.float32)).all()
        print(raised(moe.cpu_infer.sync))
        said = raised(moe.forward, x, wrong, w, cuda_stream=stream, out=out)
        stream.synchronize()
        print({said, raised(moe.cpu_infer.sync)} - {"nothing"})
        moe.forward(x, ids, w, cuda_stream=stream, out=out)
        stream.synchronize()
        assert_same_bits(out.value, expected)
        """,
    )
    error = "IndexError: topk_ids: got expert 5 at [0, 0], expected ids below 5 (negative ids are skipped)"
    assert said.splitlines() == [error, "nothing", str({error})]


def test_a_stream_waits_for_tasks_of_the_host(cuda_driver: str) -> None:
    run(
        cuda_driver,
        """
        result = np.zeros((6, 40), bf16)
        task = moe._layer.forward_task(*batch, result)
        moe.cpu_infer.submit_with_cuda_stream(stream.cuda_stream, task)
        moe.cpu_infer.sync_with_cuda_stream(stream.cuda_stream)
        stream.synchronize()
        assert_same_bits(result, expected)
        moe.cpu_infer.sync_with_cuda_stream(stream.cuda_stream, allow_n_pending=3)
        stream.synchronize()
        """,
    )


def test_buffers_are_let_go_when_others_are_used(cuda_driver: str) -> None:
    run(
        cuda_driver,
        """
        most = 0
        for tokens in (1, 2, 3, 4, 5, 6) * 4:
            part, result = [DeviceArray(array[:tokens]) for array in batch], DeviceArray(out.value[:tokens])
            moe.forward(*part, cuda_stream=stream, out=result)
            stream.synchronize()
            assert_same_bits(result.value, expected[:tokens])
            most = max(most, num_locked())
        assert most <= 4, most
        moe.forward(x, ids, w, cuda_stream=stream, out=out)
        stream.synchronize()
        moe.cpu_infer.sync()
        del moe
        KExpertsCPUBuffer.clear_buffer_cache()
        gc.collect()
        assert num_locked() == 0, num_locked()
        """,
    )


def test_buffers_live_until_they_are_copied(cuda_driver: str) -> None:
    run(
        cuda_driver,
        """
        moe.submit_forward(x, ids, w, stream, out=out)
        moe.cpu_infer.sync_with_cuda_stream(stream.cuda_stream)
        stream.synchronize()
        stream.stall(300)
        moe.sync_forward(cuda_stream=stream)
        KExpertsCPUBuffer.clear_buffer_cache()
        for _ in range(3):
            moe.forward(*batch)  # releases finished objects
            gc.collect()
        assert num_locked() == 1
        stream.synchronize()
        assert_same_bits(out.value, expected)
        """,
    )


def test_streams_have_buffers_of_their_own(cuda_driver: str) -> None:
    run(
        cuda_driver,
        """
        other, layers = Stream(), [layer.wrapper(2, layer_idx=i) for i in (0, 2)]
        cases = [(moe, s, DeviceArray(draw(rng, 6, 40))) for moe, s in zip(layers, (stream, other))]
        for _ in range(200):
            outs = [DeviceArray(np.zeros((6, 40), bf16)) for _ in cases]
            for (moe, s, given), result in zip(cases, outs):
                moe.forward(given, ids, w, cuda_stream=s, out=result)
            for (moe, s, given), result in zip(cases, outs):
                s.synchronize()
        for (moe, s, given), result in zip(cases, outs):
            assert_same_bits(result.value, moe.forward(given.value, *batch[1:]))
        """,
    )


def test_an_engine_that_has_ended_gives_no_old_numbers(cuda_driver: str) -> None:
    said = run(
        cuda_driver,
        """
        moe.forward(x, ids, w, cuda_stream=stream, out=out)
        stream.synchronize()
        stream.capture(True)
        moe.forward(x, ids, w, cuda_stream=stream, out=out)
        stream.capture(False)
        moe.cpu_infer.shutdown()
        stream.replay()
        stream.synchronize()
        assert np.isnan(out.value.astype(np.float32)).all()
        print(raised(moe.cpu_infer.sync_with_cuda_stream, stream.cuda_stream))
        """,
    )
    assert said.startswith("RuntimeError: ")


def test_what_is_wrong(cuda_driver: str) -> None:
    said = run(
        cuda_driver,
        """
        from ktmoe_np import KTMoEWrapper
        call = moe.submit_forward
        short, long = DeviceArray(batch.ids.astype(np.int16)), DeviceArray(np.zeros((6, 41), bf16))
        print(raised(call, batch.x, ids, w, stream, out=out))
        print(raised(call, x, batch.ids, w, stream, out=out))
        print(raised(call, x, short, w, stream, out=out))
        print(raised(call, long, ids, w, stream, out=out))
        print(raised(call, x, ids, w, stream))
        print(raised(call, x, ids, w, stream, out=DeviceArray(np.zeros((6, 40), np.float32))))
        print(raised(call, DeviceArray(batch.x, (2, 12)), ids, w, stream, out=out))
        print(raised(call, x, ids, w, "stream", out=out))
        print(raised(call, x, ids, w, -1, out=out))
        print(raised(call, x, ids, w, stream, out=out, incremental=True))
        print(raised(moe.sync_forward, cuda_stream=stream))
        call(x, ids, w, stream, out=out)
        print(raised(call, x, ids, w, stream, out=out))
        moe.sync_forward(cuda_stream=stream)
        empty = KTMoEWrapper(3, 5, 2, 40, 24)
        print(raised(empty.forward, x, ids, w, stream, out=out))
        call(x, ids, w, stream, out=out)
        other = Stream()
        print(raised(moe.sync_forward, cuda_stream=other).replace(hex(other.cuda_stream), "another")
              .replace(hex(stream.cuda_stream), "the one"))
        assert moe.sync_forward(cuda_stream=stream) is out
        print(raised(call, x, ids, w, stream, out=out, num_tokens=np.ones(1, np.int64)))
        print(raised(call, x, ids, w, stream, out=out, num_tokens=DeviceArray(np.ones(2, np.int64))))
        print(raised(moe.forward, *batch, num_tokens=2))
        print(raised(call, *batch, num_tokens=2))
        print(raised(moe.forward, x, batch.ids, batch.weights))
        stream.synchronize()
        stream.destroy()
        print(raised(call, x, ids, w, stream, out=out))
        """,
    )
    assert said.splitlines() == [
        "TypeError: hidden_states: got ndarray on the CPU, expected bfloat16 [..., 40] on a CUDA device",
        "TypeError: topk_ids: got ndarray on the CPU, expected int64 or int32 [6, 2] on a CUDA device",
        "TypeError: topk_ids: got int16 [6, 2], expected int64 or int32 [6, 2] on a CUDA device",
        "ValueError: hidden_states: got bfloat16 [6, 41], expected bfloat16 [..., 40] on a CUDA device",
        "TypeError: out: got None, expected an array on the device to write to: a DeviceArray cannot be made",
        "TypeError: out: got float32 [6, 40], expected bfloat16 [6, 40] on a CUDA device",
        "TypeError: hidden_states: got gaps in an array, expected bfloat16 [..., 40] on a CUDA device",
        "TypeError: cuda_stream: got 'stream', expected a torch or CuPy stream, or the handle of one",
        "TypeError: cuda_stream: got -1, expected a torch or CuPy stream, or the handle of one",
        "ValueError: incremental: got True with a cuda_stream, expected False",
        "RuntimeError: sync_forward: no pass of layer 0 is pending in a stream, call submit_forward first",
        "RuntimeError: a pass of layer 0 is pending in a stream, call sync_forward first",
        "RuntimeError: layer 3 has no weights yet, load them first",
        "ValueError: cuda_stream: got another, expected that of the pass, the one",
        "TypeError: num_tokens: got ndarray on the CPU, expected int64 or int32 [1] on a CUDA device",
        "ValueError: num_tokens: got int64 [2], expected int64 or int32 [1] on a CUDA device",
        "ValueError: num_tokens: got one without a cuda_stream, expected None: hand over fewer tokens",
        "ValueError: num_tokens: got one without a cuda_stream, expected None: hand over fewer tokens",
        "TypeError: hidden_states: got DeviceArray, expected an array on the CPU (NumPy, or with __dlpack__)",
        "RuntimeError: cuda: cuMemcpyAsync: invalid resource handle (400)",
    ]


def test_without_a_driver_or_a_gpu(cuda_driver: str) -> None:
    script = """
        print(ext.cuda.is_available())
        print(raised(moe.forward, x, ids, w, stream, out=out))
        assert_same_bits(moe.forward(*batch), expected)
        """
    said = run(cuda_driver, script, FAKE_CUDA_NO_GPU="1")
    assert said.splitlines() == ["False", "RuntimeError: cuda: the driver finds no GPU"]
    none = script.replace(
        "print(ext", "import os; os.environ['KTMOE_CUDA_DRIVER'] = '/no/driver.so'\n        print(ext"
    )
    said = run(cuda_driver, none)
    assert said.startswith(
        "False\nRuntimeError: cuda: no driver: /no/driver.so: cannot open shared object file"
    )


def test_libraries_cast_other_dtypes_in_the_stream(cuda_driver: str) -> None:
    run(
        cuda_driver,
        """
        from ktmoe_np.arrays import library

        class Tensor(DeviceArray):
            dtype = property(lambda self: self.value.dtype)
            shape = property(lambda self: self.value.shape)
            requires_grad = False

        class Library(library.ArrayLibrary):
            name = "sample"

            def is_differentiated(self, x):
                return x.requires_grad

            def cast_in_stream(self, x, dtype, handle):
                assert handle == stream.cuda_stream
                return Tensor(x.value.astype(dtype))

            def empty_like(self, x):
                return Tensor(np.zeros_like(x.value))

        library._found[Tensor] = Library(np)
        lead = [Tensor(array.reshape(2, 3, -1)) for array in batch]
        wide = batch.x.astype(np.float32) * np.float32(1.001)
        wanted = moe.forward(wide, batch.ids, batch.weights.astype(np.float16))
        others = wide, batch.ids.astype(np.int16), batch.weights.astype(np.float16)
        tensors = [Tensor(array.reshape(2, 3, -1)) for array in others]
        found, plain = moe.forward(*tensors, stream), moe.forward(*lead, stream)
        stream.synchronize()
        assert_same_bits(found.value, wanted.reshape(2, 3, 40))
        assert_same_bits(plain.value, expected.reshape(2, 3, 40))
        lead[0].requires_grad = True
        told = raised(moe.forward, *lead, stream)
        assert told.startswith("TypeError: hidden_states: got a sample tensor that requires grad"), told
        """,
    )


def test_what_the_extension_refuses(cuda_driver: str) -> None:
    said = run(
        cuda_driver,
        """
        slot = np.zeros((6, 40), bf16)
        task = moe._layer.forward_task(*batch, slot)
        make = ext.cuda.StreamPass
        print(raised(make, moe.cpu_infer, [batch.x], [(task, slot)], [slot], 2))
        work = make(moe.cpu_infer, [np.zeros((6, 40), bf16)], [], [slot], 0)
        print(raised(work.submit, stream.cuda_stream, [], None))
        print(raised(make, moe.cpu_infer, [], [(None, slot)], [slot], 0))
        print(raised(work.run, stream.cuda_stream, [1, 2], [out.value.ctypes.data], None))
        import datetime
        capsule = datetime.datetime_CAPI
        print(raised(ext.cuda.exported_array, capsule))
        """,
    )
    assert said.splitlines() == [
        "ValueError: num_deferred: got 2, expected at most 1, all tasks",
        "ValueError: addresses: got 0, expected 1",
        "TypeError: tasks: got None, expected a Task",
        "ValueError: addresses: got 2, expected 1",
        "TypeError: capsule: got another, expected one of DLPack",
    ]


def test_a_driver_that_refuses_leaves_what_remains(cuda_driver: str) -> None:
    said = run(
        cuda_driver,
        """
        from ktmoe_np import KTMoEWrapper
        moes = [layer.wrapper(2, layer_idx=i, max_deferred_experts_per_token=1) for i in (0, 1)]
        expected = [moe.forward(*batch) for moe in moes]
        remaining = KTMoEWrapper.drain_deferred()
        handle = stream.cuda_stream
        moes[0].forward(x, ids, w, handle, out=out)
        stream.synchronize()
        stream.destroy()
        print(raised(moes[1].forward, x, ids, w, handle, out=out))
        print(raised(moes[1].submit_forward, x, ids, w, handle, out=out))
        print(raised(KTMoEWrapper.drain_deferred, handle, out=out))
        stream.create_again()
        moes[1].forward(x, ids, w, handle, out=out)
        stream.synchronize()
        assert_same_bits(out.value, expected[1])
        KTMoEWrapper.drain_deferred(handle, out=out)
        stream.synchronize()
        assert_same_bits(out.value, remaining)
        """,
    )
    for line in said.splitlines():
        assert line.startswith("RuntimeError: cuda: ")
        assert line.endswith("invalid resource handle (400)")
