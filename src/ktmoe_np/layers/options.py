"""Keyword arguments that several public functions take, as types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypedDict

from ..arrays.types import ArrayLike, ExpertArrays, IntegersLike, MaskLike, PathLike
from ..config import ActivationDtype, ActivationSpec, MoEConfig

__all__ = ["ActivationLike", "LayerOptions", "LayerOverrides", "WeightOptions", "WeightSource"]

#: What `ktmoe_np.parse_activation` reads.
ActivationLike: TypeAlias = str | ActivationSpec | Mapping[str, Any]


class WeightSource(NamedTuple):
    """What a layer takes of its `weight_path`."""

    config: MoEConfig  #: what the whole layer of the checkpoint must be
    experts: tuple[int, ...] | None = None  #: those of its experts that are taken, in this order; None: all


class LayerOptions(TypedDict, total=False):
    """Options of every layer beside its method and sizes; `KTMoEWrapper` documents them."""

    gpu_experts_mask: MaskLike | None
    cpuinfer_threads: int | None
    threadpool_count: int | None
    weight_path: PathLike | None
    numa_nodes: Sequence[int] | None
    group_size: int | None
    activation_dtype: ActivationDtype | None


class LayerOverrides(LayerOptions, total=False):
    """Options of a layer that override those of its checkpoint."""

    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int
    chunked_prefill_size: int
    activation: ActivationLike
    scale_inputs: bool
    physical_to_logical_map: IntegersLike | None
    experts: IntegersLike | None  #: the layer's experts are these of the checkpoint, in this order


class WeightOptions(TypedDict, total=False):
    """Keyword arguments of `load_weights_from_tensors`; each method takes those of its encoding."""

    gate_scale: ExpertArrays | None
    up_scale: ExpertArrays | None
    down_scale: ExpertArrays | None
    gate_global_scale: ArrayLike | None
    up_global_scale: ArrayLike | None
    down_global_scale: ArrayLike | None
    gate_zero: ExpertArrays | None
    up_zero: ExpertArrays | None
    down_zero: ExpertArrays | None
    gate_format: object
    up_format: object
    down_format: object
    gate_bias: ArrayLike | None
    up_bias: ArrayLike | None
    down_bias: ArrayLike | None
    progress: Callable[[int, int], object] | None
