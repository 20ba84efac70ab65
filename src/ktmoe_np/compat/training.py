"""Layers for training under kt-kernel's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..arrays.device import device_array
from ..arrays.spec import ArraySpec
from ..arrays.types import StreamLike, bfloat16
from ..sft.base import BaseSFTMoEWrapper
from ..sft.gradients import LORA_NAMES, SFTGradients, lora_shapes
from ..sft.stream import DeviceBatch, stream_forward
from .arguments import as_tensor, number
from .base import CompatLayer, Wanted
from .inference import Rows, copied, flat_rows
from .streams import stream_of_call, torch_stream

__all__ = ["TrainingExperts"]

_GRADIENT_DTYPES = (torch.bfloat16, torch.float32)


class _Served(NamedTuple):
    """A pass of `submit_forward_inference`."""

    result: torch.Tensor | None  #: of a device, which the stream writes; None on the CPU
    dtype: torch.dtype


class TrainingExperts(CompatLayer):
    """A layer for training. Made by `ktmoe_np.compat.kt_kernel.KTMoEWrapper`, which has an example.

    Attributes
    ----------
    gate_lora_a, .., down_lora_b : tensor, or None before `init_lora_weights`
        The caller's adapters.
    grad_gate_lora_a, .., grad_down_lora_b : tensor, or None before `init_lora_weights`
        The caller's gradients, which `backward` writes.

    Examples
    --------
    >>> from ktmoe_np.compat.kt_kernel import KTMoEWrapper
    >>> sft = KTMoEWrapper(0, 2, 1, 4, 2, None, None, None, None, 512, method="AMXBF16_SFT", mode="sft",
    ...                    lora_rank=1, lora_alpha=1.0)
    >>> gate, down = torch.ones(2, 2, 4).bfloat16(), torch.ones(2, 4, 2).bfloat16()
    >>> sft.load_weights_from_tensors(gate, gate, down, torch.arange(2))
    >>> shapes = [(2, 1, 4), (2, 2, 1), (2, 1, 4), (2, 2, 1), (2, 1, 2), (2, 4, 1)]
    >>> lora, gradients = ([torch.zeros(shape) for shape in shapes] for _ in range(2))
    >>> lora[4][:] = 1.0
    >>> sft.init_lora_weights(*lora, *gradients)
    >>> batch = torch.ones(1, 4), torch.tensor([[1]]), torch.ones(1, 1)
    >>> sft.forward(*batch).tolist()
    [[31.375, 31.375, 31.375, 31.375]]
    >>> grad_input, grad_weights = sft.backward(torch.ones(1, 4))
    >>> grad_weights.tolist(), gradients[5][:, 0, 0].tolist()  # down_lora_b of expert 1
    ([[125.5]], [0.0, 31.375])
    """

    layer: BaseSFTMoEWrapper
    gate_lora_a: torch.Tensor | None
    gate_lora_b: torch.Tensor | None
    up_lora_a: torch.Tensor | None
    up_lora_b: torch.Tensor | None
    down_lora_a: torch.Tensor | None
    down_lora_b: torch.Tensor | None
    grad_gate_lora_a: torch.Tensor | None
    grad_gate_lora_b: torch.Tensor | None
    grad_up_lora_a: torch.Tensor | None
    grad_up_lora_b: torch.Tensor | None
    grad_down_lora_a: torch.Tensor | None
    grad_down_lora_b: torch.Tensor | None

    def __init__(self, layer: BaseSFTMoEWrapper, mask: torch.Tensor, wanted: Wanted) -> None:
        super().__init__(layer, mask, wanted)
        options = layer.options
        self.lora_rank, self.lora_alpha = options.lora_rank, options.lora_alpha
        self.lora_scaling, self.lora_dropout = options.lora_alpha / options.lora_rank, options.lora_dropout
        self.max_cache_depth = options.max_cache_depth
        self._lora: dict[str, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._set_attributes({}, {})
        self._scale = 1.0  # of a backward pass that is pending
        self._device: torch.device | None = None  # where its results go
        self._served: _Served | None = None

    def _set_attributes(self, lora: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> None:
        for name in LORA_NAMES:
            setattr(self, name, lora.get(name))
            setattr(self, f"grad_{name}", gradients.get(name))

    # ---- weights and adapters ----

    def _logical(self, physical_to_logical_map: Any) -> torch.Tensor | None:
        logical = super()._logical(physical_to_logical_map)
        if logical is not None and logical.tolist() != list(range(self.num_experts)):
            raise ValueError(
                f"physical_to_logical_map_cpu: got {logical.tolist()}, expected 0 to {self.num_experts - 1} "
                "in order: adapters are counted as the checkpoint counts its experts; ktmoe_np.KTMoEWrapper "
                "trains with a map"
            )
        return None

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
        """Give the layer its adapters, and the tensors that `backward` writes their gradients to.

        Both stay the caller's. After a change of the adapters call `update_lora_weights`.

        Parameters
        ----------
        gate_lora_a, up_lora_a : tensor of bfloat16 or float32 [E, R, H]
        gate_lora_b, up_lora_b : tensor of bfloat16 or float32 [E, I, R]
        down_lora_a : tensor of bfloat16 or float32 [E, R, I]
        down_lora_b : tensor of bfloat16 or float32 [E, H, R]
            On the CPU: six parameters, or none. To parameters `backward` gives their gradients as ``grad``,
            and adds to those that are there already.
        grad_gate_lora_a, .., grad_down_lora_b : tensor of bfloat16 or float32
            Of the same shapes, on the CPU; those of parameters also of the same dtypes.

        Raises
        ------
        TypeError, ValueError
            A tensor of another kind, dtype, shape or device, or parameters beside other tensors.
        """
        given = (gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        lora = dict(zip(LORA_NAMES, given, strict=True))
        of_first = (grad_gate_lora_a, grad_gate_lora_b, grad_up_lora_a, grad_up_lora_b)
        to_write = (*of_first, grad_down_lora_a, grad_down_lora_b)
        gradients = dict(zip(LORA_NAMES, to_write, strict=True))
        tensors = {name: as_tensor(name, tensor) for name, tensor in lora.items()}
        num_parameters = sum(isinstance(tensor, torch.nn.Parameter) for tensor in given)
        if num_parameters not in (0, len(given)):
            raise ValueError(
                f"gate_lora_a to down_lora_b: got {num_parameters} parameters, expected 6 or none"
            )
        for name, shape in lora_shapes(self.layer.config, self.lora_rank).items():
            dtypes = (lora[name].dtype,) if num_parameters else _GRADIENT_DTYPES
            _check_gradient(f"grad_{name}", gradients[name], dtypes, shape)
        self.layer.init_lora_weights(**tensors)
        self._lora, self._gradients = lora, gradients
        self._set_attributes(lora, gradients)

    def update_lora_weights(self) -> None:
        """Read the tensors of `init_lora_weights` again; RuntimeError when there are none."""
        self._check_lora()
        if self._lora:
            self.layer.update_lora_weights(**{name: each.detach() for name, each in self._lora.items()})

    def _check_lora(self) -> None:
        if not self._lora and not self.method.endswith("_SkipLoRA"):
            raise RuntimeError(f"layer {self.layer_idx} has no adapters yet, call init_lora_weights first")

    # ---- passes ----

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
        output_device: torch.device | None = None,
    ) -> torch.Tensor:
        """The experts of the layer, with their adapters, on a batch of tokens.

        Parameters
        ----------
        hidden_states : tensor of bfloat16, float32 or float16 [T, H]
            On the CPU, or copied to there. Rounded to bfloat16 once.
        expert_ids : tensor of integers [T, P]
        weights : tensor of floats [T, P]
        save_for_backward : bool
            Keep what `backward` needs.
        output_device : torch.device, optional
            Where the result goes; by default the CPU.

        Returns
        -------
        tensor of bfloat16 [T, H]

        Raises
        ------
        RuntimeError
            There are no adapters yet.
        Exception
            What `ktmoe_np.BaseSFTMoEWrapper.forward_sft` raises.
        """
        self._check_lora()
        rows = _on_cpu(hidden_states, expert_ids, weights)
        return _moved(
            self.layer.forward_sft(*rows, save_for_backward, activation_dtype=self._dtype), output_device
        )

    def forward_sft(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
        output_device: torch.device | None = None,
    ) -> torch.Tensor:
        """`forward` under the name of the layers of this library."""
        return self.forward(hidden_states, expert_ids, weights, save_for_backward, output_device)

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
    ) -> None:
        """Begin what `forward` does, on copies; `sync_forward` gives the result."""
        self._check_lora()
        self._check_nothing_served()
        rows = copied(_on_cpu(hidden_states, expert_ids, weights))
        self.layer.submit_forward_sft(*rows, save_for_backward, activation_dtype=self._dtype)

    def sync_forward(self, output_device: torch.device | None = None) -> torch.Tensor:
        """Wait for the pass that was submitted and give its result; RuntimeError when none was."""
        self._check_nothing_served()
        return _moved(self.layer.sync_forward_sft(), output_device)

    def backward(
        self,
        grad_output: torch.Tensor,
        output_device: torch.device | None = None,
        optimizer_grad_scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Backpropagate through the last saved pass, and write the gradients of the adapters in place.

        Parameters
        ----------
        grad_output : tensor of bfloat16, float32 or float16 [T, H]
        output_device : torch.device, optional
            Where the results go; by default the CPU.
        optimizer_grad_scale : float
            The gradients of the adapters are multiplied by it.

        Returns
        -------
        grad_input : tensor of bfloat16 [T, H]
        grad_weights : tensor of float32 [T, P]

        Raises
        ------
        TypeError, ValueError
            A scale that is no positive number.
        Exception
            What `ktmoe_np.BaseSFTMoEWrapper.backward` raises.
        """
        self._check_lora()
        scale = number("optimizer_grad_scale", optimizer_grad_scale, positive=True)
        results = self.layer.backward(as_tensor("grad_output", grad_output).cpu().contiguous())
        return self._written(results, output_device, scale)

    def submit_backward_async(
        self,
        grad_output: torch.Tensor,
        output_device: torch.device | None = None,
        optimizer_grad_scale: float = 1.0,
    ) -> None:
        """Begin what `backward` does, on a copy; `sync_backward` writes gradients and gives the results."""
        self._check_lora()
        scale = number("optimizer_grad_scale", optimizer_grad_scale, positive=True)
        self.layer.submit_backward(as_tensor("grad_output", grad_output).cpu().contiguous().clone())
        self._scale, self._device = scale, output_device

    def sync_backward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait for the backward pass that was submitted; RuntimeError when none was."""
        return self._written(self.layer.sync_backward(), self._device, self._scale)

    def _written(
        self, results: SFTGradients, device: torch.device | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the gradients of the adapters to the caller's tensors, and give the others."""
        with torch.no_grad():
            for name, found in results.matrices.items():
                matrix, parameter = torch.as_tensor(found) * scale, self._lora[name]
                target = self._gradients[name].detach()
                is_parameter = isinstance(parameter, torch.nn.Parameter)
                if is_parameter and parameter.grad is not None:
                    target.copy_(parameter.grad + matrix)
                else:
                    target.copy_(matrix)
                if is_parameter:
                    parameter.grad = target
        rows = torch.as_tensor(results.grad_input), torch.as_tensor(results.grad_weights)
        return _moved(rows[0], device), _moved(rows[1], device)

    def submit_backward_repack(self) -> None:
        """Do nothing: the backward pass reads the weights of the forward pass."""

    def wait_backward_repack(self) -> None:
        """Do nothing: see `submit_backward_repack`."""

    # ---- passes for serving ----

    def submit_forward_inference(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        cuda_stream: StreamLike | None = None,
    ) -> None:
        """Begin a pass that is not saved; `sync_forward_inference` gives the result.

        Parameters
        ----------
        hidden_states : tensor of bfloat16, float32 or float16 [T, H]
            On the CPU, where it is copied, or on a CUDA device, whose stream computes the pass at this point.
        expert_ids : tensor of integers [T, P]
        weights : tensor of floats [T, P]
        cuda_stream : int, or a torch or CuPy stream
            As in `InferenceExperts.forward`.

        Raises
        ------
        RuntimeError
            A pass is pending, there are no adapters or no weights yet, or the CUDA driver refuses.
        TypeError, ValueError
            An argument of another kind, dtype or shape.
        """
        self._check_lora()
        self._check_nothing_served()
        device, dtype = as_tensor("hidden_states", hidden_states).device, hidden_states.dtype
        handle = stream_of_call(cuda_stream, device)
        if handle is None:
            rows = copied(flat_rows(hidden_states, expert_ids, weights))
            self.layer.submit_forward_sft(*rows, False, activation_dtype=self._dtype)
            self._served = _Served(None, dtype)
            return
        with torch.cuda.stream(torch_stream(handle, device)):
            x, ids, scores = flat_rows(hidden_states, expert_ids, weights)
            given = x.to(torch.bfloat16), ids.to(torch.int64), scores.to(torch.float32)
            out = torch.empty_like(given[0])
            batch = self._device_batch(given, handle)
            written = device_array(out, "out", ArraySpec((bfloat16,), tuple(out.shape)), handle)
            stream_forward(self.layer, handle, batch, written, save=False)
            self._served = _Served(out.to(dtype), dtype)

    def _device_batch(self, rows: Rows, handle: int) -> DeviceBatch:
        """A batch as the stream copies it; its adapters are the layer's."""
        routes = (len(rows[0]), self.num_experts_per_tok)
        hidden = ArraySpec((bfloat16,), (len(rows[0]), self.hidden_size))
        return DeviceBatch(
            device_array(rows[0], "hidden_states", hidden, handle),
            device_array(rows[1], "expert_ids", ArraySpec((np.dtype(np.int64),), routes), handle),
            device_array(rows[2], "weights", ArraySpec((np.dtype(np.float32),), routes), handle),
            {},
            self._dtype,
        )

    def sync_forward_inference(self, cuda_stream: StreamLike | None = None) -> torch.Tensor:
        """Wait for the pass of `submit_forward_inference`; on a device only its stream waits.

        Returns
        -------
        tensor [T, H]
            On the device and in the dtype of the hidden states.

        Raises
        ------
        RuntimeError
            None is pending.
        IndexError
            An expert id of E or above was submitted.
        """
        if self._served is None:
            where = f"no pass of layer {self.layer_idx} is pending"
            raise RuntimeError(f"sync_forward_inference: {where}, call submit_forward_inference first")
        served, self._served = self._served, None
        if served.result is not None:
            return served.result
        result: torch.Tensor = self.layer.sync_forward_sft()
        return result.to(served.dtype)

    def _check_nothing_served(self) -> None:
        if self._served is not None:
            where = f"a pass of layer {self.layer_idx} is pending"
            raise RuntimeError(f"submit_forward_inference: {where}, call sync_forward_inference first")


def _check_gradient(name: str, tensor: object, dtypes: Sequence[torch.dtype], shape: tuple[int, ...]) -> None:
    """Raise unless a tensor can be written to."""
    expected = f"{' or '.join(map(str, dtypes))} {list(shape)} on the CPU"
    given = as_tensor(name, tensor)
    if given.dtype not in dtypes or not given.is_cpu:
        raise TypeError(
            f"{name}: got {given.dtype} {list(given.shape)} on {given.device}, expected {expected}"
        )
    if tuple(given.shape) != shape:
        raise ValueError(f"{name}: got {given.dtype} {list(given.shape)}, expected {expected}")


def _on_cpu(hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Rows:
    """A batch as rows on the CPU."""
    given = {"hidden_states": hidden_states, "expert_ids": ids, "weights": weights}
    x, ids, weights = (as_tensor(name, tensor).cpu() for name, tensor in given.items())
    return flat_rows(x, ids, weights)


def _moved(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    return tensor if device is None else tensor.to(device)
