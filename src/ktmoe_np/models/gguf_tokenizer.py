"""The tokenizer in the header of a GGUF model, built by the package tokenizers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..io.gguf.checkpoint import GgufCheckpoint

__all__ = ["build_tokenizer", "naming_failures", "stop_tokens", "tokenizer_files", "tokenizer_text"]

_PREFIX = "tokenizer.ggml."

#: What kinds of tokens there are, by their numbers in a header.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

#: How a text is cut before pairs of bytes are merged, by ``tokenizer.ggml.pre``.
_CUTS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "qwen2": _ENDINGS + r"|\p{N}" + _OTHERS,
    "llama-bpe": _ENDINGS + r"|\p{N}{1,3}" + _OTHERS,
}

#: Of them those whose texts are normalized first, and those that take a known word without merging.
_NORMALIZED, _WHOLE_WORDS = ("qwen2",), ("llama-bpe",)

_SPACE = "\u2581"


@contextmanager
def naming_failures(path: Path, what: str) -> Iterator[None]:
    """Turn what the package tokenizers raises into a ValueError that names the file.

    It raises plain Exception, and where its own code fails, a PanicException, which is none.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{path}: {what}: {error!s:.200}") from None
        raise


def build_tokenizer(checkpoint: GgufCheckpoint) -> tuple[Any, int | None]:
    """Build the tokenizer of a model.

    Returns
    -------
    tokenizers.Tokenizer
    int or None
        The token that texts begin with, if they do.

    Raises
    ------
    ValueError
        A header without a tokenizer, or with one of a kind that is not known here.
    ImportError
        The package tokenizers is missing.
    """
    kind = checkpoint.metadata(_PREFIX + "model")
    build = {"gpt2": _byte_pairs, "llama": _pieces}.get(kind) if isinstance(kind, str) else None
    if build is None:
        raise _wrong(checkpoint, "model", kind, "gpt2 or llama")
    tokens = checkpoint.metadata(_PREFIX + "tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise _wrong(checkpoint, "tokens", tokens, "a list of strings")
    try:
        library = importlib.import_module("tokenizers")
    except ImportError as error:
        raise ImportError(f"{checkpoint.path}: its tokenizer needs: pip install tokenizers") from error
    tokenizer = build(library, checkpoint, tokens)
    _add_special(library, checkpoint, tokenizer, tokens)
    adds = checkpoint.metadata(_PREFIX + "add_bos_token")
    begins = kind == "llama" if adds is None else bool(adds)
    return tokenizer, _token(checkpoint, "bos_token_id", len(tokens)) if begins else None


def tokenizer_files(checkpoint: GgufCheckpoint) -> dict[str, str]:
    """The tokenizer as files of a Hugging Face checkpoint: names and texts; none of a header without one.

    Errors are those of `build_tokenizer`.
    """
    if checkpoint.metadata(_PREFIX + "model") is None:
        return {}
    tokenizer, bos = build_tokenizer(checkpoint)
    if bos is not None:
        processors = importlib.import_module("tokenizers").processors
        text = tokenizer_text(checkpoint, "bos")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{text} $A", special_tokens=[(text, bos)]
        )
    config = {f"{name}_token": tokenizer_text(checkpoint, name) or None for name in ("bos", "eos")}
    template = checkpoint.metadata("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps({"eos_token_id": sorted(stop_tokens(checkpoint))}) + "\n",
    }


def stop_tokens(checkpoint: GgufCheckpoint) -> frozenset[int]:
    """The tokens that end a text or a turn."""
    found = (_token(checkpoint, name, 2**31) for name in ("eos_token_id", "eot_token_id", "eom_token_id"))
    return frozenset(token for token in found if token is not None)


def tokenizer_text(checkpoint: GgufCheckpoint, name: str) -> str:
    """The text of a token such as ``bos``; empty where there is none."""
    tokens = checkpoint.metadata(_PREFIX + "tokens")
    number = _token(checkpoint, f"{name}_token_id", len(tokens) if isinstance(tokens, list) else 0)
    return "" if number is None else str(tokens[number])


def _token(checkpoint: GgufCheckpoint, name: str, num_tokens: int) -> int | None:
    value = checkpoint.metadata(_PREFIX + name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < num_tokens:
        raise _wrong(checkpoint, name, value, f"a token from 0 to {num_tokens - 1}")
    return value


def _wrong(checkpoint: GgufCheckpoint, name: str, got: object, expected: str) -> ValueError:
    return ValueError(f"{checkpoint.path}: metadata '{_PREFIX}{name}': got {got!r:.80}, expected {expected}")


def _byte_pairs(library: Any, checkpoint: GgufCheckpoint, tokens: list[str]) -> Any:
    """Merges of bytes, which are written as letters."""
    name = checkpoint.metadata(_PREFIX + "pre")
    cut = _CUTS.get("default" if name is None else name) if isinstance(name, str | None) else None
    if cut is None:
        raise _wrong(checkpoint, "pre", name, f"one of {', '.join(_CUTS)}")
    merges = checkpoint.metadata(_PREFIX + "merges")
    if merges is None:  # tokens are single bytes
        merges = []
    if not isinstance(merges, list) or not all(isinstance(merge, str) and " " in merge for merge in merges):
        raise _wrong(checkpoint, "merges", merges, "a list of pairs")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocab = {token: number for number, token in enumerate(tokens)}
    with naming_failures(checkpoint.path, "the package tokenizers refuses its tokens"):
        tokenizer = library.Tokenizer(library.models.BPE(vocab, pairs, ignore_merges=name in _WHOLE_WORDS))
    if name in _NORMALIZED:
        tokenizer.normalizer = library.normalizers.NFC()
    split = library.pre_tokenizers.Split(library.Regex(cut), behavior="isolated")
    letters = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _pieces(library: Any, checkpoint: GgufCheckpoint, tokens: list[str]) -> Any:
    """Pieces with scores, as of SentencePiece: of all neighbors those with the best score are merged."""
    scores = checkpoint.metadata(_PREFIX + "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise _wrong(checkpoint, "scores", scores, f"{len(tokens)} numbers")
    vocab = {token: number for number, token in enumerate(tokens)}
    unknown = _token(checkpoint, "unknown_token_id", len(tokens))
    with naming_failures(checkpoint.path, "the package tokenizers refuses its tokens"):
        model = library.models.BPE(
            vocab,
            _merges(tokens, scores, vocab),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
        tokenizer = library.Tokenizer(model)
    steps = [library.normalizers.Replace(" ", _SPACE)]
    ends = [library.decoders.Replace(_SPACE, " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
    if checkpoint.metadata(_PREFIX + "add_space_prefix") is not False:
        steps.insert(0, library.normalizers.Prepend(_SPACE))
        ends.append(library.decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = library.normalizers.Sequence(steps)
    tokenizer.decoder = library.decoders.Sequence(ends)
    return tokenizer


def _merges(tokens: list[str], scores: list[float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, that of the best score first."""
    best_first = sorted(range(len(tokens)), key=lambda number: -scores[number])  # stable
    return [
        (token[:cut], token[cut:])
        for token in (tokens[number] for number in best_first)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]


def _add_special(library: Any, checkpoint: GgufCheckpoint, tokenizer: Any, tokens: list[str]) -> None:
    """Tokens that are taken whole wherever their text stands."""
    kinds = checkpoint.metadata(_PREFIX + "token_type")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise _wrong(checkpoint, "token_type", kinds, f"{len(tokens)} numbers")
    added: Callable[..., Any] = library.AddedToken
    special = [
        added(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in special if token.special])
    tokenizer.add_tokens([token for token in special if not token.special])
