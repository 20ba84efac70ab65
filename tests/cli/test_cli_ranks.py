"""The command on several ranks: files and texts are those of one process, to the byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mpi import Ended, mpi_command, rank_environment, run_job

from ktmoe_np.models import EMBEDDED_TEXT

pytestmark = [pytest.mark.mpi, pytest.mark.subprocess]

FILES = ("adapter_config.json", "adapter_model.safetensors", "loss.csv", "state.safetensors")


def on_ranks(num_ranks: int, *arguments: str, status: int = 0) -> Ended:
    command = [*mpi_command(num_ranks), sys.executable, "-m", "mpi4py", "-m", "ktmoe_np.cli", *arguments]
    ended = run_job(command)
    assert ended.returncode == status, ended.stderr
    return ended


def alone(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "ktmoe_np.cli", *arguments],
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    ).stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(Path(EMBEDDED_TEXT).read_text()[:3000])
    return file


def training(text: Path, out: Path, steps: int) -> list[str]:
    sizes = ["--rank=2", "--batch=5", "--window=24", "--every=2", f"--steps={steps}", "--threads=1"]
    return ["finetune", f"--text={text}", f"--out={out}", *sizes]


def test_finetune(text: Path, tmp_path: Path) -> None:
    """On 1 to 4 ranks, and of a run that was resumed with other numbers of ranks."""
    mpi_command(1)  # skips without it
    said = {1: alone(*training(text, tmp_path / "1", 4))}
    for num_ranks in (2, 4):
        said[num_ranks] = on_ranks(num_ranks, *training(text, tmp_path / str(num_ranks), 4)).stdout
    on_ranks(3, *training(text, tmp_path / "mixed", 2))
    on_ranks(2, *training(text, tmp_path / "mixed", 4))
    for name in FILES:
        if name == "adapter_config.json":
            continue
        expected = (tmp_path / "1" / name).read_bytes()
        for other in ("2", "4", "mixed"):
            assert (tmp_path / other / name).read_bytes() == expected, (name, other)
    for num_ranks in (2, 4):
        texts = [said[n].replace(str(tmp_path / str(n)), "OUT") for n in (1, num_ranks)]
        assert _without_times(texts[0]) == _without_times(texts[1])


def _without_times(text: str) -> str:
    return " ".join(word for word in text.split() if not word.isdigit())


def test_generate_and_eval(text: Path) -> None:
    prompt = ["generate", "--prompt=And God said", "--tokens=12", "--json", "--threads=1"]
    words = [line for line in alone(*prompt).splitlines() if '"text"' in line]
    measure = ["eval", f"--text={text}", "--methods=BF16,AMXINT4", "--threads=1"]
    table = alone(*measure)
    assert words == [line for line in on_ranks(2, *prompt).stdout.splitlines() if '"text"' in line]
    assert on_ranks(3, *measure).stdout == table


def test_what_goes_wrong(text: Path, tmp_path: Path) -> None:
    ended = on_ranks(2, "generate", str(tmp_path), "--threads=1", status=2)
    assert "ktmoe generate: " in ended.stderr
    ended = on_ranks(2, "eval", f"--text={text}", "--bytes=300", "--methods=BF16")
    assert "warning: ranks 0 and 1 may both use" in ended.stderr
    assert "bits per byte" in ended.stdout
