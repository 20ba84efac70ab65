"""Layers for inference under kt-kernel's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from ..arrays.checks import at_least
from ..arrays.types import StreamLike
from ..inference.base import BaseMoEWrapper
from .arguments import as_tensor, refused_pointer
from .base import CompatLayer, Wanted
from .streams import stream_of_call, torch_stream

__all__ = ["InferenceExperts", "Rows", "copied", "flat_rows"]

#: Hidden states [T, H], ids and weights [T, P].
Rows: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class InferenceExperts(CompatLayer):
    """A layer for inference. Made by `ktmoe_np.compat.kt_kernel.KTMoEWrapper`, which has an example."""

    layer: BaseMoEWrapper

    def __init__(self, layer: BaseMoEWrapper, mask: torch.Tensor, wanted: Wanted) -> None:
        super().__init__(layer, mask, wanted)
        self.max_deferred_experts_per_token = layer.max_deferred_experts_per_token

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: StreamLike | None = None,
    ) -> torch.Tensor:
        """The experts of the layer on a batch of tokens: `submit_forward` and `sync_forward`.

        Parameters
        ----------
        hidden_states : tensor of bfloat16, float32 or float16 [..., H]
            T tokens, on the CPU or a CUDA device. Rounded to bfloat16 once.
        topk_ids : tensor of integers [T, P]
            Negative ids are skipped.
        topk_weights : tensor of floats [T, P]
            Used in float32, without normalization.
        cuda_stream : int, or a torch or CuPy stream
            The stream of tensors on a device: 0 is the default stream, None torch's current one. 0 or None
            for tensors on the CPU.

        Returns
        -------
        tensor [T, H]
            New, on the device and in the dtype of `hidden_states`.

        Raises
        ------
        TypeError, ValueError, IndexError, RuntimeError
            What `ktmoe_np.BaseMoEWrapper.forward` raises; a stream for tensors on the CPU.
        """
        handle = stream_of_call(cuda_stream, as_tensor("hidden_states", hidden_states).device)
        if handle is None:
            rows = flat_rows(hidden_states, topk_ids, topk_weights)
            return _given(self.layer.forward(*rows, activation_dtype=self._dtype), hidden_states)
        self.submit_forward(hidden_states, topk_ids, topk_weights, handle)
        return self.sync_forward(hidden_states, handle)

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: StreamLike | None = None,
    ) -> None:
        """Begin what `forward` does and return at once; `sync_forward` gives the result.

        The tensors may be written to afterwards: those on the CPU are copied, and those on a device are
        copied in the order of the stream.

        Raises
        ------
        RuntimeError
            A pass of this layer is pending. Further as `forward`.
        """
        device = as_tensor("hidden_states", hidden_states).device
        handle = stream_of_call(cuda_stream, device)
        if handle is None:
            rows = copied(flat_rows(hidden_states, topk_ids, topk_weights))
            self.layer.submit_forward(*rows, activation_dtype=self._dtype)
            return
        with torch.cuda.stream(torch_stream(handle, device)):
            rows = flat_rows(hidden_states, topk_ids, topk_weights)
            self.layer.submit_forward(*rows, handle, activation_dtype=self._dtype)

    def sync_forward(
        self, hidden_states: torch.Tensor, cuda_stream: StreamLike | None = None
    ) -> torch.Tensor:
        """Wait for the pass that was submitted and give its result; on a device only the stream waits.

        Parameters
        ----------
        hidden_states : tensor
            Its device and dtype are those of the result.
        cuda_stream : int, or a torch or CuPy stream
            That of the pass.

        Returns
        -------
        tensor [T, H]

        Raises
        ------
        RuntimeError
            None is pending.
        ValueError
            Another stream than that of the pass.
        IndexError
            An expert id of E or above was submitted.
        """
        device = as_tensor("hidden_states", hidden_states).device
        handle = stream_of_call(cuda_stream, device)
        if handle is None:
            return _given(self.layer.sync_forward(), hidden_states)
        caller = torch.cuda.current_stream(device)
        with torch.cuda.stream(torch_stream(handle, device)):
            result = _given(self.layer.sync_forward(cuda_stream=handle), hidden_states)
        if caller.cuda_stream != handle:
            result.record_stream(caller)
        return result

    def select_deferred_experts(
        self, expert_ids: torch.Tensor, expert_scores: torch.Tensor, protected_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Split the slots of tokens into those that are computed at once and those that may be deferred.

        `submit_forward` splits them in the same way.

        Parameters
        ----------
        expert_ids : tensor of integers [T, P]
        expert_scores : tensor of floats [T, P]
        protected_k : int
            How many slots of each token are computed at once, those with the largest scores; ties by slot.

        Returns
        -------
        immediate, deferred : tensor of integers [T, P]
            New, as `expert_ids`, with -1 for the slots of the other.

        Raises
        ------
        TypeError
            Not tensors, or a number that is no integer.
        ValueError
            Another shape.

        Examples
        --------
        >>> from ktmoe_np.compat.kt_kernel import KTMoEWrapper
        >>> moe = KTMoEWrapper(0, 8, 3, 64, 32, method="BF16")
        >>> ids, scores = torch.tensor([[3, 1, 4]]), torch.tensor([[0.2, 0.5, 0.3]])
        >>> now, later = moe.select_deferred_experts(ids, scores, 2)
        >>> now.tolist(), later.tolist()
        ([[-1, 1, 4]], [[3, -1, -1]])
        """
        ids, scores = as_tensor("expert_ids", expert_ids), as_tensor("expert_scores", expert_scores)
        if ids.ndim != 2 or scores.shape != ids.shape:
            got = f"{list(scores.shape)} with expert_ids {list(ids.shape)}"
            raise ValueError(f"expert_scores: got {got}, expected [T, P] for both")
        kept = min(at_least("protected_k", max(protected_k, 0), 0), ids.shape[1])
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        is_kept = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, order[:, :kept], True)
        return ids.masked_fill(~is_kept, -1), ids.masked_fill(is_kept, -1)

    def submit_write_weight_scale_to_buffer(
        self,
        gpu_tp_count: int,
        expert_id: int,
        w13_weight_ptrs: Sequence[torch.Tensor],
        w13_scale_ptrs: Sequence[torch.Tensor] | None,
        w2_weight_ptrs: Sequence[torch.Tensor],
        w2_scale_ptrs: Sequence[torch.Tensor] | None,
        *,
        w13_global_scales: Sequence[torch.Tensor] | None = None,
        w2_global_scales: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Begin to write an expert's weights to tensors, sliced for GPUs that share its intermediate size.

        Parameters
        ----------
        gpu_tp_count, expert_id : int
        w13_weight_ptrs, w13_scale_ptrs, w2_weight_ptrs, w2_scale_ptrs : sequence of tensors
            On the CPU, one for each GPU. Tensors, not their addresses, despite the names. An empty sequence
            of scales is none.
        w13_global_scales, w2_global_scales : sequence of tensors, optional
            Not of kt-kernel: the global scales of ``NVFP4``.

        Raises
        ------
        TypeError
            Addresses.
        Exception
            What `ktmoe_np.BaseMoEWrapper.submit_write_weight_scale_to_buffer` raises.
        """
        buffers = {
            "w13_weight_ptrs": w13_weight_ptrs,
            "w13_scale_ptrs": w13_scale_ptrs,
            "w2_weight_ptrs": w2_weight_ptrs,
            "w2_scale_ptrs": w2_scale_ptrs,
        }
        for name, tensors in buffers.items():
            for i, tensor in enumerate(tensors or ()):
                if isinstance(tensor, int):
                    raise refused_pointer(f"{name}[{i}]", tensor)
        self.layer.submit_write_weight_scale_to_buffer(
            gpu_tp_count,
            expert_id,
            w13_weight_ptrs,
            w13_scale_ptrs or None,
            w2_weight_ptrs,
            w2_scale_ptrs or None,
            w13_global_scales=w13_global_scales,
            w2_global_scales=w2_global_scales,
        )

    def sync_write_weight_scale_to_buffer(self) -> None:
        """Wait until the tensors that were submitted have been written; RuntimeError when none were."""
        self.layer.sync_write_weight_scale_to_buffer()


def flat_rows(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> Rows:
    """A batch as contiguous rows [T, H], [T, P] and [T, P], outside of autograd.

    Raises
    ------
    TypeError
        Not tensors.
    ValueError
        Tensors on different devices.
    """
    names = ("hidden_states", "topk_ids", "topk_weights")
    given = zip(names, (hidden_states, topk_ids, topk_weights), strict=True)
    tensors = {name: as_tensor(name, value) for name, value in given}
    device = tensors["hidden_states"].device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {device}, as hidden_states")
    x, ids, weights = (_rows(tensor).contiguous() for tensor in tensors.values())
    return x, ids, weights


def copied(rows: Rows) -> Rows:
    """A batch in memory of its own."""
    return rows[0].clone(), rows[1].clone(), rows[2].clone()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.ndim < 3 else tensor.reshape(-1, tensor.shape[-1])


def _given(result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return result.to(like.dtype)
