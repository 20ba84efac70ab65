"""`ktmoe generate`: continue a text with a model and print it as it is computed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from ..models import MoEDecoder, Tokenizer, generate, load_stop_tokens, load_tokenizer
from .terminal import flush, say, say_json, say_piece

__all__ = ["run"]

#: Replaces bytes that are not UTF-8, such as those of an unfinished letter.
_UNFINISHED = "\ufffd"


def run(arguments: argparse.Namespace) -> int:
    """Print the text; always 0."""
    tokenizer = load_tokenizer(arguments.path)
    prompt = tokenizer.encode(arguments.prompt)
    if not prompt:
        raise ValueError("--prompt: got an empty text, expected at least one token")
    stop = load_stop_tokens(arguments.path)
    model = MoEDecoder.from_pretrained(
        arguments.path,
        arguments.method,
        adapter=arguments.adapter,
        experts_path=arguments.experts,
        cpuinfer_threads=arguments.threads,
        activation_dtype=arguments.activation_dtype,
    )
    tokens: list[int] = []
    started = time.perf_counter()
    following = generate(
        model,
        prompt,
        arguments.tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        stop=stop,
    )
    if not arguments.json:
        say_piece(arguments.prompt)
    for piece in _pieces(tokenizer, following, tokens):
        if not arguments.json:
            say_piece(piece)
            flush()
    seconds = time.perf_counter() - started

    value = {
        "prompt": arguments.prompt,
        "text": tokenizer.decode(tokens),
        "method": model.experts[0].method,
        "activation_dtype": model.activation_dtypes[0],
        "tokens": len(tokens),
        "seconds": seconds,
        "tokens_per_s": len(tokens) / seconds,
        "experts_of_time": model.seconds_in_experts / seconds,
    }
    if arguments.json:
        say_json(value)
    else:
        say(
            f"\n\n{value['tokens']} tokens, {value['tokens_per_s']:.1f} per second with {value['method']} "
            f"and {value['activation_dtype']} activations; "
            f"{value['experts_of_time']:.0%} of the time in the experts"
        )
    return 0


def _pieces(tokenizer: Tokenizer, following: Iterator[int], tokens: list[int]) -> Iterator[str]:
    """Yield the text of tokens, which are kept in `tokens`, as soon as its letters are whole."""
    shown = ""
    for token in following:
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith(_UNFINISHED):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(tokens)[len(shown) :]
