"""Files that are replaced: whole or not at all, with concurrent writers, and errors that name them."""

from __future__ import annotations

import doctest
import errno
import os
import secrets
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from layers import run_python
from limited_files import files_of_at_most

import ktmoe_np.io.replace
from ktmoe_np.cli.checkpoint import write_demo_checkpoint
from ktmoe_np.cli.plot import draw_course
from ktmoe_np.io import SafetensorsFile
from ktmoe_np.io.safetensors.writer import remove_leftovers, replace_text, replacing, write_safetensors


def write_half(path: Path) -> None:
    with replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path, link = tmp_path / "x.safetensors", tmp_path / "link"
    write_safetensors(path, {"a": np.arange(5)})
    mapped = SafetensorsFile(path).tensor("a")
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    np.testing.assert_array_equal(SafetensorsFile(path).tensor("a"), np.arange(5))
    link.symlink_to(path)
    write_safetensors(link, {"a": np.zeros(3)})
    np.testing.assert_array_equal(SafetensorsFile(path).tensor("a"), np.zeros(3))
    np.testing.assert_array_equal(mapped, np.arange(5))
    assert sorted(tmp_path.iterdir()) == [link, path]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_safetensors(tmp_path / "nowhere" / "x", {})


def test_an_interrupt_right_after_the_file_was_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(ktmoe_np.io.replace, "_lock", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_permissions_are_those_of_a_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        replace_text(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


# ---- who writes beside ----

#: Writes a file over and over: a letter, so often that it takes several system calls.
_WRITER = """
import os, sys
os.getpid = lambda: 1  # as in a container
from ktmoe_np.io.safetensors.writer import replacing
for _ in range(40):
    with replacing(sys.argv[1]) as file:
        for _ in range(32):
            file.write(sys.argv[2].encode() * 4096)
            file.flush()
"""


def assert_of_one_writer(content: bytes) -> None:
    assert content == content[:1] * (32 * 4096)


def test_processes_of_one_number_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "x"
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, path, letter]) for letter in "abc"]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            assert_of_one_writer(path.read_bytes())
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_threads_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "x"
    failures: list[BaseException] = []

    def write(letter: bytes) -> None:
        try:
            for _ in range(10):
                with replacing(path) as file:
                    for _ in range(32):
                        file.write(letter * 4096)
                        file.flush()
                assert_of_one_writer(path.read_bytes())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_taken_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0")
    victim, link = tmp_path / "victim", tmp_path / ".ktmoe-0.part"
    victim.write_bytes(b"mine")
    link.symlink_to(victim)
    with pytest.raises(FileExistsError, match="target"):
        replace_text(tmp_path / "target", "text")
    assert victim.read_bytes() == b"mine"
    assert link.is_symlink()
    link.unlink()
    link.write_bytes(b"of another")
    with pytest.raises(FileExistsError, match="target"):
        replace_text(tmp_path / "target", "text")
    assert link.read_bytes() == b"of another"


