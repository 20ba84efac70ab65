"""GGUF files and models of several of them, as NumPy views of the mapped files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.summary import object_summary
from ..mapped import identity_at, map_file
from ..missing import no_such_path
from ..regular_file import open_regular
from ..shared import SharedCache
from .header import GGUF_TYPES, GgufHeader, GgufTensorInfo, parse_gguf_header

__all__ = ["GgufCheckpoint", "GgufTensorInfo", "is_gguf"]

#: Checkpoints in use, by the paths and identities of all their files.
_shared: SharedCache[GgufCheckpoint] = SharedCache()

#: The name of a file of a model of several: the model, the file's number from 1, and how many there are.
_SPLIT_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)

#: What the name of a layer's tensor begins with.
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.")


class _GgufFile:
    """One file, mapped read-only; the mapping lives as long as this or any tensor of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size == 0:  # nothing to map
                raise ValueError(f"{path}: 0 bytes are too short for a GGUF file")
            self._map = map_file(file, path)
        self.header = parse_gguf_header(path, memoryview(self._map))

    def readable_header(self) -> GgufHeader:
        """The header, to decode values from the file; OSError when it was truncated."""
        self._map.check()
        return self.header

    def value(self, key: str) -> Any:
        """Decode a value of the metadata; None when there is none."""
        return self.readable_header().value(key)

    def rows(self, info: GgufTensorInfo) -> NDArray[np.uint8]:
        """View the bytes of a tensor, row by row."""
        self._map.check()
        flat = np.frombuffer(self._map, np.uint8, info.num_bytes, info.begin)
        return flat.reshape(*info.shape[:-1], info.row_bytes)


