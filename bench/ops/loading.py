"""Loading a layer from a checkpoint in its native format: the time, and the memory that it takes."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.cases import make_cases
from ..core.comparison import fit_all, note
from ..core.layer import Array, Layer
from ..core.methods import METHODS
from ..core.process import LOAD_TIMEOUT, BackendError, BackendProcess
from ..core.records import Results
from ..core.reference import Sample, reference_answer, relative_error, sample_rows
from ..core.shapes import Shape
from ..core.spec import Spec

__all__ = ["run_loading", "write_checkpoint"]

_TOKENS = 64


def write_checkpoint(layer: Layer, directory: Path) -> None:
    """Write the layer as layer 0 of a Hugging Face checkpoint, a tensor for each expert's projection."""
    shape = layer.shape
    tensors = [
        (f"model.layers.0.mlp.experts.{e}.{name}.weight", weights[e])
        for e in range(shape.experts)
        for name, weights in (("gate_proj", layer.gate), ("up_proj", layer.up), ("down_proj", layer.down))
    ]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, matrix in tensors:
        span = [offset, offset + matrix.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(matrix.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, matrix in tensors:
            matrix.view(np.uint16).tofile(file)
    config = {
        "model_type": "qwen3_moe",
        "hidden_act": shape.activation,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.per_token,
        "hidden_size": shape.hidden,
        "moe_intermediate_size": shape.inter,
        "num_hidden_layers": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))


def run_loading(shape: Shape, specs: Sequence[Spec], options: Any, results: Results) -> None:
    """Each backend loads the layer (ktmoe from the checkpoint, peers from memory) and answers once."""
    if shape.biased:
        note(f"{shape.name}: left out, its checkpoints hold bf16 experts transposed: not native")
        return
    shape = fit_all(shape, specs)
    layer = Layer.create(shape)
    directory = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.checkpoint_dir))
    try:
        need, free = 2.0 * shape.weights / 1e9, shutil.disk_usage(directory).free / 1e9
        if need > 0.8 * free:
            raise MemoryError(f"{shape.name}: a checkpoint takes {need:.1f} GB, the disk has {free:.1f}")
        write_checkpoint(layer, directory)
        case = make_cases(shape, _TOKENS)[0]
        sample = sample_rows(layer, case)
        expected = reference_answer(layer, case, sample)["y"]
        for spec in specs:
            source = {"checkpoint": str(directory)} if spec.peer == "ktmoe" else {}
            spec = spec.but(shape=shape, options=spec.options | source)
            values = _load_in_process(spec, layer, sample, expected)
            sizes = [shape.hidden, shape.inter, shape.experts, shape.per_token]
            what = {"shape": shape.name, "sizes": sizes, "method": spec.method, "contender": spec.label}
            results.add("load", **what, source="checkpoint" if source else "memory", **values)
            print(f"load: {shape.name}, {spec.label}: {_summary(values)}", flush=True)
    finally:
        shutil.rmtree(directory)
        layer.close()


def _load_in_process(spec: Spec, layer: Layer, sample: Sample, expected: Array) -> dict[str, Any]:
    process = BackendProcess(spec, layer.fd)
    try:
        return _load_once(process, layer, sample, expected)
    except BackendError as error:
        return {"status": "failed", "reason": str(error)}
    finally:
        process.close()


def _load_once(process: BackendProcess, layer: Layer, sample: Sample, expected: Array) -> dict[str, Any]:
    """Load, answer a batch, and load again when all is warm."""
    spec = process.spec
    weights_bytes = layer.shape.weights * METHODS[spec.method].bytes_per_weight
    facts = process.ask("load", spec, layer.fd, timeout=LOAD_TIMEOUT)
    loaded = process.ask("resident")
    process.ask("prepare", _TOKENS)
    error = relative_error(process.ask("check", sample)["y"], expected)
    used = process.ask("resident")
    values = {
        "status": "ok" if error <= METHODS[spec.method].tolerance else "wrong",
        "rel_err": float(f"{error:.3g}"),
        "version": facts["version"],
        "load_ms": round(facts["load_s"] * 1e3, 3),
        "growth_mb": round(facts["load_bytes"] / 1e6, 3),
        "growth_of_weights": round(facts["load_bytes"] / weights_bytes, 4),
        "growth_private_after_use": round((used["RssAnon"] - loaded["RssAnon"]) / weights_bytes, 4),
        "growth_mapped_after_use": round((used["RssFile"] - loaded["RssFile"]) / weights_bytes, 4),
    }
    if spec.peer == "ktmoe":
        again = [process.ask("load_again") for _ in range(5)]
        values["load_again_ms"] = round(statistics.median(again) * 1e3, 3)
    return values


def _summary(values: dict[str, Any]) -> str:
    if values["status"] == "failed":
        return str(values["reason"])
    again = f", again {values['load_again_ms']:.1f} ms" if "load_again_ms" in values else ""
    private, mapped = values["growth_private_after_use"], values["growth_mapped_after_use"]
    return (
        f"{values['load_ms']:.1f} ms{again}, memory {values['growth_mb']:+.1f} MB, "
        f"{values['growth_of_weights']:+.1%} of the weights; after a batch {private:+.1%} private, "
        f"{mapped:+.1%} mapped; {values['status']}, error {values['rel_err']}"
    )
