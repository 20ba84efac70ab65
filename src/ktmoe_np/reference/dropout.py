"""Dropout masks from a counter-based generator: every element can be drawn alone, in any order, again."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from numbers import Real

import numpy as np
from numpy.typing import NDArray

__all__ = ["Dropout", "dropout_mask", "philox4x32"]

#: What a mask is for, and the bit that says so in the counter.
_INPUTS = {"x": 0, "h": 1}

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011): four random words for a counter and a key.

    Ten times, with 64-bit products and the key stepped between the rounds::

        hi0 : lo0 = 0xD2511F53 * c0        hi1 : lo1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85                        modulo 2^32

    Parameters
    ----------
    counter : ndarray of uint32, [..., 4]
    key : ndarray of uint32, [..., 2]
        Broadcasts against `counter` but for the last axis.

    Returns
    -------
    ndarray of uint32, [..., 4]

    Examples
    --------
    >>> import numpy as np
    >>> [f"{word:08x}" for word in philox4x32(np.zeros(4, np.uint32), np.zeros(2, np.uint32))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    k0, k1 = np.moveaxis(key.astype(np.uint64), -1, 0)
    for _ in range(10):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (right >> _HALF) ^ c1 ^ k0, right & _LOW, (left >> _HALF) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def dropout_mask(
    seed: int, step: int, layer: int, tokens: int, features: int, which: str, rate: float
) -> NDArray[np.bool_]:
    """Draw which elements of a LoRA input are kept.

    For element (token t, feature f), with integer division and `which` 0 for x, 1 for h::

        key      k0 = seed mod 2^32     k1 = seed / 2^32
        counter  c0 = f / 4             c1 = t              c2 = step           c3 = 2 * layer + which
        word     philox4x32(c, k)[f mod 4]
        kept     word >= floor(rate * 2^32), compared as unsigned integers; rate is a float64

    One mask of x serves gate and up, and both masks serve every expert of a token: an element is dropped for
    the token, not for a slot. So a mask is drawn once, before tokens are spread over experts, and depends
    neither on the order of the slots nor on where an expert is stored or runs. The price: the noise of a
    token's adapters is correlated. Its mean is 0 all the same.

    Parameters
    ----------
    seed : int
        0 to 2^64 - 1.
    step : int
        Number of the training forward pass, 0 to 2^32 - 1. Every micro-batch has its own.
    layer : int
        Number of the layer in the model, 0 to 2^31 - 1.
    tokens : int
        T, up to 2^32. Token t is row t of the forward pass, however the engine cuts the pass.
    features : int
        H for x, I for h, up to 2^32.
    which : str
        ``"x"``, the input of the gate and up adapters, or ``"h"``, that of the down adapter.
    rate : float
        Probability that an element is dropped (exactly floor(rate * 2^32) / 2^32), at least 0 and below 1.

    Returns
    -------
    ndarray of bool, [T, features]
        True where the element is kept.

    Raises
    ------
    ValueError
        A number out of its range, or another `which`.
    TypeError
        Something else than an integer, or than a number for `rate`.

    Examples
    --------
    >>> dropout_mask(seed=1, step=0, layer=0, tokens=2, features=6, which="x", rate=0.5).astype(int)
    array([[1, 1, 1, 1, 1, 1],
           [1, 0, 0, 0, 1, 1]])
    """
    seed, step = _integer("seed", seed, 2**64 - 1), _integer("step", step, 2**32 - 1)
    layer = _integer("layer", layer, 2**31 - 1)
    tokens, features = _integer("tokens", tokens, 2**32), _integer("features", features, 2**32)
    if which not in _INPUTS:
        raise ValueError(f"which: got {which!r}, expected 'x' or 'h'")
    _check_rate(rate)
    counter = np.empty((tokens, (features + 3) // 4, 4), np.uint32)
    counter[..., 0] = np.arange(counter.shape[1])
    counter[..., 1] = np.arange(tokens)[:, None]
    counter[..., 2] = step
    counter[..., 3] = 2 * layer + _INPUTS[which]
    words = philox4x32(counter, np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32))
    words = words.reshape(tokens, 4 * counter.shape[1])[:, :features]
    return np.asarray(words >= np.uint32(int(rate * 2.0**32)))


@dataclass(frozen=True)
class Dropout:
    """Dropout on the inputs of the adapters, in one training forward pass of one layer.

    Dropped elements become 0. The others are not multiplied by 1 / (1 - rate), which would round them; the
    adapters' scale is instead (see `LoraWeights.scale`), which is the same function.

    Parameters
    ----------
    rate : float
        Probability that an element is dropped, at least 0 and below 1.
    seed, step, layer : int, optional
        See `dropout_mask`.

    Raises
    ------
    ValueError
        A rate out of its range. The integers are checked by `mask`.
    TypeError
        A rate that is not a number.
    """

    rate: float
    seed: int = 0
    step: int = 0
    layer: int = 0

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def mask(self, tokens: int, features: int, which: str) -> NDArray[np.bool_]:
        """Draw the mask of x or h, [T, features]; see `dropout_mask`."""
        return dropout_mask(self.seed, self.step, self.layer, tokens, features, which, self.rate)


def _check_rate(rate: float) -> None:
    if not isinstance(rate, Real):
        raise TypeError(f"rate: got {rate!r}, expected a number")
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate: got {rate!r}, expected at least 0 and below 1")


def _integer(name: str, value: int, largest: int) -> int:
    """`value` as an int from 0 to `largest`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {value!r}, expected an integer")
    number = operator.index(value)
    if not 0 <= number <= largest:
        raise ValueError(f"{name}: got {number}, expected 0 to {largest}")
    return number
