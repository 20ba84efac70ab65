"""`ktmoe finetune-demo`: the loss falls, the first steps are the reference's, the curve is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import only_error, run_ktmoe
from layers import IS_SLOW

from ktmoe_np.cli import finetune_demo, main

#: Enough steps for the loss to fall to a tenth; the default number brings it to a hundredth.
STEPS = "10" if IS_SLOW else "150"


def test_the_loss_falls_and_follows_the_reference(tmp_path: Path) -> None:
    picture = tmp_path / "loss.png"
    done = run_ktmoe("finetune-demo", "--steps", STEPS, "--json", "--plot", picture)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    losses, reference = report["losses"], report["reference_losses"]
    assert report["right"]
    assert len(losses) == int(STEPS)
    assert len(reference) == min(20, len(losses))
    for ours, theirs in zip(losses, reference, strict=False):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert losses[-1] < (0.95 if IS_SLOW else 0.1) * losses[0]
    assert report["ms_per_step"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_text_says_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune-demo", "--steps", "2", "--rank", "3"]) == 0
    text, errors = capsys.readouterr()
    assert "rank 3" in text
    assert "The first 2 losses agree" in text
    assert errors == ""


def test_a_loss_that_does_not_fall_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune_demo, "_GOAL_STEPS", 2)
    assert main(["finetune-demo", "--steps", "2"]) == 1
    assert "The loss fell to" in capsys.readouterr().out


def test_losses_unlike_the_reference_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune_demo, "_CHECKED_WITHIN", -1.0)
    assert main(["finetune-demo", "--steps", "1"]) == 1
    assert "DO NOT AGREE" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--steps", "--rank"])
def test_numbers_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune-demo", option, "0"]) == 2
    assert f"argument {option}: got '0', expected an integer of 1 or more" in only_error(capsys)


def test_a_picture_of_another_kind_is_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune-demo", "--plot", "curve.txt"]) == 2
    assert "--plot: got 'curve.txt', expected a file ending in .png" in only_error(capsys)
