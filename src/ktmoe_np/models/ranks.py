"""A decoder whose experts lie on several ranks: which sequences are whose, and what all have to know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import numpy as np

from ..distributed.channel import Channel
from ..distributed.expert_parallel import ExpertParallel
from ..distributed.expert_parallel_sft import ExpertParallelSFT
from ..inference.base import BaseMoEWrapper
from ..sft.base import BaseSFTMoEWrapper

__all__ = ["Experts", "Ranks", "TrainedExperts", "own_layer"]

#: The experts of a layer: of one process, or this rank's.
Experts: TypeAlias = BaseMoEWrapper | BaseSFTMoEWrapper | ExpertParallel | ExpertParallelSFT
TrainedExperts: TypeAlias = BaseSFTMoEWrapper | ExpertParallelSFT

Item = TypeVar("Item")


def own_layer(experts: Experts) -> BaseMoEWrapper | BaseSFTMoEWrapper:
    """The layer of this process."""
    return experts.layer if isinstance(experts, ExpertParallel | ExpertParallelSFT) else experts


class Ranks:
    """The ranks of a model. Every method is collective but `share`.

    Sequences are dealt in their order, neighbors to one rank: so the tokens of all ranks, one rank after
    the other, are those of one process, and sums over them have its bits.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.rank, self.size = channel.rank, channel.size

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of a sequence."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def gather_numbers(self, numbers: Sequence[float]) -> list[float]:
        """The numbers of all ranks, in the order of ranks."""
        with self._channel.call():
            parts = self._channel.gather(np.array(numbers, np.float64).tobytes())
        return [float(number) for part in parts for number in np.frombuffer(part, np.float64)]

    def number_of_first(self, number: int | None) -> int:
        """The number that the first rank has; None on the others."""
        (found,) = self.gather_numbers([] if number is None else [number])
        return int(found)
