"""The arguments of the reference, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..config import ActivationSpec, parse_activation
from .activation import round_bf16
from .integer_matrix import IntegerMatrix
from .quantized import QUANTIZED, Int4Matrix, Int8Matrix, QuantizedMatrix
from .weights import ACTIVATION_DTYPES, PRODUCTS, ExpertWeights

__all__ = ["FLOATS", "ForwardInputs", "check_array", "check_inputs", "check_out_dtype", "finite_rows"]

AnyArray = NDArray[Any]
#: `[E, N, K]`, or E arrays `[N, K]`.
Weights = AnyArray | Sequence[AnyArray] | QuantizedMatrix | IntegerMatrix

#: The matrices among `Weights`.
_MATRICES = (*QUANTIZED, IntegerMatrix)

_NUMBER_DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float16))
_BIAS_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
#: What an exact computation takes for every array of numbers, and any for its base.
FLOATS = (*_BIAS_DTYPES, np.dtype(np.float64))


@dataclass(frozen=True)
class ForwardInputs:
    """Checked arguments of one forward pass. Weights and biases are those of the physical experts."""

    x: AnyArray  # bf16 [T, H]
    ids: NDArray[np.int64]  # [T, P]; -1 where a slot is skipped
    routing: NDArray[np.float32]  # [T, P]
    gate: list[ExpertWeights]  # E of [I, H]
    up: list[ExpertWeights] | None
    down: list[ExpertWeights]  # E of [H, I]
    gate_bias: AnyArray | None  # [E, I]
    up_bias: AnyArray | None
    down_bias: AnyArray | None  # [E, H]
    activation: ActivationSpec
    base: AnyArray | None  # [T, H]
    order: NDArray[np.int64]  # [E], the logical expert behind each physical one
    scale_inputs: bool = False

    @property
    def combine_weights(self) -> AnyArray:
        """The weight of each slot's output in its token's sum, [T, P]."""
        return np.ones_like(self.routing) if self.scale_inputs else self.routing

    def expert_rows(
        self, token: NDArray[np.intp], slot: NDArray[np.intp], *, exact: bool = False
    ) -> AnyArray:
        """The inputs of the experts in the slots (token, slot), [M, H]: rows of x, or bf(w x).

        A scaled row that is not finite is all NaN. With `exact`, w x is in float64 and not rounded.
        """
        x = self.x[token]
        if not self.scale_inputs:
            return x
        dtype = np.float64 if exact else np.float32
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            scaled = self.routing[token, slot, None].astype(dtype) * x.astype(dtype)
            scaled = scaled if exact else round_bf16(scaled).astype(ml_dtypes.bfloat16)
        return np.where(finite_rows(scaled)[:, None], scaled, scaled.dtype.type(np.nan))


def finite_rows(x: AnyArray) -> NDArray[np.bool_]:
    """Whether each row of x contains only finite numbers."""
    return np.asarray(np.isfinite(x.astype(np.float64)).all(axis=1))


class LayerOptions(TypedDict, total=False):
    """The keywords that `moe_forward` and `error_bound` share; see the former."""

    gate_bias: AnyArray | None
    up_bias: AnyArray | None
    down_bias: AnyArray | None
    activation: str | ActivationSpec | Mapping[str, Any]
    gpu_experts_mask: AnyArray | None
    physical_to_logical_map: AnyArray | None
    base: AnyArray | None
    product: str
    activation_dtype: str | None
    scale_inputs: bool


def check_inputs(
    hidden_states: AnyArray,
    topk_ids: AnyArray,
    topk_weights: AnyArray,
    gate_proj: Weights,
    up_proj: Weights | None,
    down_proj: Weights,
    *,
    gate_bias: AnyArray | None = None,
    up_bias: AnyArray | None = None,
    down_bias: AnyArray | None = None,
    activation: str | ActivationSpec | Mapping[str, Any] = "silu",
    gpu_experts_mask: AnyArray | None = None,
    physical_to_logical_map: AnyArray | None = None,
    base: AnyArray | None = None,
    product: str = "bfloat16",
    activation_dtype: str | None = None,
    scale_inputs: bool = False,
    exact: bool = False,
) -> ForwardInputs:
    """Check the arguments of `moe_forward`; see there for what they are and what is raised.

    With `exact`, an array of numbers may have any float dtype.
    """
    use = _Use.of(product, activation_dtype, exact)
    bf16, float32, biases = (FLOATS,) * 3 if exact else ((ml_dtypes.bfloat16,), (np.float32,), _BIAS_DTYPES)
    if not isinstance(scale_inputs, bool):
        raise TypeError(f"scale_inputs: got {scale_inputs!r}, expected a bool")
    spec = parse_activation(activation)
    if spec.gated and up_proj is None:
        raise ValueError(f"up_proj: got None, expected [E, I, H]: activation {spec.name} is gated")
    if not spec.gated and (up_proj is not None or up_bias is not None):
        name, got = ("up_bias", up_bias) if up_proj is None else ("up_proj", up_proj)
        raise ValueError(
            f"{name}: got {type(got).__name__}, expected None: activation {spec.name} has one projection, "
            "given as gate_proj"
        )
    x = check_array("hidden_states", hidden_states, ("T", "H"), {}, *bf16)
    sizes = {"T": x.shape[0], "H": x.shape[1]}
    ids = np.asarray(topk_ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"topk_ids: got {ids.dtype}, expected an integer dtype")
    ids = check_array("topk_ids", ids, ("T", "P"), sizes, ids.dtype)
    sizes["P"] = ids.shape[1]
    routing = check_array("topk_weights", topk_weights, ("T", "P"), sizes, *float32)
    gate = _experts("gate_proj", gate_proj, ("I", "H"), sizes, use)
    up = None if up_proj is None else _experts("up_proj", up_proj, ("I", "H"), sizes, use)
    down = _experts("down_proj", down_proj, ("H", "I"), sizes, use)
    use.check_found([gate, up or [], down])
    order = _physical_order(physical_to_logical_map, sizes["E"])
    return ForwardInputs(
        x=x,
        ids=_computed_ids(ids, gpu_experts_mask, sizes["E"]),
        routing=routing,
        gate=[gate[e] for e in order],
        up=None if up is None else [up[e] for e in order],
        down=[down[e] for e in order],
        gate_bias=_bias("gate_bias", gate_bias, ("E", "I"), sizes, order, *biases),
        up_bias=_bias("up_bias", up_bias, ("E", "I"), sizes, order, *biases),
        down_bias=_bias("down_bias", down_bias, ("E", "H"), sizes, order, *biases),
        activation=spec,
        base=None if base is None else check_array("base", base, ("T", "H"), sizes, *FLOATS),
        order=order,
        scale_inputs=scale_inputs,
    )


def check_out_dtype(out_dtype: DTypeLike) -> np.dtype[Any]:
    """`out_dtype` as a dtype that a result may have."""
    dtype = np.dtype(out_dtype)
    if dtype not in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"out_dtype: got {dtype}, expected bfloat16, float32 or float64")
    return dtype


def check_array(
    name: str, value: object, letters: tuple[str, ...], sizes: Mapping[str, int], *dtypes: Any
) -> AnyArray:
    """`value`, an array of one of `dtypes` and of the letters' `sizes`; a letter without a size is free."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a NumPy array")
    if value.dtype not in [np.dtype(dtype) for dtype in dtypes]:
        raise TypeError(
            f"{name}: got {value.dtype}, expected {' or '.join(np.dtype(d).name for d in dtypes)}"
        )
    _check_shape(name, value.shape, letters, sizes)
    return value


