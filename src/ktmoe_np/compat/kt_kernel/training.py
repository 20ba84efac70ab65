"""Layers for training, as kt-kernel's callers use them."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from ...arrays.checks import integer
from ...sft.base import BaseSFTMoEWrapper
from ...sft.gradients import LORA_NAMES, SFTGradients, lora_shapes
from ...torch.calls import moe_sft
from .tensors import on_device, stream_of, tensor_of

__all__ = ["TrainingLayer"]


class TrainingLayer:
    """A layer of experts for training. Made by `ktmoe_np.compat.kt_kernel.KTMoEWrapper`.

    Tensors may be on the CPU or on a CUDA device; the passes of training wait for the device, those of
    `submit_forward_inference` go by a stream.

    Attributes
    ----------
    moe : BaseSFTMoEWrapper
        The layer of this library, with all that it can do.
    method, chunked_prefill_size, num_gpu_experts
        As given.
    """

    def __init__(
        self, moe: BaseSFTMoEWrapper, method: str, num_gpu_experts: int, chunked_prefill_size: int
    ) -> None:
        config = moe.config
        self.moe = moe
        self.method = method
        self.layer_idx = config.layer_idx
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.hidden_size = config.hidden_size
        self.moe_intermediate_size = config.moe_intermediate_size
        self.lora_rank = moe.options.lora_rank
        self.lora_alpha = moe.options.lora_alpha
        self.weight_path = moe.weight_path
        self.chunked_prefill_size = chunked_prefill_size
        self.cpu_infer = moe.cpu_infer
        self.num_gpu_experts = integer("num_gpu_experts", num_gpu_experts)
        if not 0 <= self.num_gpu_experts <= config.num_experts:
            raise ValueError(
                f"num_gpu_experts: got {num_gpu_experts}, expected 0 to {config.num_experts}, the experts"
            )
        moe.set_gpu_experts_mask(np.arange(config.num_experts) < self.num_gpu_experts)
        self._lora: dict[str, torch.Tensor] = {}
        self._lora_gradients: dict[str, torch.Tensor] = {}
        self._device_output: torch.Tensor | None = None

    # ---- weights ----

    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """Load the layer from `weight_path`; see `ktmoe_np.BaseSFTMoEWrapper.load_weights`."""
        order = physical_to_logical_map_cpu
        self.moe.load_weights(
            None if order is None else tensor_of(order, "physical_to_logical_map_cpu").cpu()
        )

    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_to_logical_map_cpu: torch.Tensor | None = None,
    ) -> None:
        """Give the layer its weights; see `InferenceLayer.load_weights_from_tensors`."""
        given = {"gate_proj": gate_proj, "up_proj": up_proj, "down_proj": down_proj}
        gate, up, down = (tensor_of(value, name).detach().cpu() for name, value in given.items())
        order = physical_to_logical_map_cpu
        if order is not None:
            order = tensor_of(order, "physical_to_logical_map_cpu").cpu()
        self.moe.load_weights_from_tensors(gate, up, down, order)

    def init_lora_weights(
        self,
        gate_lora_a: torch.Tensor,
        gate_lora_b: torch.Tensor,
        up_lora_a: torch.Tensor,
        up_lora_b: torch.Tensor,
        down_lora_a: torch.Tensor,
        down_lora_b: torch.Tensor,
        grad_gate_lora_a: torch.Tensor,
        grad_gate_lora_b: torch.Tensor,
        grad_up_lora_a: torch.Tensor,
        grad_up_lora_b: torch.Tensor,
        grad_down_lora_a: torch.Tensor,
        grad_down_lora_b: torch.Tensor,
    ) -> None:
        """Take the adapters, and the tensors that `backward` writes their gradients to.

        Parameters
        ----------
        gate_lora_a, up_lora_a : tensor of bfloat16 or float32 [E, R, H]
        gate_lora_b, up_lora_b : tensor [E, I, R]
        down_lora_a : tensor [E, R, I]
        down_lora_b : tensor [E, H, R]
            Read again by `update_lora_weights`: an optimizer may change them in place.
        grad_gate_lora_a, grad_gate_lora_b, grad_up_lora_a, grad_up_lora_b : tensor
        grad_down_lora_a, grad_down_lora_b : tensor
            Of the same shapes, in any float dtype. Overwritten by every backward pass.

        Raises
        ------
        TypeError, ValueError
            Pointers, other shapes or dtypes, or adapters where `lora_rank` is 0. Nothing changes.
        """
        adapters = (gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        gradients = (
            grad_gate_lora_a,
            grad_gate_lora_b,
            grad_up_lora_a,
            grad_up_lora_b,
            grad_down_lora_a,
            grad_down_lora_b,
        )
        lora = {n: tensor_of(value, n) for n, value in zip(LORA_NAMES, adapters, strict=True)}
        given = {n: tensor_of(value, f"grad_{n}") for n, value in zip(LORA_NAMES, gradients, strict=True)}
        for name, shape in lora_shapes(self.moe.config, self.lora_rank).items():
            found = given[name]
            if tuple(found.shape) != shape or not found.is_floating_point():
                raise ValueError(
                    f"grad_{name}: got {found.dtype} {list(found.shape)}, expected floats {list(shape)}"
                )
        self.moe.init_lora_weights(**_on_cpu(lora))
        self._lora, self._lora_gradients = lora, given

    def update_lora_weights(self) -> None:
        """Take the values that the tensors of `init_lora_weights` have now.

        Raises
        ------
        RuntimeError
            There are none.
        """
        if not self._lora:
            raise RuntimeError("update_lora_weights: there are no tensors yet, call init_lora_weights first")
        self.moe.update_lora_weights(**_on_cpu(self._lora))

    # ---- passes of training ----

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
        output_device: torch.device | None = None,
    ) -> torch.Tensor:
        """The experts of the layer, with their adapters; see `ktmoe_np.BaseSFTMoEWrapper.forward_sft`.

        Parameters
        ----------
        hidden_states : tensor [B, H]
        expert_ids : tensor of integers [B, P]
        weights : tensor of floats [B, P]
        save_for_backward : bool
        output_device : torch.device, optional
            Where the result is to be; None is the CPU.

        Returns
        -------
        tensor of bfloat16 [B, H]
        """
        arrays = _cpu_arrays(hidden_states, expert_ids, weights)
        return _to(self.moe.forward_sft(*arrays, save_for_backward), output_device)

    forward_sft = forward

    def backward(
        self, grad_output: torch.Tensor, output_device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Backpropagate through the most recently saved forward pass; the adapters' gradients are written.

        Returns
        -------
        grad_input : tensor of bfloat16 [B, H]
        grad_weights : tensor of float32 [B, P]
        """
        found = self.moe.backward(tensor_of(grad_output, "grad_output").detach().cpu())
        return self._given(found, output_device)

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
    ) -> None:
        """Begin what `forward` does and return at once; `sync_forward` gives the result."""
        self.moe.submit_forward_sft(*_cpu_arrays(hidden_states, expert_ids, weights), save_for_backward)

    def sync_forward(self, output_device: torch.device | None = None) -> torch.Tensor:
        """Wait for the forward pass that was submitted and give its result."""
        return _to(self.moe.sync_forward_sft(), output_device)

    def submit_backward_async(self, grad_output: torch.Tensor) -> None:
        """Begin what `backward` does and return at once; `sync_backward` gives the result."""
        self.moe.submit_backward(tensor_of(grad_output, "grad_output").detach().cpu())

    def sync_backward(self, output_device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait for the backward pass that was submitted; what it gives and writes is that of `backward`."""
        return self._given(self.moe.sync_backward(), output_device)

    # ---- passes of inference ----

    def submit_forward_inference(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        cuda_stream: int | None = None,
    ) -> None:
        """Begin a forward pass that saves nothing; on a device it goes by the stream, which alone waits."""
        stream = stream_of(tensor_of(hidden_states, "hidden_states"), cuda_stream)
        if stream is None:
            self.submit_forward(hidden_states, expert_ids, weights, save_for_backward=False)
            return
        lora = self._lora or {n: torch.from_numpy(v) for n, v in self.moe.lora_weights.items()}
        shapes = lora_shapes(self.moe.config, self.lora_rank)
        own = {name: lora[name].detach() for name in shapes}
        external: Any = torch.cuda.ExternalStream
        with torch.no_grad(), torch.cuda.stream(external(stream)):
            self._device_output = moe_sft(self.moe, own, hidden_states, expert_ids, weights)

    def sync_forward_inference(self, cuda_stream: int | None = None) -> torch.Tensor:
        """The result of that pass; on a device the stream computes it.

        Raises
        ------
        RuntimeError
            None is pending.
        """
        if self._device_output is None:
            return self.sync_forward()
        result, self._device_output = self._device_output, None
        return result

    def _given(
        self, found: SFTGradients, output_device: torch.device | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the gradients of the adapters where they belong, and return those of the inputs."""
        for name, value in found.matrices.items():
            if name in self._lora_gradients:
                with torch.no_grad():
                    self._lora_gradients[name].copy_(_tensor(value))
        return _to(found.grad_input, output_device), _to(found.grad_weights, output_device)


def _cpu_arrays(*values: object) -> tuple[Any, Any, Any]:
    x, ids, weights = (
        tensor_of(value, name).detach().cpu()
        for name, value in zip(("hidden_states", "expert_ids", "weights"), values, strict=True)
    )
    return x, ids, weights


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _tensor(value: object) -> torch.Tensor:
    """A result of the library: a tensor, or an array."""
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(cast(Any, value))


def _to(value: object, device: torch.device | None) -> torch.Tensor:
    tensor = _tensor(value)
    return (
        tensor if device is None or not on_device(tensor.new_empty(0, device=device)) else tensor.to(device)
    )
