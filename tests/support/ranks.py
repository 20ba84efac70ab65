"""Ranks in threads of the test's process, and layers that are cut into their experts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st
from layers import AnyArray, Layer
from native_layers import NativeLayer

from ktmoe_np.distributed import ThreadCommunicator
from ktmoe_np.distributed.placement import PlacementLike, owners_of
from ktmoe_np.reference import ScaledMatrix

__all__ = ["draw_placement", "experts_of", "on_ranks", "picked"]

Value = TypeVar("Value")


def on_ranks(num_ranks: int, function: Callable[[Any], Value]) -> list[Value]:
    """The results of a function that every rank calls with its communicator; raises the first exception."""
    with ThreadPoolExecutor(num_ranks) as threads:
        running = [threads.submit(function, comm) for comm in ThreadCommunicator.create(num_ranks)]
        return [one.result(timeout=60) for one in running]


def experts_of(placement: PlacementLike, num_experts: int, comm: Any) -> AnyArray:
    """The experts of a rank."""
    found: AnyArray = np.flatnonzero(owners_of(placement, num_experts, comm.size) == comm.rank)
    return found


def picked(layer: Layer, experts: AnyArray) -> Layer:
    """The layer of some experts, in whatever encoding it is loaded from."""
    names = ("gate_proj", "up_proj", "down_proj", "gate_bias", "up_bias", "down_bias")
    changes: dict[str, Any] = {name: _picked(getattr(layer, name), experts) for name in names}
    if isinstance(layer, NativeLayer):
        changes["arguments"] = {name: _picked(value, experts) for name, value in layer.arguments.items()}
    return replace(layer, **changes)


def _picked(value: Any, experts: AnyArray) -> Any:
    if isinstance(value, np.ndarray):
        return value[experts]
    if isinstance(value, ScaledMatrix):
        return ScaledMatrix(value.codes[experts], value.channel_scale[experts])
    return [value[e] for e in experts] if isinstance(value, list | tuple) else value


@st.composite
def draw_placement(draw: Any, num_experts: int, num_ranks: int) -> Any:
    """A name, or owners of which each has an expert."""
    names = st.sampled_from(["contiguous", "strided"])
    rest = st.lists(
        st.integers(0, num_ranks - 1), min_size=num_experts - num_ranks, max_size=num_experts - num_ranks
    )
    owners = rest.map(lambda some: [*range(num_ranks), *some]).flatmap(st.permutations)
    return draw(names | owners)
