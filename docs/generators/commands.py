"""The page of the command `ktmoe`, from its parsers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from ktmoe_np.cli.commands import _parser

from .markdown import table

__all__ = ["page", "parsers"]


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Name of a command -> its parser."""
    (subparsers,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(subparsers.choices)


def page() -> str:
    """Render a section for each command."""
    os.environ["COLUMNS"] = "100"
    return "\n".join(line for name, parser in parsers().items() for line in _section(name, parser))


def _section(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## ktmoe {name}\n"
    yield (parser.description or "") + "\n"
    yield "```text\n" + parser.format_usage().removeprefix("usage: ") + "```\n"
    rows = [_row(parser, action) for action in parser._actions if action.help != argparse.SUPPRESS]
    yield table(("argument", "default", "meaning"), rows) + "\n"


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str, str]:
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    names = ", ".join(action.option_strings) or str(value)
    shown = f"`{names} {value}`" if action.option_strings and action.nargs != 0 and value else f"`{names}`"
    nothing = action.default in (None, False, argparse.SUPPRESS, "", [])
    meaning = parser._get_formatter()._expand_help(action) if action.help else ""
    return shown, "" if nothing else f"`{_short(action.default)}`", meaning


def _short(default: object) -> str:
    if isinstance(default, list | tuple):
        return ",".join(map(str, default))
    text = str(default)
    return os.path.basename(text) if os.sep in text else text  # files of the package
