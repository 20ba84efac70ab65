"""Every native encoding against readers that others wrote, on the same tensors and the same files.

Decoding must agree to the bit, after rounding to bfloat16 where the definition or the reader rounds to it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_checkpoints import LAYER, config_of
from native_readers import (
    RAGGED,
    READERS,
    E,
    Tensors,
    assert_read_alike,
    assert_same_numbers,
    compressor,
    decoded,
    written,
)

from ktmoe_np.io.native import load_native
from ktmoe_np.reference import (
    decode_fp8,
    decode_fp8_perchannel,
    decode_mxfp8,
    decode_nvfp4,
    dequantize,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.crosscheck, pytest.mark.filterwarnings("ignore")]


# ---- numbers, by torch ----

EVERY_BYTE = np.arange(256, dtype=np.uint8)


def test_every_number_of_e4m3_and_e8m0() -> None:
    """All pairs of them: a row has a scale, and all numbers."""
    codes = np.tile(EVERY_BYTE, (256, 1))
    powers = np.repeat(EVERY_BYTE[:, None], 8, axis=1)
    numbers = torch.from_numpy(EVERY_BYTE).view(torch.float8_e4m3fn).float()
    scale = torch.from_numpy(EVERY_BYTE).view(torch.float8_e8m0fnu).float()
    assert_same_numbers(decode_mxfp8(codes, powers), (scale[:, None] * numbers).bfloat16())

    rows = scale[:255].numpy()
    assert_same_numbers(decode_fp8_perchannel(codes[:255], rows), scale[:255, None] * numbers)
    for bits in EVERY_BYTE[:255]:
        one = torch.tensor(bits).view(torch.float8_e8m0fnu).float()
        block = decode_fp8(codes[:1], np.full((1, 2), one.numpy(), np.float32))
        assert_same_numbers(block, (numbers[None] * one).bfloat16())


@pytest.mark.parametrize(("n", "k"), [(128, 256), (1, 1), (127, 129), (300, 200), (257, 128)])
def test_blocks_of_fp8(n: int, k: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (n, k), np.uint8)
    codes[0, 0] = 1
    scale = (rng.standard_normal((-(-n // 128), -(-k // 128))) * 1e-3).astype(np.float32)
    wide = torch.from_numpy(scale).repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    numbers = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    assert_same_numbers(decode_fp8(codes, scale), (numbers * wide).bfloat16())
    assert_same_numbers(decode_fp8_perchannel(codes, wide[:, 0].numpy()), numbers * wide[:, :1])


def test_every_number_of_e2m1_under_every_scale_of_e4m3() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    row = (np.arange(0, 16, 2) | np.arange(1, 16, 2) << 4).astype(np.uint8)
    codes = np.tile(row, (256, 1))
    numbers = unpack_fp4_from_uint8(torch.from_numpy(codes), 256, 16, dtype=torch.float32)
    scale = torch.from_numpy(EVERY_BYTE).view(torch.float8_e4m3fn).float()[:, None]
    one = np.ones((), np.float32)
    assert_same_numbers(decode_nvfp4(codes, EVERY_BYTE[:, None], one, 16), numbers * scale)


# ---- files, by those who read them too ----


@pytest.mark.parametrize(("encoding", "read"), READERS)
def test_a_file(tmp_path: Path, encoding: str, read: Callable[[Tensors], Any]) -> None:
    assert_read_alike(tmp_path, encoding, read, 128, 256)


@pytest.mark.parametrize(("inter", "hidden"), [(127, 129), (705, 384), (3, 130)])
@pytest.mark.parametrize(("encoding", "read"), RAGGED)
def test_a_file_of_ragged_blocks(
    tmp_path: Path, encoding: str, read: Callable[[Tensors], Any], inter: int, hidden: int
) -> None:
    assert_read_alike(tmp_path, encoding, read, inter, hidden)


def test_any_factor_of_nvfp4() -> None:
    """Another order of products, so equal but for roundings of float32."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize as of_group

    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, (64, 96), np.uint8)
    scale, factor = rng.integers(0, 127, (64, 12), np.uint8), np.float32(0.0123)
    _, scheme = compressor("nvfp4-pack-quantized")
    theirs = of_group(
        unpack_fp4_from_uint8(torch.from_numpy(codes), 64, 192, dtype=torch.float32),
        torch.from_numpy(scale).view(torch.float8_e4m3fn).float(),
        args=scheme.weights,
        dtype=torch.float32,
        global_scale=1 / torch.tensor(factor),
    )
    ours = dequantize(decode_nvfp4(codes, scale, factor, 192))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2.0**-21, atol=0)