def test_names_cannot_be_guessed(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with replacing(tmp_path / ("x" * 255)) as file:  # as long as names may be
            names.add(Path(file.name).name)
    assert len(names) == 3


@pytest.mark.parametrize("kind", ["FIFO", "device", "directory"])
def test_what_is_no_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/full")
    before = path.stat()
    with pytest.raises(OSError, match=r"regular file|directory") as caught:
        replace_text(path, "text")
    assert str(os.path.realpath(path)) in str(caught.value)
    assert path.stat() == before
    assert list(tmp_path.iterdir()) == [path]


# ---- what killed processes leave ----

#: Writes half a file, says so, and waits to be killed.
_KILLED = """
import sys, time
from ktmoe_np.io.safetensors.writer import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("written", flush=True)
    time.sleep(600)
"""


def test_leftovers_are_removed_when_their_writer_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED, tmp_path / "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        (part,) = tmp_path.iterdir()
        remove_leftovers(tmp_path)
        assert part.exists()
        writer.send_signal(signal.SIGKILL)
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_this_process_writes_is_no_leftover(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as file:
        remove_leftovers(tmp_path)
        file.write(b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_a_file_that_is_taken_for_a_leftover_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, made = ktmoe_np.io.replace._new_file, []

    def create_and_lose(name: str, directory: int) -> object:
        file = create(name, directory)
        made.append(name)
        if len(made) == 1:
            remove_leftovers(tmp_path)
        return file

    monkeypatch.setattr(ktmoe_np.io.replace, "_new_file", create_and_lose)
    replace_text(tmp_path / "x", "text")
    assert len(made) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_other_files_are_no_leftovers(tmp_path: Path) -> None:
    for name in (".x.part", "ktmoe-0.part", ".ktmoe-0.part.x", ".ktmoe.lock"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".ktmoe-1.part").mkdir()
    os.mkfifo(tmp_path / ".ktmoe-2.part")
    (tmp_path / ".ktmoe-3.part").symlink_to(tmp_path / ".x.part")
    before = set(tmp_path.iterdir())
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == before
    remove_leftovers(tmp_path / "nowhere")


def test_leftovers_from_before_there_were_locks(tmp_path: Path) -> None:
    two_days_ago = time.time() - 2 * 86400
    leftover, recent = tmp_path / ".x.safetensors.123.part", tmp_path / ".y.4.part"
    others = [tmp_path / name for name in (".z.part", "x.1.part", ".x.1a.part", ".1.part", ".x.1.part.x")]
    for path in (leftover, recent, *others):
        path.write_bytes(b"half")
        os.utime(path, (two_days_ago, two_days_ago))
    os.utime(recent)
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {recent, *others}


# ---- directories ----

#: Replaces a file in a directory that can be written to and not listed.
_UNLISTED = """
import os, shutil, tempfile
from ktmoe_np.io.safetensors.writer import replace_text
directory = tempfile.mkdtemp()
root = os.geteuid() == 0
try:
    os.chmod(directory, 0o333)
    if root:  # who may list all
        os.seteuid(65534)
    for text in ("old", "new"):
        replace_text(os.path.join(directory, "x"), text)
    print(open(os.path.join(directory, "x")).read())
    os.listdir(directory)
except PermissionError as error:
    print(error.filename == directory)
finally:
    if root:
        os.seteuid(0)
    os.chmod(directory, 0o700)
    print(os.listdir(directory))
    shutil.rmtree(directory)
"""


def test_a_directory_that_cannot_be_listed() -> None:
    done = run_python(_UNLISTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["new", "True", "['x']"]


# ---- full disks ----


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.arange(5)})
    with files_of_at_most(4096), pytest.raises(OSError, match="File too large") as caught:
        write_safetensors(path, {"a": np.zeros(1000)})
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)
    np.testing.assert_array_equal(SafetensorsFile(path).tensor("a"), np.arange(5))
    with files_of_at_most(4096), pytest.raises(OSError, match="File too large") as caught:
        replace_text(path, "x" * 5000)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.PNG"
    draw_course(path, [3.0, 2.0], {0: 3.0, 2: 2.0}, "title")
    drawn = path.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    with files_of_at_most(4096), pytest.raises(OSError, match="File too large") as caught:
        draw_course(path, [3.0, 2.0], {0: 3.0, 2: 2.0}, "title")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == drawn
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    with files_of_at_most(4096), pytest.raises(OSError, match="File too large") as caught:
        write_demo_checkpoint(tmp_path)
    assert caught.value.filename == str(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_errors_of_other_files_keep_their_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "x"):
        (tmp_path / "other").read_bytes()
    assert caught.value.filename == str(tmp_path / "other")
    assert not list(tmp_path.iterdir())


def test_examples() -> None:
    assert doctest.testmod(ktmoe_np.io.replace).failed == 0
