"""A decoder in NumPy whose experts are layers of this library: how they are embedded in a program.

All but the experts is float32 NumPy arithmetic, one sequence at a time; the experts take the rows of all
sequences together. Both give a sequence the same bits whether it is alone or not. Loaded for training, it
goes back too: to the adapters of the experts, which are all that is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from ..arrays.summary import object_summary
from ..arrays.types import ArrayLike, PathLike
from ..config import ActivationDtype
from ..distributed.adapters import WholeAdapters
from ..distributed.base import ExpertParallelBase
from ..distributed.expert_parallel_sft import ExpertParallelSFT
from ..distributed.placement import PlacementLike
from ..experts import InferenceOverrides, Overrides, SFTOverrides
from ..formats.methods import training_name
from ..sft.adapted import AdaptedLayer
from ..sft.gradients import SFTGradients
from ..sft.peft import import_peft, peft_scale
from ._arithmetic import Floats, rms_norm, rms_norm_backward
from .activation_dtypes import SequenceDtypes
from .attention import Place
from .cache import KVCache
from .config import DecoderConfig
from .embedded import EMBEDDED_MODEL
from .experts import load_experts
from .layer import DecoderLayer, LayerPass
from .ranks import Experts, Ranks, TrainedExperts
from .reading import dense_tensors, read_layer

__all__ = ["MoEDecoder", "TrainingPass", "checked_tokens"]


#: Token ids [T].
_Tokens = ArrayLike | Sequence[int]


@dataclass(frozen=True, repr=False)
class TrainingPass:
    """The values of a forward pass for `MoEDecoder.backward`."""

    pass_id: int  #: counts the forward passes of the model
    layers: list[LayerPass]
    hidden: list[Floats]  #: what the last layer gave

    def __repr__(self) -> str:
        return object_summary(self, lambda: f"{self.pass_id}: {[len(x) for x in self.hidden]} tokens")


class MoEDecoder:
    """A language model with experts: Qwen3-MoE, Mixtral or OLMoE. Make one with `from_pretrained`.

    Attributes
    ----------
    config : DecoderConfig

    Examples
    --------
    >>> model = MoEDecoder.from_pretrained()
    >>> cache = model.new_cache()
    >>> (logits,) = model.forward([list(b"In the beginning God created the heaven and the e")], [cache])
    >>> logits.shape, chr(logits[-1].argmax())
    ((49, 256), 'a')
    """

    def __init__(
        self,
        config: DecoderConfig,
        embedding: Floats,
        layers: Sequence[DecoderLayer],
        norm: Floats,
        head: Floats,
    ) -> None:
        self.config = config
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        half = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
        self._frequencies = np.float32(config.rope_theta) ** -half
        self._num_passes = 0
        self._waiting: list[int] = []  # the passes that have not been gone back

    @overload
    @classmethod
    def from_pretrained(
        cls,
        path: PathLike | None = None,
        method: str | None = None,
        *,
        adapter: None = None,
        mode: Literal["inference"] = "inference",
        experts_path: PathLike | None = None,
        prefill_activation_dtype: ActivationDtype | None = None,
        comm: object = None,
        placement: PlacementLike = "contiguous",
        **overrides: Unpack[InferenceOverrides],
    ) -> MoEDecoder: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        path: PathLike | None = None,
        method: str | None = None,
        *,
        adapter: PathLike | None = None,
        mode: Literal["sft"],
        experts_path: PathLike | None = None,
        prefill_activation_dtype: ActivationDtype | None = None,
        comm: object = None,
        placement: PlacementLike = "contiguous",
        **overrides: Unpack[SFTOverrides],
    ) -> MoEDecoder: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        path: PathLike | None = None,
        method: str | None = None,
        *,
        adapter: PathLike,
        mode: Literal["inference", "sft"] = "inference",
        experts_path: PathLike | None = None,
        prefill_activation_dtype: ActivationDtype | None = None,
        comm: object = None,
        placement: PlacementLike = "contiguous",
        **overrides: Unpack[SFTOverrides],
    ) -> MoEDecoder: ...

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike | None = None,
        method: str | None = None,
        *,
        adapter: PathLike | None = None,
        mode: Literal["inference", "sft"] = "inference",
        experts_path: PathLike | None = None,
        prefill_activation_dtype: ActivationDtype | None = None,
        comm: object = None,
        placement: PlacementLike = "contiguous",
        **overrides: Unpack[Overrides],
    ) -> MoEDecoder:
        """Load a Hugging Face checkpoint, or a GGUF model.

        Parameters
        ----------
        path : str or path-like, optional
            The directory of a checkpoint; or a GGUF file, any file of a split one, or a directory with one.
            None takes the model that comes with the package.
        method : str, optional
            The experts' method (see `KTMoEWrapper`), for training with or without its ``_SFT``; None takes
            what they are encoded in.
        adapter : str or path-like, optional
            A directory with adapters of the experts, as PEFT or ``ktmoe finetune`` writes it. They are
            computed with by a model that is loaded for training.
        mode : str
            ``inference`` or ``sft``, whose experts have adapters.
        experts_path : str or path-like, optional
            Where the experts come from instead: a GGUF model, a directory that ``ktmoe convert`` has written,
            or another Hugging Face checkpoint.
        prefill_activation_dtype : {"bfloat16", "int8"} or dtype, optional
            What experts take the first tokens of a sequence in, those that come with an empty cache, if that
            is not the `activation_dtype` of its steps. A sequence then depends on where its prompt ends:
            steps are not what one pass over all of it gives.
        comm : communicator, optional
            The experts lie on several ranks then; see `ktmoe_np.distributed`. All ranks make the same calls,
            each with its own sequences, also none; `ranks` deals them. All else is on every rank.
        placement : {"contiguous", "strided"} or array of integers [E]
            Which rank has which experts.
        **overrides
            Any other parameter of `KTMoEWrapper`, e.g. ``cpuinfer_threads`` or ``lora_rank``. Its
            `activation_dtype` is that of whole sequences; the default is ``int8`` for layers in quantized
            GGUF types, as llama.cpp computes them, and what the method takes for all others.

        Returns
        -------
        MoEDecoder

        Raises
        ------
        FileNotFoundError
            No checkpoint there, or no adapter.
        ValueError
            A configuration or an architecture that is not supported, a tensor that is missing or of another
            shape (names file and tensor), adapters or experts of another model, or a dtype of activations
            that a layer does not have.
        ImportError
            Dense tensors of quantized GGUF types need the package gguf.
        """
        path = EMBEDDED_MODEL if path is None else path
        config = DecoderConfig.from_pretrained(path)
        if adapter is not None:
            rank, alpha = peft_scale(adapter)
            mode, overrides = "sft", {"lora_rank": rank, "lora_alpha": alpha, **overrides}
        if mode == "sft" and method is not None and "_SFT" not in method:
            method = training_name(method)
        tensors = dense_tensors(path, config)
        embedding = tensors.read("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        layers = []
        for i in range(config.num_layers):
            experts = load_experts(experts_path or path, config, i, method, mode, overrides, comm, placement)
            dtypes = SequenceDtypes.of(experts, overrides.get("activation_dtype"), prefill_activation_dtype)
            layers.append(read_layer(tensors, config, i, experts, dtypes))
        norm = tensors.read("model.norm.weight", config.hidden_size)
        head = embedding
        if not config.tie_word_embeddings:
            head = tensors.read("lm_head.weight", config.vocab_size, config.hidden_size)
        model = cls(config, embedding, layers, norm, head.T)
        if adapter is not None:
            import_peft(adapter, [_whole(experts) for experts in model.trained_experts()])
        return model

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        c = self.config
        experts = f"{c.num_experts} experts, {c.num_experts_per_tok} per token, {self.experts[0].method}"
        experts += f" with {' or '.join(dict.fromkeys(self.activation_dtypes))} activations"
        waiting = f", {len(self._waiting)} forward passes saved" if self._waiting else ""
        return f"{c.num_layers} layers of {experts}; H={c.hidden_size}, {c.vocab_size} tokens{waiting}"

    @property
    def experts(self) -> list[Experts]:
        """The experts of each layer."""
        return [layer.experts for layer in self._layers]

    @property
    def activation_dtypes(self) -> list[str]:
        """What the experts of each layer take the activations of steps in: ``bfloat16`` or ``int8``."""
        return [layer.dtypes.steps for layer in self._layers]

    def set_activation_dtype(
        self,
        activation_dtype: ActivationDtype | None = None,
        prefill_activation_dtype: ActivationDtype | None = None,
    ) -> None:
        """Choose what experts take activations in from now on; see `from_pretrained`.

        Sequences that have begun are then of two parts, as with a `prefill_activation_dtype`.

        Parameters
        ----------
        activation_dtype : {"bfloat16", "int8"} or dtype, optional
            None is the default of each layer.
        prefill_activation_dtype : {"bfloat16", "int8"} or dtype, optional

        Raises
        ------
        TypeError, ValueError
            No dtype of activations, or one that a layer does not have; nothing changes.
        """
        found = [
            SequenceDtypes.of(experts, activation_dtype, prefill_activation_dtype) for experts in self.experts
        ]
        for layer, dtypes in zip(self._layers, found, strict=True):
            layer.dtypes = dtypes

    def trained_experts(self) -> list[TrainedExperts]:
        """The experts of each layer, with adapters.

        Raises
        ------
        ValueError
            The model was not loaded with ``mode="sft"`` or an adapter.
        """
        found = [experts for experts in self.experts if isinstance(experts, TrainedExperts)]
        if len(found) < len(self._layers):
            raise ValueError(
                "model: got one whose experts have no adapters, expected one loaded with mode='sft'"
            )
        return found

    @property
    def ranks(self) -> Ranks | None:
        """The ranks that the experts lie on; None in one process."""
        first = self.experts[0]
        return Ranks(first.channel) if isinstance(first, ExpertParallelBase) else None

    @property
    def seconds_in_experts(self) -> float:
        """Time that all passes have spent in the experts."""
        return sum(layer.seconds_in_experts for layer in self._layers)

    def new_cache(self) -> KVCache:
        """Make the memory of a sequence that has not begun."""
        c = self.config
        return KVCache(c.num_layers, c.num_kv_heads, c.head_dim)

    def forward(
        self, tokens: Sequence[_Tokens], caches: Sequence[KVCache], *, last: bool = False
    ) -> list[Floats]:
        """Compute logits for the next tokens of each sequence.

        Parameters
        ----------
        tokens : sequence of arrays of integers [T]
            The next tokens of each sequence, as many as there are.
        caches : sequence of KVCache
            What each has behind it; it has `tokens` too afterwards.
        last : bool
            Compute the logits of the last tokens alone: those of a long prompt take gigabytes.

        Returns
        -------
        list of float32 [T, vocab_size]
            The logits of what follows each of the tokens; with `last` [1, vocab_size].

        Raises
        ------
        ValueError
            Other numbers of sequences and caches, a cache twice, or no tokens.
        IndexError
            A token that the vocabulary does not have.
        """
        hidden = self._hidden(_checked(tokens, caches, self.config.vocab_size), caches)
        return [self._normed(x[-1:] if last else x) @ self._head for x in hidden]

    def forward_sft(self, tokens: Sequence[_Tokens]) -> tuple[list[Floats], TrainingPass]:
        """Compute the logits of whole sequences, and keep what `backward` needs.

        Experts keep theirs too, until the backward pass of this one or `clear_cache`; so passes are
        backpropagated in reverse order, `max_cache_depth` of them at most. An exception within a pass forgets
        all that wait.

        Parameters
        ----------
        tokens : sequence of arrays of integers [T]
            Sequences from their beginning on.

        Returns
        -------
        list of float32 [T, vocab_size]
        TrainingPass

        Raises
        ------
        ValueError
            No sequences (of a model in one process), one without tokens, or a model that was not loaded with
            ``mode="sft"``.
        IndexError
            A token that the vocabulary does not have.
        RuntimeError
            `max_cache_depth` passes wait for their backward pass.
        """
        trained = self.trained_experts()
        if len(tokens) == 0 and self.ranks is None:
            raise ValueError("tokens: got no sequences, expected one or more")
        caches = [self.new_cache() for _ in tokens]
        ids = _checked(tokens, caches, self.config.vocab_size)
        depth = trained[0].options.max_cache_depth
        if len(self._waiting) >= depth:
            raise RuntimeError(
                f"forward_sft: {len(self._waiting)} passes wait for their backward pass, expected fewer than "
                f"max_cache_depth, {depth}"
            )
        tape: list[LayerPass] = []
        with self._forgetting_when_broken():
            hidden = self._hidden(ids, caches, tape)
            logits = [self._normed(x) @ self._head for x in hidden]
        self._num_passes += 1
        self._waiting.append(self._num_passes)
        return logits, TrainingPass(self._num_passes, tape, hidden)

    def backward(self, kept: TrainingPass, grad_logits: Sequence[Floats]) -> list[SFTGradients]:
        """Differentiate the sum of logits * grad_logits by the adapters.

        Expert selection is treated as constant; routing weights are differentiated.

        Parameters
        ----------
        kept : TrainingPass
            Of the last forward pass that has not been backpropagated.
        grad_logits : sequence of float32 [T, vocab_size]

        Returns
        -------
        list of SFTGradients
            Of each layer.

        Raises
        ------
        ValueError
            Other shapes than those of the logits.
        RuntimeError
            It is not the last forward pass that waits.
        """
        if not self._waiting or self._waiting[-1] != kept.pass_id:
            last = f"{self._waiting[-1]}, the last that waits" if self._waiting else "none: none waits"
            raise RuntimeError(f"kept: got pass {kept.pass_id}, expected {last}")
        shapes = [(len(x), self.config.vocab_size) for x in kept.hidden]
        if [np.shape(grad) for grad in grad_logits] != shapes:
            raise ValueError(f"grad_logits: got {[np.shape(x) for x in grad_logits]}, expected {shapes}")
        eps = self.config.rms_norm_eps
        grads = [
            rms_norm_backward(x, self._norm, eps, np.asarray(grad, np.float32) @ self._head.T)
            for x, grad in zip(kept.hidden, grad_logits, strict=True)
        ]
        results = []
        with self._forgetting_when_broken():
            for layer, layer_pass in zip(self._layers[::-1], kept.layers[::-1], strict=True):
                grads, found = layer.backward(layer_pass, grads, to_input=layer.index > 0)
                results.append(found)
        self._waiting.pop()
        return results[::-1]

    def clear_cache(self) -> None:
        """Forget forward passes that were not backpropagated."""
        self._waiting.clear()
        for experts in self.trained_experts():
            experts.clear_cache()

    @contextmanager
    def _forgetting_when_broken(self) -> Iterator[None]:
        """Layers have kept different passes when an exception, or an interrupt, comes between them."""
        try:
            yield
        except BaseException:
            self.clear_cache()
            raise

    def _hidden(
        self, ids: Sequence[NDArray[np.int64]], caches: Sequence[KVCache], tape: list[LayerPass] | None = None
    ) -> list[Floats]:
        """The outputs of the last layer for the next tokens of some sequences."""
        hidden = [self._embedding[row] for row in ids]
        places = [self._place(cache.length, len(row)) for row, cache in zip(ids, caches, strict=True)]
        for layer in self._layers:
            hidden = layer.forward(hidden, places, caches, tape)
        for row, cache in zip(ids, caches, strict=True):
            cache.advance(len(row))
        return hidden

    def _place(self, begin: int, length: int) -> Place:
        positions = np.arange(begin, begin + length)
        angles = positions.astype(np.float32)[:, None] * self._frequencies
        return Place(np.cos(angles), np.sin(angles), begin)

    def _normed(self, x: Floats) -> Floats:
        return rms_norm(x, self._norm, self.config.rms_norm_eps)


def _whole(experts: TrainedExperts) -> AdaptedLayer:
    """The layer with all of its experts."""
    return WholeAdapters(experts) if isinstance(experts, ExpertParallelSFT) else experts


def _checked(
    tokens: Sequence[_Tokens], caches: Sequence[KVCache], vocab_size: int
) -> list[NDArray[np.int64]]:
    if len(tokens) != len(caches):
        raise ValueError(f"caches: got {len(caches)}, expected one for each of {len(tokens)} sequences")
    if len({id(cache) for cache in caches}) < len(caches):
        raise ValueError("caches: got one twice, expected one for each sequence")
    return checked_tokens(tokens, vocab_size)


def checked_tokens(tokens: Sequence[_Tokens], vocab_size: int) -> list[NDArray[np.int64]]:
    """Sequences of tokens as int64.

    Raises
    ------
    ValueError
        Not integers [T], at least one.
    IndexError
        A token that the vocabulary does not have.
    """
    ids = []
    for row in tokens:
        array = np.asarray(row)
        if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iu":
            got = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"tokens: got {got}, expected integers [T], at least one")
        wrong = (array < 0) | (array >= vocab_size)
        if wrong.any():
            raise IndexError(f"tokens: got {array[wrong][0]}, expected 0 to {vocab_size - 1}")
        ids.append(array.astype(np.int64))
    return ids
