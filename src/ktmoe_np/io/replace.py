"""Atomic replacement of files: the package writes all its files here.

A file is created exclusively, never through a link, under a random name in its directory, and then renamed.
While it is written, its writer locks it (`flock`); the lock ends with the writer: a file that can be locked
is a leftover. Process ids cannot tell, since containers that share a directory may have the same ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["remove_leftovers", "replace_text", "replacing"]

#: Between them 32 random hexadecimal digits.
_PREFIX, _SUFFIX = ".ktmoe-", ".part"

#: What files were called that were not locked while they were written, and for how many seconds they stay.
_OLD_PART = re.compile(r"\..+\.[0-9]+\.part", re.DOTALL)
_OLD_AGE = 86400.0


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file that others see complete or not at all.

    What is written goes to a hidden file beside it, which takes its place when it is whole and on the disk,
    and goes away with an exception, interrupts included. Who has mapped the old file keeps it.

    Raises
    ------
    OSError
        The file cannot be written, or something is there that is no file, such as a device. Names `path`,
        also when the disk is full.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "x")
    >>> with replacing(path) as file:
    ...     _ = file.write(b"whole")
    >>> path.read_bytes()
    b'whole'
    """
    target = Path(os.path.realpath(path))
    with _naming_errors(path), _opened(target.parent) as directory:
        _check_regular_file(target, directory)
        while True:
            part = f"{_PREFIX}{secrets.token_hex(16)}{_SUFFIX}"
            is_taken = False
            try:  # around its creation too: an interrupt may come as soon as it is there
                try:
                    created = _new_file(part, directory)
                except FileExistsError:
                    is_taken = True
                    raise
                with created as file:
                    if not _lock(file.fileno()):
                        continue
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(part, target.name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                if not is_taken:
                    with contextlib.suppress(OSError):
                        os.unlink(part, dir_fd=directory)
                raise
            break
        with contextlib.suppress(OSError):  # some file systems cannot; the file is whole either way
            os.fsync(directory)


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text to a file, in UTF-8, as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


def remove_leftovers(directory: str | os.PathLike[str]) -> None:
    """Remove what `replacing` has left in a directory when its process was killed.

    Files that are being written by any process stay, as do those that cannot be locked or
    removed. Files ``.NAME.NUMBER.part``, as they were called before there were locks, stay for a day.
    """
    try:
        opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for name in os.listdir(opened):
            is_old = _OLD_PART.fullmatch(name) is not None
            if is_old or (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
                with contextlib.suppress(OSError):
                    _remove_unless_locked(name, opened, _OLD_AGE if is_old else 0.0)
    finally:
        os.close(opened)


@contextmanager
def _naming_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let errors of the system name a file that they do not name: writing to a descriptor knows none."""
    try:
        yield
    except OSError as error:
        name = error.filename
        if error.errno is None or not (name is None or _is_part(name)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _is_part(name: object) -> bool:
    return isinstance(name, str) and name.startswith(_PREFIX)


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    """The descriptor of a directory, so that it stays the same one despite renames."""
    flags = os.O_DIRECTORY | os.O_CLOEXEC
    try:
        opened = os.open(directory, os.O_RDONLY | flags)
    except PermissionError:  # a directory that may be written to, but not listed
        opened = os.open(directory, os.O_PATH | flags)
    try:
        yield opened
    finally:
        os.close(opened)


def _check_regular_file(target: Path, directory: int) -> None:
    """Raise OSError when something is there that a rename would do away with: a device, a socket, ..."""
    try:
        mode = os.stat(target.name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a directory is refused by the system
        raise OSError(f"{target}: got something that is no regular file, expected one or none")


def _new_file(name: str, directory: int) -> BinaryIO:
    """Create a file, which must not be there, for writing."""

    def create(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666, dir_fd=directory)

    return open(name, "xb", opener=create)


def _lock(file: int) -> bool:
    """Lock a file that was just created; false when it was taken for a leftover before that, and removed."""
    with contextlib.suppress(OSError):  # a file system without locks: it will not be taken for a leftover
        fcntl.flock(file, fcntl.LOCK_EX)
    return os.fstat(file).st_nlink > 0


def _remove_unless_locked(name: str, directory: int, min_age: float) -> None:
    """Remove a file that has no writer, or none for `min_age` seconds; OSError when that is unknown."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(name, flags, dir_fd=directory)
    try:
        status = os.fstat(file)
        is_due = min_age == 0 or time.time() - status.st_mtime > min_age
        if stat.S_ISREG(status.st_mode) and is_due:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=directory)
    finally:
        os.close(file)
