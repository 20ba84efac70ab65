"""`ktmoe verify --digest`: the bits of a layer, as digests that two machines can compare."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .. import __version__
from .. import kt_kernel_ext as ext
from ..experts import KTMoEWrapper
from ..io.converted.manifest import manifest_path
from ..io.gguf.experts import is_gguf
from ..models import EMBEDDED_MODEL
from .arguments import Dtype
from .expert_source import open_layer
from .progress import Progress
from .table import counted
from .terminal import say, say_json

__all__ = ["RECORDED", "run"]

#: Digests of the packaged model by instruction set and case; ``python tools/record_digests.py`` writes it.
RECORDED = Path(__file__).with_name("digests.json")

#: Tokens of the forward passes, and of the training step.
_PASSES, _STEP = (1, 5, 75), 40
_RANK = 3
#: A case has so many hexadecimal digits of each SHA-256.
_DIGITS = 12


class Case(NamedTuple):
    """What is computed: a method, and its activations where they are not the default."""

    method: str | None
    dtype: Dtype = None

    def __str__(self) -> str:
        """Name the case."""
        name = self.method or "as the checkpoint is"
        return name if self.dtype is None else f"{name}, {self.dtype}"


_CASES = (
    Case("BF16"),
    Case("AMXINT8"),
    Case("AMXINT4"),
    Case("MOE_INT8"),
    Case("MOE_INT4"),
    Case("MOE_INT4", "int8"),
)


def run(arguments: argparse.Namespace) -> int:
    """Print digests; with the packaged model 1 when one is not as recorded."""
    isa = ext.isa_info()["active"]
    own = arguments.path is None
    path = EMBEDDED_MODEL if own else Path(arguments.path)
    if not is_gguf(path) and manifest_path(path).exists():
        raise ValueError(
            f"--digest: got {path}, written by 'ktmoe convert', expected a checkpoint; verify without it "
            "checks the files"
        )
    given = Case(arguments.method, arguments.activation_dtype)
    cases = _CASES if own and given == Case(None) else (given,)
    found: dict[str, list[str]] = {}
    with Progress(len(cases)) as progress:
        for case in cases:
            progress.step(str(case))
            found[str(case)] = list(_digests(arguments, path, case))
    recorded = _recorded(isa) if own and not arguments.layer else {}
    wrong = [name for name, digests in found.items() if recorded.get(name, digests) != digests]
    if arguments.json:
        value = {"ktmoe_np": __version__, "isa": isa, "model": str(path), "digests": found}
        say_json(value | {"recorded": len(recorded.keys() & found.keys()), "not_as_recorded": wrong})
    else:
        say(_text(isa, path, found, recorded))
    return int(bool(wrong))


def _recorded(isa: str) -> Mapping[str, list[str]]:
    """What this version gives with an instruction set; empty where it was not recorded."""
    recorded: dict[str, dict[str, list[str]]] = json.loads(RECORDED.read_text())
    return recorded.get(isa, {})


def _digests(arguments: argparse.Namespace, path: Path, case: Case) -> Iterator[str]:
    """Yield the digests of forward passes and of a training step."""
    threads = arguments.threads
    layer = open_layer(path, arguments.layer, case.method, case.dtype)[0].layer_idx
    moe = KTMoEWrapper.from_pretrained(path, layer, case.method, cpuinfer_threads=threads)
    for tokens in _PASSES:
        x, ids, weights = _batch(moe.config, tokens)
        out = np.empty(x.shape, np.float32)
        yield _digest([moe.forward(x, ids, weights, out=out, activation_dtype=case.dtype)])
    sft = KTMoEWrapper.from_pretrained(
        path, layer, f"{moe.method}_SFT", mode="sft", lora_rank=_RANK, cpuinfer_threads=threads
    )
    sft.init_lora_weights()
    shapes = {name: matrix.shape for name, matrix in sft.lora_weights.items()}
    drawn = {name: _numbers(shape, 7 + i) / 16 for i, (name, shape) in enumerate(sorted(shapes.items()))}
    sft.update_lora_weights(**drawn)
    x, ids, weights = _batch(sft.config, _STEP)
    y = sft.forward_sft(x, ids, weights, activation_dtype=case.dtype)
    gradients = sft.backward(_numbers(x.shape, 3).astype(ml_dtypes.bfloat16))
    by_adapters = [getattr(gradients, name) for name in sorted(shapes)]
    yield _digest([y, gradients.grad_input, gradients.grad_weights, *by_adapters])


def _batch(config: Any, tokens: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Draw tokens that are the same on every machine and with every version of NumPy."""
    x = _numbers((tokens, config.hidden_size), 1).astype(ml_dtypes.bfloat16)
    scores = _numbers((tokens, config.num_experts), 2)
    ids = np.argsort(scores, axis=1, kind="stable")[:, : config.num_experts_per_tok]
    weights = np.abs(_numbers(ids.shape, 5)) / 2
    return x, ids, weights


def _numbers(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Multiples of 2^-14 between -2 and 2, by a linear congruence."""
    count = np.arange(seed << 32, (seed << 32) + int(np.prod(shape)), dtype=np.uint64)
    mixed = count * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)  # modulo 2^64
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    drawn = (mixed >> np.uint64(48)).astype(np.float32) - np.float32(32768)
    return (drawn / np.float32(16384)).reshape(shape)


def _digest(arrays: list[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:_DIGITS]


def _text(isa: str, path: Path, found: Mapping[str, list[str]], recorded: Mapping[str, list[str]]) -> str:
    heads = [counted(tokens, "token") for tokens in _PASSES] + ["training"]
    lines = [f"Digests of the bits with {isa}: {path}", ""]
    lines.append(f"{'method':<20}" + "".join(f"{head:<14}" for head in heads))
    for name, digests in found.items():
        state = "" if name not in recorded else "as recorded" if recorded[name] == digests else "DIFFERS"
        lines.append(f"{name:<20}" + "".join(f"{digest:<14}" for digest in digests) + state)
    if not recorded:
        where = "this model" if path != EMBEDDED_MODEL else f"{isa} in this version"
        lines += ["", f"Nothing is recorded for {where}: compare with another machine that has {isa}."]
    return "\n".join(line.rstrip() for line in lines)
