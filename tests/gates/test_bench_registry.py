"""The benches know every method and make weights of every GGUF type, in the sizes that these have."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmoe_np import KTMoEWrapper
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.formats.gguf import GGUF_FORMATS
from ktmoe_np.reference import decode_gguf, quantize_activations

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


def test_an_interpreter_without_the_library_knows_the_methods_of_peers() -> None:
    script = (
        "import sys; sys.modules['ktmoe_np'] = None\nfrom bench.core.methods import METHODS; print(*METHODS)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
    assert {"BF16", "AMXINT4", "LLAMAFILE-Q4_K"} <= set(result.stdout.split())


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


def test_activation_dtypes_of_the_command_line() -> None:
    from bench.core.options import activation_dtypes

    assert activation_dtypes("both") == activation_dtypes("bfloat16,int8") == ["bfloat16", "int8"]
    assert activation_dtypes("int8,int8") == ["int8"]
    with pytest.raises(ArgumentTypeError, match=r"^got 'fp8', expected some of bfloat16, int8, or both$"):
        activation_dtypes("int8,fp8")


def test_blocks_of_int8_activations_are_those_of_the_library() -> None:
    from bench.core.methods import METHODS

    blocks = {name: method.activation_block for name, method in METHODS.items()}
    expected = {"BF16": 0, "FP8": 0, "AMXINT8": 0, "MOE_INT8": 128, "RAWINT4": 128, "MXFP4": 128}
    expected |= {"LLAMAFILE-F16": 0, "LLAMAFILE-Q8_0": 128, "LLAMAFILE-Q4_K": 256, "LLAMAFILE-NVFP4": 128}
    assert {name: blocks[name] for name in expected} == expected


def test_the_reference_of_int8_activations_rounds_as_the_library_does() -> None:
    from bench.core.reference import to_int8_and_back

    x = np.random.default_rng(0).standard_normal((3, 300), np.float32).astype("bfloat16").astype(np.float32)
    x[1, 128:256] = 0
    codes, scale = quantize_activations(x, 128)
    expected = codes.astype(np.float32) * np.repeat(scale, 128, axis=1)[:, :300]
    assert np.array_equal(to_int8_and_back(x, 128), expected)
    assert to_int8_and_back(x, 0) is x


def run_bench_moe(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    from bench.core import shapes
    from bench.ops import bench_moe

    monkeypatch.setitem(shapes.SHAPES, "small", shapes.Shape("small", 512, 256, 4, 2))
    options = ["--shape=small", "--seconds=0.01", "--limit-seconds=0.01", "--threads=1"]
    monkeypatch.setattr(sys, "argv", ["bench_moe", *options, *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # that of this process stays
    return bench_moe.main()


def test_activations_in_bf16_and_int8_are_timed_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "records.jsonl"
    wanted = ["--method=LLAMAFILE-IQ2_XS", "--activation-dtype=both", "--tokens=2", "--peers=numpy"]
    assert run_bench_moe(monkeypatch, *wanted, f"--out={out}") == 0
    records: list[dict[str, Any]] = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["status"] for record in records] == ["ok"] * len(records)
    bf16, int8 = (
        next(record for record in records if record.get("activation_dtype") == dtype)
        for dtype in ("bfloat16", "int8")
    )
    assert bf16["contender"].replace("bfloat16", "int8") == int8["contender"]
    assert "rel_err_int8" not in bf16
    assert bf16["rel_err"] < int8["rel_err_int8"] < int8["rel_err"]
    assert bf16["bits_of_first"]
    assert int8["bits_of_first"]
    (limits,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("limits: "))
    isa = ext.isa_info()["active"]
    assert limits.startswith(f"limits: {isa} bfloat16 x1 ")
    assert f"; {isa} int8 x1 " in limits


def test_tables_of_several_activation_dtypes_keep_them_apart() -> None:
    from bench.core.report import table

    same = {"date": "", "kind": "moe", "shape": "small", "operation": "forward", "method": "MOE_INT4"}
    same |= {"tokens": 1, "sizes": [64, 32, 4, 2], "experts_of_model": 4, "cpus": 1, "machine": "one"}
    same |= {"status": "ok", "ms": 1.0, "best_of_family": False}
    one = {"isa": "avx2", "threads": 1, "read_gb_s": 1.0, "tflop_s": 1.0, "drift": 0.0}
    records = [{**same, "family": "peer", "contender": "peer", "limits": one}]
    for isa, dtype in (("avx2", "bfloat16"), ("avx2", "int8"), ("scalar", "bfloat16"), ("scalar", "int8")):
        name, equal = f"ktmoe {isa} {dtype}", (isa, dtype) != ("scalar", "bfloat16")
        said = {"activation_dtype": dtype, "bits_of_first": equal, "limits": {**one, "isa": isa}}
        records.append({**same, "family": name, "contender": name, **said})
    lines = table(records).splitlines()
    assert lines[1].count("GB/s") == 4
    assert lines[-2:] == [
        "same bits as ktmoe avx2 bfloat16: all but ktmoe scalar bfloat16",
        "same bits as ktmoe avx2 int8: all",
    ]


@pytest.mark.parametrize(
    "saved", sorted((ROOT / "bench/results").glob("*.jsonl")), ids=lambda path: path.stem
)
def test_saved_records_are_shown(saved: Path) -> None:
    from bench.core.report import table

    records = [json.loads(line) for line in saved.read_text().splitlines()]
    assert table(records).count("\ntokens ") == len(
        {
            (r["date"], r["kind"], r["shape"], r["operation"], r["method"])
            for r in records
            if {"ms", "operation"} <= r.keys()
        }
    )


def test_loading_is_timed_with_the_methods_own_activations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_bench_moe(monkeypatch, "--load", "--activation-dtype=int8")
    assert "--load: got it with --activation-dtype, expected one of the two" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bench_moe", "bench_stream"])
def test_batches_of_speculative_decoding_are_timed_by_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "bench_moe":
        from bench.ops import bench_moe

        monkeypatch.setattr(sys, "argv", ["bench_moe"])
        tokens = bench_moe._parse().tokens
    else:
        from bench.ops import bench_stream

        tokens = [int(part) for part in bench_stream.parser().parse_args([]).tokens.split(",")]
    assert {2, 4, 8} <= set(tokens)


def test_bits_per_byte_by_weights_and_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.ops import bench_loss

    out = tmp_path / "records.jsonl"
    weights = "--weights=BF16,AMXINT8,MXFP4,LLAMAFILE-Q4_K"
    monkeypatch.setattr(sys, "argv", ["bench_loss", "--bytes=400", weights, f"--out={out}"])
    assert bench_loss.main() == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(record["weights"], record["activation_dtype"]) for record in records] == [
        ("BF16", "bfloat16"),
        ("AMXINT8", "int8"),
        *(("MXFP4", dtype) for dtype in ("bfloat16", "int8")),
        *(("LLAMAFILE-Q4_K", dtype) for dtype in ("bfloat16", "int8")),
    ]
    bits = [record["bits_per_byte"] for record in records]
    assert len(set(bits)) == len(bits)
    assert max(bits) - min(bits) < 0.1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| weights | bfloat16 | int8 |"
    assert lines[-1] == f"| Q4_K | {bits[-2]:.4f} | {bits[-1]:.4f} |"
    monkeypatch.setattr(sys, "argv", ["bench_loss", "--weights=BF17"])
    with pytest.raises(SystemExit):
        bench_loss.main()
    assert "--weights: got 'BF17', expected a method of bench_moe" in capsys.readouterr().err
