"""The experts that `gpu_experts_mask` takes from a layer, computed where the caller's arrays are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.activation import activate
from ..arrays.host import of_a_library
from ..arrays.library import library_of
from ..arrays.spec import ArraySpec
from ..arrays.summary import object_summary
from ..arrays.types import ArrayLike, MaskLike, bfloat16
from ..config import ActivationSpec, MoEConfig
from .masks import checked_mask

__all__ = ["GPUExperts"]

_BFLOAT16 = (bfloat16,)
_FLOAT32 = (np.dtype(np.float32),)
_INTEGERS = tuple(np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))


class GPUExperts:
    """The masked experts of a layer, in bfloat16, on the device where their weights are.

    Weights and batches are torch, CuPy, JAX or NumPy arrays, all from one library and on one device. Nothing
    waits for the host and shapes do not depend on values, so calls go into CUDA graphs and under `jax.jit`.

    Every masked expert is applied to every token, and tokens not routed to it are left out of the sum: G x T
    rows, however few of the T x P slots are masked. That suits few tokens, as in decoding, and few experts.
    The results of all rows exist at once, 4 G T H bytes: split large batches. Where
    the routing weights scale the inputs (`MoEConfig.scale_inputs`), every slot is a row: P times as many.

    Parameters
    ----------
    config : MoEConfig
        Of the layer, as `KTMoEWrapper` has it under ``config``.
    gpu_experts_mask : array of bool [E], or None for none
        That of the layer. It counts as it is now; G of its elements are set.
    gate_proj, up_proj : array of bfloat16 [G, I, H]
        Weights of the masked experts alone, in ascending order: ``weights[mask]`` of those of all. Kept
        alive, not copied. `up_proj` is None exactly when the activation is not gated.
    down_proj : array of bfloat16 [G, H, I]
    gate_bias, up_bias : array of float32, float16 or bfloat16 [G, I], optional
    down_bias : array of float32, float16 or bfloat16 [G, H], optional

    Raises
    ------
    TypeError
        An argument that is not an array, of another library than `gate_proj`, or of another dtype.
    ValueError
        Another shape; `up_proj` missing, or it or `up_bias` given to an activation that is not gated.

    Notes
    -----
    Sums are in float32 and h is rounded as `ktmoe_np.reference.moe_forward` says, so `forward` keeps within
    `ktmoe_np.reference.error_bound`. torch on CUDA (2.8 or newer) and JAX multiply bfloat16 as it is; the
    others convert the weights to float32 for the time of each product.

    In JAX this may be made within a program, of weights that are the program's arguments; made outside, its
    weights are constants of the program. `ktmoe_np.jax.moe_forward` goes into the same program.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> from ktmoe_np import GPUExperts, KTMoEWrapper
    >>> mask = np.array([False, True, False])
    >>> moe = KTMoEWrapper(layer_idx=0, num_experts=3, num_experts_per_tok=2, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2", gpu_experts_mask=mask)
    >>> gate, down = np.ones((3, 2, 4), ml_dtypes.bfloat16), np.ones((3, 4, 2), ml_dtypes.bfloat16)
    >>> moe.load_weights_from_tensors(gate, None, down)
    >>> gpu = GPUExperts(moe.config, mask, gate[mask], None, down[mask])
    >>> x, ids = np.ones((1, 4), ml_dtypes.bfloat16), np.array([[0, 1]])
    >>> weights = np.array([[0.25, 0.5]], np.float32)
    >>> moe.submit_forward(x, ids, weights)    # on a GPU with its stream, as sync_forward
    >>> partial = gpu.forward(x, ids, weights)
    >>> partial
    array([[16., 16., 16., 16.]], dtype=float32)
    >>> gpu.add(moe.sync_forward(), partial).astype(float)
    array([[24., 24., 24., 24.]])
    """

    def __init__(
        self,
        config: MoEConfig,
        gpu_experts_mask: MaskLike | None,
        gate_proj: ArrayLike,
        up_proj: ArrayLike | None,
        down_proj: ArrayLike,
        *,
        gate_bias: ArrayLike | None = None,
        up_bias: ArrayLike | None = None,
        down_bias: ArrayLike | None = None,
    ) -> None:
        if not isinstance(config, MoEConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a MoEConfig")
        _check_up(config.activation, up_proj, up_bias)
        self.config = config
        #: Numbers of the masked experts, ascending.
        self.experts = np.flatnonzero(checked_mask(gpu_experts_mask, config.num_experts)).astype(np.int32)
        gate_proj = of_a_library(gate_proj, "gate_proj")
        self._library = library_of(gate_proj, "gate_proj")
        num, hidden, inter = len(self.experts), config.hidden_size, config.moe_intermediate_size
        self._gate = self._checked("gate_proj", gate_proj, _BFLOAT16, (num, inter, hidden))
        self._up = None
        if up_proj is not None:
            self._up = self._checked("up_proj", up_proj, _BFLOAT16, (num, inter, hidden))
        self._down = self._checked("down_proj", down_proj, _BFLOAT16, (num, hidden, inter))
        self._gate_bias = self._bias("gate_bias", gate_bias, (num, inter))
        self._up_bias = self._bias("up_bias", up_bias, (num, inter))
        self._down_bias = self._bias("down_bias", down_bias, (num, hidden))
        self._expert_ids = self._library.beside(self.experts, gate_proj)[:, None, None]

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        c = self.config
        count = f"{len(self.experts)} of {c.num_experts} experts"
        sizes = f"H={c.hidden_size} I={c.moe_intermediate_size} {c.activation.name}"
        return f"layer {c.layer_idx}: {count}, {sizes}, {self._library.name} arrays"

    def forward(self, hidden_states: ArrayLike, topk_ids: ArrayLike, topk_weights: ArrayLike) -> Any:
        """The part of the layer's output that is of the masked experts.

        partial[t] = sum over p of topk_weights[t, p] * expert(topk_ids[t, p])(hidden_states[t]), for those
        slots whose id is masked. With scaled inputs of expert(topk_ids[t, p])(bf(topk_weights[t, p] *
        hidden_states[t])), which count with weight 1.

        Parameters
        ----------
        hidden_states : array of bfloat16 [T, H]
        topk_ids : array of any integer dtype [T, P]
            Negative ids and experts that are not masked give nothing, and neither do ids of E or above, which
            are for the layer to refuse.
        topk_weights : array of float32 [T, P]

        Returns
        -------
        array of float32 [T, H]
            Zero for tokens without a masked expert; NaN for others whose hidden state is not finite.

        Raises
        ------
        TypeError
            An argument that is not of the weights' library, or of another dtype.
        ValueError
            Another shape.
        """
        library, c = self._library, self.config
        x = self._checked("hidden_states", hidden_states, _BFLOAT16, ("T", c.hidden_size))
        slots = (x.shape[0], c.num_experts_per_tok)
        ids = self._checked("topk_ids", topk_ids, _INTEGERS, slots)
        weights = self._checked("topk_weights", topk_weights, _FLOAT32, slots)
        if not len(self.experts):
            return library.xp.zeros_like(library.float32(x))
        with np.errstate(all="ignore"):  # infinities that finite weights sum up to are values
            is_here = self._expert_ids == library.integers(ids)[None]  # [G, T, P]
            is_routed = is_here.any(-1)
            if c.scale_inputs:
                rows = self._scaled(x, weights).reshape(-1, c.hidden_size)
                is_row = is_here.reshape(len(self.experts), -1, 1)
                y = library.filled(self._outputs(rows), ~is_row, 0.0).sum(0)
                total = y.reshape(*slots, c.hidden_size).sum(1)
            else:
                routing = library.filled(weights[None], ~is_here, 0.0).sum(-1)
                y = routing[:, :, None] * self._outputs(x)
                total = library.filled(y, ~is_routed[:, :, None], 0.0).sum(0)
            is_finite = library.xp.isfinite(library.float32(x)).all(-1)
            return library.filled(total, (is_routed.any(0) & ~is_finite)[:, None], np.nan)

    def _scaled(self, x: Any, weights: Any) -> Any:
        """The inputs of the experts in every slot, bfloat16 [T, P, H]; non-finite rows are all NaN."""
        library = self._library
        scaled = library.float32(library.round_bf16(weights[:, :, None] * library.float32(x)[:, None]))
        is_finite = library.xp.isfinite(scaled).all(-1)
        return library.round_bf16(library.filled(scaled, ~is_finite[:, :, None], np.nan))

    def _outputs(self, x: Any) -> Any:
        """Every masked expert on every row, [G, rows, H]."""
        library = self._library
        gate = _with_bias(library.product(x[None], self._gate), self._gate_bias)
        up = None
        if self._up is not None:
            up = _with_bias(library.product(x[None], self._up), self._up_bias)
        h = library.round_bf16(activate(library, self.config.activation, gate, up))
        return _with_bias(library.product(h, self._down), self._down_bias)

    def add(self, cpu_result: ArrayLike, partial: ArrayLike) -> Any:
        """Add the results of the layer and of `forward`.

        Parameters
        ----------
        cpu_result : array of bfloat16 or float32 [T, H]
            The layer's. In bfloat16 it has been rounded once already, so that the sum has the error of two
            roundings.
        partial : array of float32 [T, H]

        Returns
        -------
        array of bfloat16 [T, H]
            The sum in float32, rounded once, to nearest with ties to even.

        Raises
        ------
        TypeError
            An argument that is not of the weights' library, or of another dtype.
        ValueError
            Another shape.
        """
        library = self._library
        partial = self._checked("partial", partial, _FLOAT32, ("T", self.config.hidden_size))
        cpu_result = self._checked("cpu_result", cpu_result, (*_BFLOAT16, *_FLOAT32), tuple(partial.shape))
        with np.errstate(all="ignore"):
            return library.round_bf16(library.float32(cpu_result) + partial)

    # ---- checks ----

    def _checked(
        self, name: str, value: Any, dtypes: tuple[np.dtype[Any], ...], shape: tuple[int | str, ...]
    ) -> Any:
        """The array, which is of the weights' library and has one of these dtypes and this shape."""
        value = of_a_library(value, name)
        library = library_of(value, name)
        if library.name != self._library.name:
            found, expected = library.name, self._library.name
            raise TypeError(f"{name}: got an array of {found}, expected one of {expected}, as gate_proj is")
        ArraySpec(dtypes, shape, "integers" if dtypes is _INTEGERS else "").check(name, value)
        return value

    def _bias(self, name: str, value: Any, shape: tuple[int, int]) -> Any:
        """A bias in float32, with an axis for the tokens."""
        if value is None:
            return None
        bias = self._checked(name, value, (*_FLOAT32, np.dtype(np.float16), *_BFLOAT16), shape)
        return self._library.float32(bias)[:, None]


def _check_up(spec: ActivationSpec, up_proj: ArrayLike | None, up_bias: ArrayLike | None) -> None:
    """Refuse up_proj where it is missing or superfluous, and a bias that has no projection."""
    if spec.gated and up_proj is None:
        raise ValueError(f"up_proj: got None, expected bfloat16 [G, I, H]: activation {spec.name} is gated")
    for name, value in (("up_proj", up_proj), ("up_bias", up_bias)):
        if not spec.gated and value is not None:
            kind = type(value).__name__
            raise ValueError(f"{name}: got {kind}, expected None: activation {spec.name} is not gated")


def _with_bias(rows: Any, bias: Any) -> Any:
    return rows if bias is None else rows + bias
