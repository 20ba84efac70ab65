"""Under pytest-xdist one worker runs all tests of a module, and no test runs beside one marked `serial`."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FOLDER = pytest.StashKey[tempfile.TemporaryDirectory[str]]()
_TURNS = pytest.StashKey["WorkerTurns"]()


class WorkerTurns:
    """Tests of several processes at a time, or one alone.

    Two locks on files in a folder that the processes share. Whoever waits for the room keeps the door locked:
    otherwise the others could overtake a test that must be alone again and again.
    """

    def __init__(self, folder: Path) -> None:
        self._door = (folder / "door.lock").open("w")
        self._room = (folder / "room.lock").open("w")

    def close(self) -> None:
        """Close the files, after the last turn."""
        self._door.close()
        self._room.close()

    @contextmanager
    def take(self, *, alone: bool) -> Iterator[None]:
        """Wait for the turn of a test; it lasts until the block ends."""
        fcntl.flock(self._door, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.flock(self._door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            # Not left to the closing of the file: a process that a test has forked may still have it open.
            fcntl.flock(self._room, fcntl.LOCK_UN)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep modules together: their fixtures often take longer than their tests."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker, before it starts, which folder the locks are in."""
    if _FOLDER not in node.config.stash:
        node.config.stash[_FOLDER] = tempfile.TemporaryDirectory(prefix="ktmoe-tests-")
    node.workerinput["ktmoe_turns"] = node.config.stash[_FOLDER].name


def pytest_configure(config: pytest.Config) -> None:
    """Open the locks, in a worker."""
    if hasattr(config, "workerinput"):
        config.stash[_TURNS] = WorkerTurns(Path(config.workerinput["ktmoe_turns"]))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close the locks, in a worker; else remove their folder, as the last worker has ended."""
    if _TURNS in config.stash:
        config.stash[_TURNS].close()
    if _FOLDER in config.stash:
        config.stash[_FOLDER].cleanup()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test in its turn."""
    turns = item.config.stash.get(_TURNS, None)
    if turns is None:
        return (yield)
    with turns.take(alone=item.get_closest_marker("serial") is not None):
        return (yield)
