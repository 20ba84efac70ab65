"""The commands of `ktmoe` and their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .. import __version__
from ..distributed.volume import PLACEMENTS
from ..models import EMBEDDED_MODEL, EMBEDDED_TEXT
from . import (
    convert,
    demo,
    doctor,
    evaluate,
    finetune,
    finetune_demo,
    generate,
    info,
    inspect,
    measure,
    verify,
)
from .arguments import (
    Count,
    activation_dtype,
    activation_dtypes,
    counts,
    counts_from_0,
    duration,
    fraction,
    layer_ranges,
    method_names,
    positive,
    share,
    temperature,
    utf8,
)
from .completion import SHELLS, PrintCompletion
from .terminal import complain, one_line, say_piece

__all__ = ["parse"]

_DESCRIPTION = "Mixture-of-experts layers on CPUs: run, check, time and fine-tune them."
_EPILOG = "Start with: ktmoe demo"
_INFO = "Add the output of 'ktmoe info --json' to every bug report."
_DOCTOR = (
    "Looks at kernels, processors, memory, huge pages, NUMA, the clock and optional packages, and tells what "
    "to do about what is in the way. Measures nothing. The exit status is 1 when there is a problem."
)
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
    "Reads the headers of a Hugging Face checkpoint, of GGUF files or of a directory written by 'ktmoe "
    "convert': layers, sizes, formats, bytes, and whether the experts fit in memory. Measures memory "
    "bandwidth, since reading each token's experts limits decoding. With --ranks, "
    "plans for several machines like this one: what each maps, and what tokens exchange."
)
_CONVERT = (
    "Quantizes the experts of a Hugging Face checkpoint, or of a GGUF model that 'ktmoe generate' runs, one "
    "file per layer, and copies what else the model "
    "needs: 'ktmoe generate', 'eval' and 'finetune' run the directory. Files that are complete are kept, so "
    "an interrupted conversion resumes. Every file of experts is read back and compared, and the weight "
    "error is measured on some experts."
)
_VERIFY = (
    "Maps the layer's experts (bfloat16, natively quantized or GGUF), runs random tokens through them and "
    "compares some of the results with the NumPy reference. The exit status is 1 when one lies outside its "
    "computed bound. In a directory written by 'ktmoe convert' every file is checked, and the weight error "
    "is measured against the source if it is still there; the exit status is 1 when a file is damaged."
)

_GENERATE = (
    "Loads a Qwen3-MoE, Mixtral or OLMoE model, a Hugging Face checkpoint or GGUF, or the small model that "
    "comes with the package, and continues the prompt; the text is shown as it is computed."
)
_EVAL = (
    "Prints bits per byte (lower is better) with the experts computed by several methods: what quantizing "
    "them costs."
)
#: Defaults of activation dtypes.
_OF_LAYERS = "int8 with AMXINT8 and AMXINT4, else bfloat16"
_OF_MODELS = "int8 with AMXINT8, AMXINT4 and quantized GGUF types, else bfloat16"

_FINETUNE = (
    "Adapters of all experts are trained on nine tenths of the text; the last tenth is held out. The "
    "output directory gets the adapters in PEFT's format, the losses as CSV and as a picture, and a state: "
    "after Ctrl-C, or with more --steps, the same command resumes as if it had never stopped."
)


#: The exit status of wrong arguments.
_WRONG = 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the arguments of the command; ``run`` of what is returned is what to call with it.

    Raises
    ------
    SystemExit
        After the help text, or after one line about an error.
    """
    hidden = argv[:1] == ["_measure"]
    return _child_parser().parse_args(argv[1:]) if hidden else _parser().parse_args(argv)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and that writes as all of the command does."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        complain(f"{self.prog}: {one_line(message)}; see '{self.prog} --help'")
        self.exit(_WRONG)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write help, or a version."""
        say_piece(message)


def _parser() -> _Parser:
    parser = _Parser(prog="ktmoe", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"ktmoe_np {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help=f"print a script that completes commands and options: {', '.join(SHELLS)} (needs shtab)",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str, more: str) -> _Parser:
        command: _Parser = commands.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}. {more}"
        )
        command.set_defaults(run=run)
        return command

    command = add("info", info.run, "show cores, instruction sets and measured limits of this machine", _INFO)
    _add_common(command, seconds=1.5, meaning="time for measuring the limits")

    command = add("doctor", doctor.run, "say what is in the way on this machine, and what to do", _DOCTOR)
    command.add_argument("--json", action="store_true", help="print JSON instead of text")

    command = add("demo", demo.run, "run a small model on every instruction set; check and time it", _DEMO)
    _add_common(command, seconds=0.25, meaning="time for each batch")
    command.add_argument("--keep", metavar="DIR", help="write the checkpoint here and leave it")
    command.add_argument(
        "--plot", metavar="FILE.png", help="draw the fractions of the limits (needs matplotlib)"
    )

    command = add(
        "finetune-demo",
        finetune_demo.run,
        "train adapters on a small layer; check and plot the loss",
        _FINETUNE_DEMO,
    )
    command.add_argument("--steps", type=Count(1), default=300, metavar="N", help="default 300")
    command.add_argument("--rank", type=Count(1), default=8, metavar="R", help="of the adapters (default 8)")
    command.add_argument(
        "--seed", type=Count(0, 2**64 - 1), default=0, metavar="N", help="random seed (default 0)"
    )
    command.add_argument("--plot", metavar="FILE.png", help="draw the curve of the loss (needs matplotlib)")
    _add_threads_and_json(command)

    _add_model_commands(add)
    _add_finetune(add)
    _add_checkpoint_commands(add)
    _add_verify(add)
    return parser


def _add_model_commands(add: Callable[..., _Parser]) -> None:
    """Add the commands that run a whole model."""
    command = add("generate", generate.run, "continue a text with a model", _GENERATE)
    _add_model(command)
    prompt = command.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", type=utf8, default="In the beginning", help="default: %(default)s")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="read the prompt, in UTF-8, from a file; - is standard input"
    )
    command.add_argument(
        "--chat", action="store_true", help="the prompt is a user's message, for the model's chat template"
    )
    _add_method(command)
    _add_experts(command)
    _add_activation_dtype(command, _OF_MODELS)
    command.add_argument("--tokens", type=Count(1), default=200, metavar="N", help="at most (default 200)")
    command.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="0 (default): greedy; 1: sample from the model's distribution",
    )
    command.add_argument(
        "--top-k", type=Count(0), default=0, metavar="N", help="sample from the N likeliest tokens only"
    )
    command.add_argument(
        "--top-p",
        type=share,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens whose probabilities reach P",
    )
    command.add_argument(
        "--min-p",
        type=fraction,
        default=0.0,
        metavar="P",
        help="sample from tokens at least P times as probable as the likeliest",
    )
    command.add_argument(
        "--seed", type=Count(0, 2**64 - 1), default=0, metavar="N", help="random seed (default 0)"
    )
    _add_adapter(command)
    _add_threads_and_json(command)

    command = add("eval", evaluate.run, "measure how well a model predicts a text, by method", _EVAL)
    _add_model(command)
    _add_text(command)
    command.add_argument(
        "--bytes", type=Count(2), default=16384, metavar="N", help="of the text, at most (default 16384)"
    )
    command.add_argument(
        "--methods",
        type=method_names,
        metavar="M,...",
        help=f"default {','.join(evaluate.METHODS)}; with --experts or a GGUF model that of the file",
    )
    _add_experts(command)
    command.add_argument(
        "--activation-dtype",
        type=activation_dtypes,
        default=[None],
        metavar="D,...",
        help="dtypes of activations in the experts' products: some of auto, bfloat16 and int8, or all, which "
        "is the latter two; of several, each method is measured with those that it has. "
        f"auto (default): {_OF_MODELS}",
    )
    command.add_argument("--plot", metavar="FILE.png", help="draw the differences (needs matplotlib)")
    _add_adapter(command)
    _add_threads_and_json(command)


def _add_finetune(add: Callable[..., _Parser]) -> None:
    command = add(
        "finetune", finetune.run, "fine-tune LoRA adapters of a model's experts on a text", _FINETUNE
    )
    _add_model(command)
    _add_text(command)
    command.add_argument("--out", default="ktmoe-adapter", metavar="DIR", help="default %(default)s")
    _add_method(command)
    _add_activation_dtype(command, _OF_MODELS)
    command.add_argument("--steps", type=Count(1), default=200, metavar="N", help="in all (default 200)")
    command.add_argument("--rank", type=Count(1), metavar="R", help="of the adapters (default 16)")
    command.add_argument("--alpha", type=positive, metavar="A", help="LoRA alpha (default: twice the rank)")
    command.add_argument(
        "--adapter", metavar="DIR", help="go on from adapters that 'ktmoe finetune' or PEFT has written"
    )
    command.add_argument(
        "--batch", type=Count(1), default=8, metavar="N", help="sequences per step (default 8)"
    )
    command.add_argument(
        "--window", type=Count(2), default=256, metavar="N", help="tokens per sequence (default 256)"
    )
    command.add_argument(
        "--rate", type=positive, default=1e-3, metavar="X", help="learning rate (default 1e-3)"
    )
    command.add_argument(
        "--optimizer",
        default="adam",
        metavar="NAME",
        help="adam (default), or one of optax, as in optax.adamw",
    )
    command.add_argument(
        "--every",
        type=Count(1),
        default=20,
        metavar="N",
        help="evaluate the held-out text every N steps (default 20)",
    )
    command.add_argument(
        "--seed", type=Count(0, 2**64 - 1), default=0, metavar="N", help="random seed (default 0)"
    )
    command.add_argument(
        "--prompt", type=utf8, help="prompt of the sample (default: start of the held-out text)"
    )
    _add_threads_and_json(command)


def _add_text(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--text", default=EMBEDDED_TEXT, metavar="FILE", help="in UTF-8; default Alice in Wonderland"
    )


def _add_method(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", help="how to compute the experts; default what they are encoded in")


def _add_experts(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--experts",
        metavar="PATH",
        help="take the experts from here: a GGUF model, or a directory that 'ktmoe convert' has written",
    )


def _add_activation_dtype(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--activation-dtype",
        type=activation_dtype,
        metavar="{auto,bfloat16,int8}",
        help=f"dtype of activations in the experts' products. auto (default): {default}",
    )


def _add_adapter(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--adapter", metavar="DIR", help="adapters that 'ktmoe finetune' or PEFT has written"
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "path",
        nargs="?",
        default=EMBEDDED_MODEL,
        help="directory of a checkpoint, or a GGUF model; default the model that comes with the package",
    )


def _add_checkpoint_commands(add: Callable[..., _Parser]) -> None:
    """Add the commands that are about a checkpoint of the user's."""
    command = add(
        "inspect",
        inspect.run,
        "list a checkpoint's experts and the decode speed that memory bandwidth allows",
        _INSPECT,
    )
    command.add_argument("path", help="directory of the checkpoint, or a file of it")
    command.add_argument("--no-measure", action="store_true", help="do not measure memory bandwidth")
    command.add_argument(
        "--ranks", type=Count(1, 4096), metavar="N", help="plan for N processes that share the experts"
    )
    command.add_argument(
        "--placement", choices=PLACEMENTS, default="contiguous", help="which experts a rank of the plan has"
    )
    _add_common(command, seconds=0.6, meaning="time for measuring the limits")

    command = add("convert", convert.run, "quantize a checkpoint's experts to files", _CONVERT)
    command.add_argument("source", metavar="SRC", help="directory of the checkpoint, or a GGUF model")
    command.add_argument("target", metavar="DST", help="directory for the files; made when it is not there")
    command.add_argument(
        "--method", required=True, help="what the files are for: AMXINT8, AMXINT4, MOE_INT8 or MOE_INT4"
    )
    command.add_argument(
        "--group-size",
        type=Count(1),
        metavar="N",
        help="columns that share a scale; default that of the method",
    )
    command.add_argument(
        "--layers", type=layer_ranges, metavar="A-B,...", help="default all that have experts"
    )
    command.add_argument(
        "--link",
        action="store_true",
        help="link the source's files of tensors instead of copying what is not quantized: hard links, or "
        "symbolic ones to another file system; small files are copied",
    )
    _add_threads_and_json(command)


