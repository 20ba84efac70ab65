"""Ends `ktmoe finetune` at every line of what it does between its passes, goes on, and compares the files.

Run as ``python finetune_kills.py SIGNAL STRIDE DRAW OFFSET``: a process of its own with one thread, which can
fork. The model is a few matrices: what is tested is the loop, the state and the files, which are the
real ones. Every STRIDE-th line that is run is tried, from the OFFSET-th on.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np

import ktmoe_np.cli.adam as adam
import ktmoe_np.cli.interrupts as interrupts
import ktmoe_np.cli.plot as plot
import ktmoe_np.cli.training_run as training_run
import ktmoe_np.cli.training_state as training_state
import ktmoe_np.io.safetensors.writer as writer
import ktmoe_np.sft.peft.write as adapters
from ktmoe_np.cli.guard import RaisingInterrupts, guard_process
from ktmoe_np.cli.training_text import TextPart, TrainingText
from ktmoe_np.config import MoEConfig
from ktmoe_np.models import EMBEDDED_MODEL
from ktmoe_np.sft.gradients import lora_shapes

TRACED = {
    module.__file__ for module in (adam, interrupts, plot, training_run, training_state, writer, adapters)
}
TRACED.add(writer.replacing.__wrapped__.__code__.co_filename)  # type: ignore[attr-defined]
RANK, STEPS, EVERY = 2, 5, 2

Trace = Callable[[FrameType, str, Any], Any]


class Experts:
    """A layer with adapters."""

    layer_idx, method, weight_path = 3, "AMXBF16_SFT", None
    config = MoEConfig(2, 1, 8, 4)
    options = SimpleNamespace(lora_rank=RANK, lora_alpha=4.0, lora_dropout=0.0)

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        shapes = lora_shapes(self.config, RANK)
        self.lora_weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}

    def update_lora_weights(self, **weights: Any) -> None:
        self.lora_weights = {name: value.copy() for name, value in weights.items()}


class Model:
    """Its loss is the size of its adapters, and what the windows of text add."""

    activation_dtypes = ("bfloat16",)
    config = SimpleNamespace(model_type="qwen3_moe")
    ranks = None

    def __init__(self) -> None:
        self.experts = [Experts()]

    def trained_experts(self) -> list[Experts]:
        return self.experts

    def size(self) -> float:
        return float(sum(np.square(value).sum() for value in self.experts[0].lora_weights.values()))


def loss_and_gradients(model: Model, windows: list[Any]) -> Any:
    drawn = np.float32(np.concatenate(windows).mean())
    matrices = {name: value + drawn for name, value in model.experts[0].lora_weights.items()}
    return SimpleNamespace(bits_per_token=model.size(), layers=[SimpleNamespace(matrices=matrices)])


def generate(model: Model, prompt: list[int], *_: Any, **__: Any) -> Iterator[int]:
    return iter([int(model.size()) % 256])


def replace_what_is_slow(draw: bool) -> None:
    training_run.loss_and_gradients = loss_and_gradients  # type: ignore[assignment]
    training_run.bits_per_token = lambda model, tokens, window: model.size()  # type: ignore[assignment]
    training_run.generate = generate  # type: ignore[assignment]
    training_run.can_draw = lambda: draw


def train(out: Path) -> int:
    """What the command does; its exit status."""
    arguments = argparse.Namespace(
        out=str(out), path=EMBEDDED_MODEL, text="text", optimizer="adam", rate=1e-2, rank=RANK,
        batch=2, window=4, seed=1, prompt=None, adapter=None, steps=STEPS, every=EVERY,
    )  # fmt: skip
    tokens = np.arange(60) % 7
    text = TrainingText(TextPart(tokens, 1.0), TextPart(tokens[:9], 1.0), "text")
    tokenizer = SimpleNamespace(encode=lambda text: [1], decode=lambda tokens: " ".join(map(str, tokens)))
    try:
        with RaisingInterrupts():
            run = training_run.TrainingRun(arguments, Model(), tokenizer, text)  # type: ignore[arg-type]
            run.begin()
            return 0 if run.run() else 130
    except KeyboardInterrupt:
        return 130


def in_child(do: Callable[[], int]) -> int:
    """The exit status of a forked process, or minus the signal that has ended it."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what interrupts say
            os._exit(do())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ending_at(line: int, number: int) -> Trace:
    """Trace that many lines, then send the process a signal."""
    left = line

    def local(frame: FrameType, event: str, argument: Any) -> Trace:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                os.kill(os.getpid(), number)
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Trace | None:
        return local if frame.f_code.co_filename in TRACED else None

    return trace


def count_lines(out: Path) -> int:
    """How many lines a run has that nothing ends."""
    lines = 0

    def local(frame: FrameType, event: str, argument: Any) -> Trace:
        nonlocal lines
        lines += event == "line"
        return local

    sys.settrace(lambda frame, event, argument: local if frame.f_code.co_filename in TRACED else None)
    status = train(out)
    sys.settrace(None)
    assert status == 0
    return lines


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def main() -> None:
    number, stride, draw = signal.Signals[sys.argv[1]], int(sys.argv[2]), sys.argv[3] == "draw"
    replace_what_is_slow(draw)
    guard_process()
    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory, "whole")
        lines = count_lines(whole)
        expected = contents(whole)
        ended = 0
        for line in range(1 + int(sys.argv[4]), lines + 1, stride):
            out = Path(directory, str(line))

            def run_to_line(out: Path = out, line: int = line) -> int:
                sys.settrace(ending_at(line, number))
                return train(out)

            ended += in_child(run_to_line) in (-number, 130)
            status = in_child(lambda out=out: train(out))  # type: ignore[misc]
            if status or contents(out) != expected:
                found = {name: data == expected.get(name) for name, data in contents(out).items()}
                sys.exit(f"line {line} of {lines}: status {status}, files as they should be: {found}")
        print(lines, ended, *sorted(expected))


if __name__ == "__main__":
    main()
