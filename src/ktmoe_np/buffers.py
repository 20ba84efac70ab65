"""Reused batch buffers: two per batch shape."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import kt_kernel_ext as ext
from .arrays.checks import Array, bfloat16
from .arrays.summary import arrays_summary, object_summary

__all__ = ["BatchBuffers", "Claims", "KExpertsCPUBuffer", "KExpertsSFTBuffer", "MatrixSet", "SFTBatchBuffers"]


#: Bytes of a page, and what arrays begin at a multiple of.
_PAGE, _LINE = 4096, 64


class _Block:
    """Arrays in one block of whole pages."""

    is_locked: bool  #: in memory, for a GPU

    def _any_array(self) -> Array:
        raise NotImplementedError

    def lock_pages(self) -> None:
        """Lock the arrays in memory, once, for copies from and to a GPU that need not wait for the CPU.

        Raises
        ------
        RuntimeError
            There is no CUDA driver, or it refuses.
        """
        if self.is_locked:
            return
        block = self._any_array()
        while isinstance(block.base, np.ndarray):
            block = block.base
        begin = -block.ctypes.data % _PAGE
        pages = block[begin : begin + (len(block) - begin) // _PAGE * _PAGE]
        ext.cuda.lock_pages(pages)
        weakref.finalize(block, ext.cuda.unlock_pages, pages.ctypes.data)
        self.is_locked = True


@dataclass(eq=False, repr=False)
class BatchBuffers(_Block):
    """The arrays of one forward pass of inference, T rows each."""

    input: Array  #: bfloat16 [T, H]
    topk_ids: NDArray[np.int64]  #: [T, P], as a GPU has them
    num_tokens: NDArray[np.int64]  #: [1], of a GPU's batch
    immediate_ids: NDArray[np.int64]  #: [T, P], deferred slots -1
    deferred_ids: NDArray[np.int64]  #: [T, P], immediate slots -1
    weights: NDArray[np.float32]  #: [T, P]
    output: Array  #: bfloat16 [T, H]
    deferred_output: NDArray[np.float32]  #: [T, H], what the next layer starts from
    busy_until: ext.Ticket | None = None  #: of the last task that uses the buffers
    is_locked: bool = False  #: in memory, for a GPU

    @classmethod
    def allocate(cls, batch_size: int, hidden_size: int, num_experts_per_tok: int) -> BatchBuffers:
        """Fresh arrays; the system gives them memory when they are first written."""
        rows, routes = (batch_size, hidden_size), (batch_size, num_experts_per_tok)
        ids, floats = np.dtype(np.int64), np.dtype(np.float32)
        arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            "input": (rows, bfloat16),
            "topk_ids": (routes, ids),
            "num_tokens": ((1,), ids),
            "immediate_ids": (routes, ids),
            "deferred_ids": (routes, ids),
            "weights": (routes, floats),
            "output": (rows, bfloat16),
            "deferred_output": (rows, floats),
        }
        return cls(**_in_pages_of_their_own(arrays))

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        (tokens, hidden), routes = self.input.shape, self.weights.shape[1]
        state = "used by no task" if self.busy_until is None else f"last used by {self.busy_until!r}"
        pages = ", page-locked" if self.is_locked else ""
        return f"T={tokens} H={hidden} P={routes}, {state}{pages}"

    def first(self, batch_size: int) -> BatchBuffers:
        """Its first rows."""
        return BatchBuffers(
            self.input[:batch_size],
            self.topk_ids[:batch_size],
            self.num_tokens,
            self.immediate_ids[:batch_size],
            self.deferred_ids[:batch_size],
            self.weights[:batch_size],
            self.output[:batch_size],
            self.deferred_output[:batch_size],
        )

    def _any_array(self) -> Array:
        return self.input


def _in_pages_of_their_own(arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> dict[str, Any]:
    """Arrays of those shapes and dtypes one after the other in a block of whole pages."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in arrays.items()}
    block = np.empty(sum(_rounded(size, _LINE) for size in sizes.values()) + 2 * _PAGE, np.uint8)
    at, found = -block.ctypes.data % _PAGE, {}
    for name, (shape, dtype) in arrays.items():
        found[name] = block[at : at + sizes[name]].view(dtype).reshape(shape)
        at += _rounded(sizes[name], _LINE)
    return found


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class Claim:
    """While it lives, arrays belong to a submitted pass whose result has not been taken yet."""


