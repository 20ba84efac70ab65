"""Expert parallelism for inference: a layer whose experts lie on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import expert_ids
from ..arrays.types import ArrayLike, IntegersLike, PathLike
from ..config import ActivationDtype
from ..experts import InferenceOverrides
from ..inference.base import BaseMoEWrapper
from ..io.converted.manifest import manifest_path
from ..layers.base import MoELayer
from ..layers.quantized import QuantizedWeights
from ..passes.batch import Batch
from .base import Combine, ExpertParallelBase
from .channel import Channel, attempt
from .exchange import SentTokens, route_tokens
from .loading import load_own_experts
from .placement import Placement, PlacementLike, balanced_owners
from .slices import ExactSlice, FastSlice, Slice, run_slices

__all__ = ["ExpertParallel"]


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

        def load(placement: PlacementLike) -> BaseMoEWrapper:
            found: BaseMoEWrapper = load_own_experts(
                channel, path, layer_idx, method, "inference", placement, overrides
            )
            return found

        made = cls(
            load(placement),
            channel,
            placement=placement,
            combine=combine,
            slice_tokens=slice_tokens,
            timeout=timeout,
        )
        made._load = load
        return made

    _load: Callable[[PlacementLike], BaseMoEWrapper] | None = None

    def rebalance(self, expert_tokens: IntegersLike | None = None) -> None:
        """Place the experts anew, so that ranks have about the same work. Collective.

        Weights are not sent: each rank maps those of its new experts from the checkpoint. Results stay the
        same.

        Parameters
        ----------
        expert_tokens : array of integers [E], optional
            What experts had to compute, the same on all ranks. None takes what the layers of all ranks have
            counted: call ``layer.collect_stats()`` on each before.

        Raises
        ------
        RankError
            On all ranks: a layer that was not made by `from_pretrained`, or is quantized when it is loaded;
            nothing was counted; another number of experts; or one that cannot be loaded. The placement is as
            it was.
        """
        channel = self._channel
        own, error = attempt(self._counted if expert_tokens is None else self._checked_source)
        with channel.call():
            channel.agree("rebalance", self._number, error)
            parts = channel.gather(np.ascontiguousarray(own, np.int64).tobytes(), self._number)
        if expert_tokens is None:
            counted = np.empty(self.config.num_experts, np.int64)
            for rank, part in enumerate(parts):
                counted[self.placement.experts_of(rank)] = np.frombuffer(part, np.int64)
            expert_tokens = counted
        owners, error = attempt(lambda: self._balanced(expert_tokens))
        with channel.call():
            channel.agree("rebalance", self._number, error)
        assert owners is not None
        assert self._load is not None
        layer = self._load(owners)  # raises on all ranks, with the old layer in place
        if self.layer._layer.collects_stats:
            layer.collect_stats()
        self.layer, self.placement = layer, Placement(owners, channel.size)

    def _checked_source(self) -> NDArray[np.int64]:
        """Raise unless the experts can be mapped anew; nothing was counted."""
        layer = self.layer
        if self._load is None:
            raise RuntimeError("rebalance: got a layer made of another, expected one of from_pretrained")
        if isinstance(layer, QuantizedWeights) and not manifest_path(str(layer.weight_path)).exists():
            raise ValueError(
                f"rebalance: got method {layer.method!r} that quantizes at load, expected a directory of "
                "ktmoe convert, whose experts are mapped"
            )
        return np.empty(0, np.int64)

    def _counted(self) -> NDArray[np.int64]:
        self._checked_source()
        return self.layer.stats().expert_tokens

    def _balanced(self, expert_tokens: IntegersLike | None) -> NDArray[np.int32]:
        tokens = expert_ids(expert_tokens, "expert_tokens")
        if tokens.shape != (self.config.num_experts,):
            raise ValueError(
                f"expert_tokens: got shape {list(tokens.shape)}, expected [{self.config.num_experts}]"
            )
        return balanced_owners(tokens, self.size)

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
        self._check_layer()
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
