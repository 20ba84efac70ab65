"""`ktmoe.json`, changed by several processes at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cli_runs import environment
from converted import name_of, run
from layers import run_python
from limited_files import files_of_at_most

from ktmoe_np.cli import main
from ktmoe_np.io.converted.manifest import (
    LayerRecord,
    Manifest,
    begin_manifest,
    manifest_path,
    read_manifest,
    record_layer,
)

#: Records layers, one after the other, as many processes at a time do.
_RECORDER = """
import sys
from ktmoe_np.io.converted.manifest import LayerRecord, Manifest, begin_manifest, record_layer
sys.stdin.readline()  # all begin together
directory, first = sys.argv[1], int(sys.argv[2])
manifest = begin_manifest(directory, Manifest("/source", "AMXINT4", 32), "1")
for layer in range(first, first + 25):
    record_layer(directory, manifest, layer, LayerRecord("0", {"gate_proj": 0.5}, (0,)), "1")
    assert layer in manifest.layers
"""


def manifest() -> Manifest:
    return Manifest("/source", "AMXINT4", 32)


def record(digest: str = "0") -> LayerRecord:
    return LayerRecord(digest, {"gate_proj": 0.5}, (0,))


def test_processes_record_layers_at_a_time(tmp_path: Path) -> None:
    firsts = (0, 100, 200, 300)
    command = [sys.executable, "-c", _RECORDER, str(tmp_path)]
    recorders = [
        subprocess.Popen([*command, str(first)], stdin=subprocess.PIPE, text=True) for first in firsts
    ]
    for recorder in recorders:
        assert recorder.stdin is not None
        recorder.stdin.write("\n")
        recorder.stdin.flush()
    assert [recorder.wait() for recorder in recorders] == [0, 0, 0, 0]
    for recorder in recorders:
        assert recorder.stdin is not None
        recorder.stdin.close()
    expected = sorted(first + i for first in firsts for i in range(25))
    assert sorted(read_manifest(tmp_path).layers) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ktmoe.lock", "ktmoe.json"]


def test_processes_convert_layers_of_one_directory(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "int4"
    command = [sys.executable, "-m", "ktmoe_np.cli", "convert", str(source), str(target), "--method=AMXINT4"]
    env = environment()
    runs = [
        subprocess.Popen([*command, f"--layers={layer}", "--threads=1"], env=env, stdout=subprocess.DEVNULL)
        for layer in (0, 1, 2, 1)
    ]
    assert [one.wait() for one in runs] == [0] * 4
    assert sorted(json.loads((target / "ktmoe.json").read_text())["layers"]) == ["0", "1", "2"]
    assert main(["verify", str(target)]) == 0
    capsys.readouterr()
    assert run(source, target, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in report["layers"]] == ["kept"] * 3


def test_who_records_waits_for_who_does(tmp_path: Path) -> None:
    found = begin_manifest(tmp_path, manifest(), "1")
    lock = tmp_path / ".ktmoe.lock"
    inode = lock.stat().st_ino
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=record_layer, args=(tmp_path, found, 3, record(), "1"))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not read_manifest(tmp_path).layers  # readers do not wait
    thread.join()
    assert read_manifest(tmp_path).layers == found.layers == {3: record()}
    assert lock.stat().st_ino == inode


def test_what_others_record_stays(tmp_path: Path) -> None:
    mine, others = (begin_manifest(tmp_path, manifest(), "1") for _ in range(2))
    record_layer(tmp_path, others, 1, record("1"), "1")
    record_layer(tmp_path, mine, 2, record("2"), "1")
    assert mine.layers == read_manifest(tmp_path).layers == {1: record("1"), 2: record("2")}
    assert begin_manifest(tmp_path, manifest(), "1").layers == mine.layers


def test_another_conversion_meanwhile(tmp_path: Path) -> None:
    mine = begin_manifest(tmp_path, manifest(), "1")
    with pytest.raises(ValueError, match=r"ktmoe\.json: method: got 'AMXINT4', expected 'AMXINT8': another"):
        begin_manifest(tmp_path, Manifest("/source", "AMXINT8", None), "1")
    path = manifest_path(tmp_path)
    path.write_text(path.read_text().replace("/source", "/other"))
    with pytest.raises(ValueError, match=r"ktmoe\.json: source: got '/other', expected '/source': another"):
        record_layer(tmp_path, mine, 0, record(), "1")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"ktmoe\.json"):
        record_layer(tmp_path, mine, 0, record(), "1")
    assert not mine.layers


def test_a_lock_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / ".ktmoe.lock"
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"\.ktmoe\.lock"):
        begin_manifest(tmp_path, manifest(), "1")
    assert not os.path.exists(tmp_path / "elsewhere")
    lock.unlink()

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=r"cannot be locked: Input/output error: .*\.ktmoe\.lock"):
        begin_manifest(tmp_path, manifest(), "1")
    assert not manifest_path(tmp_path).exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    found = begin_manifest(tmp_path, manifest(), "1")
    record_layer(tmp_path, found, 3, record(), "1")
    assert read_manifest(tmp_path).layers == {3: record()}


def test_the_lock_is_for_all_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o077)
    try:
        begin_manifest(tmp_path, manifest(), "1")
    finally:
        os.umask(before)
    lock = tmp_path / ".ktmoe.lock"
    assert stat.S_IMODE(lock.stat().st_mode) == 0o666
    lock.chmod(0o444)  # as another version has made it, which left the rest to the umask
    original = os.open

    def open_as_another(path: Path, flags: int, *args: object, **options: object) -> int:
        if path == lock and flags & os.O_RDWR and not flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, flags, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", open_as_another)
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=begin_manifest, args=(tmp_path, manifest(), "1"))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join()


#: Begins a conversion in a directory of all users, as two of them one after the other.
_USERS = """
import os, shutil, tempfile
from ktmoe_np.io.converted.manifest import Manifest, begin_manifest
directory = tempfile.mkdtemp()
os.chmod(directory, 0o1777)
os.umask(0o022)
try:
    for user in (65533, 65534):
        os.seteuid(user)
        begin_manifest(directory, Manifest("/source", "AMXINT4", 32), "1")
        os.seteuid(0)
finally:
    os.seteuid(0)
    shutil.rmtree(directory)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for several users")
def test_users_share_a_directory() -> None:
    done = run_python(_USERS)
    assert done.returncode == 0, done.stderr


def test_a_full_disk_names_the_layer(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "int4"
    with files_of_at_most(4096):
        assert run(source, target) == 2
    path = target / name_of(0)
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"{path}: file too large")
    assert not path.exists()
    assert not read_manifest(target).layers
    assert run(source, target) == 0
    assert sorted(read_manifest(target).layers) == [0, 1, 2]
