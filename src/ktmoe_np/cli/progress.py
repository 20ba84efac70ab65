"""A progress bar on terminals, silence elsewhere."""

from __future__ import annotations

import importlib
import shutil
import sys
from types import TracebackType
from typing import Any

from .ranks import is_first
from .terminal import complain, one_line

__all__ = ["EXTRA_HINT", "Progress"]

EXTRA_HINT = "pip install 'ktmoe_np[cli]'"


class Progress:
    """Steps of known number, shown on stderr when it is a terminal and gone when done. A context manager.

    Without tqdm a line says how to get the bar.

    Parameters
    ----------
    num_steps : int
    doing : str, optional
        What is said without tqdm.
    """

    def __init__(self, num_steps: int, doing: str = "measuring") -> None:
        self._bar: Any = None
        self._begun = False
        if not sys.stderr.isatty() or not is_first():
            return
        try:
            tqdm = importlib.import_module("tqdm").tqdm
        except ImportError:
            complain(f"{doing}, {num_steps} steps (for a progress bar: {EXTRA_HINT})")
            return
        layout = "{desc:<36}|{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
        columns = min(80, shutil.get_terminal_size().columns)
        self._bar = tqdm(
            total=num_steps, bar_format=layout, leave=False, file=sys.stderr, ncols=columns, nrows=20
        )

    def step(self, label: str) -> None:
        """End the step before, if any, and begin the one called `label`."""
        if self._bar is not None:
            self._bar.update(int(self._begun))
            self._bar.set_description_str(one_line(label))
        self._begun = True

    def skip(self, num_steps: int, label: str) -> None:
        """End that many steps, the one under way among them, and begin the one called `label`."""
        if self._bar is not None:
            self._bar.update(num_steps - 1)
        self.step(label)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
