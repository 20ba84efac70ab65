"""Named adapters of a layer for inference: any mixture of them in one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from .. import kt_kernel_ext as ext
from ..arrays.checks import expert_ids
from ..arrays.spec import ArraySpec
from ..arrays.types import ArrayLike, IntegersLike, PathLike
from ..config import MoEConfig
from ..formats.methods import Method, find_method, training_name
from ..layers.options import LayerOptions
from ..passes.pending import is_of_a_handler
from ..sft.gradients import LORA_NAMES
from ..sft.lora import copied_matrices
from ..sft.options import SFTOptions
from ..sft.stored_adapter import read_adapter
from .expert_export import ExpertExport

__all__ = ["AdaptedExperts"]


class AdaptedExperts(ExpertExport):
    """A layer with named adapters, which the tokens of a batch choose."""

    _layer: ext.moe.MoE_SFT_Interface

    def __init__(self, method: Method, config: MoEConfig, **layer: Unpack[LayerOptions]) -> None:
        self._adapters: dict[str, int] = {}
        self._num_adapters = 0  # that there ever were: numbers are not used again
        self._adapters_lock = ext.CallLock("load_adapter", of_engine=True)
        super().__init__(method, config, **layer)

    def _engine_layer(self, method: Method) -> ext.moe.MoE_SFT_Interface:
        """The class that trains: without adapters it computes what that for inference does."""
        trained = find_method(training_name(method.name), "sft").layer
        config = self._engine_config(ext.moe.MOESFTConfig)
        config.lora_rank = 0
        layer: ext.moe.MoE_SFT_Interface = getattr(ext.moe, trained)(config)
        return layer

    @property
    def adapters(self) -> dict[str, int]:
        """The names of the loaded adapters, and the ids by which `forward` knows them."""
        return dict(self._adapters)

    def load_adapter(self, name: str, path: PathLike) -> int:
        """Load adapters of this layer from files, for tokens that name them.

        Parameters
        ----------
        name : str
            How `adapters` and `remove_adapter` call it.
        path : str or path-like
            A directory as PEFT or `ktmoe_np.sft.export_peft` writes it, or a file of `save_lora_weights`.
            What a directory has for other layers, and for attention, is left alone.

        Returns
        -------
        int
            The id, for `forward(..., adapters=ids)`. It is never used again, also after `remove_adapter`.

        Raises
        ------
        TypeError
            A name that is no string.
        ValueError
            A name that is taken, or files that are no adapters of this layer: names the file.
        FileNotFoundError
            There are no such files.

        Notes
        -----
        The ranks and scales of adapters may differ. The matrices are copied, as bfloat16. A row has the same
        bits as with its adapter alone, and as in a training layer with these adapters, whatever the adapters
        of the other tokens are. Passes with adapters take the adapters' products besides, and tokens of one
        expert with different adapters are computed one after the other.
        """
        self._check_name(name)
        found = read_adapter(path, self.config, self.weight_path)
        return self._add_adapter(name, found.lora_weights, found.options)

    def add_adapter(
        self, name: str, matrices: Mapping[str, ArrayLike], lora_alpha: float | None = None
    ) -> int:
        """Add an adapter made of arrays; see `load_adapter`.

        Parameters
        ----------
        name : str
        matrices : mapping of str to array of float32 or bfloat16
            ``gate_lora_a``, ``up_lora_a`` [E, R, H], ``gate_lora_b``, ``up_lora_b`` [E, I, R],
            ``down_lora_a`` [E, R, I] and ``down_lora_b`` [E, H, R], by expert of the checkpoint; what is
            missing is zero.
        lora_alpha : float, optional
            The adapter is scaled by lora_alpha / R; None for 2 R.

        Returns
        -------
        int
            The id.

        Raises
        ------
        TypeError
            A name that is no string, or a matrix that is no array of these dtypes.
        ValueError
            A name that is taken, no matrices, unknown ones, or other shapes.

        Examples
        --------
        >>> import ml_dtypes, numpy as np
        >>> from ktmoe_np import KTMoEWrapper
        >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
        ...                    moe_intermediate_size=2, activation="relu2")
        >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
        >>> moe.load_weights_from_tensors(gate, None, down)
        >>> a, b = np.ones((2, 1, 4), np.float32), np.ones((2, 2, 1), np.float32)
        >>> moe.add_adapter("tuned", {"gate_lora_a": a, "gate_lora_b": b}, lora_alpha=0.5), moe.adapters
        (0, {'tuned': 0})
        >>> x, weights = np.ones((2, 4), ml_dtypes.bfloat16), np.ones((2, 1), np.float32)
        >>> y = moe.forward(x, np.zeros((2, 1), int), weights, adapters=np.array([-1, 0]))
        >>> y[:, 0].astype(float).tolist()  # the second token: gate = 4 + 0.5 * 4
        [32.0, 72.0]
        """
        self._check_name(name)
        unknown = [key for key in matrices if key not in LORA_NAMES]
        if unknown:
            raise ValueError(f"matrices: got {unknown[0]!r}, expected names among {', '.join(LORA_NAMES)}")
        rank = _rank_of(matrices)
        alpha = 2.0 * rank if lora_alpha is None else lora_alpha
        return self._add_adapter(name, matrices, SFTOptions(lora_rank=rank, lora_alpha=alpha))

    def remove_adapter(self, name: str) -> None:
        """Free an adapter. Passes that were submitted before, deferred experts included, still have it.

        Raises
        ------
        ValueError
            There is none of that name.
        RuntimeError
            A pass that uses it was submitted and not waited for.
        """
        with self._adapters_lock:
            number = self._adapters.get(name)
            if number is None:
                known = ", ".join(map(repr, self._adapters)) or "none, as none is loaded"
                raise ValueError(f"name: got {name!r:.80}, expected one of {known}")
            if self._uses_adapter(number):
                raise RuntimeError(
                    f"remove_adapter: a pass of layer {self.layer_idx} with {name!r} is pending, call "
                    "sync_forward first"
                )
            del self._adapters[name]
            self.cpu_infer.wait(self.cpu_infer.submit(self._layer.remove_adapter_task(number)))

    def _uses_adapter(self, number: int) -> bool:
        """Whether a pending pass has tokens with it."""
        raise NotImplementedError

    def _check_name(self, name: object) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name: got {type(name).__name__}, expected a string")
        if name in self._adapters:
            raise ValueError(f"name: got {name!r:.80}, expected another: an adapter of that name is loaded")

    def _add_adapter(self, name: str, matrices: Mapping[str, ArrayLike], options: SFTOptions) -> int:
        rank = options.lora_rank
        copied = copied_matrices(matrices, self.config, rank, self.cpu_infer)
        with self._adapters_lock:
            self._check_name(name)  # once more: another thread may have been faster
            number = self._num_adapters
            task = self._layer.set_adapter_task(number, rank, options.lora_alpha, **copied)
            self._num_adapters += 1
            ticket = self.cpu_infer.submit(task)
            self._adapters[name] = number  # before the wait, which Ctrl-C may end
            try:
                self.cpu_infer.wait(ticket)
            except Exception as error:
                if not is_of_a_handler(error):
                    del self._adapters[name]
                raise
        return number

    def _token_adapters(
        self, adapters: IntegersLike | None, lead: tuple[int, ...]
    ) -> NDArray[np.int32] | None:
        """A copy [T] of the ids of the adapters of tokens [...], negative ones as -1.

        Raises
        ------
        TypeError
            Not integers.
        ValueError
            Another shape.
        IndexError
            An id that no loaded adapter has.
        """
        if adapters is None:
            return None
        found = expert_ids(adapters, "adapters")
        if found.shape != lead:
            ArraySpec((), lead).check("adapters", found)
        numbers = np.maximum(found.reshape(math.prod(lead)), -1)
        known = sorted(self._adapters.values())
        wrong = ~np.isin(numbers, [-1, *known])
        if wrong.any():
            at = np.argwhere(wrong.reshape(lead))[0].tolist()
            raise IndexError(
                f"adapters: got {numbers[wrong][0]} at {at}, expected the id of a loaded adapter, {known}, "
                "or a negative one for none"
            )
        return numbers.astype(np.int32)


def _rank_of(matrices: Mapping[str, Any]) -> int:
    """The rank of adapters, of whose matrices there is at least one; their shapes are checked later."""
    for name, matrix in matrices.items():
        shape = np.shape(matrix)
        if len(shape) == 3:
            return int(shape[1 if name.endswith("_a") else 2])
        raise ValueError(f"{name}: got shape {list(shape)}, expected three axes")
    raise ValueError(f"matrices: got none, expected at least one of {', '.join(LORA_NAMES)}")
