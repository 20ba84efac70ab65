"""The training loop of `ktmoe finetune`, and the state in its directory from which it resumes."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ..arrays.checks import Array
from ..formats.methods import Method, find_method, main_name
from ..io.safetensors.writer import remove_leftovers
from ..models import MoEDecoder, Tokenizer, bits_per_token, generate, load_stop_tokens, loss_and_gradients
from ..sft.peft import export_peft
from .interrupts import Interrupts
from .optimizers import Optimizer, make_optimizer
from .plot import can_draw, draw_course
from .progress import Progress
from .shards import Shards
from .training_state import (
    Course,
    adapter_digest,
    fingerprint,
    is_leftover,
    read_state,
    state_path,
    write_csv,
    write_state,
)
from .training_text import TrainingText

__all__ = ["TrainingRun"]

#: The sample: numbers of prompt tokens and of new tokens, and the temperature.
_PROMPT_TOKENS, _SAMPLE_TOKENS, _SAMPLE_TEMPERATURE = 48, 160, 0.5


def _other_dtypes(model: MoEDecoder, method: Method) -> str | None:
    """What experts take activations in, None for the method's own: states of before there was a choice."""
    dtypes = dict.fromkeys(model.activation_dtypes)
    return None if list(dtypes) == [method.product] else ", ".join(dtypes)


