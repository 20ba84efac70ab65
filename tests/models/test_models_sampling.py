"""Which tokens are drawn from: the filters by their definitions, and what each does alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktmoe_np.models import MoEDecoder, generate
from ktmoe_np.models.generation import sampled_tokens

logits_of = st.lists(st.floats(-20, 20, width=16), min_size=1, max_size=12).map(
    lambda values: np.array(values, np.float32)
)


def kept_by_definition(logits: Any, top_k: int, top_p: float, min_p: float) -> list[int]:
    probable = np.exp((logits - logits.max()).astype(np.float64))
    probable /= probable.sum()
    kept, total = [], 0.0
    for rank, token in enumerate(sorted(range(len(logits)), key=lambda i: (-probable[i], i))):
        is_needed = total < top_p or rank == 0
        if is_needed and (not top_k or rank < top_k) and probable[token] >= min_p * probable.max():
            kept.append(token)
        total += probable[token]
    return sorted(kept)


@given(
    logits_of,
    st.integers(0, 13),
    st.sampled_from([1e-9, 0.3, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_the_filters_are_their_definitions(logits: Any, top_k: int, top_p: float, min_p: float) -> None:
    tokens, chances = sampled_tokens(logits, 0.7, top_k, top_p, min_p)
    expected = kept_by_definition(logits, top_k, top_p, min_p)
    # Sums in another order may differ where a probability falls on the limit itself.
    assert set(tokens.tolist()) ^ set(expected) <= set(_on_the_limit(logits, top_p))
    assert int(logits.argmax()) in tokens
    assert chances.sum() == pytest.approx(1)
    scaled = np.exp((logits[tokens] - logits.max()).astype(np.float64) / 0.7)
    np.testing.assert_allclose(chances, scaled / scaled.sum())


def _on_the_limit(logits: Any, top_p: float) -> list[int]:
    probable = np.exp((logits - logits.max()).astype(np.float64))
    probable /= probable.sum()
    order = sorted(range(len(logits)), key=lambda i: (-probable[i], i))
    before = np.cumsum(probable[order]) - probable[order]
    return [token for token, total in zip(order, before, strict=True) if abs(total - top_p) < 1e-12]


@given(logits_of)
def test_without_filters_all_tokens_stay(logits: Any) -> None:
    assert sampled_tokens(logits, 1.0)[0].tolist() == list(range(len(logits)))


@pytest.fixture(scope="module")
def model() -> MoEDecoder:
    return MoEDecoder.from_pretrained()


@pytest.mark.parametrize("only", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_likeliest_alone_is_greedy(model: MoEDecoder, only: dict[str, float]) -> None:
    prompt = list(b"And God said, Let there be light: and there was")
    greedy = list(generate(model, prompt, 8))
    assert list(generate(model, prompt, 8, temperature=1.0, seed=3, **only)) == greedy  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"top_k": -1}, "top_k: got -1, expected at least 0"),
        ({"top_p": 0.0}, "top_p: got 0.0, expected a number above 0, at most 1"),
        ({"top_p": float("nan")}, "top_p: got nan"),
        ({"min_p": 1.5}, "min_p: got 1.5, expected a number from 0 to 1"),
    ],
)
def test_options_that_are_refused(model: MoEDecoder, option: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(generate(model, [1], 1, **option))
