"""`ktmoe finetune`: adapters of a whole model's experts learn a text; can be stopped and gone on with."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._arrays import Array
from ..models import MoEDecoder, Tokenizer, bits_per_token, generate, load_tokenizer, loss_and_gradients
from ..sft.adapters import export_peft
from .interrupts import Interrupts
from .optimizers import Optimizer, make_optimizer
from .plot import can_draw, draw_course
from .progress import EXTRA_HINT, Progress
from .table import wrap
from .training_state import Course, read_state, state_path, write_csv, write_state

__all__ = ["run"]

#: What is held out of the text: its last tenth, of which at most so many tokens are measured.
_HELD_OUT, _MOST_MEASURED = 10, 16384

#: The sample: tokens that it goes on from and that it has, and how freely they are drawn.
_PROMPT_TOKENS, _SAMPLE_TOKENS, _SAMPLE_TEMPERATURE = 48, 160, 0.5


@dataclass(frozen=True)
class _Text:
    """What is learnt, and what it is measured on."""

    learnt: NDArray[np.int64]
    held_out: NDArray[np.int64]
    tokens_per_byte: float
    sha256: str


def run(arguments: argparse.Namespace) -> int:
    """Train; 0 when all steps are done, and KeyboardInterrupt, with a state saved, when interrupted."""
    directory, tokenizer = Path(arguments.out), load_tokenizer(arguments.path)
    text = _read(Path(arguments.text), tokenizer, arguments.window)
    model = MoEDecoder.from_pretrained(
        arguments.path,
        arguments.method,
        mode="sft",
        lora_rank=arguments.rank,
        lora_alpha=2.0 * arguments.rank if arguments.alpha is None else arguments.alpha,
        cpuinfer_threads=arguments.threads,
    )
    training = _Training(arguments, directory, model, tokenizer, text)
    with Interrupts() as interrupts:
        finished = training.run(interrupts)
    if not finished:
        course = training.course
        sys.stderr.write(
            f"stopped after step {course.num_steps} of {arguments.steps}; the same command goes on from "
            f"{state_path(directory)}\n"
        )
        raise KeyboardInterrupt
    value = training.report()
    print(json.dumps(value, indent=2) if arguments.json else _text(value))
    return 0


def _read(file: Path, tokenizer: Tokenizer, window: int) -> _Text:
    data = file.read_bytes()
    try:
        tokens = np.array(tokenizer.encode(data.decode()), np.int64)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8: {error.reason} at byte {error.start}") from error
    cut = len(tokens) - len(tokens) // _HELD_OUT
    if cut <= window or len(tokens) - cut < 2:
        expected = "nine tenths of which are longer than --window, and the last one 2 or more"
        raise ValueError(f"{file}: has {len(tokens)} tokens, expected more, {expected} ({window})")
    held_out = tokens[cut : cut + _MOST_MEASURED]
    return _Text(tokens[:cut], held_out, len(tokens) / len(data), hashlib.sha256(data).hexdigest())


class _Training:
    """The loop, with its state on disk."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        directory: Path,
        model: MoEDecoder,
        tokenizer: Tokenizer,
        text: _Text,
    ) -> None:
        self._arguments, self._directory, self._model = arguments, directory, model
        self._tokenizer, self._text = tokenizer, text
        self._experts = model.trained_experts()
        self._parameters: dict[str, Array] = {
            f"{experts.layer_idx}.{name}": np.array(matrix, np.float32)
            for experts in self._experts
            for name, matrix in experts.lora_weights.items()
        }
        self._optimizer: Optimizer = make_optimizer(arguments.optimizer, self._parameters, arguments.rate)
        self._settings = {
            "model": str(Path(arguments.path).resolve()),
            "method": self._experts[0].method,
            "text (sha256)": text.sha256,
            "rank": arguments.rank,
            "alpha": self._experts[0].options.lora_alpha,
            "batch": arguments.batch,
            "window": arguments.window,
            "rate": arguments.rate,
            "optimizer": arguments.optimizer,
            "seed": arguments.seed,
        }
        self.course = self._begin()

    def _begin(self) -> Course:
        """Go on from what is in the directory, or from nothing."""
        if state_path(self._directory).exists():
            course, state = read_state(self._directory, self._settings, self._parameters)
            self._optimizer.restore(state)
            self._give()
            return course
        if self._directory.exists() and any(self._directory.iterdir()):
            raise ValueError(
                f"{self._directory}: is not empty and has no state to go on from: give another --out"
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        return Course()

    def run(self, interrupts: Interrupts) -> bool:
        """Take the steps that are left; false when interrupted."""
        course, arguments = self.course, self._arguments
        first = course.num_steps
        if not course.held_out:
            course.before = self._sample()
            course.held_out[0] = self._measure()
        with Progress(arguments.steps, "fine-tuning") as progress:
            progress.skip(first, "first step")
            for step in range(first, arguments.steps):
                if interrupts.asked:
                    break
                self._step(step)
                last = min(course.held_out.items(), key=lambda item: -item[0])[1]
                progress.step(f"{course.losses[-1]:.3f} bits a byte, held out {last:.3f}")
                if course.num_steps % arguments.every == 0 or course.num_steps == arguments.steps:
                    course.held_out[course.num_steps] = self._measure()
                    self._save()
        finished = bool(course.num_steps >= arguments.steps)
        if not finished:
            self._save()
        return finished

    def _step(self, step: int) -> None:
        began = time.perf_counter()
        learnt, window = self._text.learnt, self._arguments.window
        rng = np.random.default_rng((self._arguments.seed, step))
        begins = rng.integers(0, len(learnt) - window, self._arguments.batch)
        loss = loss_and_gradients(self._model, [learnt[at : at + window + 1] for at in begins])
        self._optimizer.step(
            {
                f"{experts.layer_idx}.{name}": matrix
                for experts, layer in zip(self._experts, loss.layers, strict=True)
                for name, matrix in layer.matrices.items()
            }
        )
        self._give()
        self.course.losses.append(loss.bits_per_token * self._text.tokens_per_byte)
        self.course.seconds.append(time.perf_counter() - began)

    def _give(self) -> None:
        """Give the experts their adapters."""
        for experts in self._experts:
            names = experts.lora_weights
            experts.update_lora_weights(**{n: self._parameters[f"{experts.layer_idx}.{n}"] for n in names})

    def _measure(self) -> float:
        bits = bits_per_token(self._model, self._text.held_out, window=self._arguments.window)
        return bits * self._text.tokens_per_byte

    def _sample(self) -> str:
        """What the model makes of the prompt, or of how the held-out text begins."""
        given = self._arguments.prompt
        begins = self._text.held_out[:_PROMPT_TOKENS].tolist()
        prompt = begins if given is None else self._tokenizer.encode(given)
        said = generate(
            self._model, prompt, _SAMPLE_TOKENS, temperature=_SAMPLE_TEMPERATURE, seed=self._arguments.seed
        )
        return self._tokenizer.decode([*prompt, *said])

    def _save(self) -> None:
        """Write the state, the adapters as PEFT has them, the losses, and a picture where it can be drawn."""
        write_state(self._directory, self._settings, self.course, self._parameters, self._optimizer.state())
        export_peft(self._directory, self._experts)
        write_csv(self._directory / "loss.csv", self.course)
        if can_draw():
            title = f"Adapters of rank {self._arguments.rank} learn {Path(self._arguments.text).name}"
            draw_course(self._directory / "loss.png", self.course.losses, self.course.held_out, title)

    def report(self) -> dict[str, Any]:
        """What to print."""
        course, arguments = self.course, self._arguments
        return {
            "model": str(arguments.path),
            "text": str(arguments.text),
            "out": str(self._directory),
            "drawn": (self._directory / "loss.png").exists(),
            "method": self._settings["method"],
            "rank": arguments.rank,
            "num_parameters": sum(value.size for value in self._parameters.values()),
            "steps": course.num_steps,
            "tokens_per_step": arguments.batch * arguments.window,
            "losses": course.losses,
            "held_out": course.held_out,
            "ms_per_step": 1e3 * float(np.median(course.seconds)),
            "before": course.before,
            "after": self._sample(),
        }


def _text(value: dict[str, Any]) -> str:
    losses, held_out = value["losses"], value["held_out"]
    size = f"rank {value['rank']} ({value['num_parameters'] / 1e6:.2f} million numbers)"
    about = wrap(
        f"Adapters of {size} of the experts ({value['method']}) have learnt nine tenths of {value['text']}; "
        f"the last tenth was held out. {value['tokens_per_step']} tokens a step, "
        f"{value['ms_per_step']:.0f} ms each."
    )
    batches = {step: f"{losses[step - 1]:.4f}" if step else "" for step in held_out}
    rows = [f"{step:6d}   {batches[step]:>11}   {bits:9.4f}" for step, bits in held_out.items()]
    picture = "loss.csv and loss.png" if value["drawn"] else f"loss.csv (a picture needs {EXTRA_HINT})"
    end = wrap(
        f"{value['out']} has the adapters (ktmoe generate --adapter {value['out']}), the losses in "
        f"{picture}, and a state from which more --steps go on."
    )
    before, after = (wrap(" ".join(value[when].split())) for when in ("before", "after"))
    samples = ["Before:", before, "", "After:", after]
    return "\n".join([about, "", "  step   bits a byte    held out", *rows, "", *samples, "", end])
