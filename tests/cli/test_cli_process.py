"""The command `ktmoe` as a process: closed and full streams, Ctrl-C at any time, bytes that are no text."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_runs import COMMAND, QUICK, environment, run_ktmoe

import ktmoe_np
from ktmoe_np.cli import main, terminal
from ktmoe_np.cli.terminal import one_line, printable

INFO = ["info", *QUICK, "--threads=1"]
#: The console script does this.
SCRIPT = [sys.executable, "-c", "import sys; from ktmoe_np.cli import entry; sys.exit(entry())"]


def shell(line: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command with what a shell does to its streams."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {line}', "sh", *COMMAND, *arguments],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# ---- streams ----


@pytest.mark.parametrize("arguments", [INFO, ["--help"], ["generate", "--tokens=1"]])
def test_a_closed_output_is_an_error(arguments: list[str]) -> None:
    done = shell(">&-", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(
        ": standard output: is closed, expected one to write to (/dev/null will do)\n"
    )
    assert done.stderr.count("\n") == 1


def test_without_errors_the_command_works() -> None:
    done = shell("2>&-", *INFO)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ktmoe_np ")
    assert shell("2>&-", "nothing").returncode == 2
    assert shell("2>&-", *INFO, KTMOE_ISA="none").returncode == 2


@pytest.mark.parametrize("line", [">&- 2>&-", "<&- >&- 2>&-"])
def test_without_any_stream(line: str) -> None:
    assert shell(line, *INFO).returncode == 2


def test_no_file_becomes_a_standard_stream(tmp_path: Path) -> None:
    """Else what is written to standard output or error goes into a file of weights."""
    script = f"""
