"""What a backend is told: everything its process needs to begin."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .shapes import Shape

__all__ = ["Spec"]


@dataclass(frozen=True)
class Spec:
    """One backend in one bench."""

    peer: str  #: the module in `bench.peers`
    family: str  #: rows of a table; of a family that has several backends at once, see `best_of_family`
    method: str
    shape: Shape
    threads: int
    max_tokens: int
    operation: str = "forward"
    isa: str = ""  #: requested instruction set, where there is a choice
    activation_dtype: str = ""  #: what weights are multiplied with, where that was requested
    options: dict[str, Any] = field(default_factory=dict)  #: the peer's own
    copies: float = 0.0  #: bytes for each byte of the bf16 weights that the backend takes for itself
    python: str = ""  #: another interpreter than the parent's
    best_of_family: bool = False  #: the table shows the fastest of the family only
    gives_limits: bool = False  #: its process also measures the machine's limits

    @property
    def label(self) -> str:
        """The backend's name in records: unique within a bench."""
        return f"{self.family} x{self.threads}"

    def but(self, **changes: Any) -> Spec:
        """Return a copy with some fields changed."""
        return replace(self, **changes)
