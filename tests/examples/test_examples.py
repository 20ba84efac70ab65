"""The examples run, and print what they promise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import environment
from gguf_models import byte_tokens, write_gguf_model
from mpi import mpi_command, run_job

from ktmoe_np.models import EMBEDDED_MODEL, MoEDecoder, generate

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.subprocess


def run(name: str, *arguments: str, folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run an example in a folder of its own."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        input=stdin,
        cwd=folder,
        env=environment(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def output_of(name: str, *arguments: str, folder: Path, stdin: str = "") -> str:
    """What it prints; it must not fail."""
    done = run(name, *arguments, folder=folder, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text: str) -> list[float]:
    """The numbers of lines such as "step 3: 2.5 bits per token"."""
    return [float(loss) for loss in re.findall(r"^step +\d+: ([\d.]+) ", text, re.MULTILINE)]


def test_every_example_is_listed_and_tested() -> None:
    programs = {p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".ipynb")}
    assert programs == set(re.findall(r"\]\((\w+\.(?:py|ipynb))\)", (EXAMPLES / "README.md").read_text()))
    here = Path(__file__).read_text()
    assert [name for name in sorted(programs) if f'"{name}"' not in here] == []


def test_numpy_layer(tmp_path: Path) -> None:
    text = output_of("numpy_layer.py", "--tokens", "1", "8", folder=tmp_path)
    error = re.search(r"error: ([\d.]+)% of what rounding allows", text)
    assert error is not None
    assert 0 < float(error.group(1)) < 100
    assert "token 3 alone and in a batch: equal" in text
    assert len(re.findall(r"^ +\d+ tokens: +[\d.]+ ms$", text, re.MULTILINE)) == 2
    assert "AMXINT4" in output_of("numpy_layer.py", "--method", "AMXINT4", folder=tmp_path)


def test_gguf_chat(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    write_gguf_model(
        EMBEDDED_MODEL, tmp_path / "model.gguf", tokens=lambda writer: byte_tokens(writer, template)
    )
    options = ("model.gguf", "--tokens=12", "--temperature=0")
    text = output_of("gguf_chat.py", *options, folder=tmp_path, stdin="And God said\nAnd\n")
    once = output_of("gguf_chat.py", *options, folder=tmp_path, stdin="And God said\n")
    assert text.startswith(once)
    model = MoEDecoder.from_pretrained(EMBEDDED_MODEL)
    told = f"And God said\n{once[:-1]}\nAnd\n"  # the second answer sees the first
    assert text[len(once) :] == bytes(generate(model, told.encode(), 12)).decode() + "\n"


def test_the_notebook() -> None:
    """Its code runs from top to bottom, and its outputs, with two plots, are stored in it."""
    pytest.importorskip("matplotlib")
    cells = json.loads((EXAMPLES / "quantize_and_compare.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        env=environment(MPLBACKEND="agg"),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"relative error 0\.\d+", done.stdout)) == 4
    assert len(re.findall(r"[\d.]+ bits per token", done.stdout)) == 5
    stored = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in stored) == 2
    errors = re.findall(r"relative error [\d.]+", done.stdout)
    assert errors == re.findall(r"relative error [\d.]+", json.dumps(stored))


@pytest.mark.crosscheck
def test_jax_lora_scan(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    found = losses(output_of("jax_lora_scan.py", "--steps=4", folder=tmp_path))
    assert len(found) == 4
    assert found[0] == pytest.approx(3.06, abs=0.01)  # as the decoders of transformers and in NumPy have it
    assert min(found[1:]) < found[0]


@pytest.mark.crosscheck
def test_torch_transformers_lora(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = losses(output_of("torch_transformers_lora.py", "--steps=4", folder=tmp_path))
    assert len(found) == 4
    assert found[0] == pytest.approx(2.121, abs=0.01)
    assert min(found[1:]) < found[0]
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


@pytest.mark.crosscheck
def test_peft_round_trip(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    text = output_of("peft_round_trip.py", "--folder", str(tmp_path), folder=tmp_path)
    assert "adapters that PEFT has saved: bit-identical" in text
    apart = re.search(r"([\d.]+) apart", text)
    assert apart is not None
    assert float(apart.group(1)) < 0.02


@pytest.mark.crosscheck
def test_gpu_hybrid_decoder(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    text = output_of("gpu_hybrid_decoder.py", "--device=cpu", "--tokens=8", folder=tmp_path)
    assert text.startswith("And God said, Let there be light")
    assert "tokens per second, attention on cpu" in text
    done = run("gpu_hybrid_decoder.py", "--tokens=8", folder=tmp_path)
    if torch.cuda.is_available():
        assert done.stdout.splitlines()[0] == text.splitlines()[0]
    else:
        assert (done.returncode, done.stderr.splitlines()[-1][:11]) == (1, "no GPU here")


@pytest.mark.mpi
def test_expert_parallel_mpi(tmp_path: Path) -> None:
    command = [*mpi_command(2), sys.executable, "-m", "mpi4py", str(EXAMPLES / "expert_parallel_mpi.py")]
    ended = run_job(command)
    assert ended.returncode == 0, ended.stderr
    assert "compared with one process: bit-identical" in ended.stdout
