"""The command `ktmoe`: what this machine is, whether the library is right on it, and how fast."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .. import __version__
from ..models import EMBEDDED_MODEL, EMBEDDED_TEXT
from . import convert, demo, evaluate, finetune, finetune_demo, generate, info, inspect, measure, verify

__all__ = ["main"]

_DESCRIPTION = "Mixture-of-experts layers on CPUs: what this machine can do, and what is reached on it."
_EPILOG = "Start with: ktmoe demo"
_INFO = "Add the output of 'ktmoe info --json' to every bug report."
_DEMO = (
    "Writes a small Qwen3-MoE checkpoint (100 MB) to a temporary folder, maps it, runs decode and prefill "
    "batches and compares the results with the NumPy reference. Takes 10 to 20 seconds; the exit status is "
    "1 when a result lies outside its computed bound."
)
_FINETUNE_DEMO = (
    "A small layer learns, by Adam in NumPy, what a teacher with other adapters does. The first losses are "
    "compared with those of the NumPy reference. Takes some seconds; the exit status is 1 when they differ "
    "or the loss does not fall as it should."
)
_INSPECT = (
    "Reads the headers of a checkpoint of Hugging Face, of GGUF files or of a directory that 'ktmoe convert' "
    "has written: layers, sizes, formats, bytes, and whether this machine's memory holds the experts. How "
    "fast memory is read is measured: reading the experts of each token is what limits decoding."
)
_CONVERT = (
    "Quantises the experts of a Hugging Face checkpoint, a file a layer, and copies its config.json; other "
    "tensors stay where they are. What is there already and whole is kept, so that an interrupted conversion "
    "goes on. Every file is read back and compared, and the error of the weights measured on some experts."
)
_VERIFY = (
    "Maps the layer's experts, in bfloat16, in an encoding of their own or in GGUF, runs random tokens "
    "through them and compares some of the results with the NumPy reference. The exit status is 1 when one "
    "lies outside its computed bound. Of a directory that 'ktmoe convert' has written, every file is "
    "checked, and the error of the weights measured against the source if that is still there; the exit "
    "status is 1 when a file is damaged."
)

_GENERATE = (
    "Loads a Qwen3-MoE, Mixtral or OLMoE checkpoint, or the small model that comes with the package, and "
    "goes on with the prompt; the text appears as it is computed."
)
_EVAL = (
    "Measures how well a model expects a text, in bits a byte, less being better, with its experts computed "
    "by several methods: what quantising them costs."
)
_FINETUNE = (
    "Adapters (LoRA) of all experts learn nine tenths of a text; the last tenth is held out, to measure by. "
    "The directory gets the adapters as PEFT has them, the losses as CSV and as picture, and a state: after "
    "Ctrl-C, or with more --steps, the same command goes on as if it had not stopped."
)

#: Exit statuses: 0 and 1 are a command's own answer (is every result within its bound?).
_FAILED, _INTERRUPTED, _PIPE_CLOSED = 2, 130, 141

#: More than any model has, so that a mistyped range is said to be one.
_MOST_LAYERS = 100_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; None takes the process's.

    Returns
    -------
    int
        0: done, and every result that was checked is within its bound; 1: one is not; 2: it could not be
        done, and one line on stderr says why; 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # letters that the terminal does not know
    try:
        hidden = argv[:1] == ["_measure"]
        arguments = _child_parser().parse_args(argv[1:]) if hidden else _parser().parse_args(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()  # a pipe that is closed shall show here
    except KeyboardInterrupt:
        _complain("ktmoe: interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except (OSError, ValueError, TypeError, RuntimeError, MemoryError, ImportError) as error:
        _complain(f"ktmoe {arguments.command}: {_message(error)}")
        return _FAILED
    return status


def _complain(message: str) -> None:
    sys.stderr.write(f"{message}\n")


def _message(error: Exception) -> str:
    """Say in one line what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{os.fspath(error.filename)}: "
        return f"{where}{error.strerror.lower()}"
    return " ".join(str(error).split()) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(_FAILED, f"{self.prog}: {message}; see '{self.prog} --help'\n")


