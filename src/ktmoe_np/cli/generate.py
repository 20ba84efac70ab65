"""`ktmoe generate`: continue a text with a model and print it as it is computed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ..models import (
    MoEDecoder,
    Tokenizer,
    generate,
    load_chat_template,
    load_stop_tokens,
    load_tokenizer,
)
from .ranks import communicator
from .terminal import flush, say, say_json, say_piece

__all__ = ["run"]

#: Replaces bytes that are not UTF-8, such as those of an unfinished letter.
_UNFINISHED = "\ufffd"


def run(arguments: argparse.Namespace) -> int:
    """Print the text; always 0."""
    tokenizer = load_tokenizer(arguments.path)
    text = _prompt(arguments)
    prompt = tokenizer.encode(text if not arguments.chat else _conversation(arguments, text))
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
        comm=communicator(),
    )
    tokens: list[int] = []
    started = time.perf_counter()
    following = generate(
        model,
        prompt,
        arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
        stop=stop,
    )
    if not arguments.json and not arguments.chat:
        say_piece(text)
    moments: list[float] = []
    for piece in _pieces(tokenizer, _timed(following, moments), tokens):
        if not arguments.json:
            say_piece(piece)
            flush()
    seconds = time.perf_counter() - started

    prompt_seconds = moments[0] - started  # the first token needs the prompt alone
    steps, step_seconds = max(len(tokens) - 1, 0), seconds - prompt_seconds
    value = {
        "prompt": text,
        "text": tokenizer.decode(tokens),
        "method": model.experts[0].method,
        "activation_dtype": model.activation_dtypes[0],
        "tokens": len(tokens),
        "seconds": seconds,
        "tokens_per_s": len(tokens) / seconds,
        "prompt_tokens": len(prompt),
        "prompt_tokens_per_s": len(prompt) / prompt_seconds,
        "decode_tokens_per_s": steps / step_seconds if steps else None,
        "experts_of_time": model.seconds_in_experts / seconds,
    }
    if arguments.json:
        say_json(value)
    else:
        decoding = f", then {value['decode_tokens_per_s']:.1f} per second" if steps else ""
        say(
            f"\n\nprompt: {len(prompt)} tokens, {value['prompt_tokens_per_s']:.1f} per second; "
            f"text: {len(tokens)} tokens{decoding}, with {value['method']} and {value['activation_dtype']} "
            f"activations; {value['experts_of_time']:.0%} of the time in the experts"
        )
    return 0


def _prompt(arguments: argparse.Namespace) -> str:
    """The text of the prompt, from the command line, a file or standard input."""
    if arguments.prompt_file is None:
        return str(arguments.prompt)
    if arguments.prompt_file == "-":
        data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    else:
        data = Path(arguments.prompt_file).read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt-file: {arguments.prompt_file} is not UTF-8: {error.reason} at byte {error.start}"
        ) from error


def _conversation(arguments: argparse.Namespace, message: str) -> str:
    """A conversation that the model is to answer: one message of the user's."""
    template = load_chat_template(arguments.path)
    return template.render([{"role": "user", "content": message}])


def _timed(following: Iterator[int], moments: list[float]) -> Iterator[int]:
    """Yield tokens, and note when each was there; last, when it was clear that no more follow."""
    for token in following:
        moments.append(time.perf_counter())
        yield token
    moments.append(time.perf_counter())


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