def _check_shape(
    name: str, shape: tuple[int, ...], letters: tuple[str, ...], sizes: Mapping[str, int]
) -> None:
    expected = [sizes.get(letter) for letter in letters]
    fits = len(shape) == len(letters) and all(
        want is None or want == got for want, got in zip(expected, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(
            letter if n is None else f"{letter}={n}" for letter, n in zip(letters, expected, strict=True)
        )
        raise ValueError(f"{name}: got shape {list(shape)}, expected [{wanted}]")


class _Use(NamedTuple):
    """What the weights of a layer are multiplied with."""

    product: str
    int8_activations: bool  #: in blocks, where weights are integers
    exact: bool

    @classmethod
    def of(cls, product: str, activation_dtype: str | None, exact: bool) -> _Use:
        """Check the arguments of these names."""
        if product not in PRODUCTS:
            raise ValueError(f"product: got {product!r}, expected {' or '.join(PRODUCTS)}")
        if activation_dtype is not None and activation_dtype not in ACTIVATION_DTYPES:
            raise ValueError(
                f"activation_dtype: got {activation_dtype!r}, expected None, {' or '.join(ACTIVATION_DTYPES)}"
            )
        if product == "int8" and activation_dtype == "bfloat16":
            raise ValueError("activation_dtype: got 'bfloat16', expected None or 'int8' for product int8")
        return cls(product, activation_dtype == "int8" and product != "int8", exact)

    def check_found(self, projections: list[list[ExpertWeights]]) -> None:
        """Raise ValueError if no projection supports int8 activations."""
        weights = [one for projection in projections for one in projection]
        if self.int8_activations and not self.exact and all(one.integers is None for one in weights):
            raise ValueError(
                "activation_dtype: got 'int8', expected None or 'bfloat16': no projection has integer weights"
            )


def _experts(
    name: str, value: Weights, letters: tuple[str, str], sizes: dict[str, int], use: _Use
) -> list[ExpertWeights]:
    """E matrices; fills in E and I of `sizes` when they are still unknown."""
    if not isinstance(value, (np.ndarray, Sequence, *_MATRICES)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an array or a sequence of arrays")
    if use.product == "int8" and not isinstance(value, (Int8Matrix, Int4Matrix)):
        raise TypeError(
            f"{name}: got {type(value).__name__}, expected an Int8Matrix or Int4Matrix for product int8"
        )
    if isinstance(value, (np.ndarray, *_MATRICES)) and len(value.shape) != 3:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected [E, {letters[0]}, {letters[1]}]")
    num_experts = value.shape[0] if isinstance(value, _MATRICES) else len(value)
    if num_experts != sizes.setdefault("E", num_experts) or not num_experts:
        raise ValueError(f"{name}: got {num_experts} experts, expected {sizes['E'] or 'some'}")
    experts = []
    for e in range(num_experts):
        if isinstance(value, _MATRICES):
            _check_shape(f"{name}[{e}]", value.shape[1:], letters, sizes)
            how = {"exact": use.exact, "int8_activations": use.int8_activations}
            experts.append(ExpertWeights.of(value[e], use.product, **how))
        else:
            experts.append(_numbers(f"{name}[{e}]", value[e], letters, sizes, use.exact))
        sizes.setdefault("I", experts[-1].shape[0])
    return experts


def _numbers(
    name: str, value: object, letters: tuple[str, str], sizes: Mapping[str, int], exact: bool
) -> ExpertWeights:
    """A matrix of numbers, rounded to bfloat16 unless the computation is exact."""
    array = check_array(name, value, letters, sizes, *(FLOATS if exact else _NUMBER_DTYPES))
    if exact or array.dtype == ml_dtypes.bfloat16:
        return ExpertWeights(array)
    return ExpertWeights(round_bf16(array).astype(ml_dtypes.bfloat16))


def _bias(
    name: str,
    value: object,
    letters: tuple[str, str],
    sizes: Mapping[str, int],
    order: NDArray[np.int64],
    *dtypes: Any,
) -> AnyArray | None:
    return None if value is None else check_array(name, value, letters, sizes, *dtypes)[order]


def _physical_order(mapping: object, num_experts: int) -> NDArray[np.int64]:
    """Return the logical expert behind each physical one."""
    if mapping is None:
        return np.arange(num_experts)
    order = check_array("physical_to_logical_map", mapping, ("E",), {"E": num_experts}, np.int64)
    wrong = np.flatnonzero((order < 0) | (order >= num_experts))
    if wrong.size:
        at = wrong[0]
        raise ValueError(
            f"physical_to_logical_map: got expert {order[at]} at {at}, expected 0 to {num_experts - 1}"
        )
    return order


def _computed_ids(ids: AnyArray, mask: object, num_experts: int) -> NDArray[np.int64]:
    """`ids` with -1 for every slot that is skipped."""
    wrong = np.argwhere(ids >= num_experts)
    if wrong.size:
        t, p = wrong[0]
        raise IndexError(
            f"topk_ids: got expert {ids[t, p]} at [{t}, {p}], expected ids below {num_experts} "
            "(negative ids are skipped)"
        )
    computed = np.where(ids < 0, -1, ids).astype(np.int64)
    if mask is not None:
        on_gpu = check_array("gpu_experts_mask", mask, ("E",), {"E": num_experts}, np.bool_)
        computed[(computed >= 0) & on_gpu[computed]] = -1
    return computed
