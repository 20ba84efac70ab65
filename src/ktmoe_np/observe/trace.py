"""Timelines of the engine, in the format of Chrome's tracing, which Perfetto reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from .. import kt_kernel_ext as ext
from ..arrays.types import PathLike
from ..cpuinfer import _MoEBase
from ..io.replace import replacing

__all__ = ["trace"]

_SPAN = np.dtype(
    [
        ("name", "<u4"),
        ("worker", "<u4"),
        ("task", "<u4"),
        ("unused", "<u4"),
        ("layer", "<i8"),
        ("begin", "<i8"),
        ("end", "<i8"),
    ]
)

#: The worker of a span that is a phase of a pass, computed by all workers.
_PHASE = 2**32 - 1
#: The row of phases in the timeline; workers have theirs behind it.
_PHASE_ROW = 0

_SPANS_AT_ONCE = 4096


@contextmanager
def trace(path: PathLike) -> Iterator[None]:
    """Write a timeline of what the engine computes within a ``with`` block.

    The file is JSON in the trace event format: open it in Perfetto (https://ui.perfetto.dev) or
    ``chrome://tracing``. It has a row for the phases of passes (see `LayerStats`) and one for each worker,
    with the tasks that it ran, named by phase, layer and number. Recording costs two readings of the clock
    per task; while no timeline is recorded it costs nothing.

    Parameters
    ----------
    path : str or path-like
        The file to write when the block ends, also with an exception. One that is there is replaced.

    Raises
    ------
    RuntimeError
        There is no engine yet, as no layer was made, or another timeline is being recorded.
    OSError
        The file cannot be written.

    Notes
    -----
    Each worker has room for 131,072 tasks; ``otherData`` in the file says how many more there were.

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> import ml_dtypes, numpy as np
    >>> import ktmoe_np
    >>> moe = ktmoe_np.KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                             moe_intermediate_size=2, activation="relu2")
    >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
    >>> moe.load_weights_from_tensors(gate, None, down)
    >>> path = pathlib.Path(tempfile.mkdtemp(), "trace.json")
    >>> with ktmoe_np.trace(path):
    ...     y = moe.forward(np.ones((1, 4), ml_dtypes.bfloat16), np.array([[1]]), np.ones((1, 1), np.float32))
    >>> events = json.loads(path.read_text())["traceEvents"]
    >>> sorted({event["name"] for event in events if event["ph"] == "X"})
    ['combine', 'down', 'gate_up', 'route']
    """
    engine = _MoEBase._engine
    if engine is None:
        raise RuntimeError("trace: there is no engine yet, make a layer first")
    engine.begin_trace()
    try:
        yield
    finally:
        recorded = engine.end_trace()
        spans = np.frombuffer(recorded.spans, _SPAN)
        with replacing(path) as file:
            for text in _pieces(recorded, spans, engine.backend_.num_threads):
                file.write(text.encode())


def _pieces(recorded: ext.RecordedTrace, spans: NDArray[np.void], num_workers: int) -> Iterator[str]:
    """The text of the file, piece by piece."""
    rows = {_PHASE_ROW: "phases", **{i + 1: f"worker {i}" for i in range(num_workers)}}
    events = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}}
        for row, name in rows.items()
    ]
    yield '{"displayTimeUnit":"ns","otherData":' + json.dumps({"dropped_spans": recorded.num_dropped})
    yield ',"traceEvents":[' + ",\n".join(map(json.dumps, events))
    first = int(spans["begin"].min()) if len(spans) else 0
    for i in range(0, len(spans), _SPANS_AT_ONCE):
        for span in spans[i : i + _SPANS_AT_ONCE].tolist():
            yield ",\n" + json.dumps(_event(span, recorded.names, first))
    yield "]}\n"


def _event(span: tuple[int, ...], names: list[str], first: int) -> dict[str, object]:
    """A span as an event, in microseconds since the first one."""
    name, worker, task, _, layer, begin, end = span
    args = {"layer": layer} if worker == _PHASE else {"layer": layer, "task": task}
    row = _PHASE_ROW if worker == _PHASE else worker + 1
    times = {"ts": (begin - first) / 1e3, "dur": (end - begin) / 1e3}
    kind = "phase" if worker == _PHASE else "task"
    return {"name": names[name], "cat": kind, "ph": "X", "pid": 1, "tid": row, **times, "args": args}
