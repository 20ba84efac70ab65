"""The model on paper of several hosts: does it follow from its formulas, and does the page have its table?"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("bench.ops.model_hosts")


def test_the_page_has_the_table(model: Any) -> None:
    page = (ROOT / "docs/how-to/several-hosts.md").read_text().splitlines()
    lines = model.table()
    begin = page.index(lines[0])
    assert page[begin : begin + len(lines)] == lines


def test_one_token_of_one_expert(model: Any) -> None:
    """By hand: two hosts, two experts, each token has one of them."""
    shape = model.Shape("small", 100, 10, 2, 1)
    times = model.layer_times(shape, 2, 1, gbit=8e-6)  # 1000 bytes per second
    assert times.compute == pytest.approx(0.75 * 3000 / model.HOST.read)  # a half, three quarters of the time
    # Half of the tokens go to the other host: 2 bytes of 100 numbers and an id, and 4 bytes of them back.
    assert times.exchange == pytest.approx((204 + 400) / 2 / 1000 + 3 * model.HOST.latency)


@pytest.mark.parametrize("tokens", [1, 4096])
def test_more_is_not_slower(model: Any, tokens: int) -> None:
    for shape, _ in model.MODELS:
        for hosts in (2, 16, 64):
            exact, fast = (
                model.layer_times(shape, hosts, tokens, 25, combine=how) for how in ("exact", "fast")
            )
            assert model.layer_times(shape, hosts, tokens, 100).exchange < exact.exchange
            assert fast.exchange <= exact.exchange
            assert fast.compute == exact.compute
