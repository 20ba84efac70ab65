"""Going on with a text, and measuring how well a model expects one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arithmetic import cross_entropy
from .decoder import MoEDecoder, checked_tokens

__all__ = ["bits_per_token", "generate", "sampled_tokens"]


def generate(
    model: MoEDecoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yield what follows a prompt, token by token.

    Parameters
    ----------
    model : MoEDecoder
        On several ranks all of them yield what the first one computes; each token is a collective call.
    prompt : sequence of int
        At least one token.
    max_new_tokens : int
    temperature : float
        0 takes the likeliest token, 1 draws as the model expects them.
    top_k : int
        Draw from this many of the likeliest tokens; 0 is all.
    top_p : float
        Draw from the fewest of the likeliest tokens whose probabilities reach this sum; 1 is all.
    min_p : float
        Draw from tokens that are at least this times as probable as the likeliest; 0 is all.
    seed : int
        Of the draws.
    stop : collection of int
        Tokens that end the text; they are not yielded.

    Raises
    ------
    ValueError
        An empty prompt, a negative number or temperature, or a `top_p` or `min_p` that is no probability.
    IndexError
        A token that the vocabulary does not have.

    Examples
    --------
    >>> model = MoEDecoder.from_pretrained()
    >>> bytes(generate(model, b"And God said, Let there be light: and there was", 27)).decode()
    ' no more a man that is with'
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 0")
    if not temperature >= 0 or math.isinf(temperature):
        raise ValueError(f"temperature: got {temperature}, expected a number from 0 on")
    if top_k < 0:
        raise ValueError(f"top_k: got {top_k}, expected at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected a number above 0, at most 1")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p: got {min_p}, expected a number from 0 to 1")
    rng = np.random.default_rng(seed)
    cache, ranks = model.new_cache(), model.ranks
    given = list(prompt)
    for _ in range(max_new_tokens):
        if ranks is None or ranks.is_first:
            (logits,) = model.forward([given], [cache], last=True)
            if temperature == 0:
                token = int(logits[-1].argmax())
            else:
                tokens, chances = sampled_tokens(logits[-1], temperature, top_k, top_p, min_p)
                token = int(rng.choice(tokens, p=chances))
        if ranks is not None:
            if not ranks.is_first:
                model.forward([], [])
            token = ranks.number_of_first(token if ranks.is_first else None)
        if token in stop:
            return
        yield token
        given = [token]


def sampled_tokens(
    logits: NDArray[np.float32], temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens to draw from, and their probabilities.

    The three filters are those of `generate`; each sees the probabilities at temperature 1 of all tokens, and
    a token stays that all of them leave. The likeliest always does.

    Parameters
    ----------
    logits : ndarray of float32 [vocab_size]
    temperature : float
        Above 0.
    top_k, top_p, min_p
        See `generate`.

    Returns
    -------
    ndarray of int64 [N], ndarray of float64 [N]
        Tokens in ascending order; probabilities at that temperature, which sum to 1.

    Examples
    --------
    >>> logits = np.log(np.array([0.1, 0.5, 0.4], np.float32))
    >>> tokens, chances = sampled_tokens(logits, 1.0, top_p=0.8)
    >>> tokens.tolist(), chances.round(3).tolist()
    ([1, 2], [0.556, 0.444])
    """
    shifted = (logits - logits.max()).astype(np.float64)
    probable = np.exp(shifted)
    probable /= probable.sum()
    kept = probable >= min_p * probable.max()
    order = np.argsort(-probable, kind="stable")
    if top_p < 1:
        before = np.cumsum(probable[order]) - probable[order]  # of those that are likelier
        kept[order[1:][before[1:] >= top_p]] = False
    if top_k:
        kept[order[top_k:]] = False
    tokens = np.flatnonzero(kept)
    chances = np.exp(shifted[tokens] / temperature)
    return tokens, chances / chances.sum()


def bits_per_token(
    model: MoEDecoder,
    tokens: Sequence[int] | NDArray[Any],
    *,
    window: int = 512,
    batch: int = 8,
    progress: Callable[[int], object] | None = None,
) -> float:
    """Cross-entropy in bits per token.

    Windows are scored independently; the first token of each is not scored.

    Parameters
    ----------
    model : MoEDecoder
        On several ranks the call is collective, and they share the windows.
    tokens : sequence of int
        At least two.
    window : int
        Tokens that are looked at together.
    batch : int
        Windows that are computed together. The result does not depend on it.
    progress : callable, optional
        Called with the number of tokens that have been done since the last call.

    Raises
    ------
    ValueError
        Fewer than two tokens, a window below two, or a batch below one.
    IndexError
        A token that the vocabulary does not have.

    Examples
    --------
    >>> model = MoEDecoder.from_pretrained()
    >>> round(bits_per_token(model, list(b"And God saw the light, that it was good")), 1)
    1.3
    """
    array = np.asarray(tokens)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"tokens: got shape {list(array.shape)}, expected [T], at least 2")
    for name, value, least in (("window", window, 2), ("batch", batch, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    parts = [array[i : i + window] for i in range(0, len(array), window)]
    parts = [part for part in parts if len(part) > 1]
    checked_tokens([array], model.config.vocab_size)  # also those that are only expected
    ranks, nats = model.ranks, list[float]()
    for i in range(0, len(parts), batch):
        some = parts[i : i + batch]
        own = some if ranks is None else ranks.share(some)
        caches = [model.new_cache() for _ in own]
        found = model.forward([part[:-1] for part in own], caches)
        losses = [
            float(cross_entropy(logits, part[1:])[0].sum()) for part, logits in zip(own, found, strict=True)
        ]
        nats += losses if ranks is None else ranks.gather_numbers(losses)
        if progress is not None:
            progress(sum(map(len, some)))
    total = 0.0
    for each in nats:  # one after the other, however many ranks there are
        total += each
    return total / sum(len(part) - 1 for part in parts) / math.log(2)
