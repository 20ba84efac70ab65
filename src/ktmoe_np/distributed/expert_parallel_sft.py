"""Expert parallelism for training: adapters and their gradients stay with the experts' ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from .. import kt_kernel_ext as ext
from ..arrays.checks import Array, bfloat16
from ..arrays.rows import RowForm, hidden_rows
from ..arrays.types import ArrayLike, IntegersLike, PathLike
from ..config import ActivationDtype
from ..experts import SFTOverrides
from ..layers.base import MoELayer
from ..passes.batch import Batch
from ..sft.base import BaseSFTMoEWrapper
from ..sft.gradients import SFTGradients, lora_shapes
from ..sft.lora import first_matrix
from ..sft.options import SFTOptions
from ..sft.results import BackwardResults
from .base import Combine, ExpertParallelBase
from .channel import Channel, attempt
from .exchange import SentTokens, route_tokens
from .loading import load_own_experts
from .placement import PlacementLike
from .slices import Status

__all__ = ["ExpertParallelSFT"]


@dataclass(frozen=True, eq=False)
class _SavedPass:
    """What the backward pass needs of a forward pass, beside what the experts' ranks have saved."""

    batch: Batch
    hidden_states: Array  #: a copy
    weights: NDArray[np.float32]  #: a copy
    sent: SentTokens
    arriving: NDArray[np.int64]  #: tokens from each rank, [N]
    row_edges: NDArray[np.int64]  #: rows before each arriving token, and all


