"""What layers on several ranks have in common: whose experts are where, and that all ranks agree on it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from .. import kt_kernel_ext as ext
from ..arrays.checks import at_least
from ..arrays.summary import object_summary
from ..config import MoEConfig
from ..layers.base import MoELayer
from ..passes.batch import Batch
from .channel import Channel, RankError, attempt
from .placement import Placement, PlacementLike, owners_of

__all__ = ["Combine", "ExpertParallelBase"]

#: Whether results have the bits of one process, or cost one row a token and rank.
Combine: TypeAlias = Literal["exact", "fast"]

#: What products take activations in, by the variant that ranks compare.
_DTYPES = (None, "bfloat16", "int8")


class ExpertParallelBase:
    """What layers on several ranks have in common: whose experts are where."""

    layer: MoELayer

    def __init__(
        self,
        layer: MoELayer,
        comm: object,
        *,
        placement: PlacementLike = "contiguous",
        combine: Combine = "exact",
        slice_tokens: int = 2048,
        timeout: float = 300.0,
    ) -> None:
        self._channel = channel = Channel.of(comm, timeout)
        with channel.call():
            self._number = channel.new_layer()
            given = (layer, placement, combine, slice_tokens)
            own, error = attempt(lambda: self._own_experts(*given))
            counts = channel.agree("make a layer", self._number, error, [(own or 0, 0)] * channel.size)[:, 0]
            made, error = attempt(lambda: self._make(*given, counts))
            channel.agree("make a layer", self._number, error)
            assert made is not None
            self.placement: Placement = made  #: which rank has which experts
            self._check_same_everywhere(placement)

    def _own_experts(self, layer: MoELayer, placement: object, combine: Combine, slice_tokens: int) -> int:
        """Check what needs no other rank, and give the number of this rank's experts."""
        if not isinstance(layer, self._layer_class()):
            raise TypeError(
                f"layer: got {type(layer).__name__}, expected a {self._layer_class().__name__} with the "
                "experts of this rank"
            )
        if combine not in ("exact", "fast"):
            raise ValueError(f"combine: got {combine!r}, expected 'exact' or 'fast'")
        deferred = getattr(layer, "max_deferred_experts_per_token", 0)
        if deferred:
            raise ValueError(
                f"max_deferred_experts_per_token: got {deferred}, expected 0 with experts on several ranks"
            )
        if not layer.loaded:
            raise RuntimeError(f"layer {layer.layer_idx} has no weights yet, load them first")
        self.combine: Combine = combine
        self.slice_tokens = at_least("slice_tokens", slice_tokens, 1)
        return layer.config.num_experts

    @staticmethod
    def _layer_class() -> type[MoELayer]:
        raise NotImplementedError

    def _make(
        self, layer: Any, placement: PlacementLike, combine: str, slice_tokens: int, counts: NDArray[np.int64]
    ) -> Placement:
        self.layer = layer  #: this rank's experts
        num_experts = int(counts.sum())
        made = Placement(owners_of(placement, num_experts, len(counts)), len(counts))
        owned = np.bincount(made.owners, minlength=len(counts))
        wrong = np.flatnonzero(owned != counts)
        if wrong.size:
            rank = int(wrong[0])
            raise ValueError(
                f"placement: got {owned[rank]} experts for rank {rank}, expected {counts[rank]}, those of "
                "its layer"
            )
        #: The sizes of the whole layer.
        self.config: MoEConfig = replace(layer.config, num_experts=num_experts)
        return made

    def _check_same_everywhere(self, placement: object) -> None:
        """Raise on all ranks when they do not have one layer in one way."""
        own = self._properties()
        all_ranks = [
            json.loads(text) for text in self._channel.gather(json.dumps(own).encode(), self._number)
        ]
        for rank, other in enumerate(all_ranks):
            for name, value in all_ranks[0].items():
                if other.get(name) != value:
                    raise RankError(
                        f"layer {self._number} on rank {rank}: got {name} {other.get(name)!r}, expected "
                        f"{value!r} as on rank 0"
                    )

    def _properties(self) -> dict[str, object]:
        """What has to be the same on all ranks."""
        layer = self.layer
        return {
            "version": __version__,
            "instruction set": ext.isa_info()["active"],
            "method": layer.method,
            "group size": layer.group_size,
            "activation dtype": layer.activation_dtype,
            "combine": self.combine,
            "slice_tokens": self.slice_tokens,
            "placement": self.placement.owners.tolist(),
            **{name: repr(value) for name, value in asdict(self.config).items()},
        }

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        own = f"{len(self.experts)} experts of {self.config.num_experts}"
        return f"rank {self.rank} of {self.size} with {own}: {self.layer!r}"

    @property
    def channel(self) -> Channel:
        """What the layers on this communicator share."""
        return self._channel

    @property
    def method(self) -> str:
        """How this rank's experts are encoded, as on all ranks."""
        return self.layer.method

    @property
    def activation_dtype(self) -> str:
        """What products take activations in where a call does not say: ``bfloat16`` or ``int8``."""
        return self.layer.activation_dtype

    @property
    def activation_dtypes(self) -> tuple[str, ...]:
        """What products can take activations in."""
        return self.layer.activation_dtypes

    @property
    def rank(self) -> int:
        """This process's number."""
        return self._channel.rank

    @property
    def size(self) -> int:
        """N, the number of ranks."""
        return self._channel.size

    @property
    def experts(self) -> NDArray[np.int64]:
        """The ids of this rank's experts, ascending."""
        return self.placement.experts_of(self.rank)

    @property
    def layer_idx(self) -> int:
        """The layer's number in the model."""
        return self.config.layer_idx

    def _variant(self, activation_dtype: str | None) -> int:
        return _DTYPES.index(activation_dtype)

    def _check_layer(self) -> None:
        """Raise for what may have become of the layer since it was given."""
        if self.layer.gpu_experts_mask is not None:
            raise ValueError("gpu_experts_mask: got one, expected None with experts on several ranks")
        self.layer._files.check()

    def _check_output(self, batch: Batch) -> None:
        """Raise for an output that the sums at the end of a pass cannot be written to."""
        slots = batch.ids.shape
        none, nowhere = np.empty((0, self.config.hidden_size), np.float32), np.full(slots, -1, np.int32)
        pool = self.layer.cpu_infer.backend_
        ext.moe.combine_rows_task(pool, none, nowhere, batch.weights, batch.hidden_states, batch.out)

    def _checked_ids(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """A copy of ids, which nobody writes to between the check and the exchange."""
        own = ids.copy()
        wrong = np.argwhere(own >= self.config.num_experts)
        if wrong.size:
            at = wrong[0].tolist()
            raise IndexError(
                f"topk_ids: got expert {own[tuple(at)]} at {at}, expected ids below "
                f"{self.config.num_experts} (negative ids are skipped)"
            )
        return own
