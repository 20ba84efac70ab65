"""`ktmoe finetune`: what is learned, what is written, and that stop and resume is bit-identical."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import COMMAND, environment, run_ktmoe, shown_on_terminal

import ktmoe_np.cli.training_run as training_run
from ktmoe_np.cli import main
from ktmoe_np.cli.optimizers import make_optimizer
from ktmoe_np.io import SafetensorsFile
from ktmoe_np.io.safetensors.writer import write_safetensors
from ktmoe_np.models import EMBEDDED_MODEL, EMBEDDED_TEXT, MoEDecoder, bits_per_token

#: Small, but enough to learn something.
SIZES = ("--batch=4", "--window=96", "--rank=4", "--rate=3e-3", "--every=3")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "part.txt"
    path.write_bytes(EMBEDDED_TEXT.read_bytes()[:20000])
    return path


def finetune(text: Path, out: Path, *options: str) -> int:
    return main(["finetune", "--text", str(text), "--out", str(out), *SIZES, *options])


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What six steps give when nothing stops them."""
    out = tmp_path_factory.mktemp("whole") / "adapter"
    assert finetune(text, out, "--steps=6") == 0
    return out


def same(out: Path, whole: Path) -> bool:
    return all(
        (out / name).read_bytes() == (whole / name).read_bytes()
        for name in ("adapter_model.safetensors", "loss.csv")
    )


