"""The adapters of a layer: those that it computes with, their first values, the checks of given ones."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np

from .. import kt_kernel_ext as ext
from ..arrays.checks import Array, as_numpy, bfloat16
from ..arrays.spec import ArraySpec
from ..arrays.types import ArrayLike
from ..config import MoEConfig
from ..formats.methods import Method
from ..layers.base import MoELayer
from ..layers.options import LayerOptions
from .adapters import load_lora_weights, save_lora_weights
from .gradients import LORA_NAMES, lora_shapes
from .options import SFTOptions

__all__ = ["LoraLayer", "copied_matrices", "first_matrix"]


class LoraLayer(MoELayer):
    """A layer of experts with adapters, before what is computed with it.

    Parameters
    ----------
    method, config, **layer
        Those of `MoELayer`.
    options : SFTOptions
        What the adapters are, and what training keeps.
    """

    _layer: ext.moe.MoE_SFT_Interface

    def __init__(
        self, method: Method, config: MoEConfig, *, options: SFTOptions, **layer: Unpack[LayerOptions]
    ) -> None:
        self.options = options
        self._lora: dict[str, Array] = {}
        self._lora_lock = ext.CallLock("update_lora_weights", of_engine=True)
        super().__init__(method, config, **layer)

    def _engine_layer(self, method: Method) -> ext.moe.MoE_SFT_Interface:
        config, options = self._engine_config(ext.moe.MOESFTConfig), self.options
        config.lora_rank = options.lora_rank
        config.lora_alpha = options.lora_alpha
        config.lora_dropout = options.lora_dropout
        config.seed = options.seed
        config.max_cache_depth = options.max_cache_depth
        config.recompute = options.recompute
        config.cache_float32 = options.cache_dtype == np.float32
        layer: ext.moe.MoE_SFT_Interface = getattr(ext.moe, method.layer)(config)
        return layer

    @property
    def lora_weights(self) -> dict[str, Array]:
        """The layer's adapters, by name, in the dtypes they were given in; read-only.

        Before any were given they are those of `init_lora_weights()`. Empty when `lora_rank` is 0. Calls that
        bring adapters of their own, `ktmoe_np.jax.moe_sft` and `ktmoe_np.torch.moe_sft`, do not change these,
        though the next pass of the layer itself computes with theirs; `update_lora_weights` with all of them
        makes both alike again.
        """
        self._init_missing()
        return {name: self._lora[name] for name in LORA_NAMES if name in self._lora}

    def init_lora_weights(
        self,
        gate_lora_a: ArrayLike | None = None,
        gate_lora_b: ArrayLike | None = None,
        up_lora_a: ArrayLike | None = None,
        up_lora_b: ArrayLike | None = None,
        down_lora_a: ArrayLike | None = None,
        down_lora_b: ArrayLike | None = None,
    ) -> None:
        """Give all adapters their first values. A first pass without it does so by itself.

        Parameters
        ----------
        gate_lora_a, up_lora_a : array of float32 or bfloat16 [E, R, H], optional
        gate_lora_b, up_lora_b : array of float32 or bfloat16 [E, I, R], optional
        down_lora_a : array of float32 or bfloat16 [E, R, I], optional
        down_lora_b : array of float32 or bfloat16 [E, H, R], optional
            Copied, by expert of the checkpoint; computed with as bfloat16. Where None, A is drawn uniformly
            from -1 / sqrt(columns) to 1 / sqrt(columns), by the seed, and B is zero.

        Raises
        ------
        TypeError
            Not an array, or another dtype.
        ValueError
            Another shape, adapters of up when the activation is not gated, or any when `lora_rank` is 0.

        Examples
        --------
        >>> import numpy as np
        >>> from ktmoe_np import KTMoEWrapper
        >>> sft = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
        ...                    moe_intermediate_size=2, mode="sft", method="AMXBF16_SFT", lora_rank=1)
        >>> sft.init_lora_weights(gate_lora_a=np.ones((2, 1, 4), np.float32))
        >>> sft.lora_weights["gate_lora_a"][0].tolist(), sft.lora_weights["gate_lora_b"][0].tolist()
        ([[1.0, 1.0, 1.0, 1.0]], [[0.0], [0.0]])
        """
        given = self._copied(gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        self._set_lora(given, all_new=True)

    def update_lora_weights(
        self,
        gate_lora_a: ArrayLike | None = None,
        gate_lora_b: ArrayLike | None = None,
        up_lora_a: ArrayLike | None = None,
        up_lora_b: ArrayLike | None = None,
        down_lora_a: ArrayLike | None = None,
        down_lora_b: ArrayLike | None = None,
    ) -> None:
        """Give some adapters new values; those that are None stay.

        Parameters and errors are those of `init_lora_weights`. Later changes of the arrays change nothing.
        Waits for passes that were submitted before.

        Raises
        ------
        ValueError
            All are None: a caller that changed its own arrays in place has to give them again.

        Examples
        --------
        >>> import numpy as np
        >>> from ktmoe_np import KTMoEWrapper
        >>> sft = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
        ...                    moe_intermediate_size=2, mode="sft", method="AMXBF16_SFT", lora_rank=1)
        >>> sft.update_lora_weights(up_lora_b=np.full((2, 2, 1), 0.5, np.float32))
        >>> sft.lora_weights["up_lora_b"][0].tolist(), sft.lora_weights["down_lora_b"].shape
        ([[0.5], [0.5]], (2, 4, 1))
        """
        given = self._copied(gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        if not given:
            raise ValueError(
                f"update_lora_weights: got no matrix, expected at least one of {', '.join(LORA_NAMES)}"
            )
        self._set_lora(given)

    def save_lora_weights(self, path: str | os.PathLike[str]) -> None:
        """Write the adapters to a safetensors file; see `ktmoe_np.sft.adapters.save_lora_weights`."""
        save_lora_weights(path, self)

    def load_lora_weights(self, path: str | os.PathLike[str]) -> None:
        """Read adapters that were saved; see `ktmoe_np.sft.adapters.load_lora_weights`."""
        load_lora_weights(path, self)

    def _copied(self, *matrices: Any) -> dict[str, Array]:
        given = dict(zip(LORA_NAMES, matrices, strict=True))
        return copied_matrices(given, self.config, self.options.lora_rank, self.cpu_infer)

    def _init_missing(self) -> None:
        """Give adapters that were never given any values their first ones."""
        if not self._lora:
            self._set_lora({})

    def _set_lora(self, given: dict[str, Array], *, all_new: bool = False) -> None:
        """Replace some adapters; those that have no values yet, or all others, get their first ones."""
        with self._lora_lock:
            if all_new or not self._lora:
                names = lora_shapes(self.config, self.options.lora_rank).keys() - given.keys()
                given = {**given, **{name: first_matrix(name, self.config, self.options) for name in names}}
            if given:
                ticket = self.cpu_infer.submit(self._layer.update_lora_weights_task(**given))
                self._lora = {**self._lora, **given}  # before the wait, which Ctrl-C may end
                self.cpu_infer.wait(ticket)


def first_matrix(name: str, config: MoEConfig, options: SFTOptions) -> Array:
    """Initial adapters: A uniform in +-1 / sqrt(its columns), B zero; float32.

    The numbers depend on the seed, the layer and the matrix alone.
    """
    shape = lora_shapes(config, options.lora_rank)[name]
    if name.endswith("_b"):
        zeros = np.zeros(shape, np.float32)
        zeros.setflags(write=False)
        return zeros
    generator = np.random.default_rng((options.seed, config.layer_idx, LORA_NAMES.index(name)))
    bound = np.float32(1.0 / math.sqrt(shape[-1]))
    numbers = generator.random(shape, np.float32)
    numbers *= 2 * bound
    numbers -= bound
    numbers.setflags(write=False)
    return numbers


def copied_matrices(
    given: Mapping[str, Any], config: MoEConfig, rank: int, engine: ext.CPUInfer
) -> dict[str, Array]:
    """Read-only copies of the matrices that were given, None left out, made by the engine's threads.

    Raises
    ------
    TypeError
        Not an array, or another dtype than float32 and bfloat16.
    ValueError
        Another shape, or a matrix that the layer does not have.
    """
    shapes = lora_shapes(config, rank)
    checked = {
        name: _checked(name, value, shapes.get(name), config, rank)
        for name, value in given.items()
        if value is not None
    }
    return {name: _copied(array, engine) for name, array in checked.items()}


def _checked(
    name: str, value: Any, shape: tuple[int, int, int] | None, config: MoEConfig, rank: int
) -> Array:
    if shape is None:
        why = "lora_rank is 0" if rank == 0 else f"activation {config.activation.name} is not gated"
        raise ValueError(f"{name}: got one, expected None: {why}")
    array = as_numpy(value, name)
    ArraySpec((np.dtype(np.float32), bfloat16), shape).check(name, array)
    return array


def _copied(array: Array, engine: ext.CPUInfer) -> Array:
    if array.flags.c_contiguous:
        copy = np.empty_like(array, order="C")
        engine.copy(array, copy)
    else:
        copy = np.array(array, order="C")
    copy.setflags(write=False)
    return copy
