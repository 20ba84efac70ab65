"""The command `ktmoe`: `info`, usage, and that it ends cleanly on a pipe, a terminal and Ctrl-C."""

from __future__ import annotations

import doctest
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import COMMAND, CONTROL, QUICK, environment, only_error, run_ktmoe, shown, shown_on_terminal

import ktmoe_np.cli.machine
import ktmoe_np.cli.table
from ktmoe_np import __version__
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.cli import machine, main, progress
from ktmoe_np.cpuinfer import _MoEBase

pytestmark = pytest.mark.usefixtures("leave_no_engine")


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", *QUICK]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ktmoe_np"] == __version__
    assert report["isa"] == ext.isa_info()
    assert report["limits"]["isa"] == ext.isa_info()["active"]
    assert all(report["limits"][name] > 1e6 for name in report["limits"] if name.endswith("_per_s"))
    assert report["memory"]["total_bytes"] >= report["memory"]["available_bytes"] > 0
    assert set(report["cpus_allowed"]) == os.sched_getaffinity(0)


def test_info_text() -> None:
    done = run_ktmoe("info", *QUICK, KTMOE_ISA="scalar")
    assert (done.returncode, done.stderr) == (0, "")
    assert CONTROL.search(done.stdout) is None
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert re.search(r"^Instruction sets +scalar is used \(forced by KTMOE_ISA\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^  reading memory +[\d.]+ GB/s$", done.stdout, re.MULTILINE)


def test_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.2, 9.0, 9.0))
    assert machine.busy_note() is None
    monkeypatch.setattr(os, "getloadavg", lambda: (8.0, 0.0, 0.0))
    assert "load 8.0 on 4 CPUs" in str(machine.busy_note())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ktmoe: the following arguments are required: COMMAND"),
        (["convert"], "ktmoe convert: the following arguments are required: SRC, DST"),
        (["verify", ".", "--tokens", "1,0"], "argument --tokens: got '0', expected an integer of 1 or more"),
        (["verify", ".", "--layer", "x"], "argument --layer: got 'x', expected an integer of 0 or more"),
        (["info", "--seconds", "nan"], "argument --seconds: got 'nan', expected a number above 0"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in only_error(capsys)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ktmoe_np {__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("info", "demo", "verify"))
    assert "_measure" not in text


def test_another_engine_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    threads = sum(_MoEBase._get_cpu_infer().backend_.config.subpool_thread_count)
    assert main(["info", "--threads", str(threads + 1), *QUICK]) == 2
    assert f"the engine of this process has {threads}" in only_error(capsys)


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [*COMMAND, "demo"], env=environment(TMPDIR=str(tmp_path)), stdout=-1, stderr=-1, text=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=60)
    assert (child.returncode, out, errors) == (130, "", "ktmoe: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_closed_pipe_is_quiet() -> None:
    child = subprocess.Popen([*COMMAND, "info", *QUICK], env=environment(), stdout=-1, stderr=-1)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    errors = child.stderr.read()
    assert (child.wait(60), errors) == (141, b"")
    child.stderr.close()


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_terminal_shows_progress_and_then_only_the_result(with_tqdm: bool) -> None:
    if with_tqdm:
        pytest.importorskip("tqdm")
    block = "" if with_tqdm else "sys.modules['tqdm'] = None; "
    script = (
        f"import sys; {block}from ktmoe_np.cli import main; sys.exit(main(['info', '--seconds', '0.01']))"
    )
    raw = shown_on_terminal([sys.executable, "-c", script], environment())
    screen = shown(raw.decode())
    if with_tqdm:
        assert b"measuring the limits" in raw
        assert screen[0].startswith("ktmoe_np ")
    else:
        assert screen[0] == "measuring, 3 steps (for a progress bar: pip install 'ktmoe_np[cli]')"
        assert screen[1].startswith("ktmoe_np ")
    assert all(CONTROL.search(line) is None for line in screen)


def test_no_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress(2) as bar:
        bar.step("first")
        bar.step("second")
    assert capsys.readouterr() == ("", "")


def test_examples() -> None:
    for module in (ktmoe_np.cli.machine, ktmoe_np.cli.table):
        assert doctest.testmod(module).failed == 0