class TrainingRun:
    """Adapters on their way.

    Parameters
    ----------
    arguments : argparse.Namespace
        Those of the command.
    model : MoEDecoder
        Loaded for training.
    tokenizer : Tokenizer
    text : TrainingText

    Attributes
    ----------
    parameters : dict of str to ndarray of float32
        The adapters, under the layer's number and their names.
    course : Course
    seconds : list of float
        Of each step that this process took.
    drawn : bool
        Whether there is a picture.

    Raises
    ------
    ValueError
        A method that trains no adapters, an optimizer that is none, or an empty prompt.
    """

    def __init__(
        self, arguments: argparse.Namespace, model: MoEDecoder, tokenizer: Tokenizer, text: TrainingText
    ) -> None:
        self._arguments, self._model, self._tokenizer, self._text = arguments, model, tokenizer, text
        self._directory = Path(arguments.out)
        self._experts = model.trained_experts()
        method = find_method(self._experts[0].method, "sft")
        if method.skip_lora:
            raise ValueError(f"--method: got {method.name!r}, expected one that trains adapters")
        self.parameters: dict[str, Array] = {
            f"{experts.layer_idx}.{name}": np.array(matrix, np.float32)
            for experts in self._experts
            for name, matrix in experts.lora_weights.items()
        }
        self._shards = Shards(model)
        self._optimizer: Optimizer = make_optimizer(arguments.optimizer, self.parameters, arguments.rate)
        given = arguments.prompt
        self._prompt = (
            text.held_out.tokens[:_PROMPT_TOKENS].tolist() if given is None else tokenizer.encode(given)
        )
        if not self._prompt:
            raise ValueError("--prompt: got an empty text, expected at least one token")
        self._settings = {
            "model (sha256)": fingerprint(arguments.path),
            "method": main_name(method),
            "text (sha256)": text.sha256,
            "rank": self._experts[0].options.lora_rank,
            "alpha": self._experts[0].options.lora_alpha,
            "batch": arguments.batch,
            "window": arguments.window,
            "rate": arguments.rate,
            "optimizer": arguments.optimizer,
            "seed": arguments.seed,
            "prompt": given,
            "activation_dtype": _other_dtypes(model, method),
            "adapter (sha256)": None if arguments.adapter is None else adapter_digest(arguments.adapter),
            "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        }
        self.course = Course()
        self.drawn = False
        self.seconds: list[float] = []
        self._is_whole = True  # parameters, moments and course are those of one step
        self._is_saved = False

    def begin(self) -> None:
        """Go on from what is in the directory, or from nothing.

        Raises
        ------
        ValueError
            It is of a run with other settings, or of something else.
        OSError
            It cannot be made.
        """
        directory = self._directory
        if self._shards.is_first:
            remove_leftovers(directory)
        if self._shards.first_says(state_path(directory).exists()):
            self._resume()
        elif directory.exists() and not all(map(is_leftover, directory.iterdir())):
            raise ValueError(f"{directory}: is not empty and has no state to resume from: give another --out")
        if self._shards.is_first:
            directory.mkdir(parents=True, exist_ok=True)

    def _resume(self) -> None:
        """Read the state, of which a rank takes what belongs to its experts."""
        shards = self._shards
        parameters, expected = shards.whole(self.parameters), shards.whole(self._optimizer.state())
        self.course, state = read_state(self._directory, self._settings, parameters, expected)
        for name, value in shards.own(parameters).items():
            self.parameters[name][:] = value
        self._optimizer.restore(shards.own(state))
        self._give()
        self._drop_ends_of_earlier_runs()

    def _drop_ends_of_earlier_runs(self) -> None:
        """Forget measurements that a run of all steps at once would not have made."""
        for step in list(self.course.held_out):
            if not self._is_measured(step):
                del self.course.held_out[step]

    def _is_measured(self, step: int) -> bool:
        """Whether a run of all steps at once measures the held-out text after so many."""
        every, steps = self._arguments.every, self._arguments.steps
        return bool(step % every == 0 or step == steps)

    def run(self) -> bool:
        """Take the steps that are left; false when interrupted, what was done being saved.

        A first interrupt ends the step under way, a second one ends at once.

        Raises
        ------
        ValueError
            The loss is not finite any more; what was saved before stays.
        KeyboardInterrupt
            Before the first step, or within one.
        """
        course, steps = self.course, self._arguments.steps
        if not course.before:
            course.before = self.sample()
        try:
            self._measure_if_due()  # what an earlier run was interrupted in; the first step of all
            for step in self._with_progress(range(course.num_steps, steps)):
                with Interrupts() as interrupts:
                    self._step(step)
                if self._shards.any_rank(interrupts.requested):
                    raise KeyboardInterrupt
                if self._measure_if_due():
                    self._save()
        except KeyboardInterrupt:
            if not self._is_whole or course.num_steps == 0:
                raise
            self._save()
            return False
        if not self._is_saved:
            self._save()
        return True

    def _measure_if_due(self) -> bool:
        """Measure the held-out text if it is due after this many steps and not done yet; whether it was."""
        course = self.course
        due = self._is_measured(course.num_steps) and course.num_steps not in course.held_out
        if due:
            course.held_out[course.num_steps] = self._measure()
        return due

    def _with_progress(self, steps: range) -> Iterator[int]:
        course = self.course
        with Progress(self._arguments.steps, "fine-tuning") as progress:
            if steps.start:
                progress.step("resuming")
            for step in steps:
                label = "first step"
                if course.losses:
                    held_out = max(course.held_out.items())[1]
                    label = f"{course.losses[-1]:.3f} bits per byte, held out {held_out:.3f}"
                if step and step == steps.start:
                    progress.skip(step, label)
                else:
                    progress.step(label)
                yield step

    def _step(self, step: int) -> None:
        began = time.perf_counter()
        learned, window = self._text.learned, self._arguments.window
        rng = np.random.default_rng((self._arguments.seed, step))
        begins = rng.integers(0, len(learned.tokens) - window, self._arguments.batch)
        loss = loss_and_gradients(self._model, [learned.tokens[at : at + window + 1] for at in begins])
        self._check_finite(loss.bits_per_token)
        self._is_whole = False
        self._optimizer.step(
            {
                f"{experts.layer_idx}.{name}": matrix
                for experts, layer in zip(self._experts, loss.layers, strict=True)
                for name, matrix in layer.matrices.items()
            }
        )
        self._give()
        self.course.losses.append(loss.bits_per_token * learned.tokens_per_byte)
        self._is_saved = False
        self.seconds.append(time.perf_counter() - began)
        self._is_whole = True

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained, on all ranks."""
        experts = self._experts[0]
        own = sum(value.size for value in self.parameters.values())
        first = next(iter(self.parameters.values()))
        return own // len(first) * experts.config.num_experts

    def _give(self) -> None:
        """Give the experts their adapters."""
        for experts in self._experts:
            names = experts.lora_weights
            experts.update_lora_weights(**{n: self.parameters[f"{experts.layer_idx}.{n}"] for n in names})

    def _measure(self) -> float:
        """Bits per byte of the held-out text."""
        held_out = self._text.held_out
        bits = bits_per_token(self._model, held_out.tokens, window=self._arguments.window)
        self._check_finite(bits)
        return bits * held_out.tokens_per_byte

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            after = f"after step {self.course.num_steps} the loss is {loss}"
            raise ValueError(f"{after}, expected a number: a smaller --rate may help")

    def sample(self) -> str:
        """Continue the prompt, or the beginning of the held-out text."""
        said = generate(
            self._model,
            self._prompt,
            _SAMPLE_TOKENS,
            temperature=_SAMPLE_TEMPERATURE,
            seed=self._arguments.seed,
            stop=load_stop_tokens(self._arguments.path),
        )
        return self._tokenizer.decode([*self._prompt, *said])

    def _save(self) -> None:
        """Replace the state atomically, then write the files derived from it.

        A run that is killed meanwhile resumes from the old or the new state, and writes the rest again.
        """
        parameters, state = self._shards.whole(self.parameters), self._shards.whole(self._optimizer.state())
        if not all(np.isfinite(value).all() for value in parameters.values()):
            raise ValueError(
                f"after step {self.course.num_steps} adapters are not finite: try a smaller --rate"
            )
        with Interrupts() as interrupts:
            if self._shards.is_first:
                write_state(self._directory, self._settings, self.course, parameters, state)
                self._write_results(parameters)
        self._is_saved = True
        if self._shards.any_rank(interrupts.requested):
            raise KeyboardInterrupt

    def _write_results(self, parameters: Mapping[str, Array]) -> None:
        """Write the adapters as PEFT has them, the losses, and a picture where it can be drawn."""
        arguments, course = self._arguments, self.course
        base, family = Path(arguments.path).absolute(), self._model.config.model_type
        layers = self._shards.layers(parameters)
        export_peft(self._directory, layers, base_model_name_or_path=base, model_type=family)
        write_csv(self._directory / "loss.csv", course)
        self.drawn = False
        if can_draw():
            title = f"Adapters of rank {self._settings['rank']} learn {Path(arguments.text).name}"
            with contextlib.suppress(Exception):  # an error of matplotlib must not lose the rest
                draw_course(self._directory / "loss.png", course.losses, course.held_out, title)
                self.drawn = True