class ExpertParallelSFT(ExpertParallelBase):
    """A layer of experts that lie on several ranks, for training.

    Every rank makes the same calls in the same order, each with its own tokens. Results and gradients have
    **the bits of one process** that takes the batches of all ranks as one, rank after rank, for every
    number of ranks and every placement. Gradients of adapters are those of all ranks' tokens: they arise
    where the experts are, and are reduced nowhere.

    Parameters
    ----------
    layer : BaseSFTMoEWrapper
        This rank's experts, loaded, in the order of their ids. Adapters that were given no values yet get
        those that one process draws for the whole layer.
    comm, placement, timeout
        See `ExpertParallel`.

    Raises
    ------
    RankError
        On all ranks, as with `ExpertParallel`; also for a layer with `lora_dropout`, whose masks depend on
        the place of a token in its batch.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> from ktmoe_np import KTMoEWrapper
    >>> from ktmoe_np.distributed import ExpertParallelSFT, ThreadCommunicator
    >>> def rank(comm):
    ...     sft = KTMoEWrapper(layer_idx=0, num_experts=1, num_experts_per_tok=1, hidden_size=4, lora_rank=1,
    ...                        moe_intermediate_size=2, activation="relu2", mode="sft", method="AMXBF16_SFT")
    ...     ones = np.ones((1, 2, 4), ml_dtypes.bfloat16)
    ...     sft.load_weights_from_tensors(ones, None, np.ones((1, 4, 2), ml_dtypes.bfloat16))
    ...     layer = ExpertParallelSFT(sft, comm)
    ...     x, ids = np.ones((1, 4), ml_dtypes.bfloat16), np.array([[1 - comm.rank]])
    ...     y = layer.forward_sft(x, ids, np.ones((1, 1), np.float32))
    ...     gradients = layer.backward(y)
    ...     return float(y[0, 0]), gradients.grad_weights.tolist(), gradients.down_lora_b.shape
    >>> with ThreadPoolExecutor() as threads:
    ...     list(threads.map(rank, ThreadCommunicator.create(2)))
    [(32.0, [[4096.0]], (1, 4, 1)), (32.0, [[4096.0]], (1, 4, 1))]
    """

    layer: BaseSFTMoEWrapper

    @staticmethod
    def _layer_class() -> type[MoELayer]:
        return BaseSFTMoEWrapper

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike,
        layer_idx: int = 0,
        method: str | None = None,
        *,
        comm: object,
        placement: PlacementLike = "contiguous",
        timeout: float = 300.0,
        **overrides: Unpack[SFTOverrides],
    ) -> ExpertParallelSFT:
        """Make and load this rank's part of a layer of a checkpoint, on all ranks; as for `ExpertParallel`.

        Parameters
        ----------
        path, layer_idx, method, **overrides
            See `KTMoEWrapper.from_pretrained` with ``mode="sft"``.
        comm, placement, timeout
            See `ExpertParallel`.
        """
        channel = Channel.of(comm, timeout)
        layer = load_own_experts(channel, path, layer_idx, method, "sft", placement, overrides)
        return cls(layer, channel, placement=placement, timeout=timeout)

    def __init__(
        self,
        layer: BaseSFTMoEWrapper,
        comm: object,
        *,
        placement: PlacementLike = "contiguous",
        timeout: float = 300.0,
    ) -> None:
        super().__init__(layer, comm, placement=placement, timeout=timeout)
        self._saved: list[_SavedPass] = []
        if layer.options.lora_rank and not layer._lora:
            self.init_lora_weights()

    def _own_experts(self, layer: MoELayer, placement: object, combine: Combine, slice_tokens: int) -> int:
        count = super()._own_experts(layer, placement, combine, slice_tokens)
        assert isinstance(layer, BaseSFTMoEWrapper)
        if layer.options.lora_dropout:
            raise ValueError(
                f"lora_dropout: got {layer.options.lora_dropout}, expected 0 with experts on several ranks"
            )
        if layer.num_cached:
            raise ValueError(f"layer: got one with {layer.num_cached} saved passes, expected none")
        return count

    def _properties(self) -> dict[str, object]:
        options = self.layer.options
        return {**super()._properties(), "options": repr(options)}

    # ---- adapters ----

    def init_lora_weights(self, **given: ArrayLike) -> None:
        """Give the adapters of this rank's experts their first values. Not collective.

        Parameters
        ----------
        **given : array
            Matrices of this rank's experts, as `BaseSFTMoEWrapper.init_lora_weights` takes them. The others
            are this rank's part of what one process draws for the whole layer.
        """
        options = self.layer.options
        missing = lora_shapes(self.config, options.lora_rank).keys() - given.keys()
        drawn = {name: first_matrix(name, self.config, options)[self.experts] for name in missing}
        self.layer.init_lora_weights(**drawn, **given)

    def update_lora_weights(self, **given: ArrayLike) -> None:
        """Give adapters of this rank's experts new values; see `BaseSFTMoEWrapper`. Not collective."""
        self.layer.update_lora_weights(**given)

    @property
    def options(self) -> SFTOptions:
        """What the adapters are, and what training keeps."""
        return self.layer.options

    @property
    def lora_weights(self) -> dict[str, Array]:
        """The adapters of this rank's experts."""
        return self.layer.lora_weights

    def gather_experts(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays of all experts [E, ...], from those that every rank has of its own. Collective.

        Parameters
        ----------
        arrays : mapping of str to array [E of this rank, ...]
            The same names, dtypes and other axes on all ranks.

        Returns
        -------
        dict of str to array [E, ...]

        Raises
        ------
        RankError
            Arrays of another number of experts than a rank's.
        """
        channel, experts = self._channel, self.experts
        found = {}
        for name, array in arrays.items():
            error = None
            if len(array) != len(experts):
                error = ValueError(f"{name}: got {len(array)} experts, expected {len(experts)}, this rank's")
            with channel.call():
                data = b"" if error else np.ascontiguousarray(array).tobytes()
                parts = channel.gather(data, self._number, error)
            whole = np.empty((self.config.num_experts, *array.shape[1:]), array.dtype)
            for rank, part in enumerate(parts):
                owned = self.placement.experts_of(rank)
                whole[owned] = np.frombuffer(part, array.dtype).reshape(len(owned), *array.shape[1:])
            found[name] = whole
        return found

    # ---- forward ----

    def forward(
        self,
        hidden_states: ArrayLike,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        *,
        out: ArrayLike | None = None,
        activation_dtype: ActivationDtype | None = None,
    ) -> Any:
        """`forward_sft` with nothing saved. Collective."""
        return self.forward_sft(
            hidden_states, topk_ids, topk_weights, False, out=out, activation_dtype=activation_dtype
        )

    def forward_sft(
        self,
        hidden_states: ArrayLike,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        save_for_backward: bool = True,
        *,
        out: ArrayLike | None = None,
        activation_dtype: ActivationDtype | None = None,
    ) -> Any:
        """The experts of all ranks, with their adapters, on this rank's tokens. Collective.

        Parameters
        ----------
        hidden_states, topk_ids, topk_weights, out
            This rank's tokens, also none; see `BaseSFTMoEWrapper.forward_sft`. Ids are of the whole layer.
            Copied for the backward pass.
        save_for_backward : bool
            The same on all ranks.
        activation_dtype : {"bfloat16", "int8"} or dtype, optional
            The same on all ranks.

        Returns
        -------
        array of bfloat16 [..., H], of the kind of `hidden_states`, or `out`

        Raises
        ------
        RankError
            On all ranks, as in `ExpertParallel.forward`: nothing is saved then.
        TimeoutError, RuntimeError
            As there.
        """
        channel, save = self._channel, bool(save_for_backward)
        with channel.call():
            made, error = attempt(
                lambda: self._prepare(hidden_states, topk_ids, topk_weights, out, save, activation_dtype)
            )
            leaving = np.zeros(channel.size, np.int64) if made is None else made[1].num_tokens
            variant = 0 if made is None else 2 * self._variant(made[0].activation_dtype) + save
            numbers = np.stack([leaving, np.zeros_like(leaving)], axis=1)
            arriving = channel.agree("forward_sft", self._number, error, numbers, variant)[:, 0]
            assert made is not None
            saved = self._run_forward(*made, arriving.copy(), save)
            if save:
                self._saved.append(saved)
            return saved.batch.result()

    def _prepare(
        self,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        out: Any,
        save: bool,
        activation_dtype: Any,
    ) -> tuple[Batch, SentTokens]:
        dtype = self.layer._dtype_of_call(activation_dtype)
        batch = Batch(self.config, hidden_states, topk_ids, topk_weights, out, False, dtype)
        self._check_output(batch)
        depth = self.layer.options.max_cache_depth
        if save and len(self._saved) >= depth:
            raise RuntimeError(
                f"forward_sft: got {len(self._saved)} saved forward passes of layer {self.layer_idx}, "
                f"expected fewer than max_cache_depth {depth}; call backward or clear the cache first"
            )
        self._check_layer()
        self.layer._init_missing()
        return batch, route_tokens(self._checked_ids(batch.ids), self.placement)

    def _run_forward(
        self, batch: Batch, sent: SentTokens, arriving: NDArray[np.int64], save: bool
    ) -> _SavedPass:
        hidden, slots = self.config.hidden_size, self.config.num_experts_per_tok
        weights = batch.weights.copy()
        leaving = sent.num_tokens
        x = self._exchange("x", batch.hidden_states.view(np.uint16)[sent.tokens], leaving, arriving)
        routes = np.concatenate([sent.ids, sent.of_slots(weights).view(np.int32)], axis=1)
        got = self._exchange("routes", routes, leaving, arriving)
        ids = got[:, :slots].astype(np.int64)
        row_edges = np.concatenate([[0], np.cumsum((ids >= 0).sum(axis=1))])
        rows = np.empty((int(row_edges[-1]), hidden), np.float32)
        task = self.layer._layer.forward_sft_task(
            x.view(bfloat16),
            ids,
            np.ascontiguousarray(got[:, slots:]).view(np.float32),
            rows,
            save,
            activation_dtype=batch.activation_dtype,
            expert_rows=True,
        )
        saved = _SavedPass(batch, batch.hidden_states.copy(), weights, sent, arriving, row_edges)
        self._run(task, lambda: self._sum(saved, self._return_rows(saved, rows), batch.out, of_input=False))
        return saved

    def _run(self, task: ext.moe.TrainingTask, finish: Callable[[], None]) -> None:
        """Compute, and finish with what all ranks have computed; when one of them fails, none has."""
        status = Status(self._channel)
        try:
            try:
                self.layer.cpu_infer.run(task)
            except Exception as error:
                status.error = error
            status.begin()
            status.finish()
            finish()
        except BaseException:
            task.revoke()
            raise

    def _exchange(
        self, what: str, send: NDArray[Any], leaving: NDArray[np.int64], arriving: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Rows that come from all ranks, this one among them, by rank."""
        got = np.empty((int(arriving.sum()), *send.shape[1:]), send.dtype)
        request = self._channel.begin(np.ascontiguousarray(send), leaving.tolist(), got, arriving.tolist())
        self._channel.wait(request, f"{what} of other ranks")
        return got

    def _return_rows(self, saved: _SavedPass, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rows that experts have computed, back at their tokens."""
        ends = np.cumsum(saved.arriving)
        leaving = saved.row_edges[ends] - saved.row_edges[ends - saved.arriving]
        return self._exchange("rows", rows, leaving, saved.sent.num_rows)

    def _sum(self, saved: _SavedPass, rows: NDArray[np.float32], out: Array, *, of_input: bool) -> None:
        """Sum the rows of this rank's tokens: weighted where the layer of one process does so."""
        sent = saved.sent
        first = np.cumsum(sent.num_rows) - sent.num_rows
        weights = saved.weights if self.config.scale_inputs is of_input else None
        index = sent.row_of_slots(saved.batch.num_tokens, first)
        engine = self.layer.cpu_infer
        engine.run(ext.moe.combine_rows_task(engine.backend_, rows, index, weights, saved.hidden_states, out))

    # ---- backward ----

    def backward(
        self,
        grad_output: ArrayLike,
        *,
        gradients: SFTGradients | None = None,
        accumulate: bool = False,
    ) -> SFTGradients:
        """Backpropagate through the forward pass that was saved last. Collective.

        Parameters
        ----------
        grad_output : array of bfloat16 [..., H]
            Of this rank's tokens in that pass.
        gradients : SFTGradients, optional
            Arrays for the gradients of this rank's adapters; see `BaseSFTMoEWrapper.backward`.
        accumulate : bool
            Add to those arrays.

        Returns
        -------
        SFTGradients
            Those of the input and of the routing weights are of this rank's tokens; those of matrices are
            of this rank's experts, by all ranks' tokens.

        Raises
        ------
        RankError
            On all ranks: no pass is saved, or an argument of one of them is wrong. The pass stays saved.
        TimeoutError, RuntimeError
            As in `ExpertParallel.forward`.
        """
        channel = self._channel
        with channel.call():
            made, error = attempt(lambda: self._prepare_backward(grad_output, gradients, accumulate))
            channel.agree("backward", self._number, error)
            assert made is not None
            saved, q, results = made
            self._run_backward(saved, q, results, accumulate)
            self._saved.pop()
            return results.given()

    def _prepare_backward(
        self, grad_output: Any, gradients: SFTGradients | None, accumulate: bool
    ) -> tuple[_SavedPass, Array, BackwardResults]:
        config = self.config
        rows, form = hidden_rows(grad_output, "grad_output", config.hidden_size)
        if not self._saved:
            raise RuntimeError(
                f"backward: got no saved forward pass of layer {self.layer_idx}, expected a forward_sft with "
                "save_for_backward first"
            )
        saved = self._saved[-1]
        if len(rows) != saved.batch.num_tokens:
            raise ValueError(
                f"grad_output: got {len(rows)} tokens, expected {saved.batch.num_tokens} as in the forward "
                "pass"
            )
        self._check_layer()
        return saved, rows, self._results(form, len(rows), gradients, accumulate)

    def _results(
        self, form: RowForm, num_tokens: int, gradients: SFTGradients | None, accumulate: bool
    ) -> BackwardResults:
        """Where gradients go."""
        layer, config = self.layer, self.config
        results = BackwardResults(form, layer._given_matrices(gradients, accumulate))
        if gradients is None:
            results.new_matrices(layer._results.matrices(None))
        results.new_rows(
            np.empty((num_tokens, config.hidden_size), bfloat16),
            np.zeros((num_tokens, config.num_experts_per_tok), np.float32),
        )
        return results

    def _run_backward(self, saved: _SavedPass, q: Array, results: BackwardResults, accumulate: bool) -> None:
        sent, arriving = saved.sent, saved.arriving
        at_experts = self._exchange("grad_output", q.view(np.uint16)[sent.tokens], sent.num_tokens, arriving)
        rows = np.empty((int(saved.row_edges[-1]), self.config.hidden_size), np.float32)
        of_weights = np.empty((len(at_experts), self.config.num_experts_per_tok), np.float32)
        task = self.layer._layer.backward_task(
            at_experts.view(bfloat16),
            rows,
            of_weights,
            **results.matrices,
            accumulate=bool(accumulate),
            expert_rows=True,
        )

        def finish() -> None:
            back = self._exchange("grad_weights", of_weights, arriving, sent.num_tokens)
            at, slot = np.nonzero(sent.ids >= 0)
            results.rows["grad_weights"][sent.tokens[at], slot] = back[at, slot]
            self._sum(saved, self._return_rows(saved, rows), results.rows["grad_input"], of_input=True)

        self._run(task, finish)

    @property
    def num_cached(self) -> int:
        """Forward passes that are saved and wait for their backward pass."""
        return len(self._saved)

    def clear_cache(self) -> None:
        """Drop the saved forward passes, on every rank at the same point of its calls. Not collective."""
        self._saved.clear()
        self.layer.clear_cache()
