"""`ktmoe finetune`: fine-tunes adapters of a whole model's experts on a text; can be stopped and resumed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from ..models import MoEDecoder, load_tokenizer
from ..sft.peft import peft_scale
from .plot import can_draw
from .progress import EXTRA_HINT
from .ranks import communicator
from .table import wrap
from .terminal import complain, say, say_json
from .training_run import TrainingRun
from .training_state import state_path
from .training_text import read_training_text

__all__ = ["run"]

#: Of adapters that are new.
_RANK = 16


def run(arguments: argparse.Namespace) -> int:
    """Train; 0 when all steps are done, and KeyboardInterrupt, with a state saved, when interrupted."""
    tokenizer = load_tokenizer(arguments.path)
    rank, alpha = _scale(arguments)
    model = MoEDecoder.from_pretrained(
        arguments.path,
        arguments.method,
        mode="sft",
        adapter=arguments.adapter,
        lora_rank=rank,
        lora_alpha=alpha,
        seed=arguments.seed,
        cpuinfer_threads=arguments.threads,
        activation_dtype=arguments.activation_dtype,
        comm=communicator(),
    )
    text = read_training_text(Path(arguments.text), tokenizer, arguments.window, model.config.vocab_size)
    training = TrainingRun(arguments, model, tokenizer, text)
    training.begin()
    if not training.run():
        complain(
            f"stopped after step {training.course.num_steps} of {arguments.steps}; the same command resumes "
            f"from {state_path(Path(arguments.out))}"
        )
        raise KeyboardInterrupt
    value = _report(arguments, training, model)
    if arguments.json:
        say_json(value)
    else:
        say(_text(value))
    return 0


def _scale(arguments: argparse.Namespace) -> tuple[int, float]:
    """Rank and alpha of the adapters: those of an adapter to go on from, or as the arguments say."""
    if arguments.adapter is None:
        rank = _RANK if arguments.rank is None else arguments.rank
        return rank, 2.0 * rank if arguments.alpha is None else arguments.alpha
    if Path(arguments.adapter).resolve() == Path(arguments.out).resolve():
        raise ValueError(f"--adapter: got {arguments.adapter}, expected another directory than --out")
    found = peft_scale(arguments.adapter)
    for name, given, own in zip(("rank", "alpha"), (arguments.rank, arguments.alpha), found, strict=True):
        if given not in (None, own):
            raise ValueError(f"--{name}: got {given} with --adapter, expected {own}, that of the adapter")
    return found


def _report(arguments: argparse.Namespace, training: TrainingRun, model: MoEDecoder) -> dict[str, Any]:
    course = training.course
    return {
        "model": str(arguments.path),
        "text": str(arguments.text),
        "out": str(arguments.out),
        "drawn": training.drawn,
        "method": model.experts[0].method,
        "activation_dtype": model.activation_dtypes[0],
        "rank": model.trained_experts()[0].options.lora_rank,
        "num_parameters": training.num_parameters,
        "steps": course.num_steps,
        "tokens_per_step": arguments.batch * arguments.window,
        "losses": course.losses,
        "held_out": course.held_out,
        "ms_per_step": 1e3 * float(np.median(training.seconds)) if training.seconds else None,
        "before": course.before,
        "after": training.sample(),
    }


def _text(value: dict[str, Any]) -> str:
    losses, held_out = value["losses"], value["held_out"]
    size = f"rank {value['rank']} ({value['num_parameters'] / 1e6:.2f} million numbers)"
    each = "" if value["ms_per_step"] is None else f", {value['ms_per_step']:.0f} ms each"
    about = wrap(
        f"Adapters of {size} of the experts ({value['method']}) were fine-tuned on nine tenths of "
        f"{value['text']}; the last tenth was held out. {value['tokens_per_step']} tokens per step{each}."
    )
    batches = {step: f"{losses[step - 1]:.4f}" if step else "" for step in held_out}
    rows = [f"{step:6d}   {batches[step]:>13}   {bits:9.4f}" for step, bits in held_out.items()]
    why = "could not be written" if can_draw() else f"needs {EXTRA_HINT}"
    picture = "loss.csv and loss.png" if value["drawn"] else f"loss.csv (a picture {why})"
    end = wrap(
        f"{value['out']} has the adapters (ktmoe generate --adapter {value['out']}), the losses in "
        f"{picture}, and a state to resume from with more --steps."
    )
    before, after = (wrap(" ".join(value[when].split())) for when in ("before", "after"))
    samples = ["Before:", before, "", "After:", after]
    return "\n".join([about, "", "  step   bits per byte    held out", *rows, "", *samples, "", end])
