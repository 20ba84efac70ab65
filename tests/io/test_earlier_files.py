"""Files that earlier versions wrote still load, and what is written has not changed unseen.

`write_samples.py` says how the samples came about; those of a version are never written again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import write_samples
from layers import Layer as Weights
from layers import assert_same_bits, draw_batch
from write_samples import E, H, I, R, biases, expert_matrices, lora_matrices

from ktmoe_np import KTMoEWrapper
from ktmoe_np.cli import main
from ktmoe_np.io import SafetensorsFile, load_experts
from ktmoe_np.io.inspect import inspect_checkpoint
from ktmoe_np.models import EMBEDDED_MODEL, MoEDecoder
from ktmoe_np.sft import import_peft

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("leave_no_engine")]

SAMPLES = sorted(path for path in (Path(__file__).parent / "samples").iterdir() if path.is_dir())

every_version = pytest.mark.parametrize("version", SAMPLES, ids=[path.name for path in SAMPLES])


def converted(version: Path) -> list[Path]:
    """The directories of `ktmoe convert`."""
    return sorted((version / "converted").iterdir())


def weights() -> Weights:
    return Weights(**expert_matrices())


def test_there_are_samples_of_this_format() -> None:
    assert [path.name for path in SAMPLES] == ["0.1"]
    assert len(converted(SAMPLES[0])) == len(write_samples.CONVERTED)


@every_version
def test_the_model_is_what_the_samples_are_of(version: Path) -> None:
    experts = load_experts(version / "model", 0)
    for name, expected in expert_matrices().items():
        assert_same_bits(np.stack(experts.projections[name].codes), expected, name)


@every_version
def test_converted_layers(version: Path, tmp_path: Path) -> None:
    batch = draw_batch(np.random.default_rng(0), weights(), 9, 1)
    for directory in converted(version):
        manifest = json.loads((directory / "ktmoe.json").read_text())
        method, size = manifest["method"], manifest["group_size"]
        moe = KTMoEWrapper.from_pretrained(directory)
        assert (moe.method, moe.group_size) == (method, size)
        own = KTMoEWrapper(0, E, 1, H, I, method=method, group_size=size)
        own.load_weights_from_tensors(*weights().matrices)
        assert_same_bits(moe.forward(*batch), own.forward(*batch), directory.name)
        written = own.save_weights(tmp_path / directory.name)  # type: ignore[attr-defined]
        assert written.read_bytes() == (directory / "layer-00000.safetensors").read_bytes(), directory.name
        sft = KTMoEWrapper.from_pretrained(directory, mode="sft", lora_rank=2)
        sft.init_lora_weights()
        assert_same_bits(sft.forward_sft(*batch), moe.forward(*batch), directory.name)


@every_version
def test_converted_directories_are_inspected_and_verified(
    version: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for directory in converted(version):
        report = inspect_checkpoint(directory)
        assert (report.kind, len(report.layers)) == ("converted", 1)
        assert main(["verify", str(directory), "--json"]) == 0
        capsys.readouterr()


@every_version
def test_experts_of_a_converted_directory(version: Path) -> None:
    for directory in converted(version):
        model = MoEDecoder.from_pretrained(version / "model", experts_path=directory)
        assert [layer.method for layer in model.experts] == [directory.name.partition("-")[0]]


@every_version
def test_a_conversion_is_resumed(version: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "model"
    shutil.copytree(version / "model", source)
    for directory in converted(version):
        target = tmp_path / directory.name
        shutil.copytree(directory, target)
        manifest = json.loads((target / "ktmoe.json").read_text())
        (target / "ktmoe.json").write_text(json.dumps({**manifest, "source": str(source)}))
        group = [] if manifest["group_size"] is None else [f"--group-size={manifest['group_size']}"]
        arguments = [str(source), str(target), f"--method={manifest['method']}", *group, "--json"]
        assert main(["convert", *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["layers"][0]["status"] == "kept"


@every_version
def test_a_saved_layer(version: Path, tmp_path: Path) -> None:
    path = version / "saved"
    options = {"method": "MOE_INT4", "activation": "swigluoai"}
    moe = KTMoEWrapper(3, E, 1, H, I, weight_path=path, **options)  # type: ignore[arg-type]
    moe.load_weights()
    own = KTMoEWrapper(3, E, 1, H, I, **options)  # type: ignore[arg-type]
    own.load_weights_from_tensors(*weights().matrices, **biases())
    batch = draw_batch(np.random.default_rng(1), weights(), 9, 1)
    assert_same_bits(moe.forward(*batch), own.forward(*batch))
    written = own.save_weights(tmp_path)  # type: ignore[attr-defined]
    assert written.read_bytes() == (path / written.name).read_bytes()


def test_adapters(tmp_path: Path) -> None:
    for version in SAMPLES:
        for load in ("lora", "peft"):
            sft = KTMoEWrapper(0, E, 1, H, I, mode="sft", method="BF16_SFT", lora_rank=R, lora_alpha=4.0)
            sft.load_weights_from_tensors(*weights().matrices)
            if load == "lora":
                sft.load_lora_weights(version / "lora.safetensors")
            else:
                import_peft(version / "peft", [sft])
            sft.save_lora_weights(tmp_path / "again.safetensors")
            found = SafetensorsFile(tmp_path / "again.safetensors")
            for name, matrix in lora_matrices().items():
                got = found.tensor(name)
                assert np.array_equal(got.astype(np.float32), matrix), (load, name)
            if load == "lora":
                assert (tmp_path / "again.safetensors").read_bytes() == (
                    version / "lora.safetensors"
                ).read_bytes()


@every_version
def test_a_state_goes_on(version: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out, text = tmp_path / "model", tmp_path / "adapter", tmp_path / "text.txt"
    shutil.copytree(version / "model", model)
    shutil.copy(EMBEDDED_MODEL / "tokenizer.json", model)
    shutil.copytree(version / "finetune", out)
    text.write_bytes(write_samples.TEXT)
    begun = SafetensorsFile(out / "state.safetensors")
    losses = json.loads(begun.metadata["course"])["losses"]
    options = ("--text", str(text), "--out", str(out), *write_samples.FINETUNE, "--json")
    assert main(["finetune", str(model), *options, f"--steps={write_samples.STEPS + 1}"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["losses"][: write_samples.STEPS] == pytest.approx(losses)
    assert value["steps"] == write_samples.STEPS + 1
    assert (out / "adapter_model.safetensors").exists()
