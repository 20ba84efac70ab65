"""What `ktmoe finetune` goes on from: a safetensors file with the settings and the course in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._arrays import Array
from ..io import SafetensorsFile
from ..io._safetensors_header import parse_json_object
from ..io.writer import replacing, write_safetensors

__all__ = ["Course", "read_state", "state_path", "write_csv", "write_state"]

_FORMAT = {"format": "ktmoe_np.finetune", "format_version": "1"}
_PARAMETER, _OPTIMIZER = "parameter.", "optimizer."


@dataclass
class Course:
    """What happened, in bits a byte."""

    losses: list[float] = field(default_factory=list)  #: of the batch of each step, before it
    held_out: dict[int, float] = field(default_factory=dict)  #: number of steps -> of the held-out text
    seconds: list[float] = field(default_factory=list)  #: of each step
    before: str = ""  #: what the model said before the first step

    @property
    def num_steps(self) -> int:
        """Steps that were taken."""
        return len(self.losses)


def state_path(directory: Path) -> Path:
    """The file in a directory."""
    return directory / "state.safetensors"


def write_state(
    directory: Path,
    settings: Mapping[str, Any],
    course: Course,
    parameters: Mapping[str, Array],
    optimizer: Mapping[str, Array],
) -> None:
    """Write the file, all at once."""
    tensors = {f"{_PARAMETER}{name}": value for name, value in parameters.items()}
    tensors |= {f"{_OPTIMIZER}{name}": value for name, value in optimizer.items()}
    told = {"settings": json.dumps(settings), "course": json.dumps(asdict(course))}
    write_safetensors(state_path(directory), tensors, {**_FORMAT, **told})


def read_state(
    directory: Path, settings: Mapping[str, Any], parameters: Mapping[str, Array]
) -> tuple[Course, dict[str, Array]]:
    """Read what was written with the same settings: the course, the optimiser's; parameters in place.

    Raises
    ------
    ValueError
        Other settings, or not such a file: names it.
    """
    path = state_path(directory)
    file = SafetensorsFile(path)
    if {name: file.metadata.get(name) for name in _FORMAT} != _FORMAT:
        raise ValueError(f"{path}: is no state of ktmoe finetune")
    begun = parse_json_object(file.metadata.get("settings", "").encode(), f"{path}: settings")
    for name, value in settings.items():
        if begun.get(name) != value:
            what = f"was begun with {name} {begun.get(name)!r}, not {value!r}"
            raise ValueError(f"{directory}: {what}: give what it was begun with, or another --out")
    told = parse_json_object(file.metadata.get("course", "").encode(), f"{path}: course")
    held_out = {int(step): bits for step, bits in told.pop("held_out").items()}
    for name, value in parameters.items():
        value[:] = file.tensor(f"{_PARAMETER}{name}")
    names = [name for name in file.names() if name.startswith(_OPTIMIZER)]
    state = {name.removeprefix(_OPTIMIZER): file.tensor(name).copy() for name in names}
    return Course(held_out=held_out, **told), state


def write_csv(path: Path, course: Course) -> None:
    """Write the losses by step: of each batch before the step, of the held-out text where it was measured."""
    lines = ["step,bits_per_byte,held_out_bits_per_byte"]
    for step in range(course.num_steps + 1):
        loss = f"{course.losses[step - 1]:.6f}" if step else ""
        held_out = f"{course.held_out[step]:.6f}" if step in course.held_out else ""
        lines.append(f"{step},{loss},{held_out}")
    with replacing(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
