"""The benches know every method, and encode the types of GGUF in the sizes that these have."""

from __future__ import annotations

import pytest

from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.formats.gguf import GGUF_FORMATS

from ._tree import ROOT


@pytest.fixture(autouse=True)
def benches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_every_method_is_benched() -> None:
    from bench.core.methods import METHODS

    known = {name for info in ext.methods() for name in info.names}
    benched = {method.library_name for method in METHODS.values()}
    assert {info.names[0] for info in ext.methods()} <= benched <= known
    for method in METHODS.values():
        products = {info.product for info in ext.methods() if method.library_name in info.names}
        assert products == {method.product} or method.operation == "sft"


def test_encoded_blocks_have_their_sizes() -> None:
    from bench.core.encoders_gguf import GGUF_FORMATS as BENCHED

    for name, fmt in BENCHED.items():
        known = GGUF_FORMATS[name.lower()]
        assert fmt.block_bytes * known.block == known.block_bytes * fmt.block