class Claims:
    """The claimed arrays of a set, by name."""

    def __init__(self) -> None:
        self._holders: dict[str, weakref.ref[Claim]] = {}

    def taken(self) -> list[str]:
        """The names of the arrays that a living claim has."""
        return [name for name, holder in self._holders.items() if holder() is not None]

    def take(self, name: str, claim: Claim | None) -> bool:
        """Whether the arrays are free; from here on they are the claim's, if there is one."""
        holder = self._holders.get(name)
        if holder is not None and holder() is not None:
            return False
        if claim is not None:
            self._holders[name] = weakref.ref(claim)
        return True


@dataclass(repr=False)
class SFTBatchBuffers(_Block):
    """The arrays of one training step, T rows each."""

    input: Array  #: bfloat16 [T, H]
    ids: NDArray[np.int64]  #: [T, P]
    weights: NDArray[np.float32]  #: [T, P]
    output: Array  #: bfloat16 [T, H]
    grad_output: Array  #: bfloat16 [T, H]
    grad_input: Array  #: bfloat16 [T, H]
    grad_weights: NDArray[np.float32]  #: [T, P]
    claims: Claims = field(default_factory=Claims)  #: of output, and of the gradients
    is_locked: bool = False  #: in memory, for a GPU

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        (tokens, hidden), routes = self.input.shape, self.weights.shape[1]
        taken = self.claims.taken()
        return f"T={tokens} H={hidden} P={routes}, {' and '.join(taken) or 'nothing'} in use"

    @classmethod
    def allocate(cls, batch_size: int, hidden_size: int, num_experts_per_tok: int) -> SFTBatchBuffers:
        """Fresh arrays; the system gives them memory when they are first written."""
        rows, routes = (batch_size, hidden_size), (batch_size, num_experts_per_tok)
        ids, floats = np.dtype(np.int64), np.dtype(np.float32)
        arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            "input": (rows, bfloat16),
            "ids": (routes, ids),
            "weights": (routes, floats),
            "output": (rows, bfloat16),
            "grad_output": (rows, bfloat16),
            "grad_input": (rows, bfloat16),
            "grad_weights": (routes, floats),
        }
        return cls(**_in_pages_of_their_own(arrays))

    def first(self, batch_size: int) -> SFTBatchBuffers:
        """Its first rows."""
        names = (field.name for field in fields(self)[:7])
        return SFTBatchBuffers(*(getattr(self, name)[:batch_size] for name in names))

    def _any_array(self) -> Array:
        return self.input


@dataclass(eq=False, repr=False)
class MatrixSet:
    """The gradients of a layer's matrices, float32, by name."""

    arrays: dict[str, NDArray[np.float32]]
    claims: Claims = field(default_factory=Claims)

    def __repr__(self) -> str:
        return object_summary(self, lambda: arrays_summary(self.arrays))


@dataclass(eq=False, repr=False)
class StagedMatrices(_Block):
    """Matrices of a pass in a stream, by name, in pinned memory; the layers of a stream use them in turn."""

    arrays: dict[str, Array]
    is_locked: bool = False  #: in memory, for a GPU

    def __repr__(self) -> str:
        return object_summary(self, lambda: arrays_summary(self.arrays))

    def _any_array(self) -> Array:
        return next(iter(self.arrays.values()))


#: The shape and the dtype of each array, by name.
_Shapes = tuple[tuple[str, tuple[int, ...], np.dtype[Any]], ...]

