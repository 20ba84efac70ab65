"""The layers that are benched, by the models they come from; a further model is a further row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["SHAPES", "Shape", "available_memory", "cut", "fit"]


@dataclass(frozen=True)
class Shape:
    """The sizes of one layer of experts."""

    name: str
    hidden: int  # H
    inter: int  # I
    experts: int  # E
    per_token: int  # P
    activation: str = "silu"
    biased: bool = False
    model_experts: int = 0  #: E of the model, when `experts` was cut to fit this machine's memory
    rank: int = 0  #: R of the adapters beside the weights; 0: without
    alpha: float = 32.0  #: adapters are scaled by alpha / R

    @property
    def weights_per_expert(self) -> int:
        """Weights of gate, up and down of one expert."""
        return 3 * self.hidden * self.inter

    @property
    def weights(self) -> int:
        """Weights of the layer."""
        return self.experts * self.weights_per_expert

    @property
    def adapter_weights_per_expert(self) -> int:
        """Weights of the adapters of gate, up and down of one expert."""
        return 3 * self.rank * (self.hidden + self.inter)

    def flop(self, tokens: int) -> int:
        """Multiplications and additions of a forward pass."""
        return 2 * tokens * self.per_token * (self.weights_per_expert + self.adapter_weights_per_expert)

    def step_flop(self, tokens: int) -> int:
        """Those of a forward and a backward pass of training the adapters alone.

        Backward, a weight takes part in the gradient of its product's input, an adapter's in its own too.
        """
        per_row = 2 * self.weights_per_expert + 3 * self.adapter_weights_per_expert
        return 2 * tokens * self.per_token * per_row


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3", 2048, 768, 128, 8),
        Shape("dsv3", 7168, 2048, 256, 8),
        Shape("mixtral", 4096, 14336, 8, 2),
        Shape("gpt-oss", 2880, 2880, 32, 4, activation="swigluoai", biased=True),
        Shape("tiny", 64, 32, 8, 2),
    )
}


def available_memory() -> int:
    """Bytes that this process and its children may still take."""
    limits = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        if limit.strip() != "max":
            limits.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return min(limits)


def cut(shape: Shape, experts: int) -> Shape:
    """`shape` with that many experts, if it has more, and the model's number kept beside."""
    if experts >= shape.experts:
        return shape
    return replace(shape, experts=experts, model_experts=shape.model_experts or shape.experts)


def fit(shape: Shape, bytes_per_weight: float, memory: float) -> Shape:
    """`shape` with as many experts as `memory` holds when a weight takes `bytes_per_weight` of it, all told.

    Raises
    ------
    MemoryError
        Not even the experts of one token fit.
    """
    experts = int(memory / (shape.weights_per_expert * bytes_per_weight))
    if experts < shape.per_token:
        need = shape.per_token * shape.weights_per_expert * bytes_per_weight / 1e9
        raise MemoryError(
            f"{shape.name}: needs {need:.1f} GB for {shape.per_token} experts, has {memory / 1e9:.1f}"
        )
    return cut(shape, experts)
