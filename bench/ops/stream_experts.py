"""Experts on the CPU in the order of a CUDA stream, by either library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ktmoe_np import KTMoEWrapper

from ..core.layer import Layer, bfloat16
from ..core.shapes import Shape
from ..peers.ktkernel.inference import find_extension, import_extension
from ..peers.ktkernel.memory import address, aligned

__all__ = ["LIBRARIES", "KtKernelExperts", "KtmoeExperts"]


class KtmoeExperts:
    """Layers of this package."""

    def __init__(self, shape: Shape, layers: list[Layer], threads: int, _: str | None) -> None:
        self._shape, self._weights = shape, layers
        self._threads = threads
        self._moes: list[KTMoEWrapper] = []
        self._make(0)

    def _make(self, deferred: int) -> None:
        """Layers that defer so many experts, but for the last one. They share the weights."""
        s, last = self._shape, len(self._weights) - 1
        self._deferred, self._moes = deferred, []
        for i, layer in enumerate(self._weights):
            moe = KTMoEWrapper(
                i,
                s.experts,
                s.per_token,
                s.hidden,
                s.inter,
                cpuinfer_threads=self._threads,
                max_deferred_experts_per_token=deferred if i < last else 0,
            )
            moe.load_weights_from_tensors(layer.gate, layer.up, layer.down)
            self._moes.append(moe)

    def prepare(self, tokens: int, deferred: int) -> None:
        """Before passes of that many tokens are captured."""
        KTMoEWrapper.set_capture_batch_sizes([tokens])
        if deferred != self._deferred:
            self._make(deferred)

    @staticmethod
    def on_host(array: Any) -> Any:
        """A tensor as the CPU's passes take it."""
        host = array.cpu()
        return (
            host.view(torch.uint16).numpy().view(bfloat16) if host.dtype == torch.bfloat16 else host.numpy()
        )

    def run_on_host(self, batches: list[Any]) -> None:
        """Passes of the layers, one after the other, without a stream."""
        for moe, batch in zip(self._moes, batches, strict=False):
            moe.forward(*batch)

    def begin(self, i: int, x: Any, ids: Any, weights: Any) -> None:
        """Let the current stream do a pass of layer i: nothing else is to be done meanwhile."""
        self._result = self._moes[i].forward(x, ids, weights, torch.cuda.current_stream())

    def end(self, i: int) -> Any:
        """Its result."""
        return self._result

    def round_trip(self) -> None:
        """Submit the least task there is and wait for it, in the current stream."""
        stream, engine = torch.cuda.current_stream().cuda_stream, self._moes[0].cpu_infer
        moe = self._moes[0]
        rows, routes = (0, moe.config.hidden_size), (0, moe.config.num_experts_per_tok)
        x, out = np.zeros(rows, bfloat16), np.zeros(rows, bfloat16)
        task = moe._layer.forward_task(x, np.zeros(routes, np.int64), np.zeros(routes, np.float32), out)
        engine.submit_with_cuda_stream(stream, task)
        engine.sync_with_cuda_stream(stream)


