"""Sizes that files claim are held against the files before anything is allocated by them."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

import ktmoe_np.io.missing
from ktmoe_np import KTMoEWrapper
from ktmoe_np.config import MoEConfig
from ktmoe_np.io import SafetensorsCheckpoint, load_experts, load_hf_config
from ktmoe_np.io.inspect import inspect_checkpoint
from ktmoe_np.io.layer_config import check_fits, layer_config
from ktmoe_np.io.layouts.layer import find_layer
from ktmoe_np.models import MoEDecoder

SIZES = {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    "load", [KTMoEWrapper.from_pretrained, MoEDecoder.from_pretrained, inspect_checkpoint]
)
def test_the_name_of_a_model_is_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "Qwen/Qwen3-30B-A3B"
    for path in (name, Path(name)):
        with pytest.raises(FileNotFoundError) as caught:
            load(path)
        assert str(caught.value) == (
            f"{name}: no such file or directory; for the model of that name: "
            f"huggingface-cli download {name} --local-dir {name}"
        )
    for path in (tmp_path / "Qwen" / "Qwen3-30B-A3B", "a/b/c", "../a/b", "model", "a/model.gguf"):
        with pytest.raises(FileNotFoundError, match=r"no such file or directory$"):
            load(path)


def claim(path: Path, **changes: Any) -> None:
    """Change what the config.json of a checkpoint says."""
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, "qwen3_moe", [0], 4, 3, 5)
    return tmp_path


@pytest.mark.parametrize("size", ["num_experts", "hidden_size", "moe_intermediate_size"])
@pytest.mark.parametrize("value", [10**9, 2**31 - 1])
def test_a_layer_too_large_for_its_files(checkpoint: Path, size: str, value: int) -> None:
    claim(checkpoint, **{size: value})
    with pytest.raises(ValueError, match=rf"got num_experts.* {value}\b.*, but the files have \d+ bytes"):
        KTMoEWrapper.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"tensor .* expected"):
        inspect_checkpoint(checkpoint)


#: Reads a checkpoint with 1 GB more of address space than the interpreter has taken.
_IN_LITTLE_MEMORY = """
import resource, sys
from ktmoe_np import KTMoEWrapper
from ktmoe_np.io.inspect import inspect_checkpoint
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, taken + 2**30))
for read in (KTMoEWrapper.from_pretrained, inspect_checkpoint):
    try:
        read(sys.argv[1])
    except ValueError:
        continue
    sys.exit(f"{read} read it")
