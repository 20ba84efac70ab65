"""KTMoEWrapper: the factory of expert layers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from ._arrays import Array
from ._methods import find_method
from .buffers import KExpertsCPUBuffer
from .config import MoEConfig
from .inference.base import BaseMoEWrapper
from .io import load_hf_config

__all__ = ["KTMoEWrapper"]


class KTMoEWrapper:
    """Make the wrapper of one layer of experts.

    The instance is of the class that serves `mode` and `method`; `BaseMoEWrapper` documents what it does.

    Parameters
    ----------
    layer_idx : int
        The layer's number in the model.
    num_experts : int
        E, the routed experts.
    num_experts_per_tok : int
        P, the experts of a token.
    hidden_size : int
        H.
    moe_intermediate_size : int
        I.
    gpu_experts_mask : array of bool [E], optional
        Experts that are computed elsewhere and skipped here.
    cpuinfer_threads : int, optional
        Threads of the engine; None takes the CPUs that this process may use.
    threadpool_count : int, optional
        Sub-pools of the engine; None takes one for every NUMA node.
    weight_path : str or path-like, optional
        The checkpoint that `load_weights` reads.
    chunked_prefill_size : int
        Tokens that are taken at a time; bounds the scratch memory, not the batch.
    method : str
        How weights are encoded: ``BF16``.
    mode : str
        ``inference``.
    numa_nodes : sequence of int, optional
        The NUMA node of each sub-pool; a node may be named twice.
    max_deferred_experts_per_token : int
        Of each token, how many experts the next layer's output may wait for.
    activation : str, ActivationSpec or mapping
        See `ktmoe_np.config.parse_activation`.
    group_size : int, optional
        Of methods that quantise in groups.

    Raises
    ------
    ValueError
        An unknown method, mode or activation, or sizes that cannot be.
    RuntimeError
        Another engine than the one that lives is asked for.

    Examples
    --------
    >>> moe = KTMoEWrapper(layer_idx=3, num_experts=8, num_experts_per_tok=2, hidden_size=64,
    ...                    moe_intermediate_size=32, method="BF16")
    >>> type(moe).__name__, moe.loaded
    ('NativeMoEWrapper', False)
    """

    def __new__(  # type: ignore[misc]  # a factory: instances are of the method's class
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: Any = None,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        weight_path: str | os.PathLike[str] | None = None,
        chunked_prefill_size: int = 4096,
        method: str = "BF16",
        mode: str = "inference",
        numa_nodes: Sequence[int] | None = None,
        max_deferred_experts_per_token: int = 0,
        activation: Any = "silu",
        group_size: int | None = None,
    ) -> BaseMoEWrapper:
        """Make the wrapper; see the class."""
        found = find_method(method, mode)
        if group_size is not None:
            raise ValueError(f"group_size: got {group_size}, expected None: method {method!r} has no groups")
        module, name = found.wrapper.split(":")
        wrapper = getattr(importlib.import_module(f".{module}", __package__), name)
        made: BaseMoEWrapper = wrapper(
            found,
            layer_idx=layer_idx,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
            gpu_experts_mask=gpu_experts_mask,
            cpuinfer_threads=cpuinfer_threads,
            threadpool_count=threadpool_count,
            weight_path=weight_path,
            chunked_prefill_size=chunked_prefill_size,
            numa_nodes=numa_nodes,
            max_deferred_experts_per_token=max_deferred_experts_per_token,
            activation=activation,
        )
        return made

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        layer_idx: int = 0,
        method: str | None = None,
        mode: str = "inference",
        **overrides: Any,
    ) -> BaseMoEWrapper:
        """Make and load a layer of a Hugging Face checkpoint; ``config.json`` gives the sizes.

        Parameters
        ----------
        path : str or path-like
            The directory of the checkpoint.
        layer_idx : int
            The layer.
        method : str, optional
            None takes what the checkpoint is encoded in.
        mode : str
            ``inference``.
        **overrides
            Any other parameter of `KTMoEWrapper`.

        Raises
        ------
        FileNotFoundError
            No checkpoint there.
        ValueError
            A config or a layer that is not what it should be.
        """
        config = MoEConfig.from_hf_config(load_hf_config(path), layer_idx)
        sizes = {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "hidden_size": config.hidden_size,
            "moe_intermediate_size": config.moe_intermediate_size,
            "activation": config.activation,
        }
        overrides = {**sizes, "weight_path": path, **overrides}
        physical_to_logical_map = overrides.pop("physical_to_logical_map", None)
        moe: BaseMoEWrapper = cls(layer_idx=layer_idx, method=method or "BF16", mode=mode, **overrides)
        moe.load_weights(physical_to_logical_map)
        return moe

    @staticmethod
    def set_capture_batch_sizes(capture_batch_sizes: Sequence[int]) -> None:
        """See `KExpertsCPUBuffer.set_capture_batch_sizes`."""
        KExpertsCPUBuffer.set_capture_batch_sizes(capture_batch_sizes)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """See `KExpertsCPUBuffer.get_capture_batch_sizes`."""
        return KExpertsCPUBuffer.get_capture_batch_sizes()

    @staticmethod
    def clear_buffer_cache() -> None:
        """See `KExpertsCPUBuffer.clear_buffer_cache`."""
        KExpertsCPUBuffer.clear_buffer_cache()

    @staticmethod
    def drain_deferred() -> Array | None:
        """See `BaseMoEWrapper.drain_deferred`."""
        return BaseMoEWrapper.drain_deferred()
