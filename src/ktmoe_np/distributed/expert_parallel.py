"""Expert parallelism for inference: a layer whose experts lie on several ranks."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any, Literal, TypeAlias, Unpack

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from .. import kt_kernel_ext as ext
from ..arrays.checks import at_least
from ..arrays.summary import object_summary
from ..arrays.types import ArrayLike, IntegersLike, PathLike
from ..config import ActivationDtype, MoEConfig
from ..experts import InferenceOverrides
from ..inference.base import BaseMoEWrapper
from ..layers.base import MoELayer
from ..passes.batch import Batch
from .channel import Channel, RankError, attempt
from .exchange import SentTokens, route_tokens
from .loading import load_own_experts
from .placement import Placement, PlacementLike, owners_of
from .slices import ExactSlice, FastSlice, Slice, run_slices

__all__ = ["Combine", "ExpertParallel", "ExpertParallelBase"]

#: Whether results have the bits of one process, or cost one row a token and rank.
Combine: TypeAlias = Literal["exact", "fast"]

#: What products take activations in, by the variant that ranks compare.
_DTYPES = (None, "bfloat16", "int8")


class ExpertParallelBase:
    """What layers on several ranks have in common: whose experts are where."""

    layer: MoELayer

    def __init__(
        self,
        layer: MoELayer,
        comm: object,
        *,
        placement: PlacementLike = "contiguous",
        combine: Combine = "exact",
        slice_tokens: int = 2048,
        timeout: float = 300.0,
    ) -> None:
        self._channel = channel = Channel.of(comm, timeout)
        with channel.call():
            self._number = channel.new_layer()
            given = (layer, placement, combine, slice_tokens)
            own, error = attempt(lambda: self._own_experts(*given))
            counts = channel.agree("make a layer", self._number, error, [(own or 0, 0)] * channel.size)[:, 0]
            made, error = attempt(lambda: self._make(*given, counts))
            channel.agree("make a layer", self._number, error)
            assert made is not None
            self.placement: Placement = made  #: which rank has which experts
            self._check_same_everywhere(placement)

    def _own_experts(self, layer: MoELayer, placement: object, combine: Combine, slice_tokens: int) -> int:
        """Check what needs no other rank, and give the number of this rank's experts."""
        if not isinstance(layer, self._layer_class()):
            raise TypeError(
                f"layer: got {type(layer).__name__}, expected a {self._layer_class().__name__} with the "
                "experts of this rank"
            )
        if combine not in ("exact", "fast"):
            raise ValueError(f"combine: got {combine!r}, expected 'exact' or 'fast'")
        if not layer.loaded:
            raise RuntimeError(f"layer {layer.layer_idx} has no weights yet, load them first")
        self.combine: Combine = combine
        self.slice_tokens = at_least("slice_tokens", slice_tokens, 1)
        return layer.config.num_experts

    @staticmethod
    def _layer_class() -> type[MoELayer]:
        raise NotImplementedError

    def _make(
        self, layer: Any, placement: PlacementLike, combine: str, slice_tokens: int, counts: NDArray[np.int64]
    ) -> Placement:
        self.layer = layer  #: this rank's experts
        num_experts = int(counts.sum())
        made = Placement(owners_of(placement, num_experts, len(counts)), len(counts))
        owned = np.bincount(made.owners, minlength=len(counts))
        wrong = np.flatnonzero(owned != counts)
        if wrong.size:
            rank = int(wrong[0])
            raise ValueError(
                f"placement: got {owned[rank]} experts for rank {rank}, expected {counts[rank]}, those of "
                "its layer"
            )
        #: The sizes of the whole layer.
        self.config: MoEConfig = replace(layer.config, num_experts=num_experts)
        return made

    def _check_same_everywhere(self, placement: object) -> None:
        """Raise on all ranks when they do not have one layer in one way."""
        own = self._properties()
        all_ranks = [
            json.loads(text) for text in self._channel.gather(json.dumps(own).encode(), self._number)
        ]
        for rank, other in enumerate(all_ranks):
            for name, value in all_ranks[0].items():
                if other.get(name) != value:
                    raise RankError(
                        f"layer {self._number} on rank {rank}: got {name} {other.get(name)!r}, expected "
                        f"{value!r} as on rank 0"
                    )

    def _properties(self) -> dict[str, object]:
        """What has to be the same on all ranks."""
        layer = self.layer
        return {
            "version": __version__,
            "instruction set": ext.isa_info()["active"],
            "method": layer.method,
            "group size": layer.group_size,
            "activation dtype": layer.activation_dtype,
            "combine": self.combine,
            "slice_tokens": self.slice_tokens,
            "placement": self.placement.owners.tolist(),
            **{name: repr(value) for name, value in asdict(self.config).items()},
        }

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        own = f"{len(self.experts)} experts of {self.config.num_experts}"
        return f"rank {self.rank} of {self.size} with {own}: {self.layer!r}"

    @property
    def channel(self) -> Channel:
        """What the layers on this communicator share."""
        return self._channel

    @property
    def method(self) -> str:
        """How this rank's experts are encoded, as on all ranks."""
        return self.layer.method

    @property
    def activation_dtype(self) -> str:
        """What products take activations in where a call does not say: ``bfloat16`` or ``int8``."""
        return self.layer.activation_dtype

    @property
    def activation_dtypes(self) -> tuple[str, ...]:
        """What products can take activations in."""
        return self.layer.activation_dtypes

    @property
    def rank(self) -> int:
        """This process's number."""
        return self._channel.rank

    @property
    def size(self) -> int:
        """N, the number of ranks."""
        return self._channel.size

    @property
    def experts(self) -> NDArray[np.int64]:
        """The ids of this rank's experts, ascending."""
        return self.placement.experts_of(self.rank)

    @property
    def layer_idx(self) -> int:
        """The layer's number in the model."""
        return self.config.layer_idx

    def _variant(self, activation_dtype: str | None) -> int:
        return _DTYPES.index(activation_dtype)

    def _check_output(self, batch: Batch) -> None:
        """Raise for an output that the sums at the end of a pass cannot be written to."""
        slots = batch.ids.shape
        none, nowhere = np.empty((0, self.config.hidden_size), np.float32), np.full(slots, -1, np.int32)
        pool = self.layer.cpu_infer.backend_
        ext.moe.combine_rows_task(pool, none, nowhere, batch.weights, batch.hidden_states, batch.out)

    def _checked_ids(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """A copy of ids, which nobody writes to between the check and the exchange."""
        own = ids.copy()
        wrong = np.argwhere(own >= self.config.num_experts)
        if wrong.size:
            at = wrong[0].tolist()
            raise IndexError(
                f"topk_ids: got expert {own[tuple(at)]} at {at}, expected ids below "
                f"{self.config.num_experts} (negative ids are skipped)"
            )
        return own


class ExpertParallel(ExpertParallelBase):
    """A layer of experts that lie on several ranks, for inference.

    Every rank makes the same calls in the same order, each with its own tokens. A token goes once to each
    rank that has one of its experts; what comes back is summed where the token is.

    Parameters
    ----------
    layer : BaseMoEWrapper
        This rank's experts, loaded, in the order of their ids.
    comm : communicator
        An mpi4py communicator, or another `Communicator`. Duplicated once for all layers on it.
    placement : {"contiguous", "strided"} or array of integers [E]
        Which rank has which experts; see `owners_of`.
    combine : {"exact", "fast"}
        ``exact``: ranks return one float32 row for each slot, and the token's rank sums them in the order
        of slots: **the bits of one process**, for every number of ranks and every placement. ``fast``: one
        partial sum for each token and rank, rounded once in the end, so bits depend on the placement.
    slice_tokens : int
        Tokens of a rank that are exchanged and computed at a time: while a slice is computed, the next one
        and the results of the one before are under way. Results do not depend on it.
    timeout : float
        Seconds that an exchange may take. Then it raises TimeoutError, no later call works, and the job is
        aborted when this process ends. That of the first layer on a communicator holds for all.

    Raises
    ------
    RuntimeError
        On all ranks: one of them has another version, instruction set, config, method or placement, or was
        given something wrong.

    Examples
    --------
    Two ranks in threads of one process; with MPI every process has ``comm=MPI.COMM_WORLD``:

    >>> import ml_dtypes, numpy as np
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> from ktmoe_np import KTMoEWrapper
    >>> from ktmoe_np.distributed import ExpertParallel, ThreadCommunicator
    >>> def rank(comm):
    ...     moe = KTMoEWrapper(layer_idx=0, num_experts=1, num_experts_per_tok=1, hidden_size=4,
    ...                        moe_intermediate_size=2, activation="relu2")
    ...     gate = np.full((1, 2, 4), 1 + comm.rank, ml_dtypes.bfloat16)
    ...     moe.load_weights_from_tensors(gate, None, np.ones((1, 4, 2), ml_dtypes.bfloat16))
    ...     layer = ExpertParallel(moe, comm)
    ...     x = np.ones((1, 4), ml_dtypes.bfloat16)
    ...     return float(layer.forward(x, np.array([[1 - comm.rank]]), np.ones((1, 1), np.float32))[0, 0])
    >>> with ThreadPoolExecutor() as threads:
    ...     list(threads.map(rank, ThreadCommunicator.create(2)))
    [128.0, 32.0]
    """

    layer: BaseMoEWrapper

    @staticmethod
    def _layer_class() -> type[MoELayer]:
        return BaseMoEWrapper

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike,
        layer_idx: int = 0,
        method: str | None = None,
        *,
        comm: object,
        placement: PlacementLike = "contiguous",
        combine: Combine = "exact",
        slice_tokens: int = 2048,
        timeout: float = 300.0,
        **overrides: Unpack[InferenceOverrides],
    ) -> ExpertParallel:
        """Make and load this rank's part of a layer of a checkpoint, on all ranks. Collective.

        Parameters
        ----------
        path, layer_idx, method, **overrides
            See `KTMoEWrapper.from_pretrained`. Every rank finds the checkpoint there, and maps the tensors of
            its own experts.
        comm, placement, combine, slice_tokens, timeout
            See the class.

        Returns
        -------
        ExpertParallel

        Raises
        ------
        RankError
            On all ranks: one of them cannot load its experts, or loads others than it should.
        TimeoutError
            Not all ranks came.

        Examples
        --------
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from ktmoe_np.distributed import ExpertParallel, ThreadCommunicator
        >>> from ktmoe_np.models import EMBEDDED_MODEL
        >>> def load(comm):
        ...     return ExpertParallel.from_pretrained(EMBEDDED_MODEL, 1, comm=comm, placement="strided")
        >>> with ThreadPoolExecutor() as threads:
        ...     [layer.experts.tolist() for layer in threads.map(load, ThreadCommunicator.create(2))]
        [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
        """
        channel = Channel.of(comm, timeout)
        layer = load_own_experts(channel, path, layer_idx, method, "inference", placement, overrides)
        return cls(
            layer, channel, placement=placement, combine=combine, slice_tokens=slice_tokens, timeout=timeout
        )

    def forward(
        self,
        hidden_states: ArrayLike,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        *,
        out: ArrayLike | None = None,
        activation_dtype: ActivationDtype | None = None,
    ) -> Any:
        """The experts of all ranks on this rank's tokens. Collective.

        Parameters
        ----------
        hidden_states : array of bfloat16 [..., H]
            This rank's tokens, also none. As in `BaseMoEWrapper.forward`.
        topk_ids : array of any integer dtype [..., P]
            Ids of the whole layer; negative ones are skipped. Copied.
        topk_weights : array of float32, or another float dtype, [..., P]
        out : array of bfloat16 or float32 [..., H], optional
            Where to write; unspecified after an error.
        activation_dtype : {"bfloat16", "int8"} or dtype, optional
            The same on all ranks.

        Returns
        -------
        array of bfloat16 [..., H], of the kind of `hidden_states`, or `out`

        Raises
        ------
        RankError
            On all ranks: an argument of one of them is wrong, or it has failed to compute, or ranks make
            different calls. They can call again.
        TimeoutError
            A rank did not come in time; no later call works.
        RuntimeError
            Another thread of this rank is in a call, or an earlier call has ended in a timeout or an
            interrupt.
        """
        channel = self._channel
        with channel.call():
            made, error = attempt(
                lambda: self._prepare(hidden_states, topk_ids, topk_weights, out, activation_dtype)
            )
            mine = [] if made is None else made.slices
            first = mine[0].num_tokens if mine else np.zeros(channel.size, np.int64)
            lengths = np.stack([first, np.full(channel.size, len(mine))], axis=1)
            variant = 0 if made is None else self._variant(made.batch.activation_dtype)
            got = channel.agree("forward", self._number, error, lengths, variant)
            assert made is not None
            counts = self._exchange_counts(mine, got)
            run_slices(channel, self._slices(made, counts), self.layer.cpu_infer)
            return made.batch.result()

    def _prepare(
        self, hidden_states: Any, topk_ids: Any, topk_weights: Any, out: Any, activation_dtype: Any
    ) -> _Prepared:
        """Everything before the first exchange."""
        dtype = self.layer._dtype_of_call(activation_dtype)
        batch = Batch(self.config, hidden_states, topk_ids, topk_weights, out, False, dtype)
        self._check_output(batch)
        self.layer._files.check()
        ids = self._checked_ids(batch.ids)
        size = self.slice_tokens
        cuts = [slice(at, at + size) for at in range(0, batch.num_tokens, size)]
        return _Prepared(batch, cuts, [route_tokens(ids[cut], self.placement) for cut in cuts])

    def _slices(self, made: _Prepared, counts: NDArray[np.int64]) -> list[Slice]:
        """The slices of the call: this rank may have none of its own in the last ones."""
        none = route_tokens(np.empty((0, self.config.num_experts_per_tok), np.int64), self.placement)
        kind = ExactSlice if self.combine == "exact" else FastSlice
        return [
            kind(
                self._channel,
                self.layer,
                made.batch,
                made.cuts[at] if at < len(made.cuts) else slice(0, 0),
                made.slices[at] if at < len(made.slices) else none,
                arriving,
                at,
            )
            for at, arriving in enumerate(counts)
        ]

    def _exchange_counts(self, mine: list[SentTokens], got: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens each rank sends in each slice, [slices, N]."""
        num_slices = int(got[:, 1].max())
        if num_slices <= 1:
            return got[None, :, 0]
        counts = np.zeros((self.size, num_slices), np.int64)
        for at, sent in enumerate(mine):
            counts[:, at] = sent.num_tokens
        return self._channel.exchange_equal(counts, "the sizes of slices").T


class _Prepared:
    """A batch that is ready to be exchanged, cut into slices."""

    def __init__(self, batch: Batch, cuts: list[slice], slices: list[SentTokens]) -> None:
        self.batch = batch
        self.cuts = cuts
        self.slices = slices
