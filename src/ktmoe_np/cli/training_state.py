"""The state of `ktmoe finetune`: a safetensors file with the settings and the course in its metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..arrays.checks import Array
from ..arrays.summary import array_summary
from ..io import SafetensorsFile
from ..io.gguf.checkpoint import GgufCheckpoint, is_gguf
from ..io.json_text import MAX_JSON_BYTES, parse_json_object
from ..io.regular_file import open_regular, read_regular
from ..io.safetensors.writer import replace_text, write_safetensors

__all__ = [
    "Course",
    "adapter_digest",
    "fingerprint",
    "is_leftover",
    "read_state",
    "state_path",
    "write_csv",
    "write_state",
]

_FORMAT = {"format": "ktmoe_np.finetune", "format_version": "1"}
_PARAMETER, _OPTIMIZER = "parameter.", "optimizer."

#: Settings that states of earlier versions do not tell.
_LATER = ("blas_threads",)

#: How much of a file of weights is looked at to tell a model by, from its beginning.
_LOOKED_AT = 1 << 20


@dataclass
class Course:
    """The course of the run, in bits per byte."""

    losses: list[float] = field(default_factory=list)  #: of the batch of each step, before it
    held_out: dict[int, float] = field(default_factory=dict)  #: number of steps -> of the held-out text
    before: str = ""  #: what the model said before the first step

    @property
    def num_steps(self) -> int:
        """Steps that were taken."""
        return len(self.losses)


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Identify a model, whatever its path: its config, and the beginnings of its files."""
    if is_gguf(path):
        digest, files = hashlib.sha256(), list(GgufCheckpoint.shared(path).files)
    else:
        digest = hashlib.sha256(read_regular(Path(path) / "config.json", MAX_JSON_BYTES))
        files = sorted(Path(path).glob("*.safetensors"))
    for file in files:
        with open_regular(file) as opened:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(_LOOKED_AT))
    return digest.hexdigest()


def adapter_digest(directory: str | os.PathLike[str]) -> str:
    """Identify adapters of PEFT, whatever their path."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with open_regular(Path(directory) / name) as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def state_path(directory: Path) -> Path:
    """The file in a directory."""
    return directory / "state.safetensors"


def is_leftover(path: Path) -> bool:
    """Whether a killed process had not yet given a file its name; see `ktmoe_np.io.replace`."""
    return path.name.startswith(".") and path.suffix == ".part"


def write_state(
    directory: Path,
    settings: Mapping[str, Any],
    course: Course,
    parameters: Mapping[str, Array],
    optimizer: Mapping[str, Array],
) -> None:
    """Write the file, all at once."""
    told = {"settings": json.dumps(settings), "course": json.dumps(asdict(course))}
    write_safetensors(state_path(directory), _named(parameters, optimizer), {**_FORMAT, **told})


def read_state(
    directory: Path,
    settings: Mapping[str, Any],
    parameters: Mapping[str, Array],
    optimizer: Mapping[str, Array],
) -> tuple[Course, dict[str, Array]]:
    """Read what was written with the same settings.

    Parameters
    ----------
    directory : path
    settings : mapping of str to JSON values
    parameters : mapping of str to ndarray
        Overwritten.
    optimizer : mapping of str to ndarray
        A state of the same optimizer, to compare with.

    Returns
    -------
    Course
    dict of str to ndarray
        The optimizer's state.

    Raises
    ------
    ValueError
        Other settings, or not such a file: names it. Parameters are as they were.
    """
    path = state_path(directory)
    file = SafetensorsFile(path)
    if {name: file.metadata.get(name) for name in _FORMAT} != _FORMAT:
        raise ValueError(f"{path}: is no state of ktmoe finetune")
    begun = parse_json_object(file.metadata.get("settings", "").encode(), f"{path}: settings")
    for name, value in settings.items():
        if begun.get(name) != value and (name in begun or name not in _LATER):
            what = f"was begun with {name} {begun.get(name)!r}, not {value!r}"
            raise ValueError(f"{directory}: {what}: give what it was begun with, or another --out")
    course = _course(parse_json_object(file.metadata.get("course", "").encode(), f"{path}: course"), path)
    expected = _named(parameters, optimizer)
    if sorted(file.names()) != sorted(expected):
        raise ValueError(f"{path}: has other tensors than a state of this model and optimizer")
    found = {name: file.tensor(name) for name in expected}
    for name, value in found.items():
        if array_summary(value) != array_summary(expected[name]):
            raise ValueError(
                f"{path}: {name}: got {array_summary(value)}, expected {array_summary(expected[name])}"
            )
    for name, parameter in parameters.items():
        parameter[:] = found[f"{_PARAMETER}{name}"]
    return course, {name: found[f"{_OPTIMIZER}{name}"].copy() for name in optimizer}


def _named(parameters: Mapping[str, Array], optimizer: Mapping[str, Array]) -> dict[str, Array]:
    named = {f"{_PARAMETER}{name}": value for name, value in parameters.items()}
    return named | {f"{_OPTIMIZER}{name}": value for name, value in optimizer.items()}


def _course(told: dict[str, Any], path: Path) -> Course:
    try:
        told.pop("seconds", None)  # times, which earlier versions kept
        losses = [float(bits) for bits in told.pop("losses")]
        held_out = {int(step): float(bits) for step, bits in told.pop("held_out").items()}
        if 0 not in held_out or max(held_out) > len(losses):
            raise ValueError(f"the held-out text was measured after steps {sorted(held_out)}"[:200])
        return Course(losses, held_out, **told)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its course is not one of ktmoe finetune: {error}") from error


def write_csv(path: Path, course: Course) -> None:
    """Write the losses by step: of each batch before the step, of the held-out text where it was measured."""
    lines = ["step,bits_per_byte,held_out_bits_per_byte"]
    for step in range(course.num_steps + 1):
        loss = f"{course.losses[step - 1]:.6f}" if step else ""
        held_out = f"{course.held_out[step]:.6f}" if step in course.held_out else ""
        lines.append(f"{step},{loss},{held_out}")
    replace_text(path, "\n".join(lines) + "\n")
