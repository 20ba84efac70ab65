"""The benches know every method and make weights of every GGUF type, in the sizes that these have."""

from __future__ import annotations

import numpy as np
import pytest

from ktmoe_np import KTMoEWrapper
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.formats.gguf import GGUF_FORMATS
from ktmoe_np.reference import decode_gguf

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


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_every_gguf_type_is_benched_with_finite_weights(name: str) -> None:
    from bench.core.layer import Layer
    from bench.core.methods import METHODS
    from bench.core.shapes import Shape

    method = METHODS[f"LLAMAFILE-{name.upper()}"]
    layer = Layer.create(Shape("small", 512, 256, 2, 1))
    try:
        method.replace_weights(layer)
        arguments = method.encode(layer)
        for role in ("gate", "up", "down"):
            expected = getattr(layer, role).astype(np.float32)
            decoded = decode_gguf(arguments[f"{role}_proj"], arguments[f"{role}_format"].lower())
            assert np.isfinite(decoded.astype(np.float32)).all()
            error = np.linalg.norm(decoded.astype(np.float32) - expected) / np.linalg.norm(expected)
            assert error < method.tolerance
            assert 1e-3 < np.sqrt(np.mean(np.square(expected))) < 4
        assert arguments["gate_proj"].nbytes == layer.gate.size * method.bytes_per_weight
        KTMoEWrapper(0, 2, 1, 512, 256, method="LLAMAFILE").load_weights_from_tensors(**arguments)
    finally:
        layer.close()


def test_rows_that_random_blocks_do_not_fill() -> None:
    from bench.core.layer import Layer
    from bench.core.methods import METHODS
    from bench.core.shapes import Shape

    method = METHODS["LLAMAFILE-IQ1_M"]
    layer = Layer.create(Shape("narrow", 512, 128, 1, 1))
    try:
        before = [getattr(layer, role).tobytes() for role in ("gate", "up", "down")]
        method.replace_weights(layer)
        assert [getattr(layer, role).tobytes() for role in ("gate", "up", "down")] == before
        with pytest.raises(ValueError, match=r"^IQ1_M: got rows of 128, expected a multiple of 256$"):
            method.encode(layer)
    finally:
        layer.close()
