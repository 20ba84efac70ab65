"""A step of training: the cross-entropy loss of a model on some texts, and the gradients by its adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays.summary import object_summary
from ..arrays.types import ArrayLike
from ..sft.gradients import SFTGradients
from ._arithmetic import cross_entropy
from .decoder import MoEDecoder, checked_tokens

__all__ = ["Loss", "loss_and_gradients"]


@dataclass(frozen=True, eq=False, repr=False)
class Loss:
    """The results of a step."""

    bits_per_token: float  #: minus the mean log2 of the chances given to the tokens
    num_tokens: int  #: that were expected
    layers: list[SFTGradients]  #: of the mean of the natural logarithms, by the adapters of each layer

    def __repr__(self) -> str:
        return object_summary(
            self,
            lambda: (
                f"{self.bits_per_token:.4f} bits per token over {self.num_tokens} tokens, gradients of "
                f"{len(self.layers)} layers"
            ),
        )


def loss_and_gradients(model: MoEDecoder, sequences: Sequence[ArrayLike | Sequence[int]]) -> Loss:
    """Measure the cross-entropy of sequences and differentiate it by the adapters of all experts.

    The loss is minus the mean, over all tokens but the first of each sequence, of log softmax(logits)[token];
    its gradient by logits is softmax(logits) less 1 at the token, over the number of tokens.

    Parameters
    ----------
    model : MoEDecoder
        Loaded with ``mode="sft"``. On several ranks the call is collective.
    sequences : sequence of arrays of integers [T]
        At least two tokens each. On several ranks, the same on all, which share the work.

    Returns
    -------
    Loss

    Raises
    ------
    ValueError
        No sequences, one that is too short, or a model that was not loaded for training.
    IndexError
        A token that the vocabulary does not have.

    Examples
    --------
    >>> model = MoEDecoder.from_pretrained(mode="sft", lora_rank=2)
    >>> loss = loss_and_gradients(model, [list(b"And God saw the light, that it was good")])
    >>> round(loss.bits_per_token, 1), loss.num_tokens, loss.layers[0].gate_lora_a.shape
    (1.3, 38, (16, 2, 256))
    """
    arrays = [np.asarray(sequence) for sequence in sequences]
    if not arrays or any(array.ndim != 1 or len(array) < 2 for array in arrays):
        shapes = [list(array.shape) for array in arrays]
        raise ValueError(f"sequences: got shapes {shapes}, expected one or more of [T], at least 2")
    arrays = checked_tokens(arrays, model.config.vocab_size)
    count, ranks = sum(len(array) - 1 for array in arrays), model.ranks
    own = arrays if ranks is None else ranks.share(arrays)
    logits, kept = model.forward_sft([array[:-1] for array in own])
    try:
        all_nats, grads = [], []
        for found, array in zip(logits, own, strict=True):
            losses, grad = cross_entropy(found, array[1:])
            grad[np.arange(len(grad)), array[1:]] -= 1
            all_nats.append(float(losses.sum()))
            grads.append(grad / np.float32(count))
        layers = model.backward(kept, grads)
        nats = 0.0
        for each in all_nats if ranks is None else ranks.gather_numbers(all_nats):
            nats += each
    except BaseException:  # also an interrupt: what experts keep would be in the way of the next step
        model.clear_cache()
        raise
    return Loss(nats / count / math.log(2), count, layers)