import os, sys
from ktmoe_np.cli import entry
sys.argv = ["ktmoe", "--version"]
entry()
sys.exit(os.open({str(tmp_path / "file")!r}, os.O_CREAT | os.O_WRONLY))
"""
    done = subprocess.run(
        ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", script],
        env=environment(), timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode > 2


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(INFO, "ktmoe info"), (["--help"], "ktmoe"), (["generate", "--tokens=1"], "ktmoe generate")],
)
def test_a_full_disk_names_the_output(arguments: list[str], name: str) -> None:
    done = shell(">/dev/full", *arguments)
    assert done.returncode == 2
    assert done.stderr == f"{name}: standard output: no space left on device\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_errors_is_quiet(unbuffered: str) -> None:
    assert shell("2>/dev/full", "nothing", PYTHONUNBUFFERED=unbuffered).returncode == 2


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--tokens=400"]])
def test_a_pipe_that_ends_early_is_quiet(arguments: list[str]) -> None:
    done = shell("| head -c 3", *arguments)
    assert (done.returncode, len(done.stdout), done.stderr) == (0, 3, "")


# ---- Ctrl-C, and imports that fail ----


@pytest.mark.parametrize("command", [COMMAND, SCRIPT])
@pytest.mark.parametrize("module", ["numpy", "ml_dtypes"])
def test_interrupted_during_imports(command: list[str], module: str, tmp_path: Path) -> None:
    """An import that takes its time, and that makes other errors of all errors, as NumPy does."""
    begun = tmp_path / "begun"
    (tmp_path / f"{module}.py").write_text(
        "import pathlib, time\n"
        f"pathlib.Path({str(begun)!r}).touch()\n"
        "try:\n    time.sleep(60)\n"
        "except BaseException as error:\n    raise ImportError('broken') from error\n"
    )
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    child = subprocess.Popen([*command, *INFO], env=env, stdout=-1, stderr=-1, text=True)
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=30)
    assert (child.returncode, out, errors) == (130, "", "ktmoe: interrupted\n")


def test_interrupts_that_are_ignored_stay_ignored() -> None:
    script = (
        "import os, signal, sys; from ktmoe_np.cli.guard import guard_process; guard_process(); "
        "os.kill(os.getpid(), signal.SIGINT); sys.exit(7)"
    )
    done = subprocess.run(
        ["sh", "-c", "trap '' INT; \"$@\"", "sh", sys.executable, "-c", script],
        env=environment(), timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 7


@pytest.mark.parametrize("many", [1, 2, 5])
def test_more_interrupts_end_as_one(many: int) -> None:
    child = subprocess.Popen(
        [*COMMAND, "generate", "--tokens=100000"], env=environment(), stdout=-1, stderr=-1, bufsize=0
    )
    assert child.stdout is not None
    assert child.stdout.read(1)
    for _ in range(many):
        child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (130, b"ktmoe: interrupted\n")


def test_an_interrupt_that_an_import_would_swallow(tmp_path: Path) -> None:
    """A module that is imported while the command runs, and that hides whatever happens in it."""
    (tmp_path / "swallowing.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    [None for _ in range(99)]\n"
        "except BaseException:\n    pass\n"
    )
    script = (
        "import sys, time\nfrom ktmoe_np.cli.guard import RaisingInterrupts, guard_process\nguard_process()\n"
        "try:\n    with RaisingInterrupts():\n        import swallowing\n        time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


@pytest.mark.parametrize("command", [COMMAND, SCRIPT])
def test_an_instruction_set_that_is_none(command: list[str]) -> None:
    done = subprocess.run(
        [*command, *INFO],
        env=environment(KTMOE_ISA="avx\x1b[31m"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("ktmoe info: KTMOE_ISA=avx\\x1b[31m: isa: got")


def test_importing_the_command_imports_nothing_heavy() -> None:
    script = (
        "import sys, ktmoe_np.cli, ktmoe_np.cli.terminal; "
        "sys.exit(any(name in sys.modules for name in ('numpy', 'ml_dtypes', 'ktmoe_np.kt_kernel_ext')))"
    )
    assert subprocess.run([sys.executable, "-c", script], env=environment(), check=False).returncode == 0


@pytest.mark.parametrize(
    "error", [KeyError("x\ny"), AssertionError(), IndexError("deep"), BaseException("x")]
)
def test_no_error_is_a_traceback(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("ktmoe_np.cli.evaluate.load_tokenizer", fail)
    assert main(["eval"]) == 2
    out, errors = capsys.readouterr()
    assert (out, errors.count("\n")) == ("", 1)
    assert errors.startswith(f"ktmoe eval: {type(error).__name__}")


def test_warnings_are_not_shown() -> None:
    done = run_ktmoe("generate", "--tokens=2", "--temperature=1e-320", "--json")
    assert (done.returncode, done.stderr) == (0, "")


# ---- what arguments and files may hold ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", b"a\xff"], r"argument --prompt: got '\udcff' at letter 1, expected UTF-8"),
        (["finetune", "--prompt", b"\xe2\x82"], r"argument --prompt: got '\udce2' at letter 0"),
        (["generate", b"/no/\xff\x1b[31m"], r"/no/\udcff\x1b[31m/tokenizer.json: no such file"),
        (["inspect", b"/no\n\xff"], r"/no \udcff: no such file"),
        (["eval", "--text", b"/no/\x1b]0;x\x07"], r"/no/\x1b]0;x\x07: no such file"),
        (["eval", "--methods", b"\xff"], r"\udcff"),
        ([b"\xff\x1b[2J"], r"\udcff\x1b[2J"),
        (["info", b"--\x1b[2J"], r"\x1b[2J"),
        (["info", b"--threads", b"9" * 5000], "argument --threads: got '999"),
        (["info", b"--threads", b"9" * 50], "expected at most 2147483647"),
        (["verify", ".", b"--tokens", b"9" * 5000], "argument --tokens: got '999"),
        (["convert", "a", "b", "--method=AMXINT4", b"--layers", b"0-" + b"9" * 5000], "argument --layers"),
    ],
)  # fmt: skip
def test_arguments_of_any_bytes(arguments: list[Any], message: str) -> None:
    done = subprocess.run([*COMMAND, *arguments], env=environment(), capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    errors = done.stderr.decode("ascii")
    assert errors.count("\n") == 1
    assert errors[:-1].isprintable()
    assert message in errors


def test_what_a_terminal_obeys_is_not_printed() -> None:
    for code in range(0x110000):
        letter = chr(code)
        shown = printable(letter)
        control = code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in (0x2028, 0x202E)
        if control and letter not in "\n\t":
            assert shown.startswith("\\"), hex(code)
            assert shown.isascii()
        if letter.isprintable() or letter in "\n\t":
            assert shown == letter
    assert printable("a\r\nb\tc") == "a\\r\nb\tc"
    assert one_line("\n a\n\tb\x1b ") == "a b\\x1b"


def test_a_text_that_a_model_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = b"line\n\ttab \x1b[31mred\x07\r\x7f \xe2\x80\xae"
    monkeypatch.setattr("ktmoe_np.cli.generate.generate", lambda *_, **__: iter(said))
    assert main(["generate", "--prompt=x\x1b[0m\n"]) == 0
    text = capsys.readouterr().out
    said_and_prompt, rates = text.split("\n\n")
    assert said_and_prompt == "x\\x1b[0m\nline\n\ttab \\x1b[31mred\\x07\\r\\x7f \\u202e"
    assert rates.startswith("prompt: 6 tokens, ")
    assert "; text: 25 tokens, then " in rates


def test_json_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say_json({"x\x7f": "\x1b\u202e\udcff"})
    assert capsys.readouterr().out == '{\n  "x\\u007f": "\\u001b\\u202e\\udcff"\n}\n'


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_names_in_files_of_others(
    as_json: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (
        '{"model_type": "\\u001b[2J", "architectures": ["\\u001b]0;title\\u0007"], "num_experts": "\\u009b"}'
    )
    (tmp_path / "config.json").write_text(config)
    header = b'{"\\u001b[31mx": {"dtype": "\\u001b", "shape": [], "data_offsets": [0, 0]}}'
    (tmp_path / "\x1b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for command in ("inspect", "verify", "generate"):
        assert main([command, str(tmp_path), *as_json]) == 2
        out, errors = capsys.readouterr()
        assert (out, errors.count("\n")) == ("", 1)
        assert errors[:-1].isprintable()


def test_a_tokenizer_that_its_package_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise Exception("unknown variant\n`\x1b[31m` at line 1")

    library = type(sys)("tokenizers")
    library.Tokenizer = type("Tokenizer", (), {"from_file": refuse, "from_str": refuse})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tokenizers", library)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert main(["generate", str(tmp_path)]) == 2
    out, errors = capsys.readouterr()
    assert (out, errors.count("\n")) == ("", 1)
    assert "unknown variant `\\x1b[31m` at line 1" in errors


# ---- the gate: one place writes ----


def writes(source: str) -> list[int]:
    """Lines that write to a standard stream."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Name) and node.id == "print")
        or (
            isinstance(node, ast.Attribute)
            and node.attr in ("stdout", "stderr")
            and ast.unparse(node.value) == "sys"
        )
    ]


def test_one_module_of_the_command_writes() -> None:
    # The bar of steps is drawn by tqdm; the entry fills in for a standard error that is not there.
    allowed = {"terminal.py", "progress.py", "__init__.py"}
    files = sorted(Path(ktmoe_np.__file__).with_name("cli").glob("*.py"))
    assert {name for name in allowed if writes(Path(files[0]).with_name(name).read_text())} == allowed
    assert [path.name for path in files if writes(path.read_text()) and path.name not in allowed] == []
