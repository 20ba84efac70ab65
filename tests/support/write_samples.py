"""Writes the samples of `tests/io/samples`: small files of every kind that the package writes.

    python tests/support/write_samples.py tests/io/samples/VERSION

Run it when a format of files gets a new version, into a folder of that version; those that are there stay as
they are: `test_earlier_files.py` reads them all.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

AnyArray = NDArray[Any]

#: The model: what a decoder and its experts need, as small as can be.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 256,
    "hidden_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 40,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
}

E, I, H, R = 2, 40, 80, 2  # noqa: E741

#: Method and group size of the converted layers.
CONVERTED: tuple[tuple[str, int | None], ...] = (
    ("AMXINT8", None),
    ("AMXINT4", 32),
    ("AMXINT4", 64),
    ("AMXINT4", 128),
    ("MOE_INT8", 32),
)

#: What a state of `ktmoe finetune` was begun with; it has this many steps.
FINETUNE = ("--batch=1", "--window=8", "--rank=1", "--every=1", "--prompt=ab")
STEPS = 2
TEXT = b"In the beginning God created the heaven and the earth. " * 4

#: What stands for the path of the source in a manifest.
SOURCE = "/models/sample"


def numbers(*shape: int, seed: int) -> AnyArray:
    """Numbers that bfloat16 has, in no visible order, the same on every machine."""
    places = np.arange(np.prod(shape), dtype=np.uint32) * np.uint32(2654435761) + np.uint32(seed * 97)
    return ((places >> np.uint32(24)).astype(np.float32) / 128 - 1).reshape(shape)


def lora_matrices() -> dict[str, AnyArray]:
    """The adapters of a layer."""
    shapes = {"gate": (H, I), "up": (H, I), "down": (I, H)}
    matrices = {}
    for seed, (name, (columns, rows)) in enumerate(shapes.items()):
        matrices[f"{name}_lora_a"] = numbers(E, R, columns, seed=seed)
        matrices[f"{name}_lora_b"] = numbers(E, rows, R, seed=seed + 3)
    return matrices


def biases() -> dict[str, AnyArray]:
    """Those of the saved layer."""
    return {
        "gate_bias": numbers(E, I, seed=7),
        "up_bias": numbers(E, I, seed=8),
        "down_bias": numbers(E, H, seed=9),
    }


def expert_matrices() -> dict[str, AnyArray]:
    """The weights of the experts."""
    shapes = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    return {
        name: (numbers(E, *shape, seed=20 + seed) / 4).astype(ml_dtypes.bfloat16)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def tensors() -> Mapping[str, AnyArray]:
    """Those of the model."""
    shapes = {
        "self_attn.q_proj.weight": (32, H),
        "self_attn.k_proj.weight": (16, H),
        "self_attn.v_proj.weight": (16, H),
        "self_attn.o_proj.weight": (H, 32),
        "mlp.gate.weight": (E, H),
    }
    named = {
        f"model.layers.0.{name}": numbers(*shape, seed=i) / 4
        for i, (name, shape) in enumerate(shapes.items())
    }
    named["model.embed_tokens.weight"] = numbers(256, H, seed=10)
    norms = {
        "model.norm": H,
        "model.layers.0.input_layernorm": H,
        "model.layers.0.post_attention_layernorm": H,
    }
    norms |= {f"model.layers.0.self_attn.{name}_norm": 16 for name in ("q", "k")}
    named |= {f"{name}.weight": np.ones(size, np.float32) for name, size in norms.items()}
    for name, stacked in expert_matrices().items():
        named |= {f"model.layers.0.mlp.experts.{e}.{name}.weight": stacked[e] for e in range(E)}
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in named.items()}


def write_model(directory: Path) -> None:
    """The model, without a tokenizer."""
    from ktmoe_np.io.safetensors.writer import write_safetensors

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    write_safetensors(directory / "model.safetensors", tensors(), {"format": "pt"})


def write_converted(model: Path, directory: Path) -> None:
    """A directory of `ktmoe convert` for each format, without what is not quantized."""
    from ktmoe_np.cli import main

    for method, size in CONVERTED:
        target = directory / (method if size is None else f"{method}-{size}")
        group = [] if size is None else [f"--group-size={size}"]
        assert main(["convert", str(model), str(target), f"--method={method}", *group]) == 0
        manifest = json.loads((target / "ktmoe.json").read_text())
        (target / "ktmoe.json").write_text(json.dumps({**manifest, "source": SOURCE}, indent=1) + "\n")
        for name in (".ktmoe.lock", "model.safetensors"):
            (target / name).unlink(missing_ok=True)


def write_layers(directory: Path) -> None:
    """Files of `save_weights`, `save_lora_weights` and `export_peft`."""
    from ktmoe_np import KTMoEWrapper
    from ktmoe_np.sft import export_peft

    matrices = expert_matrices().values()
    saved = KTMoEWrapper(3, E, 1, H, I, method="MOE_INT4", activation="swigluoai")
    saved.load_weights_from_tensors(*matrices, **biases())
    saved.save_weights(directory / "saved")
    sft = KTMoEWrapper(0, E, 1, H, I, mode="sft", method="AMXBF16_SFT", lora_rank=R, lora_alpha=4.0)
    sft.load_weights_from_tensors(*matrices)
    sft.init_lora_weights(**lora_matrices())
    sft.save_lora_weights(directory / "lora.safetensors")
    export_peft(directory / "peft", [sft], model_type="qwen3_moe")


def write_state(model: Path, directory: Path) -> None:
    """A state of `ktmoe finetune`."""
    from ktmoe_np.cli import main
    from ktmoe_np.models import EMBEDDED_MODEL

    text, out, copy = directory / "text.txt", directory / "finetune", directory / "with_tokenizer"
    text.write_bytes(TEXT)
    shutil.copytree(model, copy)
    shutil.copy(EMBEDDED_MODEL / "tokenizer.json", copy)
    options = ("--text", str(text), "--out", str(out), f"--steps={STEPS}", *FINETUNE)
    assert main(["finetune", str(copy), *options]) == 0
    for file in out.iterdir():
        if file.name != "state.safetensors":
            file.unlink()
    text.unlink()
    shutil.rmtree(copy)


def write(directory: Path) -> None:
    """All samples."""
    write_model(directory / "model")
    write_converted(directory / "model", directory / "converted")
    write_layers(directory)
    write_state(directory / "model", directory)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