def _add_verify(add: Callable[..., _Parser]) -> None:
    command = add("verify", verify.run, "check and time a layer of your own checkpoint", _VERIFY)
    command.add_argument(
        "path",
        nargs="?",
        help="directory of the checkpoint, with config.json and *.safetensors; or a GGUF model. "
        "May be left out with --digest: the model that comes with the package",
    )
    command.add_argument(
        "--digest",
        action="store_true",
        help="print digests of results and gradients instead, to compare with another machine; those of the "
        "packaged model are compared with what this version has recorded",
    )
    command.add_argument(
        "--layer",
        type=Count(0),
        metavar="N",
        help="layer (default: the first with experts; in converted directories, all)",
    )
    command.add_argument("--method", help="how to compute; default what the checkpoint is encoded in")
    _add_activation_dtype(command, _OF_LAYERS)
    command.add_argument(
        "--tokens", type=counts, default=[1, 16, 256], metavar="T,...", help="batch sizes (default 1,16,256)"
    )
    command.add_argument(
        "--check-seconds",
        type=duration,
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
    command.add_argument("--layers", type=counts_from_0, required=True)
    command.add_argument("--tokens", type=counts, required=True)
    command.add_argument("--experts", type=Count(1), required=True)
    command.add_argument("--seconds", type=float, required=True)
    command.add_argument("--threads", type=Count(1))
    return command


def _add_common(command: argparse.ArgumentParser, seconds: float, meaning: str) -> None:
    """Add the options that the commands that measure have."""
    command.add_argument(
        "--seconds", type=duration, default=seconds, metavar="S", help=f"{meaning} (default {seconds:g})"
    )
    _add_threads_and_json(command)


def _add_threads_and_json(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--threads", type=Count(1), metavar="N", help="threads; default the CPUs that this process may use"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