# Slow: a model has to learn before its loss says anything; the loss falls by 0.31 in so few steps.
@pytest.mark.slow
def test_the_held_out_loss_falls(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(text, tmp_path / "new" / "adapter", "--steps=12", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    held_out = {int(step): bits for step, bits in value["held_out"].items()}
    assert list(held_out) == [0, 3, 6, 9, 12]
    assert held_out[12] < held_out[0] - 0.25
    assert len(value["losses"]) == value["steps"] == 12
    assert value["tokens_per_step"] == 4 * 96
    assert value["num_parameters"] == 4 * 16 * 4 * 3 * (256 + 64)
    assert value["method"] == "AMXBF16_SFT"
    assert value["before"] != value["after"]
    assert value["before"][:40] == value["after"][:40]


def test_what_is_written(whole: Path, text: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.csv",
        "loss.png",
        "state.safetensors",
    }
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = read(whole / "loss.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(7)]
    assert [bool(row["held_out_bits_per_byte"]) for row in rows] == [
        True,
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    tokens = np.frombuffer(text.read_bytes(), np.uint8)
    model = MoEDecoder.from_pretrained(adapter=whole)
    measured = bits_per_token(model, tokens[-2000:], window=96)
    assert measured == pytest.approx(float(rows[-1]["held_out_bits_per_byte"]), abs=1e-6)


def test_the_text_says_all(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "adapter"
    assert finetune(text, out, "--steps=2", "--prompt=Alice was") == 0
    said = capsys.readouterr().out
    for part in (
        "rank 4 (0.25 million",
        "(AMXBF16_SFT)",
        "Before:\nAlice was",
        "After:\nAlice was",
        "loss.png",
    ):
        assert part in said
    assert f"ktmoe generate --adapter {out}" in " ".join(said.split())
    assert "384 tokens per step" in " ".join(said.split())


def test_more_steps_go_on_as_if_not_stopped(text: Path, whole: Path, tmp_path: Path) -> None:
    assert finetune(text, tmp_path / "adapter", "--steps=4") == 0  # measures the held-out text after them
    assert not same(tmp_path / "adapter", whole)
    assert finetune(text, tmp_path / "adapter", "--steps=6") == 0
    assert same(tmp_path / "adapter", whole)


def test_interrupts_come_between_steps(
    text: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 4:
            signal.raise_signal(signal.SIGINT)
        return steps(*arguments)

    steps = training_run.loss_and_gradients
    monkeypatch.setattr(training_run, "loss_and_gradients", interrupted)
    out = tmp_path / "adapter"
    assert finetune(text, out, "--steps=6") == 130
    error = capsys.readouterr().err
    assert "stopping after this step; press Ctrl-C again to stop now" in error
    assert f"stopped after step 4 of 6; the same command resumes from {out / 'state.safetensors'}" in error
    assert len(read(out / "loss.csv")) == 5
    assert finetune(text, out, "--steps=6") == 0
    assert taken == 6
    assert read(out / "loss.csv")[4]["bits_per_byte"] == read(whole / "loss.csv")[4]["bits_per_byte"]
    assert same(out, whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_ends_at_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_twice(*_: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training_run, "loss_and_gradients", interrupted_twice)
    assert finetune(text, tmp_path / "adapter", "--steps=6") == 130
    assert not list((tmp_path / "adapter").iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "arguments", [["generate", "--tokens=8"], ["eval", "--bytes=400", "--methods=BF16,AMXINT8"]]
)
def test_adapters_are_computed_with(
    arguments: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = []
    for more in ([], ["--adapter", str(whole)]):
        assert main([*arguments, *more, "--json"]) == 0
        values.append(json.loads(capsys.readouterr().out))
    if arguments[0] == "generate":
        assert [value["method"] for value in values] == ["BF16", "AMXBF16_SFT"]
    else:
        before, after = ([row["bits_per_byte"] for row in value["methods"]] for value in values)
        assert all(after < before for before, after in zip(before, after, strict=True))


def test_training_goes_on_from_an_adapter(
    text: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first measurement is the last of the run that the adapter is from; rank and alpha are its own."""
    out = tmp_path / "more"
    options = [option for option in SIZES if not option.startswith("--rank")]
    command = ["finetune", f"--text={text}", f"--out={out}", *options, f"--adapter={whole}", "--steps=3"]
    assert main([*command, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    last = [row for row in read(whole / "loss.csv") if row["held_out_bits_per_byte"]][-1]
    assert value["rank"] == 4
    assert value["held_out"]["0"] == pytest.approx(float(last["held_out_bits_per_byte"]), abs=1e-4)
    assert value["held_out"]["3"] < value["held_out"]["0"]
    assert main([*command[:-1], "--steps=4"]) == 0  # the same command resumes
    capsys.readouterr()
    assert main([*command[:-2], "--steps=5"]) == 2
    assert "was begun with rank 4, not 16" in capsys.readouterr().err
    assert main([*command[:-2], "--rank=4", "--steps=5"]) == 2
    assert "was begun with adapter (sha256)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank=5"], "--rank: got 5 with --adapter, expected 4, that of the adapter"),
        (["--rank=4", "--alpha=3"], "--alpha: got 3.0 with --adapter, expected 8.0, that of the adapter"),
    ],
)
def test_adapters_of_another_scale(
    options: list[str], message: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", f"--adapter={whole}", f"--out={tmp_path / 'x'}", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_adapter_is_not_written_over(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", f"--adapter={whole}", f"--out={whole}"]) == 2
    assert "expected another directory than --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank=5"], "was begun with rank 4, not 5: give what it was begun with, or another --out"),
        (["--rate=1e-3"], "was begun with rate 0.003, not 0.001"),
        (["--seed=1"], "was begun with seed 0, not 1"),
        (["--method=AMXINT8"], "was begun with method 'AMXBF16_SFT', not 'AMXINT8_SFT'"),
        (["--prompt=Alice"], "was begun with prompt None, not 'Alice'"),
    ],
)
def test_other_settings_do_not_go_on(
    options: list[str], message: str, text: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert finetune(text, whole, "--steps=9", *options) == 2
    assert message in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


def test_products_of_other_threads_do_not_go_on(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of NumPy's products depend on their threads."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert finetune(text, tmp_path / "x", "--steps=1", "--every=1") == 0
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert finetune(text, tmp_path / "x", "--steps=2", "--every=1") == 2
    assert "was begun with blas_threads '1', not '2'" in capsys.readouterr().err


def test_another_text_does_not_go_on(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(EMBEDDED_TEXT.read_bytes()[5000:20000])
    assert finetune(other, whole, "--steps=9") == 2
    assert "was begun with text (sha256)" in capsys.readouterr().err


def test_states_that_are_none(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: Path
) -> None:
    (tmp_path / "state.safetensors").write_bytes((whole / "adapter_model.safetensors").read_bytes())
    assert finetune(text, tmp_path) == 2
    assert "state.safetensors: is no state of ktmoe finetune" in capsys.readouterr().err
    (tmp_path / "state.safetensors").rename(tmp_path / "other")
    assert finetune(text, tmp_path) == 2
    assert "is not empty and has no state to resume from: give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 100, "got 90 tokens in its first nine tenths, expected 97 or more"),
        (b"", "got 1 tokens in its first nine tenths, expected 97 or more"),
        (b"x" * 500 + b"\xff", "is not UTF-8: invalid start byte at byte 500"),
    ],
)
def test_texts_that_cannot_be_learned(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes(content)
    assert finetune(tmp_path / "text", tmp_path / "adapter") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--rate=0", "--rate: got '0', expected a number above 0"),
        ("--rate=inf", "--rate: got 'inf', expected a number above 0"),
        ("--alpha=no", "--alpha: got 'no', expected a number above 0"),
        ("--window=1", "--window: got '1', expected an integer of 2 or more"),
        ("--optimizer=sgd", "--optimizer: got 'sgd', expected adam or optax.NAME"),
        (
            "--method=BF16_SFT_SkipLoRA",
            "--method: got 'BF16_SFT_SkipLoRA', expected one that trains adapters",
        ),
        ("--prompt=", "--prompt: got an empty text, expected at least one token"),
        (f"--seed={2**64}", f"--seed: got '{2**64}', expected at most {2**64 - 1}"),
    ],
)
def test_wrong_options(
    option: str, message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(text, tmp_path / "adapter", option) == 2
    assert message in capsys.readouterr().err


def test_optax_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optax", None)
    with pytest.raises(ImportError, match=r"--optimizer optax\.adamw: needs: pip install optax jax"):
        make_optimizer("optax.adamw", {}, 1e-3)


def test_without_matplotlib_there_is_no_picture(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("training_run", "finetune"):
        monkeypatch.setattr(f"ktmoe_np.cli.{module}.can_draw", lambda: False)
    assert finetune(text, tmp_path / "adapter", "--steps=1") == 0
    assert "loss.csv (a picture needs pip install" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "adapter" / "loss.png").exists()


def test_a_model_is_told_by_its_content(
    text: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, model)
    assert main(["finetune", str(model), "--text", str(text), "--out", str(whole), *SIZES, "--steps=6"]) == 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    assert main(["finetune", str(model), "--text", str(text), "--out", str(whole), *SIZES, "--steps=6"]) == 2
    assert "was begun with model (sha256)" in capsys.readouterr().err


def test_a_method_has_one_name(text: Path, whole: Path) -> None:
    assert finetune(text, whole, "--steps=6", "--method=BF16") == 0


def test_what_is_missing_is_written_again(text: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes((whole / "state.safetensors").read_bytes())
    assert finetune(text, tmp_path, "--steps=6") == 0
    assert same(tmp_path, whole)


def test_what_a_killed_run_left_is_removed(text: Path, tmp_path: Path) -> None:
    (tmp_path / ".ktmoe-0123.part").write_bytes(b"half")
    assert finetune(text, tmp_path, "--steps=1") == 0
    assert not list(tmp_path.glob(".*"))


def test_a_loss_that_is_none_is_not_saved(
    text: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(text, tmp_path / "adapter", "--steps=4", "--rate=1e30") == 2
    message = "the loss is nan, expected a number: a smaller --rate may help"
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "adapter").iterdir())


def test_a_picture_that_cannot_be_written(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(text, tmp_path / "adapter", "--steps=1") == 0
    (tmp_path / "adapter" / "loss.png").unlink()
    (tmp_path / "adapter" / "loss.png").mkdir()
    assert finetune(text, tmp_path / "adapter", "--steps=1") == 0
    assert "loss.csv (a picture could not be written)" in " ".join(capsys.readouterr().out.split())


def test_the_first_adapters_are_of_the_seed(text: Path, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        assert finetune(text, tmp_path / seed, "--steps=1", "--rate=1e-30", f"--seed={seed}") == 0
    assert not same(tmp_path / "1", tmp_path / "2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors, told: tensors.pop("optimizer.num_steps"),
            "has other tensors than a state of this model",
        ),
        (
            lambda tensors, told: tensors.update(
                {"parameter.0.gate_lora_a": np.zeros((16, 1, 256), np.float32)}
            ),
            r"parameter.0.gate_lora_a: got float32 \[16, 1, 256\], expected float32 \[16, 4, 256\]",
        ),
        (lambda tensors, told: told.update(course="{}"), "its course is not one of ktmoe finetune"),
        (lambda tensors, told: told.update(course='{"held_out": {}, "x": 1}'), "its course is not one"),
        (lambda tensors, told: told.pop("settings"), "settings"),
    ],
)
def test_states_that_are_damaged(
    change: Callable[[dict[str, Any], dict[str, str]], object],
    message: str,
    text: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = SafetensorsFile(whole / "state.safetensors")
    tensors, told = {name: file.tensor(name) for name in file.names()}, dict(file.metadata)
    change(tensors, told)
    write_safetensors(tmp_path / "state.safetensors", tensors, told)
    assert finetune(text, tmp_path, "--steps=9") == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "state.safetensors" in error


def test_the_bar_counts_steps(text: Path, tmp_path: Path) -> None:
    arguments = ["finetune", "--text", str(text), "--out", str(tmp_path / "adapter"), *SIZES]
    for steps, counts in (("2", ["0/2", "1/2"]), ("4", ["0/4", "2/4", "3/4"])):
        raw = shown_on_terminal([*COMMAND, *arguments, f"--steps={steps}"], environment()).decode()
        assert "Warning" not in raw
        assert [
            count for count in dict.fromkeys(re.findall(r"-?\d+/\d", raw)) if count[-1] == steps
        ] == counts


def test_letters_that_the_terminal_does_not_know(text: Path, tmp_path: Path) -> None:
    done = run_ktmoe(
        "finetune",
        "--text",
        text,
        "--out",
        tmp_path / "a",
        *SIZES,
        "--steps=1",
        "--prompt=é",
        PYTHONIOENCODING="ascii",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_activations_in_int8_are_part_of_the_settings(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "adapter", ("--steps=1", "--every=1", "--method=MOE_INT4", "--json")
    assert finetune(text, out, *options, "--activation-dtype=int8") == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["method"], value["activation_dtype"]) == ("MOE_INT4_SFT", "int8")
    assert finetune(text, tmp_path / "bf16", *options) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["activation_dtype"] == "bfloat16"
    assert 0 < abs(value["losses"][0] - other["losses"][0]) < 0.05
    assert finetune(text, out, *options, "--activation-dtype=int8") == 0
    capsys.readouterr()
    assert finetune(text, out, *options) == 2
    assert "was begun with activation_dtype 'int8', not None" in capsys.readouterr().err
    assert finetune(text, tmp_path / "bf16", *options, "--activation-dtype=bfloat16") == 0
