"""Models of transformers as truth, in float64 throughout, and as yardstick, in the dtypes of our decoder.

A decoder is right when its error to the truth is at most about that of another implementation that rounds
where it does. So no tolerance is guessed, and none hides a mistake that is larger than rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

__all__ = ["FACTOR", "AdaptedExperts", "Peers", "assert_as_exact", "clear_tokens", "in_float64"]

AnyArray = Any

#: How much larger than the yardstick's an error may be, both as root mean squares.
FACTOR = 2.0


class Peers:
    """A checkpoint as transformers computes it: `truth`, `single` in float32, and `yardstick`."""

    def __init__(self, path: Path) -> None:
        self.truth, self.single, self.yardstick = (
            transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, experts_implementation="eager"
            ).eval()
            for dtype in (torch.float64, torch.float32, torch.float32)
        )
        config = self.truth.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        half = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        self.truth.model.rotary_emb.inv_freq = config.rope_parameters["rope_theta"] ** -half
        for layer in self.yardstick.model.layers:
            _with_experts_in_bfloat16(layer.mlp.experts)

    def logits(self, tokens: AnyArray) -> tuple[AnyArray, AnyArray]:
        """The logits [T, vocab_size] of the yardstick and of the truth."""
        ids = torch.tensor(np.asarray(tokens)[None])
        with torch.no_grad():
            near = self.yardstick(ids, use_cache=False).logits[0].numpy()
            with in_float64():
                true = self.truth(ids, use_cache=False).logits[0].numpy()
        assert true.dtype == np.float64
        return near, true


def _with_experts_in_bfloat16(experts: Any) -> None:
    """Let a module of experts in a model of float32 compute in bfloat16."""
    experts.to(torch.bfloat16)
    experts.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(), args[1], args[2].bfloat16()))
    experts.register_forward_hook(lambda _, args, output: output.to(torch.float32))


class AdaptedExperts(torch.nn.Module):
    """The experts of a layer with adapters, in a dtype; sums over slots are in that of the model.

    `leaves` are the adapters, by the names that ours have.
    """

    def __init__(self, experts: Any, adapters: dict[str, AnyArray], scale: float, dtype: Any) -> None:
        super().__init__()
        self._wide = experts.down_proj.dtype if dtype is torch.float64 else torch.float32
        self._dtype, self._scale = dtype, scale
        gate, up = experts.gate_up_proj.detach().to(dtype).chunk(2, dim=1)
        self._weights = {"gate": gate, "up": up, "down": experts.down_proj.detach().to(dtype)}
        self.leaves = {
            name: torch.tensor(x, dtype=self._wide, requires_grad=True) for name, x in adapters.items()
        }

    def _project(self, name: str, e: int, x: Any) -> Any:
        a, b = (self.leaves[f"{name}_lora_{matrix}"][e].to(self._dtype) for matrix in "ab")
        return x @ self._weights[name][e].T + self._scale * ((x @ a.T) @ b.T)

    def forward(self, x: Any, ids: Any, weights: Any) -> Any:
        total = torch.zeros_like(x)
        for e in range(len(self._weights["down"])):
            t, p = torch.where(ids == e)
            rows = x[t].to(self._dtype)
            h = torch.nn.functional.silu(self._project("gate", e, rows)) * self._project("up", e, rows)
            y = self._project("down", e, h).to(self._wide)
            total = total.index_add(0, t, weights[t, p, None] * y)
        return total


@contextmanager
def in_float64() -> Iterator[None]:
    """Casts to float32, which models have in their norms, angles and routers, become casts to float64."""
    to, single, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def wide(dtype: Any) -> Any:
        return torch.float64 if dtype is torch.float32 else dtype

    def wide_to(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = {name: wide(value) for name, value in kwargs.items()}
        return to(self, *map(wide, args), **named)

    def wide_softmax(*args: Any, dtype: Any = None, **kwargs: Any) -> Any:
        return softmax(*args, dtype=wide(dtype), **kwargs)

    torch.Tensor.to, torch.Tensor.float = wide_to, torch.Tensor.double
    torch.nn.functional.softmax = wide_softmax
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax = to, single, softmax


def assert_as_exact(ours: AnyArray, yardstick: AnyArray, truth: AnyArray, what: str) -> None:
    """The error of `ours` is at most `FACTOR` times that of the yardstick."""
    errors = [np.sqrt(np.mean(np.square(np.asarray(x, np.float64) - truth))) for x in (ours, yardstick)]
    assert np.isfinite(errors).all()
    assert errors[0] <= FACTOR * errors[1], f"{what}: error {errors[0]:.3g}, of the yardstick {errors[1]:.3g}"


def clear_tokens(peers: Peers, candidates: Iterator[AnyArray], least: float = 0.01) -> AnyArray:
    """The first tokens of which none is nearly tied between experts, or roundings would decide where it goes.

    `least` is how far apart the logits of the last expert that is taken and of the next are.
    """
    gaps: list[float] = []
    taken = peers.truth.config.num_experts_per_tok

    def note(_: Any, args: Any, output: Any) -> None:
        ordered = output[0].sort(dim=-1, descending=True).values
        gaps.append(float((ordered[:, taken - 1] - ordered[:, taken]).min()))

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in peers.truth.model.layers]
    try:
        for tokens in candidates:
            gaps.clear()
            with torch.no_grad(), in_float64():
                peers.truth(torch.tensor(tokens[None]), use_cache=False)
            if min(gaps) >= least:
                return tokens
    finally:
        for hook in hooks:
            hook.remove()
    raise AssertionError(f"every candidate has tokens with experts closer than {least}")