def test_gpt_oss(tmp_path: Path) -> None:
    """Blocks, and rows of gate and up that take turns."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, config = written(tmp_path, "gpt_oss", 96, 160)
    stem = f"model.layers.{LAYER}.mlp.experts."
    # Transformers has them transposed.
    gate_up, down = (
        convert_moe_packed_tensors(tensors[f"{stem}{name}_blocks"], tensors[f"{stem}{name}_scales"])
        for name in ("gate_up_proj", "down_proj")
    )
    experts = load_native(tmp_path, LAYER, config)
    theirs = {"gate_proj": gate_up[..., ::2], "up_proj": gate_up[..., 1::2], "down_proj": down}
    for projection, matrices in theirs.items():
        for ours, matrix in zip(decoded(experts, projection, config), matrices, strict=True):
            assert_same_numbers(ours, matrix.T)


#: Formats that compressed-tensors writes -> the largest number of a code, and whether scales are powers of 2.
WRITES = {
    "float-quantized": (448.0, False),
    "pack-quantized": (7.0, False),
    "mxfp4-pack-quantized": (6.0, True),
    "mxfp8-quantized": (448.0, True),
    "nvfp4-pack-quantized": (6.0, False),
}


@pytest.mark.parametrize("form", WRITES)
def test_what_compressed_tensors_writes(tmp_path: Path, form: str) -> None:
    """Its quantizer makes the tensors, and it names all but the layer."""
    from safetensors.torch import save_file

    writer, scheme = compressor(form)
    largest, powers = WRITES[form]
    inter, hidden = 64, 96
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    theirs: dict[tuple[str, int], Any] = {}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        n, k = (hidden, inter) if projection == "down_proj" else (inter, hidden)
        for expert in range(E):
            weight = torch.randn(n, k, generator=generator).bfloat16()
            groups = weight.float().unflatten(1, (-1, scheme.weights.group_size or k))
            scale = groups.abs().amax(dim=2) / largest
            matrix = {"weight": weight, "weight_scale": scale.bfloat16()}
            if powers:
                matrix["weight_scale"] = torch.exp2(scale.log2().ceil()).bfloat16()
            if form.startswith("nvfp4"):
                # Scales times this are of the size of E4M3's numbers.
                factor = torch.tensor([1024.0])
                scaled = (scale * factor).to(torch.float8_e4m3fn).float()
                matrix |= {"weight_scale": scaled, "weight_global_scale": factor}
            packed = writer.compress(matrix, scheme)
            stem = f"model.layers.{LAYER}.mlp.experts.{expert}.{projection}"
            tensors |= {f"{stem}.{name}": array.contiguous() for name, array in packed.items()}
            theirs[projection, expert] = writer.decompress(packed, scheme)["weight"]
            error = torch.linalg.norm(theirs[projection, expert].float() - weight.float())
            assert error < 0.15 * torch.linalg.norm(weight.float())
    save_file(tensors, tmp_path / "model.safetensors")

    config = config_of(E, inter, hidden)
    experts = load_native(tmp_path, LAYER, config)
    for projection in experts.projections:
        for expert, ours in enumerate(decoded(experts, projection, config)):
            assert_same_numbers(ours, theirs[projection, expert])