"""


def test_claims_take_no_memory(checkpoint: Path) -> None:
    claim(checkpoint, num_experts=2**31 - 1)
    subprocess.run([sys.executable, "-c", _IN_LITTLE_MEMORY, str(checkpoint)], check=True, timeout=60)


def test_names_are_listed_up_to_the_first_that_is_missing(checkpoint: Path) -> None:
    layer = find_layer(SafetensorsCheckpoint(checkpoint), 0)
    template = "mlp.experts.{e}.up_proj.weight"
    assert len(layer.names_of(template, 10**12)) == 5
    assert len(layer.names_of(template, 4)) == 4
    config = MoEConfig(10**9, 1, hidden_size=5, moe_intermediate_size=3)
    with pytest.raises(ValueError, match=r"tensor 'model.layers.0.mlp.experts.4.gate_proj.weight': got none"):
        load_experts(checkpoint, 0, config)


def test_numbers_of_experts_in_names(tmp_path: Path) -> None:
    """A single name with a large number must not make a list as long."""
    write_checkpoint(tmp_path, "qwen3_moe", [0], 2, 3, 5)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"experts.1.", b"experts.9."))
    with pytest.raises(ValueError, match=r"experts.1.gate_proj.weight': got none"):
        load_experts(tmp_path, 0)
    layer = find_layer(SafetensorsCheckpoint(tmp_path), 0)
    assert len(layer.names_of("mlp.experts.{e}.up_proj.weight", 10**9)) == 3


@pytest.mark.parametrize(
    ("sizes", "num_bytes", "fits"),
    [((2, 4, 2), 11, False), ((2, 4, 2), 12, True), ((1, 32, 32), 255, False), ((1, 32, 32), 256, True)],
)
def test_the_least_that_a_layer_takes(
    tmp_path: Path, sizes: tuple[int, int, int], num_bytes: int, fits: bool
) -> None:
    config = MoEConfig(sizes[0], 1, *sizes[1:])
    model, disk = tmp_path / "model", tmp_path / "disk"
    model.mkdir()
    check_fits(config, model)  # no files: the loader says so
    disk.mkdir()
    (disk / "x.safetensors").write_bytes(bytes(num_bytes - 1))
    (model / "other.safetensors").write_bytes(bytes(1))
    (model / "sub").symlink_to(disk)
    index = {"weight_map": {"a": "sub/x.safetensors", "b": "other.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    if fits:
        check_fits(config, model)
        return
    with pytest.raises(ValueError, match=f"but the files have {num_bytes} bytes, too few"):
        check_fits(config, model)


def test_only_the_files_of_the_checkpoint_count(checkpoint: Path) -> None:
    (checkpoint / "cache").mkdir()
    (checkpoint / "cache" / "x.safetensors").write_bytes(bytes(10**6))
    claim(checkpoint, moe_intermediate_size=10**4)
    with pytest.raises(ValueError, match=r"but the files have \d{1,4} bytes, too few"):
        KTMoEWrapper.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", [*SIZES, "layer_idx"])
def test_sizes_beyond_any_model(name: str) -> None:
    MoEConfig(**{**SIZES, name: 2**31 - 1})
    for value in (2**31, 2**63, 2**64, 10**400, 10**5000):
        with pytest.raises(ValueError, match=rf"{name}: got .*, expected at most 2147483647"):
            MoEConfig(**{**SIZES, name: value})
        with pytest.raises(ValueError, match=f"{name}: got .*, expected at most"):
            KTMoEWrapper(**{"layer_idx": 0, **SIZES, name: value})


def test_more_experts_of_a_token_than_there_are(checkpoint: Path) -> None:
    """A whole model cannot be so; a layer that is made by itself can."""
    message = "num_experts_per_tok: got 5, expected at most num_experts, 4"
    claim(checkpoint, num_experts_per_tok=5)
    for read in (KTMoEWrapper.from_pretrained, inspect_checkpoint, lambda path: layer_config(path, 0)):
        with pytest.raises(ValueError, match=rf"config\.json: {message}"):
            read(checkpoint)
    with pytest.raises(ValueError, match=f"^{message}"):
        MoEConfig.from_hf_config(load_hf_config(checkpoint), 0)
    assert KTMoEWrapper(0, 4, 5, 64, 32).config.num_experts_per_tok == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": "4"}, "num_experts: got '4', expected an integer"),
        ({"num_experts": 2**63}, f"num_experts: got {2**63}, expected at most 2147483647"),
        ({"swiglu_limit": "7"}, "activation: got silu with limit='7', expected a number"),
        ({"hidden_act": ["silu"]}, r"config: activation: got \['silu'\], expected one of silu"),
        ({"num_experts": [4, 4], "num_hidden_layers": 3}, "num_experts: got 2 values"),
        ({"num_local_experts": 9}, "config: num_experts: got .*, expected the same of all"),
    ],
)
def test_messages_name_the_config(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    claim(checkpoint, **changes)
    for read in (KTMoEWrapper.from_pretrained, inspect_checkpoint):
        with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
            read(checkpoint)


@pytest.mark.parametrize("model_type", [["qwen3_moe"], {"a": 1}, 3, True, None])
def test_a_model_type_of_another_type(checkpoint: Path, model_type: Any) -> None:
    claim(checkpoint, model_type=model_type)
    assert inspect_checkpoint(checkpoint).model_type is None
    with pytest.raises(ValueError, match=r"config\.json: model_type: got .*, expected one of qwen3_moe"):
        MoEDecoder.from_pretrained(checkpoint)


def test_nesting_is_followed_as_deep_as_models_nest() -> None:
    config: dict[str, Any] = SIZES
    for depth in range(1, 1000):
        config = {"text_config": config}
        if depth <= 4:
            assert MoEConfig.from_hf_config(config, 0).num_experts == 8
    with pytest.raises(ValueError, match="config: got no number of experts"):
        MoEConfig.from_hf_config(config, 0)


@pytest.mark.parametrize(
    "value", [2**63, 2**64, 10**400, 10**5000], ids=["2^63", "2^64", "10^400", "10^5000"]
)
def test_options_beyond_what_the_core_can_take(value: int) -> None:
    for name in ("chunked_prefill_size", "max_deferred_experts_per_token"):
        with pytest.raises(ValueError, match=f"^{name}: got .*, expected at most"):
            KTMoEWrapper(0, **SIZES, **{name: value})
    for name in ("lora_rank", "max_cache_depth"):
        with pytest.raises(ValueError, match=f"^{name}: got .*, expected at most 9223372036854775807"):
            KTMoEWrapper(0, **SIZES, mode="sft", method="BF16_SFT", **{name: value})
    with pytest.raises(ValueError, match=r"^seed: got .*, expected at most 18446744073709551615"):
        KTMoEWrapper(0, **SIZES, mode="sft", method="BF16_SFT", seed=2**64 + value)
    for activation in ({"kind": "silu", "limit": 10**400}, {"kind": "situ", "beta1": 10**5000}):
        with pytest.raises(ValueError, match=r"got .*=an integer of .*, expected one that fits a float"):
            KTMoEWrapper(0, **SIZES, activation=activation)


@pytest.mark.parametrize("name", ["lora_alpha", "lora_dropout"])
def test_numbers_beyond_a_float(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got inf, expected a finite number"):
        KTMoEWrapper(0, **SIZES, mode="sft", method="BF16_SFT", **{name: 10**5000})


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_a_shape_error_says_where_the_size_is_from(tmp_path: Path, model_type: str) -> None:
    """Both sizes are there, and which of them is the experts' depends on the family."""
    write_checkpoint(tmp_path, "qwen3_moe", [0], E=8, I=24, H=64)
    config = {**SIZES, "moe_intermediate_size": 32, "intermediate_size": 40, "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = {"mixtral": "intermediate_size 40", "qwen3_moe": "moe_intermediate_size 32"}[model_type]
    expected = name.split()[1]
    message = (
        rf"'model\.layers\.0\.mlp\.experts\.0\.gate_proj\.weight': got BF16 \[24, 64\], expected BF16 .*"
        rf"\[{expected}, 64\], by num_experts 8, hidden_size 64, {name} of the configuration$"
    )
    for load in (KTMoEWrapper.from_pretrained, inspect_checkpoint):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    overridden = KTMoEWrapper.from_pretrained(tmp_path, 0, moe_intermediate_size=24)
    assert overridden.config.sources["hidden_size"] == "hidden_size"
    assert "moe_intermediate_size" not in overridden.config.sources


def test_both_sizes_of_a_family_that_reads_the_plain_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "mixtral", [0], E=8, I=24, H=64)
    config = {**SIZES, "moe_intermediate_size": 32, "intermediate_size": 24, "model_type": "mixtral"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert KTMoEWrapper.from_pretrained(tmp_path).config.moe_intermediate_size == 24


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.io.missing).failed == 0