def _parser() -> _Parser:
    parser = _Parser(prog="ktmoe", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"ktmoe_np {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str, more: str) -> _Parser:
        command: _Parser = commands.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}. {more}"
        )
        command.set_defaults(run=run)
        return command

    command = add("info", info.run, "the machine: cores, instruction sets, measured limits", _INFO)
    _add_common(command, seconds=1.5, meaning="time for measuring the limits")

    command = add("demo", demo.run, "a small model on every instruction set, checked and timed", _DEMO)
    _add_common(command, seconds=0.25, meaning="time for each batch")
    command.add_argument("--keep", metavar="DIR", help="write the checkpoint here and leave it")
    command.add_argument(
        "--plot", metavar="FILE.png", help="draw the fractions of the limits (needs matplotlib)"
    )

    command = add(
        "finetune-demo", finetune_demo.run, "adapters that learn, checked and drawn", _FINETUNE_DEMO
    )
    command.add_argument("--steps", type=_count(1), default=300, metavar="N", help="default 300")
    command.add_argument("--rank", type=_count(1), default=8, metavar="R", help="of the adapters (default 8)")
    command.add_argument("--seed", type=_count(0), default=0, metavar="N", help="of everything that is drawn")
    command.add_argument("--plot", metavar="FILE.png", help="draw the curve of the loss (needs matplotlib)")
    _add_threads_and_json(command)

    _add_model_commands(add)
    _add_finetune(add)
    _add_checkpoint_commands(add)
    return parser


def _add_model_commands(add: Callable[..., _Parser]) -> None:
    """Add the commands that run a whole model."""
    command = add("generate", generate.run, "a text, gone on with by a model", _GENERATE)
    _add_model(command)
    command.add_argument("--prompt", default="In the beginning", help="default: %(default)s")
    _add_method(command)
    command.add_argument("--tokens", type=_count(1), default=200, metavar="N", help="at most (default 200)")
    command.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (default), 1 draws as the model expects them",
    )
    command.add_argument("--seed", type=_count(0), default=0, metavar="N", help="of the draws")
    _add_adapter(command)
    _add_threads_and_json(command)

    command = add("eval", evaluate.run, "how well a model expects a text, by each method", _EVAL)
    _add_model(command)
    _add_text(command)
    command.add_argument(
        "--bytes", type=_count(2), default=16384, metavar="N", help="of the text, at most (default 16384)"
    )
    command.add_argument(
        "--methods",
        type=_names,
        default=["BF16", "AMXINT8", "AMXINT4", "MOE_INT4"],
        metavar="M,...",
        help="default BF16,AMXINT8,AMXINT4,MOE_INT4",
    )
    _add_adapter(command)
    _add_threads_and_json(command)


def _add_finetune(add: Callable[..., _Parser]) -> None:
    command = add("finetune", finetune.run, "adapters of a model's experts that learn a text", _FINETUNE)
    _add_model(command)
    _add_text(command)
    command.add_argument("--out", default="ktmoe-adapter", metavar="DIR", help="default %(default)s")
    _add_method(command)
    command.add_argument("--steps", type=_count(1), default=200, metavar="N", help="in all (default 200)")
    command.add_argument(
        "--rank", type=_count(1), default=16, metavar="R", help="of the adapters (default 16)"
    )
    command.add_argument("--alpha", type=_rate, metavar="A", help="scale times rank; default twice the rank")
    command.add_argument("--batch", type=_count(1), default=8, metavar="N", help="texts a step (default 8)")
    command.add_argument(
        "--window", type=_count(2), default=256, metavar="N", help="tokens each (default 256)"
    )
    command.add_argument("--rate", type=_rate, default=1e-3, metavar="X", help="of learning (default 1e-3)")
    command.add_argument(
        "--optimizer",
        default="adam",
        metavar="NAME",
        help="adam (default), or one of optax, as in optax.adamw",
    )
    command.add_argument(
        "--every", type=_count(1), default=20, metavar="N", help="steps to measure after (default 20)"
    )
    command.add_argument("--seed", type=_count(0), default=0, metavar="N", help="of everything that is drawn")
    command.add_argument("--prompt", help="of the sample; default how the held-out text begins")
    _add_threads_and_json(command)


def _add_text(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--text", default=EMBEDDED_TEXT, metavar="FILE", help="in UTF-8; default Alice in Wonderland"
    )


