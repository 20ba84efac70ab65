"""JSON of files: a value or a ValueError that names the file, whatever the text is."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import ktmoe_np.io.json_text
from ktmoe_np.io.json_text import naming_file, parse_json, parse_json_object, read_json_object, shown

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**307), 10**307) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.io.json_text).failed == 0


@given(values)
@example(-(10**307))  # the sign is no digit
def test_what_is_json_is_read(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), "x") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "x") == value


@given(st.binary())
def test_what_is_none_is_refused(text: bytes) -> None:
    try:
        expected = json.loads(text.decode())
    except ValueError:
        with pytest.raises(ValueError, match=r"^x\.json is not JSON"):
            parse_json(text, "x.json")
    else:
        assert repr(parse_json(text, "x.json")) == repr(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "x is not JSON: Expecting value"),
        (b"\xff", "x is not JSON: 'utf-8' codec"),
        (b"\xef\xbb\xbf{}", "x is not JSON: Unexpected UTF-8 BOM"),
        (b"9" * 400, "x is not JSON: got an integer of 400 digits, expected at most 308"),
        (b"-" + b"9" * 400, "x is not JSON: got an integer of 400 digits, expected at most 308"),
        (b"9" * 10_000, "x is not JSON: got an integer of 10000 digits"),
        (b"[" * 100_000 + b"]" * 100_000, "x is not JSON that can be read: it is nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"[" + b"[],[]," * 2**21 + b"1]", "x: got 4194305 objects and arrays, expected at most 4194304"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "x is not JSON: key 'c' occurs twice"),
        (rb'["\ud800"]', "x is not JSON: a string has half a surrogate pair"),
        (rb'{"\uDFFF": 1}', "x is not JSON: a string has half a surrogate pair"),
        (rb'{"a": {"b": ["c", "\udc00\ud800"]}}', "half a surrogate pair"),
    ],
    ids=lambda value: f"{value!r:.30}",
)
def test_what_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}" if message.startswith("x") else message):
        parse_json(text, "x")


def test_whole_surrogate_pairs_are_read() -> None:
    assert parse_json(rb'["\ud83d\ude00", "\\ud800"]', "x") == ["\U0001f600", r"\ud800"]


def test_integers_fit_a_float() -> None:
    assert math.isfinite(float(parse_json(b"9" * 308, "x")))
    assert math.isfinite(float(parse_json(b"-" + b"9" * 307, "x")))


@pytest.mark.parametrize("text", [b"NaN", b"[Infinity]", b'{"a": -Infinity}', b"1e999", b"[-1e999]"])
def test_infinities_where_they_are_none(text: bytes) -> None:
    parse_json(text, "x")
    with pytest.raises(ValueError, match=r"^x is not JSON"):
        parse_json(text, "x", finite=True)


def test_only_an_object_is_an_object() -> None:
    with pytest.raises(ValueError, match="x: got list, expected a JSON object"):
        parse_json_object(b"[]", "x")


def test_values_in_messages_are_short() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "[[[[...]]]]"
    for value in ("x" * 10**6, [0] * 10**6, {i: i for i in range(10**5)}, 10**300, ["y" * 100] * 100):
        assert len(shown(value)) <= 80


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json_object(path) == {"a": 1}
    with path.open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(ValueError, match=r"x\.json: got 100000001 bytes, expected at most 100000000"):
        read_json_object(path)


@pytest.mark.parametrize("error", [ValueError("size: got 0"), TypeError("size: got 0")])
def test_errors_about_a_file_name_it(error: Exception) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: size: got 0$"), naming_file("config.json"):
        raise error
