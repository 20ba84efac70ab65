"""The base of the layers for inference: forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, Unpack, overload

from ..arrays.checks import Array, at_least
from ..arrays.device import stream_handle
from ..arrays.types import ArrayLike, IntegersLike, StreamLike
from ..config import ActivationDtype, MoEConfig
from ..formats.methods import Method
from ..layers.options import LayerOptions
from ..passes.batch import Batch
from ..passes.deferral import DeferralChain
from ..passes.host import LayerRunner
from ..passes.pending import BegunPass, PendingPass
from ..passes.stream import Stream, stream_at
from ..passes.stream_runner import StreamBatch, StreamRunner, drain
from .adapters import AdaptedExperts

__all__ = ["BaseMoEWrapper"]


#: Hidden states, ids and weights.
_Arrays = tuple[ArrayLike, IntegersLike, ArrayLike]

InT = TypeVar("InT", bound=ArrayLike)
OutT = TypeVar("OutT", bound=ArrayLike)


class BaseMoEWrapper(AdaptedExperts):
    """A layer of experts for inference. Made by `KTMoEWrapper`, which documents the parameters."""

    def __init__(
        self,
        method: Method,
        config: MoEConfig,
        *,
        chunked_prefill_size: int = 4096,
        max_deferred_experts_per_token: int = 0,
        **layer: Unpack[LayerOptions],
    ) -> None:
        self.chunked_prefill_size = at_least("chunked_prefill_size", chunked_prefill_size, 1)
        self.max_deferred_experts_per_token = at_least(
            "max_deferred_experts_per_token", max_deferred_experts_per_token, 0
        )
        if max_deferred_experts_per_token > config.num_experts_per_tok:
            raise ValueError(
                f"max_deferred_experts_per_token: got {max_deferred_experts_per_token}, expected at most "
                f"num_experts_per_tok, {config.num_experts_per_tok}"
            )
        super().__init__(method, config, **layer)
        self._runner = LayerRunner(
            self._layer,
            self.cpu_infer,
            self.config,
            self.chunked_prefill_size,
            self.max_deferred_experts_per_token,
        )
        self._stream_runner = StreamRunner(self._runner, self.cpu_infer, self.config)
        self._pending: PendingPass[Batch] = PendingPass("forward", self.layer_idx, self.cpu_infer)

    @overload
    def forward(
        self,
        hidden_states: Array,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        cuda_stream: None = None,
        *,
        out: None = None,
        incremental: bool = False,
        num_tokens: ArrayLike | None = None,
        chain: DeferralChain | None = None,
        activation_dtype: ActivationDtype | None = None,
        adapters: IntegersLike | None = None,
    ) -> Array: ...

    @overload
    def forward(
        self,
        hidden_states: InT,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        cuda_stream: None = None,
        *,
        out: None = None,
        incremental: bool = False,
        num_tokens: ArrayLike | None = None,
        chain: DeferralChain | None = None,
        activation_dtype: ActivationDtype | None = None,
        adapters: IntegersLike | None = None,
    ) -> InT: ...

    @overload
    def forward(
        self,
        hidden_states: ArrayLike,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        cuda_stream: None = None,
        *,
        out: OutT,
        incremental: bool = False,
        num_tokens: ArrayLike | None = None,
        chain: DeferralChain | None = None,
        activation_dtype: ActivationDtype | None = None,
        adapters: IntegersLike | None = None,
    ) -> OutT: ...

    @overload
    def forward(
        self,
        hidden_states: ArrayLike,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        cuda_stream: StreamLike,
        *,
        out: ArrayLike | None = None,
        incremental: bool = False,
        num_tokens: ArrayLike | None = None,
        chain: DeferralChain | None = None,
        activation_dtype: ActivationDtype | None = None,
        adapters: None = None,
    ) -> Any: ...

    def forward(
        self,
        hidden_states: ArrayLike,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        cuda_stream: StreamLike | None = None,
        *,
        out: ArrayLike | None = None,
        incremental: bool = False,
        num_tokens: ArrayLike | None = None,
        chain: DeferralChain | None = None,
        activation_dtype: ActivationDtype | None = None,
        adapters: IntegersLike | None = None,
    ) -> Any:
        """The experts of the layer on a batch of tokens.

        out[t] = sum over p in slot order of topk_weights[t, p] * expert(topk_ids[t, p])(hidden_states[t]);
        with ``scale_inputs`` the sum of expert(topk_ids[t, p])(topk_weights[t, p] * hidden_states[t]).
        `ktmoe_np.reference.moe_forward` defines it, including every rounding.

        Parameters
        ----------
        hidden_states : array of bfloat16 [..., H]
            Of any library, also without rows. All leading axes count as tokens, T of them: more than
            `chunked_prefill_size` are taken in chunks. Read in place; float32 and float16 are rounded to
            bfloat16 once, to nearest with ties to even.
        topk_ids : array of any integer dtype [..., P]
            Negative ids are skipped.
        topk_weights : array of float32, or another float dtype, [..., P]
            Routing weights in float32, used without normalization.
        cuda_stream : torch or CuPy stream, or the handle of one, optional
            For arrays on a CUDA device: torch, CuPy, JAX (in any stream) or others with
            ``__cuda_array_interface__``; `out` in bfloat16. Of libraries other than torch and JAX, which cast
            them on the device, hidden states in bfloat16, ids in int64 or int32, weights in float32. They are
            copied to the host and back in the stream, and only the stream waits for the result. Works also in
            a stream that is being captured into a graph; graphs captured in one stream share its buffers and
            must be replayed one after the other.
        out : array of bfloat16 or float32 [..., H], optional
            Where to write; must not overlap the inputs. No JAX array, which cannot be written.
        incremental : bool
            Add to the contents of `out`.
        num_tokens : array of int64 or int32 [1], optional
            With a stream, on its device, and read when the stream reaches the pass: the number of valid
            tokens. The results of the others are zero. So a graph captured for the largest batch serves
            smaller ones.
        chain : DeferralChain, optional
            Without a stream, the chain that passes deferred experts from layer to layer; by default one that
            all calls share, one thread at a time.
        activation_dtype : {"bfloat16", "int8"} or dtype, optional
            What products take activations in, for this call; None for the layer's own. See `KTMoEWrapper`.
        adapters : array of any integer dtype [...], optional
            Without a stream: the id of each token's adapter (see `load_adapter`), negative for none. Copied.

        Returns
        -------
        array of bfloat16 [..., H], of the kind of `hidden_states`, or `out`
            Tensors of torch share the memory that the engine has written; JAX arrays are copies.

        Raises
        ------
        TypeError, ValueError
            An argument of another kind, dtype, order or shape, or an `activation_dtype` that the layer does
            not have: named, with what was expected. A torch tensor that requires grad, while grad mode is
            on: `ktmoe_np.torch.moe_sft` is differentiable.
        IndexError
            An expert id of E or above, or an id that no adapter has.
        RuntimeError
            Nothing is loaded, or the layer's last pass was submitted and not waited for; deferred experts of
            an earlier pass were not drained, or, on the shared chain, belong to another thread; with a
            stream, there is no CUDA driver, or it refuses.
        OSError
            A file of the weights was truncated; see `load_weights`.

        Notes
        -----
        Errors that a pass finds when the stream reaches it, ids of E or above and numbers of tokens outside 0
        to T, cannot be raised at once: its result is NaN, and the next call with a `cuda_stream` raises the
        exception before it does anything (`sync_forward`: at its end), or ``cpu_infer.sync`` does. A stream
        has one chain of deferred experts, for all threads.

        Examples
        --------
        >>> import ml_dtypes, numpy as np
        >>> from ktmoe_np import KTMoEWrapper
        >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
        ...                    moe_intermediate_size=2, activation="relu2")
        >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
        >>> moe.load_weights_from_tensors(gate, None, down)
        >>> x = np.ones((1, 4), ml_dtypes.bfloat16)
        >>> moe.forward(x, np.array([[1]]), np.array([[0.5]], np.float32)).astype(float).tolist()
        [[16.0, 16.0, 16.0, 16.0]]
        """
        if cuda_stream is not None:
            _check_no_chain(chain)
            _check_no_adapters(adapters)
            arrays = hidden_states, topk_ids, topk_weights
            there = self._stream_batch(arrays, out, num_tokens, incremental, activation_dtype)
            result: Array = self._stream_runner.run(there, self._stream(cuda_stream))
            return result
        _check_no_num_tokens(num_tokens)
        used = self._chain if chain is None else _checked(chain)
        if self._runner.defers(used):
            return self._pending.run(
                self._starter(
                    (hidden_states, topk_ids, topk_weights),
                    out,
                    incremental,
                    activation_dtype,
                    used,
                    adapters,
                )
            ).result()
        arrays = hidden_states, topk_ids, topk_weights
        batch = self._batch(arrays, out, incremental, activation_dtype, adapters)
        self._runner.run(batch, self.gpu_experts_mask)
        return batch.result()

    def submit_forward(
        self,
        hidden_states: ArrayLike,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        cuda_stream: StreamLike | None = None,
        *,
        out: ArrayLike | None = None,
        incremental: bool = False,
        num_tokens: ArrayLike | None = None,
        chain: DeferralChain | None = None,
        activation_dtype: ActivationDtype | None = None,
        adapters: IntegersLike | None = None,
    ) -> None:
        """Begin what `forward` does and return at once; `sync_forward` gives the result.

        Until then the engine keeps the arrays alive, and the caller must not write to them. With deferred
        experts, the output includes those of the previous layer.

        Raises
        ------
        RuntimeError
            A pass of this layer is pending, or, with deferred experts, one before was not drained or is
            another thread's.
        OSError
            A file of the weights was truncated; see `load_weights`.

        Notes
        -----
        An exception that ends this call, such as KeyboardInterrupt, leaves no pass pending; `out` may then be
        written all the same.

        Examples
        --------
        >>> import ml_dtypes, numpy as np
        >>> from ktmoe_np import KTMoEWrapper
        >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
        ...                    moe_intermediate_size=2, activation="relu2")
        >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
        >>> moe.load_weights_from_tensors(gate, None, down)
        >>> x = np.ones((1, 4), ml_dtypes.bfloat16)
        >>> moe.submit_forward(x, np.array([[1]]), np.array([[0.5]], np.float32))
        >>> others = x + x  # while the experts are computed
        >>> moe.sync_forward().astype(float).tolist()
        [[16.0, 16.0, 16.0, 16.0]]
        """
        if cuda_stream is not None:
            _check_no_chain(chain)
            _check_no_adapters(adapters)
            arrays = hidden_states, topk_ids, topk_weights
            there = self._stream_batch(arrays, out, num_tokens, incremental, activation_dtype)
            self._stream_runner.submit(there, self._stream(cuda_stream))
            return
        _check_no_num_tokens(num_tokens)
        used = self._chain if chain is None else _checked(chain)
        arrays = hidden_states, topk_ids, topk_weights
        self._pending.submit(self._starter(arrays, out, incremental, activation_dtype, used, adapters))

    def _starter(
        self,
        arrays: _Arrays,
        out: ArrayLike | None,
        incremental: bool,
        activation_dtype: ActivationDtype | None,
        chain: DeferralChain,
        adapters: IntegersLike | None,
    ) -> Callable[[BegunPass[Batch]], Batch]:
        """Make the function that queues a pass."""

        def start(begun: BegunPass[Batch]) -> Batch:
            batch = self._batch(arrays, out, incremental, activation_dtype, adapters)
            if self._runner.defers(chain):
                self._runner.submit_deferring(batch, self.gpu_experts_mask, begun, chain)
            else:
                self._runner.submit(batch, self.gpu_experts_mask, begun)
            return batch

        return start

    def _batch(
        self,
        arrays: _Arrays,
        out: ArrayLike | None,
        incremental: bool,
        activation_dtype: ActivationDtype | None,
        adapters: IntegersLike | None,
    ) -> Batch:
        dtype = self._dtype_of_call(activation_dtype)
        batch = Batch(
            self.config, *arrays, out, incremental, dtype, lambda lead: self._token_adapters(adapters, lead)
        )
        self._files.check()
        return batch

    def _uses_adapter(self, number: int) -> bool:
        batch = self._pending.pending
        return batch is not None and batch.adapters is not None and bool((batch.adapters == number).any())

    def _stream_batch(
        self,
        arrays: _Arrays,
        out: ArrayLike | None,
        num_tokens: ArrayLike | None,
        incremental: bool,
        activation_dtype: ActivationDtype | None,
    ) -> StreamBatch:
        if not self.loaded:
            raise RuntimeError(f"layer {self.layer_idx} has no weights yet, load them first")
        if incremental:
            raise ValueError("incremental: got True with a cuda_stream, expected False")
        dtype = self._dtype_of_call(activation_dtype)
        self._files.check()
        return StreamBatch(*arrays, out, num_tokens, self.gpu_experts_mask, dtype)

    @classmethod
    def _stream(cls, cuda_stream: StreamLike) -> Stream:
        """The state that passes in a stream share."""
        return stream_at(cls._streams, stream_handle(cuda_stream))

    def sync_forward(self, hidden_states: object = None, cuda_stream: StreamLike | None = None) -> Any:
        """Wait for the pass that was submitted and give its result.

        Parameters
        ----------
        hidden_states : ignored
            For compatibility with the layers of KTransformers.
        cuda_stream : stream, optional
            That of the pass; only the stream waits.

        Returns
        -------
        array of bfloat16 [..., H], of the hidden states' kind, or the pass's `out`

        Raises
        ------
        RuntimeError
            None is pending, or another call waits for it. After KeyboardInterrupt the pass is still pending.
        ValueError
            Another stream than that of the pass.
        IndexError
            An expert id of E or above was submitted; of streams see `forward`.

        Examples
        --------
        >>> import ml_dtypes, numpy as np
        >>> from ktmoe_np import KTMoEWrapper
        >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
        ...                    moe_intermediate_size=2, activation="relu2")
        >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
        >>> moe.load_weights_from_tensors(gate, None, down)
        >>> x = np.ones((1, 4), ml_dtypes.bfloat16)
        >>> out = np.empty((1, 4), np.float32)
        >>> moe.submit_forward(x, np.array([[0]]), np.array([[0.25]], np.float32), out=out)
        >>> moe.sync_forward() is out, out.tolist()
        (True, [[8.0, 8.0, 8.0, 8.0]])
        """
        if cuda_stream is not None:
            result: Array = self._stream_runner.sync(self._stream(cuda_stream))
            return result
        return self._pending.sync().result()

    @classmethod
    def drain_deferred(
        cls,
        cuda_stream: StreamLike | None = None,
        *,
        out: ArrayLike | None = None,
        chain: DeferralChain | None = None,
    ) -> Any:
        """Return the deferred experts of the last layer of a pass.

        Parameters
        ----------
        cuda_stream : torch or CuPy stream, or the handle of one, optional
            For passes in that stream; only the stream waits for the deferred experts.
        out : array of bfloat16 [T, H], optional
            With a stream, where to write.
        chain : DeferralChain, optional
            For passes with this chain.

        Returns
        -------
        array of bfloat16 [..., H], of the kind of the layer's hidden states, or `out`
            To be added to the last layer's output; None when nothing is left.

        Raises
        ------
        TypeError
            No `out` in a stream whose arrays are of a library that makes none here, or one of another kind.
        ValueError
            An `out` of another shape, or without a stream.
        RuntimeError
            The CUDA driver refuses; or, without a stream and a chain, another thread is in the middle of a
            pass.

        Examples
        --------
        >>> import ml_dtypes, numpy as np
        >>> from ktmoe_np import KTMoEWrapper
        >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=2, hidden_size=4,
        ...                    moe_intermediate_size=2, activation="relu2", max_deferred_experts_per_token=1)
        >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
        >>> moe.load_weights_from_tensors(gate, None, down)
        >>> x, weights = np.ones((1, 4), ml_dtypes.bfloat16), np.array([[0.75, 0.25]], np.float32)
        >>> float(moe.forward(x, np.array([[0, 1]]), weights)[0, 0])
        24.0
        >>> float(KTMoEWrapper.drain_deferred()[0, 0])
        8.0
        """
        if cuda_stream is not None:
            _check_no_chain(chain)
            return drain(cls._stream(cuda_stream), out)
        if out is not None:
            raise ValueError("out: got one without a cuda_stream, expected None")
        return (cls._chain if chain is None else _checked(chain)).drain()


def _check_no_num_tokens(num_tokens: ArrayLike | None) -> None:
    if num_tokens is not None:
        raise ValueError("num_tokens: got one without a cuda_stream, expected None: hand over fewer tokens")


def _checked(chain: object) -> DeferralChain:
    if not isinstance(chain, DeferralChain):
        raise TypeError(f"chain: got {type(chain).__name__}, expected a DeferralChain")
    return chain


def _check_no_adapters(adapters: object) -> None:
    if adapters is not None:
        raise ValueError("adapters: got some with a cuda_stream, expected None: passes in streams have none")


def _check_no_chain(chain: object) -> None:
    if chain is not None:
        raise ValueError("chain: got one with a cuda_stream, expected None: a stream has a chain of its own")