class GgufCheckpoint:
    """The metadata and the tensors of a GGUF model, which may be split over several files.

    Opening maps the files and reads and checks their headers; tensors are views, read from disk as they are
    touched. The mappings live as long as the checkpoint or any tensor of it. The metadata are those of the
    first file.

    Parameters
    ----------
    path : str or path-like
        A file, any file of a split model (``*-00001-of-00003.gguf``), or a directory that holds one model.

    Raises
    ------
    FileNotFoundError
        No such path, a directory without GGUF files, or a split model of which a file is missing.
    ValueError
        A directory of several models; not a GGUF file, cut off, or a header that contradicts itself (names
        the file and the tensor); or files that do not belong together.

    Examples
    --------
    >>> import gguf, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.gguf")
    >>> writer = gguf.GGUFWriter(path, "qwen3moe")
    >>> writer.add_block_count(4)
    >>> writer.add_tensor("output.weight", np.ones((2, 3), np.float32))
    >>> writer.write_header_to_file()
    >>> writer.write_kv_data_to_file()
    >>> writer.write_tensors_to_file()
    >>> writer.close()
    >>> checkpoint = GgufCheckpoint(path.parent)
    >>> checkpoint.metadata("general.architecture"), checkpoint.metadata("qwen3moe.block_count")
    ('qwen3moe', 4)
    >>> checkpoint.info("output.weight").type, checkpoint.info("output.weight").shape
    ('f32', (2, 3))
    >>> checkpoint.tensor("output.weight").shape
    (2, 12)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        paths = _model_files(self.path)
        self._files = [_GgufFile(file) for file in paths]
        self._check_split()
        self._file_of: dict[str, _GgufFile] = {}
        for file in self._files:
            for name in file.header.tensors:
                if name in self._file_of:
                    raise ValueError(f"{file.path}: tensor {name!r} is in {self._file_of[name].path} too")
                self._file_of[name] = file
        expected = self.metadata("split.tensors.count")
        if len(paths) > 1 and expected is not None and expected != len(self._file_of):
            raise ValueError(
                f"{self._files[0].path}: metadata 'split.tensors.count': got {expected!r:.80}, expected "
                f"{len(self._file_of)}, the tensors of {len(paths)} files"
            )

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        files = "1 file" if len(self._files) == 1 else f"{len(self._files)} files"
        return f"{str(self.path)!r}: {len(self._file_of)} tensors in {files}"

    @classmethod
    def shared(cls, path: str | os.PathLike[str]) -> GgufCheckpoint:
        """The checkpoint at `path`, the same one for all its users: headers are read once.

        When any file has been replaced or written to, all are read again. Errors are those of the class.
        """
        key = tuple((str(file.resolve()), identity_at(file)) for file in _model_files(Path(path)))
        return _shared.get(key, lambda: cls(path))

    @classmethod
    def opened(cls, checkpoint: GgufCheckpoint | str | os.PathLike[str]) -> GgufCheckpoint:
        """A checkpoint as it is, or that of a path."""
        return checkpoint if isinstance(checkpoint, GgufCheckpoint) else cls(checkpoint)

    def _check_split(self) -> None:
        """Raise ValueError when the files say other things of themselves than their names."""
        for number, file in enumerate(self._files):
            count = file.value("split.count")
            if count not in (None, 0, len(self._files)):
                raise ValueError(
                    f"{file.path}: metadata 'split.count': got {count!r:.80}, expected "
                    f"{len(self._files)}, by the file's name"
                )
            split_number = file.value("split.no")
            if len(self._files) > 1 and split_number not in (None, number):
                raise ValueError(
                    f"{file.path}: metadata 'split.no': got {split_number!r:.80}, expected {number}, by the "
                    "file's name"
                )

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the model, in order."""
        return tuple(file.path for file in self._files)

    def metadata_keys(self) -> tuple[str, ...]:
        """List the keys of the metadata."""
        return tuple(self._files[0].header.values)

    def metadata(self, key: str) -> Any:
        """Decode a value of the metadata.

        Parameters
        ----------
        key : str

        Returns
        -------
        int, float, bool, str, a list of one of these, or None
            None when there is no such key.

        Raises
        ------
        ValueError
            A string that is not UTF-8.
        OSError
            The file was cut off since it was opened.
        """
        return self._files[0].value(key)

    def metadata_of_layer(self, key: str, layer_idx: int) -> Any:
        """Decode a value of the metadata; of an array, which has one for every layer, the element of a layer.

        Raises
        ------
        ValueError
            An array without that element, or a string that is not UTF-8.
        OSError
            The file was cut off since it was opened.
        """
        header = self._files[0].readable_header()
        length = header.length(key)
        if length is None:
            return header.value(key)
        if not 0 <= layer_idx < length:
            raise ValueError(
                f"{self.path}: metadata {key!r}: got values for {length} layers, expected one for layer "
                f"{layer_idx}"
            )
        return header.element(key, layer_idx)

    @cached_property
    def blocks(self) -> Mapping[int, list[str]]:
        """The tensors of each layer, by the number in their names, ``blk.{number}.``."""
        blocks: dict[int, list[str]] = {}
        for name in self._file_of:
            if match := _BLOCK.match(name):
                blocks.setdefault(int(match[1]), []).append(name)
        return blocks

    def names(self) -> tuple[str, ...]:
        """List all tensors."""
        return tuple(self._file_of)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor called `name`."""
        return name in self._file_of

    def file_of(self, name: str) -> Path:
        """Return the file that holds `name`; ValueError when none does."""
        return self._file(name).path

    def _file(self, name: str) -> _GgufFile:
        if name not in self._file_of:
            raise ValueError(f"{self.path}: no tensor {name!r}")
        return self._file_of[name]

    def info(self, name: str) -> GgufTensorInfo:
        """Return type, shape and place of a tensor; ValueError when there is none of that name."""
        return self._file(name).header.tensors[name]

    def tensor(self, name: str) -> NDArray[np.uint8]:
        """View the bytes of a tensor.

        Parameters
        ----------
        name : str

        Returns
        -------
        ndarray of uint8, read-only
            As the tensor's shape, with the bytes of a row for its last dimension. Shares the mapped file's
            memory.

        Raises
        ------
        ValueError
            No such tensor, or one of a type that is not known.
        OSError
            The file was cut off since it was opened.

        Notes
        -----
        Reading the tensor when the file has been cut off meanwhile ends the process; see
        `ktmoe_np.io.mapped`.
        """
        info = self.info(name)
        if not info.num_bytes:
            known = ", ".join(kind.name for kind in GGUF_TYPES.values())
            raise ValueError(
                f"{self.file_of(name)}: tensor {name!r}: got {info.type}, expected one of {known}"
            )
        return self._file(name).rows(info)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Tell whether a GGUF model is meant: by the file's suffix, or by a directory that has no other files.

    Examples
    --------
    >>> is_gguf("model-Q4_K_M.gguf"), is_gguf("model.safetensors")
    (True, False)
    """
    where = Path(path)
    if where.is_dir():
        return any(where.glob("*.gguf")) and not any(where.glob("*.safetensors*"))
    return where.suffix == ".gguf"


def _model_files(path: Path) -> list[Path]:
    """List the files of the model at `path`, in order."""
    if not path.exists():
        raise no_such_path(path)
    if path.is_dir():
        models: dict[tuple[str, str], Path] = {}
        for file in sorted(file for file in path.glob("*.gguf") if file.is_file()):
            match = _SPLIT_NAME.fullmatch(file.name)
            models.setdefault((match[1], match[3]) if match else (file.name, ""), file)
        if not models:
            raise FileNotFoundError(f"{path}: no *.gguf file")
        if len(models) > 1:
            found = ", ".join(file.name for file in models.values())
            raise ValueError(
                f"{path}: got the files of {len(models)} GGUF models, expected those of one: {found}"
            )
        (path,) = models.values()
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    if not 1 <= int(match[2]) <= count:
        raise ValueError(f"{path}: a name for file {int(match[2])} of {count}")
    files = []
    for number in range(1, count + 1):
        files.append(path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf"))
        if not files[-1].exists():
            raise FileNotFoundError(f"{files[-1]}: no such file, but {path.name} is one of {count}")
    return files