def _add_method(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", help="how to compute the experts; default what they are encoded in")


def _add_adapter(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--adapter", metavar="DIR", help="adapters that 'ktmoe finetune' or PEFT has written"
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "path",
        nargs="?",
        default=EMBEDDED_MODEL,
        help="directory of a checkpoint; default the model that comes with the package",
    )


def _add_checkpoint_commands(add: Callable[..., _Parser]) -> None:
    """Add the commands that are about a checkpoint of the user's."""
    command = add("inspect", inspect.run, "what experts a checkpoint has, and how fast they can be", _INSPECT)
    command.add_argument("path", help="directory of the checkpoint, or a file of it")
    command.add_argument(
        "--no-measure", action="store_true", help="leave out how fast memory is read, and what that allows"
    )
    _add_common(command, seconds=0.6, meaning="time for measuring the limits")

    command = add("convert", convert.run, "a checkpoint's experts, quantised to files", _CONVERT)
    command.add_argument("source", metavar="SRC", help="directory of the checkpoint")
    command.add_argument("target", metavar="DST", help="directory for the files; made when it is not there")
    command.add_argument(
        "--method", required=True, help="what the files are for: AMXINT8, AMXINT4, MOE_INT8 or MOE_INT4"
    )
    command.add_argument(
        "--group-size",
        type=_count(1),
        metavar="N",
        help="columns that share a scale; default that of the method",
    )
    command.add_argument("--layers", type=_ranges, metavar="A-B,...", help="default all that have experts")
    _add_threads_and_json(command)

    command = add("verify", verify.run, "a layer of your own checkpoint, checked and timed", _VERIFY)
    command.add_argument(
        "path", help="directory of the checkpoint, with config.json and *.safetensors; or a GGUF model"
    )
    command.add_argument(
        "--layer",
        type=_count(0),
        metavar="N",
        help="the layer; default the first with experts, or of files that were converted all",
    )
    command.add_argument("--method", help="how to compute; default what the checkpoint is encoded in")
    command.add_argument(
        "--tokens", type=_counts, default=[1, 16, 256], metavar="T,...", help="batch sizes (default 1,16,256)"
    )
    command.add_argument(
        "--check-seconds",
        type=_seconds,
        default=4.0,
        metavar="S",
        help="time for the reference, which is slow: decides how many experts are checked (default 4)",
    )
    _add_common(command, seconds=0.5, meaning="time for each batch")


def _child_parser() -> _Parser:
    """Make the parser of ``_measure``, which `demo` runs in child processes and no user sees."""
    command = _Parser(prog="ktmoe _measure")
    command.set_defaults(run=measure.run_child, command="_measure")
    command.add_argument("path")
    command.add_argument("--layers", type=_counts_from_0, required=True)
    command.add_argument("--tokens", type=_counts, required=True)
    command.add_argument("--experts", type=_count(1), required=True)
    command.add_argument("--seconds", type=float, required=True)
    command.add_argument("--threads", type=_count(1))
    return command


def _add_common(command: argparse.ArgumentParser, seconds: float, meaning: str) -> None:
    """Add the options that the commands that measure have."""
    command.add_argument(
        "--seconds", type=_seconds, default=seconds, metavar="S", help=f"{meaning} (default {seconds:g})"
    )
    _add_threads_and_json(command)


def _add_threads_and_json(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--threads", type=_count(1), metavar="N", help="threads; default the CPUs that this process may use"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")


class _count:
    """Argument type: an integer of at least `least`."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, text: str) -> int:
        if not text.strip().isdecimal() or int(text) < self.least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of {self.least} or more")
        return int(text)


def _counts(text: str, least: int = 1) -> list[int]:
    """Argument type: integers with commas between them."""
    return [_count(least)(part) for part in text.split(",")]


def _counts_from_0(text: str) -> list[int]:
    return _counts(text, 0)


def _ranges(text: str) -> list[int]:
    """Argument type: numbers and ranges of them, as in 0-3,7."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = [_count(0)(end) for end in ((first, last) if dash else (first,))]
        if ends[0] > ends[-1] or ends[-1] >= _MOST_LAYERS:
            raise argparse.ArgumentTypeError(
                f"got {part!r}, expected a range upwards, of numbers below {_MOST_LAYERS}"
            )
        numbers += range(ends[0], ends[-1] + 1)
    return numbers


def _names(text: str) -> list[str]:
    """Argument type: names with commas between them."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected names with commas between them")
    return names


def _float(text: str) -> float:
    """The number that a text is, or NaN, which lies in no range."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _temperature(text: str) -> float:
    """Argument type: a temperature."""
    temperature = _float(text)
    if not 0 <= temperature <= 100:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to 100")
    return temperature


def _rate(text: str) -> float:
    """Argument type: a number above 0."""
    rate = _float(text)
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return rate


def _seconds(text: str) -> float:
    """Argument type: a time."""
    seconds = _float(text)
    if not 0 < seconds <= 600:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0, at most 600")
    return seconds