Buffers = TypeVar("Buffers", BatchBuffers, SFTBatchBuffers)

#: T, H, P, and the stream; and without T.
_Key = tuple[int, int, int, int | None]
_Sizes = tuple[int, int, int | None]

#: Rows that a stream's buffers grow by, from so many on.
_GROWTH = 256


class _Cache:
    """The buffers that a class keeps."""

    def __init__(self) -> None:
        self.kept: dict[_Key, tuple[Any, ...]] = {}
        self.last: dict[_Sizes, tuple[int, tuple[Any, ...]]] = {}  # T and the buffers
        self.matrices: weakref.WeakKeyDictionary[Any, MatrixSet] = weakref.WeakKeyDictionary()  # by layer
        self.staged: dict[tuple[int, _Shapes], StagedMatrices] = {}  # by stream and shapes


class _CacheOfThread(_Cache, threading.local):
    """One for each thread, which goes when the thread ends."""


class _ExpertsBuffer(Generic[Buffers]):
    """Buffers of all layers: layer L uses number L % 2, so that two neighbors never share any.

    Buffers are kept for the capture batch sizes and for the last other size; the rest are released. Every
    subclass has its own buffers and capture batch sizes, and so has every CUDA stream, which uses them in
    its own order. The buffers of a stream grow and serve smaller batches too: releasing pinned memory waits
    until the GPU is idle.
    """

    buffer_depth: ClassVar[int] = 2
    _buffers: ClassVar[type[Any]]
    _lock: ClassVar[ext.CallLock]
    _capture_batch_sizes: ClassVar[list[int]]
    _cache_kind: ClassVar[type[_Cache]]
    _cache: ClassVar[_Cache]

    def __init_subclass__(cls, buffers: type[Any], cache: type[_Cache] = _Cache, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._buffers = buffers
        cls._lock = ext.CallLock(cls.__name__)
        cls._capture_batch_sizes = []
        cls._cache_kind = cache
        cls._cache = cache()

    @classmethod
    def get_buffer(
        cls, batch_size: int, hidden_size: int, num_experts_per_tok: int, stream: int | None = None
    ) -> tuple[Buffers, ...]:
        """The buffers for batches of that size.

        Parameters
        ----------
        batch_size : int
            T.
        hidden_size : int
            H.
        num_experts_per_tok : int
            P.
        stream : int, optional
            The CUDA stream that uses them, by its key; None for the host.

        Returns
        -------
        tuple of buffers
            `buffer_depth` of them; the same ones at the next call with the same sizes, unless another size
            came between and this one is not a capture batch size. Those of a stream may have more rows.
        """
        sizes: _Sizes = (hidden_size, num_experts_per_tok, stream)
        key: _Key = (batch_size, *sizes)
        with cls._lock:
            cache = cls._cache
            buffers = cache.kept.get(key)
            if buffers is not None:
                return buffers
            is_captured = batch_size in cls._capture_batch_sizes
            rows, last = cache.last.get(sizes, (-1, None))
            if rows == batch_size or (stream is not None and not is_captured and rows >= batch_size):
                buffers = last
            if buffers is None:
                rows = batch_size if stream is None or is_captured else _grown(batch_size)
                buffers = tuple(cls._buffers.allocate(rows, *sizes[:2]) for _ in range(cls.buffer_depth))
            if is_captured:
                cache.kept[key] = buffers
            else:
                cache.last[sizes] = (rows, buffers)
            return buffers

    @classmethod
    def set_capture_batch_sizes(cls, capture_batch_sizes: Sequence[int]) -> None:
        """Batch sizes whose buffers stay allocated, at the same addresses, until the cache is cleared.

        Raises
        ------
        ValueError
            A size below 1.
        """
        sizes = sorted({int(size) for size in capture_batch_sizes})
        if sizes and sizes[0] < 1:
            raise ValueError(f"capture_batch_sizes: got {sizes[0]}, expected sizes of 1 or more")
        with cls._lock:
            cls._capture_batch_sizes = sizes

    @classmethod
    def get_capture_batch_sizes(cls) -> list[int]:
        """The sizes set last, ascending."""
        return list(cls._capture_batch_sizes)

    @classmethod
    def clear_buffer_cache(cls) -> None:
        """Let all buffers go. Calls that are under way keep theirs."""
        with cls._lock:
            cls._cache = cls._cache_kind()


def _grown(batch_size: int) -> int:
    """Rows of a stream's buffers: a power of two, or of many rows a multiple."""
    if batch_size <= _GROWTH:
        return 1 << max(batch_size - 1, 0).bit_length()
    return _rounded(batch_size, _GROWTH)


class KExpertsCPUBuffer(_ExpertsBuffer[BatchBuffers], buffers=BatchBuffers):
    """Buffers of inference: layer L uses number L % 2, so that two neighbors never share any.

    Buffers are kept for the capture batch sizes and for the last other size; the rest are released.

    Examples
    --------
    >>> buffers = KExpertsCPUBuffer.get_buffer(batch_size=4, hidden_size=8, num_experts_per_tok=2)
    >>> len(buffers), buffers[0].input.shape
    (2, (4, 8))
    >>> KExpertsCPUBuffer.set_capture_batch_sizes([1, 2])
    >>> KExpertsCPUBuffer.get_capture_batch_sizes()
    [1, 2]
    >>> KExpertsCPUBuffer.clear_buffer_cache()
    >>> KExpertsCPUBuffer.set_capture_batch_sizes([])
    """


class KExpertsSFTBuffer(_ExpertsBuffer[SFTBatchBuffers], buffers=SFTBatchBuffers, cache=_CacheOfThread):
    """Buffers of training: arrays that a training loop reads into, and has results written to.

    Layer L uses number L % 2. Buffers are kept for the capture batch sizes, which are not those of
    `KExpertsCPUBuffer`, and for the last other size; the rest are released. Every thread has its own,
    so that no thread overwrites arrays that another one reads. Passes in CUDA streams (`ktmoe_np.torch`)
    stage their arrays in buffers of the stream, in pinned memory.

    Layers created with `reuse_buffers` write their results there; `ktmoe_np.sft.SFTOptions` documents how
    long these are valid.

    Examples
    --------
    >>> buffers = KExpertsSFTBuffer.get_buffer(batch_size=4, hidden_size=8, num_experts_per_tok=2)
    >>> len(buffers), buffers[1].grad_output.shape, buffers[1].grad_weights.shape
    (2, (4, 8), (4, 2))
    >>> KExpertsSFTBuffer.clear_buffer_cache()
    """

    @classmethod
    def get_matrices(cls, layer: object, shapes: Mapping[str, tuple[int, ...]]) -> MatrixSet:
        """The arrays for the gradients of a layer's matrices: one set for each layer, of this thread.

        Parameters
        ----------
        layer : object
            Whose they are; the set goes with it.
        shapes : mapping of str to tuple of int
            By name, always the same of one layer.

        Returns
        -------
        MatrixSet
        """
        with cls._lock:
            matrices = cls._cache.matrices
            found = matrices.get(layer)
            if found is None:
                found = MatrixSet({name: np.empty(shape, np.float32) for name, shape in shapes.items()})
                matrices[layer] = found
            return found

    @classmethod
    def get_staging(
        cls, stream: int, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
    ) -> StagedMatrices:
        """The arrays that matrices of a pass in a stream are staged in, the same for all its layers.

        Parameters
        ----------
        stream : int
            The CUDA stream, by its key.
        shapes : mapping of str to shape and dtype

        Returns
        -------
        StagedMatrices
        """
        key = stream, tuple((name, *each) for name, each in shapes.items())
        with cls._lock:
            staged = cls._cache.staged
            if key not in staged:
                staged[key] = StagedMatrices(_in_pages_of_their_own(dict(shapes)))
            return staged[key]
