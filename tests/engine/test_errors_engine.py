"""Calls in an order that cannot be, and engines that cannot be."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from layers import Batch, Layer, assert_same_bits, draw_batch, draw_layer, run_python

from ktmoe_np import KTMoEWrapper
from ktmoe_np import kt_kernel_ext as ext

pytestmark = pytest.mark.engine

AnyArray = Any

E, I, H, P, T = 4, 24, 40, 2, 6  # noqa: E741


@pytest.fixture(scope="module")
def layer() -> Layer:
    return draw_layer(np.random.default_rng(0), E, I, H, with_biases=True)


@pytest.fixture(scope="module")
def batch(layer: Layer) -> Batch:
    return draw_batch(np.random.default_rng(1), layer, T, P)


@pytest.fixture
def moe(layer: Layer) -> Any:
    return layer.wrapper(P)


def test_sync_without_submit(moe: Any, batch: Batch) -> None:
    message = r"sync_forward: no pass of layer 0 is pending, .*submit_forward first"
    with pytest.raises(RuntimeError, match=message):
        moe.sync_forward()
    moe.submit_forward(*batch)
    moe.sync_forward()
    with pytest.raises(RuntimeError, match=message):
        moe.sync_forward()


def test_submit_twice(moe: Any, batch: Batch) -> None:
    expected = moe.forward(*batch)
    moe.submit_forward(*batch)
    with pytest.raises(
        RuntimeError, match=r"submit_forward: a pass of layer 0 is pending, .*sync_forward first"
    ):
        moe.submit_forward(*batch)
    assert_same_bits(moe.sync_forward(), expected)


def test_incremental_without_out(moe: Any, batch: Batch) -> None:
    for call in (moe.forward, moe.submit_forward):
        with pytest.raises(
            ValueError, match="out: got None with incremental=True, expected the array to add to"
        ):
            call(*batch, incremental=True)


def test_a_cuda_stream(moe: Any, batch: Batch) -> None:
    """With a driver it is the arrays that are wrong, without one the stream."""
    expected = moe.forward(*batch)
    message = (
        "hidden_states: got ndarray on the CPU, expected bfloat16 .* device|cuda: (no driver|the driver)"
    )
    for call in (moe.forward, moe.submit_forward):
        with pytest.raises((TypeError, RuntimeError), match=message):
            call(*batch, cuda_stream=5)
    moe.submit_forward(*batch)
    with pytest.raises(
        RuntimeError, match=r"no pass of layer 0 is pending in a str|cuda: (no driver|the dr)"
    ):
        moe.sync_forward(cuda_stream=5)
    assert_same_bits(moe.sync_forward(), expected)


# ---- the engine of the wrappers, in a process that has none yet ----

ENGINES: dict[str, tuple[dict[str, Any], str, str]] = {
    "no threads": ({"cpuinfer_threads": 0}, "ValueError", "cpuinfer_threads: got 0, expected 1 or more"),
    "threads, a word": ({"cpuinfer_threads": "2"}, "TypeError", "cpuinfer_threads: got '2', expected"),
    "threads, a fraction": ({"cpuinfer_threads": 1.5}, "TypeError", "cpuinfer_threads: got 1.5, expected"),
    "no sub-pools": (
        {"cpuinfer_threads": 2, "threadpool_count": 0},
        "ValueError",
        "threadpool_count: got 0, expected 1 to 2, the number of threads",
    ),
    "too many sub-pools": (
        {"cpuinfer_threads": 2, "threadpool_count": 3},
        "ValueError",
        "threadpool_count: got 3, expected 1 to 2, the number of threads",
    ),
    "nodes and sub-pools": (
        {"cpuinfer_threads": 2, "threadpool_count": 2, "numa_nodes": [0]},
        "ValueError",
        "numa_nodes: got [0], expected 2 nodes, one for each sub-pool",
    ),
    **{
        f"{name}, {value:.0e}": (
            {name: [value] if name == "numa_nodes" else value, "threadpool_count": 1},
            "ValueError",
            f"{name}: got {value}, expected at most 65536",
        )
        for name in ("cpuinfer_threads", "numa_nodes")
        for value in (2**31, 2**63, 2**64)
    },
    "a missing node": (
        {"numa_nodes": [999]},
        "ValueError",
        ": got 999, expected a NUMA node with CPUs that this process may use: {nodes}",
    ),
}


def test_engines_that_cannot_be() -> None:
    script = """
        import json, sys
        from ktmoe_np import KTMoEWrapper
        results = []
        for options in json.loads(sys.argv[1]):
            try:
                KTMoEWrapper(0, 2, 1, 8, 8, **options)
            except Exception as error:
                results.append([type(error).__name__, str(error)])
            else:
                results.append(["nothing", ""])
        KTMoEWrapper(0, 2, 1, 8, 8, cpuinfer_threads=2, threadpool_count=2)
        print(json.dumps(results))
    """
    done = run_python(script, json.dumps([options for options, _, _ in ENGINES.values()]))
    assert (done.returncode, done.stderr) == (0, "")
    nodes = ", ".join(map(str, sorted(ext.topology()["node_cpus"])))
    wrong = {}
    for (name, (_, error, message)), (got, text) in zip(
        ENGINES.items(), json.loads(done.stdout), strict=True
    ):
        if got != error or message.format(nodes=nodes) not in text:
            wrong[name] = (got, text)
    assert not wrong


@pytest.mark.parametrize("name", ["cpuinfer_threads", "threadpool_count", "numa_nodes"])
def test_another_engine_than_the_one_that_lives(moe: Any, batch: Batch, name: str) -> None:
    before, pool = moe.forward(*batch), moe.cpu_infer.backend_
    has: dict[str, Any] = {"cpuinfer_threads": pool.num_threads, "threadpool_count": pool.num_subpools}
    has["numa_nodes"] = list(pool.config.subpool_numa_map)
    other = [*has["numa_nodes"], 0] if name == "numa_nodes" else has[name] + 1
    message = (
        rf"{name}: got .*, but the engine of this process has .*; there is one engine; delete its layers and "
        r"call KTMoEWrapper\.reset_engine\(\) before creating another$"
    )
    with pytest.raises(RuntimeError, match=message):
        KTMoEWrapper(0, E, P, H, I, **{name: other})
    assert KTMoEWrapper(0, E, P, H, I, **{name: has[name]}).cpu_infer is moe.cpu_infer
    with pytest.raises(
        RuntimeError, match=r"cpuinfer: layers \[.*0.*\] are loaded on the engine; delete them first"
    ):
        KTMoEWrapper.reset_engine()
    assert_same_bits(moe.forward(*batch), before)


def test_an_engine_after_a_reset() -> None:
    script = """
        import numpy as np
        from layers import assert_same_bits, draw_batch, draw_layer
        from ktmoe_np import KTMoEWrapper
        layer = draw_layer(np.random.default_rng(0), 3, 20, 30)
        batch = draw_batch(np.random.default_rng(1), layer, 5, 2)
        early = KTMoEWrapper(0, 3, 2, 30, 20, cpuinfer_threads=1)
        expected = layer.forward(batch)
        KTMoEWrapper.reset_engine()
        moe = layer.wrapper(2, cpuinfer_threads=3, threadpool_count=2)
        assert moe.cpu_infer.backend_.num_threads == 3
        assert_same_bits(moe.forward(*batch), expected)
        try:
            layer.load_into(early)
        except RuntimeError as error:
            print(error)
        assert_same_bits(moe.forward(*batch), expected)
    """
    done = run_python(script)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "the engine has been shut down and takes no more tasks\n"
