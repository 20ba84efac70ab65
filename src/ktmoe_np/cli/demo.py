"""`ktmoe demo`: the main job on a small model, on every instruction set of the machine."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .. import kt_kernel_ext as ext
from ..config import MoEConfig
from ..io import load_experts
from .checkpoint import CONFIG, NUM_LAYERS, write_demo_checkpoint
from .expert_source import TensorSource
from .machine import busy_note, describe_machine
from .measure import Measured, measure_in_child
from .plot import check_plot, draw_plot
from .progress import Progress
from .sample import Expected, draw_sample
from .table import Row, as_json, counted, machine_limits, make_rows, summary, wrap
from .terminal import say, say_json

__all__ = ["run"]

#: A decode step, a few sequences decoded together, and a piece of a prefill.
_TOKENS = (1, 16, 256)

#: Experts that the checked tokens use.
_NUM_CHECKED = 8

#: Instruction sets on request are emulators, thousands of times slower than what they emulate.
_EMULATED_TOKENS = (2,)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 0 when everything that was checked is within its bound, else 1."""
    busy = busy_note()
    if arguments.plot:
        check_plot(arguments.plot)
    with ExitStack() as stack:
        if arguments.keep:
            path = Path(arguments.keep)
        else:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ktmoe-demo-")))
        weight_bytes, expected, runs, failures = _work(path, arguments)
    limits = machine_limits(runs)
    rows = make_rows(runs, expected, limits)
    right = not failures and all(row.within_bound for row in rows)
    if arguments.plot:
        draw_plot(arguments.plot, rows, describe_machine()["cpu"])
    if arguments.json:
        report = {
            "within_bound": right,
            "rows": as_json(rows),
            "failures": failures,
            "limits": limits,
            "threads": runs[0].threads,
            "checked_experts": expected.num_experts,
            "checkpoint": {"config": CONFIG, "weight_bytes": weight_bytes},
        }
        say_json(report)
    else:
        say(_text(rows, failures, limits, weight_bytes, runs, expected, busy))
        if arguments.keep:
            say(f"The checkpoint stays in {path}; try: ktmoe verify {path}")
        if arguments.plot:
            say(f"The fractions of the limits are drawn in {arguments.plot}")
    return 0 if right else 1


def _work(path: Path, arguments: argparse.Namespace) -> tuple[int, Expected, list[Measured], dict[str, str]]:
    """Write the checkpoint, compute the reference, and measure each instruction set in its own process."""
    info = ext.isa_info()
    isas, emulated = info["supported"], info["on_request"]
    runs: list[Measured] = []
    failures: dict[str, str] = {}
    with Progress(2 + len(isas)) as progress:
        progress.step("writing a checkpoint")
        weight_bytes = write_demo_checkpoint(path)
        progress.step("asking the reference")
        config = MoEConfig.from_hf_config(CONFIG, layer_idx=0)
        expected = Expected(
            draw_sample(config, _NUM_CHECKED), config, TensorSource(load_experts(path, 0, config))
        )
        for isa in isas:
            progress.step(f"running on {isa}")
            tokens, seconds = (_EMULATED_TOKENS, 0.0) if isa in emulated else (_TOKENS, arguments.seconds)
            try:
                run = measure_in_child(
                    isa, path, range(NUM_LAYERS), tokens, seconds, _NUM_CHECKED, arguments.threads
                )
                runs.append(run)
            except RuntimeError as error:
                failures[isa] = str(error)
    if not any(run.timings for run in runs):
        raise RuntimeError("; ".join(f"{isa}: {why}" for isa, why in failures.items()))
    return weight_bytes, expected, runs, failures


def _text(
    rows: Sequence[Row],
    failures: dict[str, str],
    limits: dict[str, Any],
    weight_bytes: int,
    runs: Sequence[Measured],
    expected: Expected,
    busy: str | None,
) -> str:
    about = wrap(
        f"A small Qwen3-MoE checkpoint, memory-mapped: {NUM_LAYERS} layers of {CONFIG['num_experts']} "
        f"experts, {CONFIG['num_experts_per_tok']} per token, hidden size {CONFIG['hidden_size']}, "
        f"intermediate size {CONFIG['moe_intermediate_size']}, {weight_bytes / 1e6:.0f} MB of bf16 weights. "
        f"{counted(runs[0].threads, 'thread')}; results of {expected.num_experts} experts compared with the "
        "NumPy reference."
    )
    timed = [row.isa for row in rows if row.of_limit is not None]
    active = ext.isa_info()["active"]
    isa = active if active in timed else timed[-1]
    return "\n".join([about, "", summary(rows, limits, isa, failures, busy)])
