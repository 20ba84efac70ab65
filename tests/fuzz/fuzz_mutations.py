"""Mutations that keep a file parsable up to what they change, so that the checks behind it are reached."""

from __future__ import annotations

import json
import random
from typing import Any

__all__ = ["mutate"]

_NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    64,
    65,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
)
_OTHERS: tuple[Any, ...] = (
    *_NUMBERS,
    0.5,
    -0.0,
    1e308,
    1e-300,
    float("inf"),
    float("nan"),
    True,
    None,
    "",
    "0",
    "\0",
    "\ud800",
    "../x",
    "/etc",
    "F32",
    "BF16",
    "F4",
    "layer",
    [],
    {},
    [[]],
    {"": {}},
)


def mutate(target: str, data: bytes, rng: random.Random) -> bytes:
    """Change a file of a target in one to four places."""
    if target == "gguf":
        return _mutate_bytes(data, rng)
    if target == "safetensors":
        length = int.from_bytes(data[:8], "little")
        header = _mutate_json(data[8 : 8 + length], rng)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return _mutate_json(data, rng)


def _mutate_json(text: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _mutate_bytes(text, rng)
    for _ in range(rng.randint(1, 4)):
        value = _changed(value, rng)
    try:
        changed = json.dumps(value)
    except (ValueError, RecursionError):
        return _mutate_bytes(text, rng)
    if rng.random() < 0.05:  # what no value can be
        changed = changed.replace(":", rng.choice((': 1, "a":', ":" + "9" * 400 + ",", ":[", ":1e999,")), 1)
    return changed.encode()


def _changed(value: Any, rng: random.Random) -> Any:
    """`value` with one node changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        choice = rng.random()
        if choice < 0.08:
            return {name: inner for name, inner in value.items() if name != key}
        if choice < 0.16:
            name = rng.choice((key + "0", "", "__metadata__", "text_config", *map(str, _OTHERS)))
            return {**value, name: value[key]}
        if choice < 0.2:
            return {**value, rng.choice(("text_config", "llm_config")): value}
        return {**value, key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:at] + value[at:] * rng.choice((0, 2, 70))
        return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 2, 8))
    if isinstance(value, str) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(("", "0", ".", "/", "\0", "\ud8ff", "\x1b", value)) + value[at + 1 :]
    return rng.choice(_OTHERS)


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Integers of 1, 4 or 8 bytes replaced, bytes removed or repeated."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed)) if changed else 0
        choice = rng.random()
        if choice < 0.1:
            del changed[at : at + rng.choice((1, 4, 8, 64))]
        elif choice < 0.2:
            changed[at:at] = changed[at : at + rng.choice((1, 4, 8, 64))]
        else:
            size = rng.choice((1, 4, 8))
            number = rng.choice((*_NUMBERS, rng.randrange(256), rng.getrandbits(64)))
            changed[at : at + size] = (number % 256**size).to_bytes(size, "little")
    return bytes(changed)