class KtKernelExperts:
    """kt-kernel's extension, driven as its wrapper does it, with two sets of pinned buffers."""

    def __init__(self, shape: Shape, layers: list[Layer], threads: int, path: str | None) -> None:
        self._shape = shape
        self._ext = import_extension(find_extension(Path(path or "")))
        self._engine = self._ext.CPUInfer(threads)
        self._map = aligned(np.arange(shape.experts, dtype=np.int64))
        self._moes = [self._load(i, layer) for i, layer in enumerate(layers)]
        self.prepare(1, 0)

    def _load(self, i: int, layer: Layer) -> Any:
        s = self._shape
        config = self._ext.moe.MOEConfig(s.experts, s.per_token, s.hidden, s.inter, 0)
        config.layer_idx, config.max_len, config.pool = i, 1024, self._engine.backend_
        config.gate_proj, config.up_proj, config.down_proj = map(address, (layer.gate, layer.up, layer.down))
        config.physical_to_logical_map = address(self._map)
        moe = self._ext.moe.AMXBF16_MOE(config)
        self._engine.submit(moe.load_weights_task(address(self._map)))
        self._engine.sync()
        return moe

    def prepare(self, tokens: int, deferred: int) -> None:
        """Before passes of that many tokens are captured."""
        s, self._deferred = self._shape, deferred

        def pinned(width: int, dtype: Any) -> Any:
            return torch.zeros(tokens, width, dtype=dtype).pin_memory()

        self._staging = [
            {
                "x": pinned(s.hidden, torch.bfloat16),
                "now": pinned(s.per_token, torch.int64),
                "later": pinned(s.per_token, torch.int64),
                "weights": pinned(s.per_token, torch.float32),
                "out": pinned(s.hidden, torch.bfloat16),
            }
            for _ in range(2)
        ]
        self._num = torch.full((1,), tokens, dtype=torch.int32).pin_memory()
        self._result = torch.zeros(tokens, s.hidden, dtype=torch.bfloat16, device="cuda")

    @staticmethod
    def on_host(array: Any) -> Any:
        """A tensor as the CPU's passes take it."""
        return array.cpu().contiguous()

    def run_on_host(self, batches: list[Any]) -> None:
        """Passes of the layers, one after the other, without a stream."""
        for moe, (x, ids, weights) in zip(self._moes, batches, strict=False):
            out, num = torch.empty_like(x), torch.full((1,), len(x), dtype=torch.int32)
            pointers = [t.data_ptr() for t in (ids, weights, x, out)]
            self._engine.submit(moe.forward_task(num.data_ptr(), self._shape.per_token, *pointers, False))
            self._engine.sync()

    def begin(self, i: int, x: Any, ids: Any, weights: Any) -> None:
        """Let the current stream submit a pass of layer i."""
        own, other = self._staging[i % 2], self._staging[(i + 1) % 2]
        stream = torch.cuda.current_stream().cuda_stream
        is_last = i == len(self._moes) - 1
        deferred = 0 if is_last else self._deferred
        now = ids
        if deferred:
            smallest = weights.topk(deferred, largest=False).indices
            now = ids.scatter(1, smallest, -1)
            later = torch.full_like(ids, -1).scatter(1, smallest, ids.gather(1, smallest))
            own["later"].copy_(later, non_blocking=True)
        own["x"].copy_(x, non_blocking=True)
        own["now"].copy_(now, non_blocking=True)
        own["weights"].copy_(weights, non_blocking=True)
        self._submit(stream, i, own, own["now"], own["out"], bool(self._deferred) and i > 0)
        if deferred:
            self._submit(stream, i, own, own["later"], other["out"], False)

    def _submit(self, stream: int, i: int, own: dict[str, Any], ids: Any, out: Any, adds: bool) -> None:
        pointers = [t.data_ptr() for t in (ids, own["weights"], own["x"], out)]
        task = self._moes[i].forward_task(self._num.data_ptr(), self._shape.per_token, *pointers, adds)
        self._engine.submit_with_cuda_stream(stream, task)

    def end(self, i: int) -> Any:
        """Let the current stream wait for it: its result."""
        is_last = i == len(self._moes) - 1
        pending = 1 if self._deferred and not is_last else 0
        self._engine.sync_with_cuda_stream(torch.cuda.current_stream().cuda_stream, pending)
        return self._result.copy_(self._staging[i % 2]["out"], non_blocking=True)

    def round_trip(self) -> None:
        """Submit the least task there is and wait for it, in the current stream."""
        stream, own = torch.cuda.current_stream().cuda_stream, self._staging[0]
        own["now"].fill_(-1)
        self._submit(stream, 0, own, own["now"], own["out"], False)
        self._engine.sync_with_cuda_stream(stream, 0)


LIBRARIES = {"ktmoe": KtmoeExperts, "kt-kernel": KtKernelExperts}
