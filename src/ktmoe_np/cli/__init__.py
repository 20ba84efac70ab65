"""The command `ktmoe`: what this machine is, whether the library is right on it, and how fast.

Nothing heavy is imported here: `entry` is in control before NumPy and the extension are loaded.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from .guard import EXIT_STATUS, INTERRUPTED, RaisingInterrupts, guard_process
from .ranks import check_cpus, is_first, prepare_environment, rank_prefix

__all__ = ["entry", "main"]

#: Exit statuses: 0 and 1 are a command's own answer (is every result within its bound?).
_FAILED, _PIPE_CLOSED = 2, 141


def entry() -> int:
    """Run the command as all that the process does.

    Besides what `main` does, Ctrl-C at any time, during imports too, is one line on standard error and status
    130; a standard stream that is closed is not taken by the next file that is opened; and warnings are not
    shown, unless Python was told to.

    Returns
    -------
    int
        The exit status: see `main`.
    """
    guard_process()
    _fill_descriptors()
    prepare_environment()
    if not sys.warnoptions:  # numbers that overflow show in the results, and errors are one line
        warnings.simplefilter("ignore")
    return main()


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
        done, and one line on stderr says why; 130: interrupted; 141: the output was closed.
    """
    from . import terminal

    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        terminal.complain(INTERRUPTED)
        return EXIT_STATUS
    except BrokenPipeError:
        terminal.drop_output()
        return _PIPE_CLOSED
    except BaseException as error:  # whatever it is, its user is told in one line, without a traceback
        if not is_first() and _is_of_all_ranks(error):
            return _FAILED  # the first one says it
        terminal.complain(f"{rank_prefix()}{_name(argv)}: {_message(error)}")
        return _FAILED


def _run(argv: list[str]) -> int:
    from . import terminal

    terminal.prepare()
    from .commands import parse

    try:
        arguments = parse(argv)
    except SystemExit as leaving:
        terminal.flush()
        return int(leaving.code or 0)
    if not is_first():
        terminal.drop_output()
    warning = check_cpus() if getattr(arguments, "threads", 1) is None else None
    if warning is not None and is_first():
        terminal.complain(f"warning: {warning}")
    with RaisingInterrupts():
        status: int = arguments.run(arguments)
        terminal.flush()  # a pipe that is closed shall show here
    return status


def _is_of_all_ranks(error: BaseException) -> bool:
    """Whether every rank has raised it."""
    from ..distributed.channel import RankError

    return isinstance(error, RankError)


def _name(argv: Sequence[str]) -> str:
    """The command as messages begin with it."""
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    return "ktmoe" if command is None else f"ktmoe {command}"


def _message(error: BaseException) -> str:
    """Say what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        name = os.fsdecode(name) if isinstance(name, bytes) else name
        return error.strerror.lower() if name is None else f"{name}: {error.strerror.lower()}"
    said = str(error).strip()
    if isinstance(error, (OSError, ValueError, TypeError, RuntimeError, MemoryError, ImportError)):
        return said or type(error).__name__
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _fill_descriptors() -> None:
    """Open nothing for those of 0, 1 and 2 that are closed: the next file would get the number.

    And it would get what is written to that number: messages of libraries, into a file of weights.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # as long as the process
