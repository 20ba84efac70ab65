"""What all layers of experts for inference have in common: engine, config, weights, forward passes."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kt_kernel_ext as ext
from .._arrays import Array, at_least, bfloat16, expert_ids
from .._methods import Method
from ..config import ActivationSpec, MoEConfig, parse_activation
from ..cpuinfer import _MoEBase
from .runner import Batch, LayerRunner

__all__ = ["BaseMoEWrapper"]


@dataclass
class _Pending:
    """A submitted forward pass: its result, and the tickets to wait for."""

    output: Array
    tickets: list[int]


class BaseMoEWrapper(_MoEBase):
    """A layer of experts on the engine. Made by `KTMoEWrapper`, which documents the parameters."""

    def __init__(
        self,
        method: Method,
        *,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: Any = None,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        weight_path: str | os.PathLike[str] | None = None,
        chunked_prefill_size: int = 4096,
        numa_nodes: Sequence[int] | None = None,
        max_deferred_experts_per_token: int = 0,
        activation: str | ActivationSpec | Mapping[str, Any] = "silu",
    ) -> None:
        self.method = method.name
        self.config = MoEConfig(
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
            activation=parse_activation(activation),
            layer_idx=layer_idx,
        )
        self.weight_path = weight_path
        self.chunked_prefill_size = at_least("chunked_prefill_size", chunked_prefill_size, 1)
        self.max_deferred_experts_per_token = at_least(
            "max_deferred_experts_per_token", max_deferred_experts_per_token, 0
        )
        if max_deferred_experts_per_token > num_experts_per_tok:
            raise ValueError(
                f"max_deferred_experts_per_token: got {max_deferred_experts_per_token}, expected at most "
                f"num_experts_per_tok, {num_experts_per_tok}"
            )
        self.set_gpu_experts_mask(gpu_experts_mask)
        self.cpu_infer = self._get_cpu_infer(cpuinfer_threads, threadpool_count, numa_nodes)
        self._layer = getattr(ext.moe, method.layer)(self._layer_config())
        self._runner = LayerRunner(
            self._layer,
            self.cpu_infer,
            self.config,
            self.chunked_prefill_size,
            self.max_deferred_experts_per_token,
        )
        self._pending: _Pending | None = None

    @property
    def layer_idx(self) -> int:
        """The layer's number in the model."""
        return self.config.layer_idx

    @property
    def loaded(self) -> bool:
        """Whether the layer has weights."""
        return bool(self._layer.loaded)

    def _layer_config(self) -> ext.moe.MOEConfig:
        config, spec = self.config, self.config.activation
        layer = ext.moe.MOEConfig(
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_intermediate_size,
            config.layer_idx,
            self.cpu_infer.backend_,
        )
        layer.set_activation(spec.kind, spec.gated, spec.limit, spec.alpha, spec.beta1, spec.beta2)
        return layer

    # ---- weights ----

    def load_weights(self, physical_to_logical_map: Any = None) -> None:
        """Load the layer from `weight_path`. Does nothing when it is loaded already.

        Parameters
        ----------
        physical_to_logical_map : array of int64 [E], optional
            Expert i uses the weights of the checkpoint's expert map[i].

        Raises
        ------
        RuntimeError
            The layer was made without a `weight_path`.
        FileNotFoundError, ValueError
            The checkpoint is not there, or does not hold this layer: names file and tensor.
        """
        if self.loaded:
            return
        if self.weight_path is None:
            raise RuntimeError("weight_path: got None, expected a checkpoint to load from")
        self._load_from_path(physical_to_logical_map)

    @abstractmethod
    def _load_from_path(self, physical_to_logical_map: object) -> None: ...

    def load_weights_from_tensors(
        self,
        gate_proj: Any,
        up_proj: Any,
        down_proj: Any,
        physical_to_logical_map: Any = None,
        *,
        gate_bias: Any = None,
        up_bias: Any = None,
        down_bias: Any = None,
    ) -> None:
        """Give the layer its weights. They are held, not copied: do not write to them afterwards.

        Parameters
        ----------
        gate_proj, up_proj : array of bfloat16 [E, I, H], or E arrays [I, H]
            `up_proj` is None when the activation is not gated.
        down_proj : array of bfloat16 [E, H, I], or E arrays [H, I]
            Rows may lie apart in memory, the last axis must be contiguous.
        physical_to_logical_map : array of int64 [E], optional
            Expert i uses the weights of entry map[i].
        gate_bias, up_bias : array of float32 or bfloat16 [E, I], optional
            Added before the activation. Copied, unlike the weights.
        down_bias : array of float32 or bfloat16 [E, H], optional
            Added before the routing weight is applied.

        Raises
        ------
        TypeError
            Not arrays, another dtype, or a last axis with gaps.
        ValueError
            Another shape or number of arrays, or an `up_proj` that the activation does not use.
        IndexError
            An entry of the map outside 0 to E - 1.
        """
        if physical_to_logical_map is not None:
            physical_to_logical_map = expert_ids(physical_to_logical_map, "physical_to_logical_map")
        task = self._layer.load_weights_task(
            gate_proj,
            up_proj,
            down_proj,
            physical_to_logical_map,
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=down_bias,
        )
        self.cpu_infer.run(task)
        self._loaded.add(self)

    def set_gpu_experts_mask(self, gpu_experts_mask: Any) -> None:
        """Name the experts that someone else computes; from the next call on they are skipped here.

        Parameters
        ----------
        gpu_experts_mask : array of bool [E], or None for none

        Raises
        ------
        ValueError
            Another shape.
        TypeError
            Another dtype.
        """
        if gpu_experts_mask is None:
            self.gpu_experts_mask: NDArray[np.bool_] | None = None
            return
        mask = np.asarray(gpu_experts_mask)
        expected = f"expected bool [{self.config.num_experts}]"
        if mask.dtype != np.bool_:
            raise TypeError(f"gpu_experts_mask: got {mask.dtype} {list(mask.shape)}, {expected}")
        if mask.shape != (self.config.num_experts,):
            raise ValueError(f"gpu_experts_mask: got bool {list(mask.shape)}, {expected}")
        mask = mask.copy()  # a new array for a new mask: calls under way keep theirs
        mask.setflags(write=False)
        self.gpu_experts_mask = mask if mask.any() else None

    # ---- forward passes ----

    def forward(
        self,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        cuda_stream: Any = None,
        *,
        out: Array | None = None,
        incremental: bool = False,
    ) -> Array:
        """The experts of the layer on a batch of tokens.

        out[t] = sum over p in slot order of topk_weights[t, p] * expert(topk_ids[t, p])(hidden_states[t]);
        `ktmoe_np.reference.moe_forward` states it to the rounding.

        Parameters
        ----------
        hidden_states : array of bfloat16 [T, H]
            Read in place. Any T: more than `chunked_prefill_size` tokens are taken in chunks.
        topk_ids : array of any integer dtype [T, P]
            Negative ids are skipped.
        topk_weights : array of float32 [T, P]
            Routing weights, used as they are.
        cuda_stream : None
            For device arrays, which this version does not take.
        out : array of bfloat16 or float32 [T, H], optional
            Where to write; must not overlap the inputs.
        incremental : bool
            Add to what `out` holds.

        Returns
        -------
        ndarray of bfloat16 [T, H], or `out`

        Raises
        ------
        TypeError, ValueError
            An argument of another kind, dtype, order or shape: named, with what was expected.
        IndexError
            An expert id of E or above.
        RuntimeError
            Nothing is loaded.

        Examples
        --------
        >>> import ml_dtypes, numpy as np
        >>> from ktmoe_np import KTMoEWrapper
        >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
        ...                    moe_intermediate_size=2, activation="relu2")
        >>> first, last = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
        >>> moe.load_weights_from_tensors(first, None, last)
        >>> x = np.ones((1, 4), ml_dtypes.bfloat16)
        >>> moe.forward(x, np.array([[1]]), np.array([[0.5]], np.float32)).astype(float).tolist()
        [[16.0, 16.0, 16.0, 16.0]]
        """
        self._check_stream(cuda_stream)
        if self._runner.defers(self._chain):
            self.submit_forward(hidden_states, topk_ids, topk_weights, out=out, incremental=incremental)
            return self.sync_forward()
        batch = Batch(self.config, hidden_states, topk_ids, topk_weights, out, incremental)
        self._runner.run(batch, self.gpu_experts_mask)
        return batch.out

    def submit_forward(
        self,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        cuda_stream: Any = None,
        *,
        out: Array | None = None,
        incremental: bool = False,
    ) -> None:
        """Begin what `forward` does and return at once; `sync_forward` gives the result.

        Until then the engine holds the arrays, and the caller must not write to them. With deferred experts
        the output begins with what the layer before has deferred.

        Raises
        ------
        RuntimeError
            A pass of this layer is pending, or, with deferred experts, one before was not drained.
        """
        self._check_stream(cuda_stream)
        if self._pending is not None:
            raise RuntimeError(
                f"submit_forward: a pass of layer {self.layer_idx} is pending, call sync_forward first"
            )
        batch = Batch(self.config, hidden_states, topk_ids, topk_weights, out, incremental)
        if self._runner.defers(self._chain):
            tickets = self._runner.submit_deferring(batch, self.gpu_experts_mask, self._chain)
        else:
            tickets = self._runner.submit(batch, self.gpu_experts_mask)
        self._pending = _Pending(batch.out, tickets)

    def sync_forward(self, hidden_states: Any = None, cuda_stream: Any = None) -> Array:
        """Wait for the pass that was submitted and give its result.

        Raises
        ------
        RuntimeError
            None is pending.
        IndexError
            An expert id of E or above was submitted.
        """
        self._check_stream(cuda_stream)
        pending = self._pending
        if pending is None:
            raise RuntimeError(
                f"sync_forward: no pass of layer {self.layer_idx} is pending, call submit_forward first"
            )
        errors = []
        for ticket in pending.tickets:
            try:
                self.cpu_infer.wait(ticket)
            except (IndexError, RuntimeError, MemoryError) as error:
                errors.append(error)
        self._pending = None  # not before: after Ctrl-C the pass can still be waited for
        if errors:
            raise errors[0]
        return pending.output

    @classmethod
    def drain_deferred(cls) -> Array | None:
        """What the last layer of a pass has deferred, so that nothing is lost.

        Returns
        -------
        ndarray of bfloat16 [T, H], to be added to the last layer's output; None when nothing is left
        """
        carry = cls._chain.take()
        if carry is None:
            return None
        cls._get_cpu_infer().wait(carry.ticket)
        return carry.output.astype(bfloat16)

    @staticmethod
    def _check_stream(cuda_stream: Any) -> None:
        if cuda_stream is not None:
            raise RuntimeError(f"cuda_stream: got {cuda_stream!r}, expected None: arrays are on the CPU")
