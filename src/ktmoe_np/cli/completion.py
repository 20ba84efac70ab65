"""`ktmoe --print-completion SHELL`: a script by which a shell completes commands, options and files."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from typing import Any

from .terminal import say_piece

__all__ = ["SHELLS", "PrintCompletion"]

SHELLS = ("bash", "zsh", "tcsh")

#: What arguments are called, whose values are files or folders.
_FILES = ("FILE", "FILE.png", "PATH", "SRC")
_FOLDERS = ("DIR", "DST")


class PrintCompletion(argparse.Action):
    """Print the script and leave, as ``--version`` does."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        """Write the script of a shell."""
        del namespace
        try:
            shtab = importlib.import_module("shtab")
        except ImportError:
            parser.error(f"{option} needs: pip install shtab")
        for action in _actions(parser):
            if action.metavar in _FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.metavar in _FILES or action.dest == "path":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        say_piece(shtab.complete(parser, shell=values) + "\n")
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
