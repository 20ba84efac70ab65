"""Is a timeline what the engine did: every task once, in its phase, by a worker, within the block?"""

from __future__ import annotations

import doctest
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import assert_same_bits, draw_batch, draw_layer, run_python
from sft_layers import draw_student, draw_training

import ktmoe_np
import ktmoe_np.observe.trace
from ktmoe_np import KTMoEWrapper

E, I, H, P, T = 6, 160, 96, 2, 70  # noqa: E741


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.observe.trace).failed == 0


def events(path: Path) -> list[dict[str, Any]]:
    found = json.loads(path.read_text())
    assert found["otherData"] == {"dropped_spans": 0}
    return list(found["traceEvents"])


def spans(path: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events(path) if event["ph"] == "X" and event["cat"] == kind]


def test_a_timeline(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layer = draw_layer(rng, E, I, H)
    batch = draw_batch(rng, layer, T, P)
    moe = layer.wrapper(P, layer_idx=7)
    expected = moe.forward(*batch)
    path = tmp_path / "trace.json"
    began = time.perf_counter()
    with ktmoe_np.trace(path):
        assert_same_bits(moe.forward(*batch), expected)
        moe.forward(*batch)
    took = (time.perf_counter() - began) * 1e6

    phases = spans(path, "phase")
    assert [event["name"] for event in phases] == 2 * ["route", "gate_up", "down", "combine"]
    assert {event["args"]["layer"] for event in phases} == {7}
    tasks = spans(path, "task")
    assert {event["name"] for event in tasks} == {"gate_up", "down", "combine"}
    for event in phases + tasks:
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert event["ts"] + event["dur"] <= took

    # Every task ran once in each pass, inside its phase; a worker does one thing at a time.
    for phase in phases:
        inside = [
            task
            for task in tasks
            if task["name"] == phase["name"] and phase["ts"] <= task["ts"] <= phase["ts"] + phase["dur"]
        ]
        numbers = sorted(task["args"]["task"] for task in inside)
        assert numbers == list(range(len(numbers)))
        assert all(task["ts"] + task["dur"] <= phase["ts"] + phase["dur"] + 1e-3 for task in inside)
        assert bool(inside) == (phase["name"] != "route")
    for row in {task["tid"] for task in tasks}:
        own = sorted((task["ts"], task["ts"] + task["dur"]) for task in tasks if task["tid"] == row)
        assert all(first[1] <= second[0] + 1e-3 for first, second in itertools.pairwise(own))


def test_rows_have_names(tmp_path: Path) -> None:
    moe = draw_layer(np.random.default_rng(0), E, I, H).wrapper(P)
    with ktmoe_np.trace(tmp_path / "x"):
        pass
    named = {event["tid"]: event["args"]["name"] for event in events(tmp_path / "x") if event["ph"] == "M"}
    num_threads = moe.cpu_infer.backend_.num_threads
    assert named == {0: "phases", **{i + 1: f"worker {i}" for i in range(num_threads)}}


def test_training(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    student = draw_student(rng, (E, I, H), rank=2)
    batch, grad_output = draw_training(rng, student, T, P)
    sft = student.wrapper(P)
    with ktmoe_np.trace(tmp_path / "x"):
        sft.forward_sft(*batch)
        sft.backward(grad_output)
    names = [event["name"] for event in spans(tmp_path / "x", "phase")]
    assert names.index("save_inputs") < names.index("gate_up") < names.index("backward_output")
    assert {"adapters", "backward_activation", "weight_gradients", "backward_input"} <= set(names)


def test_an_exception_ends_a_timeline(tmp_path: Path) -> None:
    layer = draw_layer(np.random.default_rng(0), E, I, H)
    moe = layer.wrapper(P)
    x, _, weights = draw_batch(np.random.default_rng(1), layer, 1, P)
    with pytest.raises(IndexError), ktmoe_np.trace(tmp_path / "x"):
        moe.forward(x, np.full((1, P), E), weights)
    assert spans(tmp_path / "x", "phase")
    with ktmoe_np.trace(tmp_path / "y"):
        pass
    assert not spans(tmp_path / "y", "phase")


def test_two_timelines_at_once_are_refused(tmp_path: Path) -> None:
    moe = draw_layer(np.random.default_rng(0), E, I, H).wrapper(P)
    second = ktmoe_np.trace(tmp_path / "y")
    with ktmoe_np.trace(tmp_path / "x"), pytest.raises(RuntimeError, match="trace: got a second one"):
        second.__enter__()
    assert not (tmp_path / "y").exists()
    assert (tmp_path / "x").exists()
    with pytest.raises(RuntimeError, match="trace: got an end, expected a beginning"):
        moe.cpu_infer.end_trace()


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    draw_layer(np.random.default_rng(0), E, I, H).wrapper(P)
    with pytest.raises(OSError, match="nowhere"), ktmoe_np.trace(tmp_path / "nowhere" / "x"):
        pass
    with ktmoe_np.trace(tmp_path / "x"):
        pass


@pytest.mark.subprocess
def test_without_an_engine() -> None:
    printed = run_python(
        """
        import ktmoe_np
        try:
            with ktmoe_np.trace("x"):
                pass
        except RuntimeError as error:
            print(error)
        """
    )
    assert printed.stdout.strip() == "trace: there is no engine yet, make a layer first"


@pytest.mark.engine
def test_deferred_experts(tmp_path: Path) -> None:
    layer = draw_layer(np.random.default_rng(0), E, I, H)
    moe = layer.wrapper(P, max_deferred_experts_per_token=1)
    with ktmoe_np.trace(tmp_path / "x"):
        moe.forward(*draw_batch(np.random.default_rng(1), layer, 9, P))
        KTMoEWrapper.drain_deferred()
    assert [event["name"] for event in spans(tmp_path / "x", "phase")].count("route") >= 1
