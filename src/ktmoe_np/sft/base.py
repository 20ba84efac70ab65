"""The base of the layers for training: forward and backward passes."""

from __future__ import annotations

from typing import Any, TypeVar, Unpack, overload

from .. import kt_kernel_ext as ext
from ..arrays.checks import at_least
from ..arrays.rows import hidden_rows
from ..arrays.types import Array, ArrayLike, IntegersLike, StreamLike
from ..buffers import Claim
from ..config import ActivationDtype, MoEConfig
from ..formats.methods import Method
from ..layers.options import LayerOptions
from ..passes.batch import Batch
from ..passes.pending import BegunPass, PendingPass
from .gradients import SFTGradients, lora_shapes, projection_shapes
from .lora import LoraLayer
from .options import SFTOptions
from .results import BackwardResults, Results

__all__ = ["BaseSFTMoEWrapper"]

_LARGEST_STEP = 2**32 - 1

InT = TypeVar("InT", bound=ArrayLike)
OutT = TypeVar("OutT", bound=ArrayLike)


class BaseSFTMoEWrapper(LoraLayer):
    """A layer of experts for training. Made by `KTMoEWrapper`, which documents the parameters.

    A training step is a forward pass that is saved and its backward pass::

        y = sft.forward_sft(hidden_states, topk_ids, topk_weights)
        g = sft.backward(grad_output)
        sft.update_lora_weights(gate_lora_a=..., ...)

    Up to `max_cache_depth` forward passes may be saved; a backward pass takes the last of them.
    `ktmoe_np.reference.moe_forward_sft` and `moe_backward` state what is computed. Calls may come from
    several threads; they are carried out one after the other.

    An exception that ends a pass, KeyboardInterrupt too, leaves the saved passes and `step` as they were
    before the call: a forward pass is not saved, and that of a backward pass still is. What the call was to
    write, such as gradients to be added to, is then unspecified. `sync_forward_sft` and `sync_backward` can
    be called again after KeyboardInterrupt.
    """

    def __init__(
        self, method: Method, config: MoEConfig, *, options: SFTOptions, **layer: Unpack[LayerOptions]
    ) -> None:
        super().__init__(method, config, options=options, **layer)
        self._shapes = {} if method.skip_lora else lora_shapes(config, options.lora_rank)
        if options.full_weight_grad:
            self._shapes |= projection_shapes(config)
        self._results = Results(self, self._shapes)
        self._forward: PendingPass[tuple[Batch, Claim]] = PendingPass(
            "forward_sft", self.layer_idx, self.cpu_infer
        )
        self._backward: PendingPass[tuple[BackwardResults, Claim]] = PendingPass(
            "backward", self.layer_idx, self.cpu_infer
        )

    def _summary(self) -> str:
        o = self.options
        saved = f"{self.num_cached} of {o.max_cache_depth} passes saved"
        return f"{super()._summary()}, lora_rank {o.lora_rank}, {saved}"

    # ---- forward passes ----

    @overload
    def forward(
        self,
        hidden_states: Array,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        cuda_stream: StreamLike | None = None,
        *,
        out: None = None,
        activation_dtype: ActivationDtype | None = None,
    ) -> Array: ...

    @overload
    def forward(
        self,
        hidden_states: InT,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        cuda_stream: StreamLike | None = None,
        *,
        out: None = None,
        activation_dtype: ActivationDtype | None = None,
    ) -> InT: ...

    @overload
    def forward(
        self,
        hidden_states: ArrayLike,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        cuda_stream: StreamLike | None = None,
        *,
        out: OutT,
        activation_dtype: ActivationDtype | None = None,
    ) -> OutT: ...

    def forward(
        self,
        hidden_states: ArrayLike,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        cuda_stream: StreamLike | None = None,
        *,
        out: ArrayLike | None = None,
        activation_dtype: ActivationDtype | None = None,
    ) -> Any:
        """The layer with its adapters, without dropout: `forward_sft` with nothing saved."""
        self._check_stream(cuda_stream)
        return self.forward_sft(
            hidden_states,
            topk_ids,
            topk_weights,
            save_for_backward=False,
            out=out,
            activation_dtype=activation_dtype,
        )

    @overload
    def forward_sft(
        self,
        hidden_states: Array,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        save_for_backward: bool = True,
        *,
        out: None = None,
        activation_dtype: ActivationDtype | None = None,
    ) -> Array: ...

    @overload
    def forward_sft(
        self,
        hidden_states: InT,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        save_for_backward: bool = True,
        *,
        out: None = None,
        activation_dtype: ActivationDtype | None = None,
    ) -> InT: ...

    @overload
    def forward_sft(
        self,
        hidden_states: ArrayLike,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        save_for_backward: bool = True,
        *,
        out: OutT,
        activation_dtype: ActivationDtype | None = None,
    ) -> OutT: ...

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
        """The experts of the layer, with their adapters, on a batch of tokens.

        Parameters
        ----------
        hidden_states : array of bfloat16 [..., H]
            Of any library and number of tokens, all leading axes. Read in place; float32 and float16 are
            rounded to bfloat16 once.
        topk_ids : array of any integer dtype [..., P]
            Negative ids are skipped.
        topk_weights : array of float32, or another float dtype, [..., P]
            Routing weights, used as they are, in float32.
        save_for_backward : bool
            Keep what the backward pass needs, and drop elements of the adapters' inputs (`lora_dropout`).
        out : array of bfloat16 or float32 [..., H], optional
            Where to write; must not overlap the inputs.
        activation_dtype : {"bfloat16", "int8"} or dtype, optional
            What products with the base weights take activations in, for this pass; None for the layer's own.
            A recomputed forward pass takes the same. See `KTMoEWrapper`.

        Returns
        -------
        array of bfloat16 [..., H], of the kind of `hidden_states`, or `out`
            New, or, with `reuse_buffers`, valid until the next pass that is written to the same buffers.

        Raises
        ------
        TypeError, ValueError
            An argument of another kind, dtype, order or shape, or an `activation_dtype` that the layer does
            not have: named, with what was expected.
        IndexError
            An expert id of E or above.
        RuntimeError
            Nothing is loaded, or `max_cache_depth` passes are saved already.
        OSError
            A file of the weights was truncated; see `load_weights`.

        Examples
        --------
        >>> import ml_dtypes, numpy as np
        >>> from ktmoe_np import KTMoEWrapper
        >>> sft = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
        ...                    moe_intermediate_size=2, activation="relu2", mode="sft", method="AMXBF16_SFT",
        ...                    lora_rank=1, lora_alpha=0.5)
        >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
        >>> sft.load_weights_from_tensors(gate, None, down)
        >>> sft.init_lora_weights(gate_lora_b=np.ones((2, 2, 1), np.float32))
        >>> sft.update_lora_weights(gate_lora_a=np.ones((2, 1, 4), np.float32))
        >>> x = np.ones((1, 4), ml_dtypes.bfloat16)
        >>> y = sft.forward_sft(x, np.array([[1]]), np.ones((1, 1), np.float32))
        >>> y.astype(float).tolist()  # gate = 4 + 0.5 * 4
        [[72.0, 72.0, 72.0, 72.0]]
        >>> gradients = sft.backward(np.ones((1, 4), ml_dtypes.bfloat16))
        >>> gradients.grad_weights.tolist(), sorted(gradients.matrices)
        ([[288.0]], ['down_lora_a', 'down_lora_b', 'gate_lora_a', 'gate_lora_b'])
        """
        arrays = hidden_states, topk_ids, topk_weights
        batch, task = self._forward_task(*arrays, save_for_backward, out, activation_dtype)
        try:
            self.cpu_infer.run(task)
            return batch.result()
        except BaseException:
            task.revoke()
            raise

    def submit_forward_sft(
        self,
        hidden_states: ArrayLike,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        save_for_backward: bool = True,
        *,
        out: ArrayLike | None = None,
        activation_dtype: ActivationDtype | None = None,
    ) -> None:
        """Begin what `forward_sft` does and return at once; `sync_forward_sft` gives the result.

        Until then the engine keeps the arrays alive, and the caller must not write to them.

        Raises
        ------
        RuntimeError
            A forward pass of this layer is pending.
        """

        def start(begun: BegunPass[tuple[Batch, Claim]]) -> tuple[Batch, Claim]:
            claim, arrays = Claim(), (hidden_states, topk_ids, topk_weights)
            batch, task = self._forward_task(*arrays, save_for_backward, out, activation_dtype, claim)
            begun.queue(task)
            return batch, claim

        self._forward.submit(start)

    def sync_forward_sft(self) -> Any:
        """Wait for the forward pass that was submitted and give its result.

        Raises
        ------
        RuntimeError
            None is pending, nothing is loaded, or `max_cache_depth` passes were saved already.
        IndexError
            An expert id of E or above was submitted.
        """
        return self._forward.sync()[0].result()

    def _forward_task(
        self,
        hidden_states: ArrayLike,
        topk_ids: IntegersLike,
        topk_weights: ArrayLike,
        save_for_backward: bool,
        out: ArrayLike | None,
        activation_dtype: ActivationDtype | None,
        claim: Claim | None = None,
    ) -> tuple[Batch, ext.moe.TrainingTask]:
        dtype = self._dtype_of_call(activation_dtype)
        batch = Batch(
            self.config,
            hidden_states,
            topk_ids,
            topk_weights,
            out,
            incremental=False,
            new_out=lambda rows: self._results.output(len(rows), rows, claim),
        )
        if out is not None:
            self._results.claim_given("output", (batch.out,), batch.num_tokens, claim)
        self._files.check()
        task = self._layer.forward_sft_task(
            batch.hidden_states,
            batch.ids,
            batch.weights,
            batch.out,
            bool(save_for_backward),
            skip_experts=self.gpu_experts_mask,
            activation_dtype=dtype,
        )
        if save_for_backward and "gate_lora_a" in self._shapes:
            self._init_missing()  # all-zero adapters would stay zero
        return batch, task

    # ---- backward passes ----

    def backward(
        self,
        grad_output: ArrayLike,
        *,
        gradients: SFTGradients | None = None,
        accumulate: bool = False,
        grad_input: ArrayLike | None = None,
        grad_weights: ArrayLike | None = None,
    ) -> SFTGradients:
        """Backpropagate grad_output through the most recently saved forward pass.

        Parameters
        ----------
        grad_output : array of bfloat16 [..., H]
            Of the tokens of that pass, of any library; float32 and float16 are rounded to bfloat16 once.
        gradients : SFTGradients, optional
            Arrays for the gradients of matrices; one that is None there is not computed. Without it there are
            arrays for all that the method trains: new ones, or, with `reuse_buffers`, those of the layer.
        accumulate : bool
            Add to those arrays instead of overwriting them, for gradients of several batches.
        grad_input : array of bfloat16 [..., H], optional
        grad_weights : array of float32 [..., P], optional
            Where to write the gradients of the input and of the routing weights, which are never added to;
            by default new arrays, or, with `reuse_buffers`, the buffers', also when `gradients` has some.

        Returns
        -------
        SFTGradients
            Arrays of the kind of `grad_output`; rows have its leading axes.

        Raises
        ------
        TypeError, ValueError
            An argument of another kind, dtype, order or shape, or a matrix that is not trained. The forward
            pass stays saved.
        RuntimeError
            No forward pass is saved.
        OSError
            A file of the weights was truncated; see `load_weights`. The forward pass stays saved.

        Examples
        --------
        >>> import ml_dtypes, numpy as np
        >>> from ktmoe_np import KTMoEWrapper
        >>> sft = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
        ...                    moe_intermediate_size=2, activation="relu2", mode="sft", method="AMXBF16_SFT",
        ...                    lora_rank=1, lora_alpha=0.5)
        >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
        >>> sft.load_weights_from_tensors(gate, None, down)
        >>> x, ids = np.ones((1, 4), ml_dtypes.bfloat16), np.array([[1]])
        >>> _ = sft.forward_sft(x, ids, np.ones((1, 1), np.float32))
        >>> gradients = sft.backward(np.ones((1, 4), ml_dtypes.bfloat16))
        >>> gradients.grad_input.astype(float).tolist(), gradients.grad_weights.tolist()
        ([[64.0, 64.0, 64.0, 64.0]], [[128.0]])
        >>> gradients.gate_lora_b.shape
        (2, 2, 1)
        """
        results, task = self._backward_task(grad_output, gradients, accumulate, grad_input, grad_weights)
        try:
            self.cpu_infer.run(task)
            return results.given()
        except BaseException:
            task.revoke()
            raise

    def submit_backward(
        self,
        grad_output: ArrayLike,
        *,
        gradients: SFTGradients | None = None,
        accumulate: bool = False,
        grad_input: ArrayLike | None = None,
        grad_weights: ArrayLike | None = None,
    ) -> None:
        """Begin what `backward` does and return at once; `sync_backward` gives the result.

        Until then the engine keeps the arrays alive, and the caller must not use them.

        Raises
        ------
        RuntimeError
            A backward pass of this layer is pending.
        """

        def start(begun: BegunPass[tuple[BackwardResults, Claim]]) -> tuple[BackwardResults, Claim]:
            claim, given = Claim(), (gradients, accumulate, grad_input, grad_weights)
            results, task = self._backward_task(grad_output, *given, claim)
            begun.queue(task)
            return results, claim

        self._backward.submit(start)

    def sync_backward(self) -> SFTGradients:
        """Wait for the backward pass that was submitted and give its result.

        Raises
        ------
        RuntimeError
            None is pending, or no forward pass was saved.
        ValueError
            `grad_output` does not have the tokens of the forward pass, which stays saved.
        """
        return self._backward.sync()[0].given()

    def _backward_task(
        self,
        grad_output: ArrayLike,
        gradients: SFTGradients | None,
        accumulate: bool,
        grad_input: Any,
        grad_weights: Any,
        claim: Claim | None = None,
    ) -> tuple[BackwardResults, ext.moe.TrainingTask]:
        config = self.config
        rows, form = hidden_rows(grad_output, "grad_output", config.hidden_size)
        self._files.check()
        results = BackwardResults(form, self._given_matrices(gradients, accumulate))
        if gradients is None:
            results.new_matrices(self._results.matrices(claim))
        results.write_rows("grad_input", grad_input, config.hidden_size)
        results.write_rows("grad_weights", grad_weights, config.num_experts_per_tok)
        self._results.claim_given("gradients", results.rows.values(), len(rows), claim)
        if len(results.rows) < 2:
            results.new_rows(*self._results.row_gradients(len(rows), rows, claim))
        task = self._layer.backward_task(
            rows, **results.rows, **results.matrices, accumulate=bool(accumulate), expert_rows=False
        )
        return results, task

    def _given_matrices(self, gradients: SFTGradients | None, accumulate: bool) -> dict[str, Any]:
        """The arrays of the caller that gradients of matrices go to."""
        if gradients is None:
            if accumulate:
                raise ValueError("gradients: got None with accumulate=True, expected SFTGradients")
            return {}
        if not isinstance(gradients, SFTGradients):
            raise TypeError(f"gradients: got {type(gradients).__name__}, expected SFTGradients")
        for name in gradients.matrices:
            if name not in self._shapes:
                raise ValueError(
                    f"gradients: got {name}, expected None there: this layer has no gradients of it "
                    f"(method {self.method!r}, lora_rank {self.options.lora_rank}, "
                    f"full_weight_grad {self.options.full_weight_grad})"
                )
        return dict(gradients.matrices)

    # ---- saved forward passes ----

    @property
    def num_cached(self) -> int:
        """Forward passes that are saved and wait for their backward pass."""
        return int(self._layer.num_cached)

    @property
    def cache_bytes(self) -> int:
        """Memory of saved passes, and memory kept for the next ones; `clear_cache` releases it."""
        return int(self._layer.cache_bytes)

    def clear_cache(self) -> None:
        """Drop the saved forward passes; waits for passes that were submitted before."""
        self.cpu_infer.run(self._layer.clear_cache_task())

    @property
    def step(self) -> int:
        """The number of the next forward pass that is saved.

        With the seed and the layer it keys the dropout masks, so setting it resumes a training run, or
        repeats a pass.

        Raises
        ------
        TypeError, ValueError
            Set to something else than an integer from 0 to 2^32 - 1.
        """
        return int(self._layer.step)

    @step.setter
    def step(self, value: int) -> None:
        step = at_least("step", value, 0)
        if step > _LARGEST_STEP:
            raise ValueError(f"step: got {step}, expected at most {_LARGEST_STEP}")
        self._layer.step = step
