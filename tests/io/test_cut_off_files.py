"""Mapped files that are cut off while layers compute from them: an error that names the file, no SIGBUS."""

from __future__ import annotations

import doctest
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_checkpoints
import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint
from fake_cuda_runs import run as run_with_driver
from layers import assert_same_bits, run_python
from numpy.typing import NDArray

import ktmoe_np.io.mapped
from ktmoe_np import KTMoEWrapper
from ktmoe_np.io import SafetensorsCheckpoint, SafetensorsFile, load_experts
from ktmoe_np.io.gguf.experts import GgufCheckpoint
from ktmoe_np.io.mapped import MappedFiles
from ktmoe_np.io.safetensors.writer import write_safetensors

E, I, H, P = 3, 32, 64, 2  # noqa: E741
SIZES: dict[str, Any] = {
    "num_experts": E,
    "num_experts_per_tok": P,
    "hidden_size": H,
    "moe_intermediate_size": I,
}

rng = np.random.default_rng(0)
X = rng.standard_normal((5, H)).astype(ml_dtypes.bfloat16)
BATCH = X, rng.integers(0, E, (5, P)), rng.random((5, P), np.float32)


class CutOff:
    """A file that is cut off within a block, and whole again behind it."""

    def __init__(self, path: Path) -> None:
        self._path, self._content = path, path.read_bytes()

    def __enter__(self) -> None:
        os.truncate(self._path, 10)

    def __exit__(self, *_: object) -> None:
        with self._path.open("r+b") as file:  # in place: the mapping stays that of this file
            file.write(self._content)


def assert_told(path: Path, call: Callable[[], object]) -> None:
    """A call fails when the file is cut off, names it, and works again behind that."""
    with CutOff(path), pytest.raises(OSError, match=r"got 10 bytes, expected the \d+ that are") as caught:
        call()
    assert str(caught.value).startswith(f"{path}: ")


# ---- layers whose weights stay in their files ----


def bfloat16_layer(directory: Path, **options: Any) -> tuple[Any, list[Path]]:
    write_checkpoint(directory, "qwen3_moe", [0], E, I, H, num_shards=2)
    return KTMoEWrapper.from_pretrained(directory, **options), sorted(directory.glob("*.safetensors"))


def quantized_layer(directory: Path, **options: Any) -> tuple[Any, list[Path]]:
    first, _ = bfloat16_layer(directory / "source", method="AMXINT4")
    file = first.save_weights(directory / "int4")
    moe = KTMoEWrapper(0, **SIZES, method="AMXINT4", weight_path=directory / "int4")
    moe.load_weights()
    return moe, [file]


def native_layer(directory: Path, **options: Any) -> tuple[Any, list[Path]]:
    tensors: dict[str, Any] = {}
    for e in range(E):
        for name, (rows, columns) in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items():
            stem = f"model.layers.0.mlp.experts.{e}.{name}_proj"
            tensors[f"{stem}.weight_packed"] = rng.integers(0, 256, (rows, columns // 2), np.uint8)
            tensors[f"{stem}.weight_scale"] = np.full((rows, columns // 32), 127, np.uint8)
    path = directory / "model.safetensors"
    write_safetensors(path, tensors)
    moe = KTMoEWrapper(0, **SIZES, method="MXFP4", weight_path=path)
    moe.load_weights()
    return moe, [path]


def gguf_layer(directory: Path, **options: Any) -> tuple[Any, list[Path]]:
    layer = gguf_checkpoints.draw_layer("q8_0", E, I, H)
    gguf_checkpoints.write(directory / "model.gguf", layer.tensors, split=2)
    moe = KTMoEWrapper(gguf_checkpoints.LAYER, **SIZES, method="LLAMAFILE", weight_path=directory)
    moe.load_weights()
    return moe, sorted(directory.glob("*.gguf"))


def layer_of_memmaps(directory: Path, **options: Any) -> tuple[Any, list[Path]]:
    """A layer of arrays that the caller has mapped."""
    files, arrays = [], []
    for name, shape in {"gate": (E, I, H), "up": (E, I, H), "down": (E, H, I)}.items():
        files.append(directory / name)
        drawn = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        files[-1].write_bytes(bytes(16) + drawn.tobytes())
        mapped = np.memmap(files[-1], np.uint16, "r", offset=16, shape=shape)
        arrays.append(mapped.view(ml_dtypes.bfloat16))
    moe = KTMoEWrapper(0, **SIZES)
    moe.load_weights_from_tensors(arrays[0], list(arrays[1]), np.asarray(arrays[2]))
    return moe, files


LAYERS = [bfloat16_layer, quantized_layer, native_layer, gguf_layer, layer_of_memmaps]


@pytest.mark.kernels
@pytest.mark.parametrize("make", LAYERS)
def test_passes(make: Callable[..., tuple[Any, list[Path]]], tmp_path: Path) -> None:
    moe, files = make(tmp_path)
    expected = moe.forward(*BATCH)
    for file in files:
        for call in (moe.forward, moe.submit_forward):
            assert_told(file, lambda call=call: call(*BATCH))
            assert_same_bits(moe.forward(*BATCH), expected)
    with pytest.raises(RuntimeError, match="no pass of layer"):  # nothing was submitted
        moe.sync_forward()


def test_a_pass_asks_for_each_file_once(tmp_path: Path) -> None:
    moe, files = bfloat16_layer(tmp_path)
    assert len(moe._files._watched) == len(files) == 2


def test_passes_that_defer(tmp_path: Path) -> None:
    moe, files = bfloat16_layer(tmp_path, max_deferred_experts_per_token=1)
    expected = moe.forward(*BATCH), moe.drain_deferred()
    for call in (moe.forward, moe.submit_forward):
        assert_told(files[0], lambda call=call: call(*BATCH))
    assert moe.drain_deferred() is None
    assert_same_bits(moe.forward(*BATCH), expected[0])
    assert_same_bits(moe.drain_deferred(), expected[1])


@pytest.mark.kernels
def test_training(tmp_path: Path) -> None:
    sft, files = bfloat16_layer(tmp_path, mode="sft", lora_rank=2)
    expected = sft.forward_sft(*BATCH)
    gradients = sft.backward(X)
    for call in (sft.forward, sft.forward_sft, sft.submit_forward_sft):
        assert_told(files[1], lambda call=call: call(*BATCH))
    assert sft.num_cached == 0
    assert_same_bits(sft.forward_sft(*BATCH), expected)
    for call in (sft.backward, sft.submit_backward):
        assert_told(files[1], lambda call=call: call(X))
    assert sft.num_cached == 1
    assert_same_bits(sft.backward(X).grad_input, gradients.grad_input)


def test_streams(cuda_driver: str) -> None:
    run_with_driver(
        cuda_driver,
        """
        import os, tempfile
        path = os.path.join(tempfile.mkdtemp(), "down")
        with open(path, "wb") as file:
            file.write(layer.matrices[2].tobytes())
        down = np.memmap(path, np.uint16, "r", shape=layer.matrices[2].shape).view(bf16)
        moe.load_weights_from_tensors(*layer.matrices[:2], down)
        moe.forward(x, ids, w, stream, out=out)
        stream.synchronize()
        assert_same_bits(out.value, expected)
        os.truncate(path, 10)
        for call in (moe.forward, moe.submit_forward):
            try:
                call(x, ids, w, stream, out=out)
            except OSError as error:
                assert str(error).startswith(f"{path}: got 10 bytes"), error
            else:
                raise AssertionError(call)
        """,
    )


@pytest.mark.crosscheck
def test_calls_of_jax_outside_of_programs_and_tracing(tmp_path: Path) -> None:
    jax = pytest.importorskip("jax")
    from ktmoe_np.jax import moe_forward

    moe, files = bfloat16_layer(tmp_path)
    arrays = tuple(map(jax.numpy.asarray, BATCH))
    assert_told(files[0], lambda: moe_forward(moe, *arrays))
    program = jax.jit(lambda *batch: moe_forward(moe, *batch))
    assert_told(files[0], lambda: program(*arrays))
    assert_same_bits(np.asarray(program(*arrays)), moe.forward(*BATCH))


def test_buffers_of_experts(tmp_path: Path) -> None:
    moe, files = bfloat16_layer(tmp_path)
    w13, w2 = (np.empty(shape, ml_dtypes.bfloat16) for shape in ((2 * I, H), (H, I)))
    write = moe.submit_write_weight_scale_to_buffer
    assert_told(files[0], lambda: write(1, 0, [w13], None, [w2], None))
    write(1, 0, [w13], None, [w2], None)
    moe.sync_write_weight_scale_to_buffer()


def test_saving(tmp_path: Path) -> None:
    moe, (file,) = quantized_layer(tmp_path)
    content = file.read_bytes()
    assert_told(file, lambda: moe.save_weights(tmp_path / "again"))
    assert not list((tmp_path / "again").iterdir())
    assert moe.save_weights(tmp_path / "again").read_bytes() == content


def test_weights_that_are_refused_change_nothing(tmp_path: Path) -> None:
    sft, files = bfloat16_layer(tmp_path, mode="sft", lora_rank=2)
    sft.forward_sft(*BATCH)
    other = np.zeros((E, I, H), ml_dtypes.bfloat16)
    with pytest.raises(RuntimeError, match="wait for their backward"):
        sft.load_weights_from_tensors(other, other, np.zeros((E, H, I), ml_dtypes.bfloat16))
    assert_told(files[0], lambda: sft.backward(X))
    sft.clear_cache()
    sft.load_weights_from_tensors(other, other, np.zeros((E, H, I), ml_dtypes.bfloat16))
    with CutOff(files[0]):  # it holds other weights now
        assert not sft.forward_sft(*BATCH).any()


def test_layers_that_have_copied_their_weights_need_no_file(tmp_path: Path) -> None:
    moe, files = bfloat16_layer(tmp_path, method="AMXINT8")
    expected = moe.forward(*BATCH)
    with CutOff(files[0]), CutOff(files[1]):
        assert_same_bits(moe.forward(*BATCH), expected)


# ---- loading ----


def test_loading_from_a_checkpoint_that_was_opened_before(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], E, I, H)
    checkpoint, path = SafetensorsCheckpoint(tmp_path), tmp_path / "model.safetensors"
    assert_told(path, lambda: load_experts(checkpoint, 0))
    file = SafetensorsFile(path)
    assert_told(path, lambda: file.tensor(file.names()[0]))
    experts = load_experts(checkpoint, 0)
    for method in ("BF16", "AMXINT4"):
        moe = KTMoEWrapper(0, **SIZES, method=method)
        load = moe.load_weights_from_tensors
        assert_told(path, lambda load=load: load(**experts.arguments()))
        assert not moe.loaded


def test_arrays_that_are_converted_when_they_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "codes"
    path.write_bytes(bytes(4 * E * I * H // 8))
    codes = np.memmap(path, np.int32, "r", shape=(E, H // 8, I))
    last = np.zeros((E, I // 8, H), np.int32)
    scale, last_scale = np.ones((E, H // 32, I), np.float16), np.ones((E, I // 32, H), np.float16)
    moe = KTMoEWrapper(0, **SIZES, method="GPTQ_INT4", activation="relu2")
    load = moe.load_weights_from_tensors
    assert_told(path, lambda: load(codes, None, last, gate_scale=scale, down_scale=last_scale))
    load(codes, None, last, gate_scale=scale, down_scale=last_scale)
    expected = moe.forward(*BATCH)
    with CutOff(path):  # the rows that were made of them are in memory
        assert_same_bits(moe.forward(*BATCH), expected)
    scales, rows = tmp_path / "scales", np.zeros((E, I, H), np.uint8)
    scales.write_bytes(np.ones((E, I), np.float32).tobytes())
    moe = KTMoEWrapper(0, **SIZES, method="AMXINT8", activation="relu2")
    mapped = np.memmap(scales, np.float32, "r", shape=(E, I))
    down, down_scale = np.zeros((E, H, I), np.uint8), np.ones((E, H), np.float32)
    load = moe.load_weights_from_tensors
    assert_told(scales, lambda: load(rows, None, down, gate_scale=mapped, down_scale=down_scale))


def test_a_gguf_checkpoint_that_was_opened_before(tmp_path: Path) -> None:
    layer = gguf_checkpoints.draw_layer("q8_0", E, I, H)
    path = tmp_path / "model.gguf"
    gguf_checkpoints.write(path, layer.tensors)
    checkpoint = GgufCheckpoint(path)
    assert_told(path, lambda: checkpoint.tensor(checkpoint.names()[0]))
    assert_told(path, lambda: checkpoint.metadata("general.architecture"))
    for key in ("general.architecture", "qwen3moe.block_count"):
        assert_told(path, lambda key=key: checkpoint.metadata_of_layer(key, 0))
    assert checkpoint.metadata("general.architecture") == "qwen3moe"


def test_a_shared_checkpoint_that_was_cut_off_is_not_shared(tmp_path: Path) -> None:
    moe, files = bfloat16_layer(tmp_path)
    os.truncate(files[0], 100)
    with pytest.raises(ValueError, match=r"model-00001.*not a safetensors file, or cut off"):
        KTMoEWrapper.from_pretrained(tmp_path)
    assert moe.loaded


# ---- the process ----

_CUT_OFF = """
import os, sys
import ml_dtypes, numpy as np
from pathlib import Path
from checkpoints import write_checkpoint
from ktmoe_np import KTMoEWrapper
path = Path(sys.argv[1])
write_checkpoint(path, "qwen3_moe", [0], 2, 256, 512)
moe = KTMoEWrapper.from_pretrained(path)
batch = np.ones((1, 512), ml_dtypes.bfloat16), np.array([[0, 1]]), np.ones((1, 2), np.float32)
moe.forward(*batch)
os.truncate(path / "model.safetensors", 0)
try:
    moe.forward(*batch)
except OSError as error:
    print(error)
"""


def test_the_process_lives(tmp_path: Path) -> None:
    done = run_python(_CUT_OFF, str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'model' / 'model.safetensors'}: got 0 bytes, expected the ")


# ---- which files arrays lie in ----


def test_arrays_and_their_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(20000))
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    views: list[NDArray[Any]] = [
        np.ndarray((3, 4), np.int16, mapping, 8)[1:, ::2],
        np.frombuffer(mapping, np.uint8, 100, 3).view(np.int8).reshape(10, 10).T,
        np.asarray(memoryview(mapping)[5:9]),
    ]
    for view in views:
        files = MappedFiles([[view]])
        files.check()
        with CutOff(path), pytest.raises(OSError, match="a mapped file: got 10 bytes, expected the 20000"):
            files.check()
    anonymous = mmap.mmap(-1, 4096)
    others = [None, "q8_0", np.ones(3), np.frombuffer(anonymous, np.uint8), [np.ones(2), object()]]
    assert not MappedFiles(others)._watched


def test_a_memmap_needs_its_own_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    mapped = np.memmap(path, np.uint8, "r", offset=mmap.PAGESIZE + 8, shape=(100,))
    os.truncate(path, 2 * mmap.PAGESIZE)
    MappedFiles([mapped]).check()
    os.truncate(path, mmap.PAGESIZE + 107)
    with pytest.raises(OSError, match=f"expected the {mmap.PAGESIZE + 108} that are in use"):
        MappedFiles([np.asarray(mapped[5:])]).check()


def test_devices_have_no_size(tmp_path: Path) -> None:
    mapped: list[NDArray[Any]] = [np.memmap("/dev/zero", np.uint8, "r", shape=(100,))]
    with open("/dev/zero", "r+b") as device:
        for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
            mapped.append(np.frombuffer(mmap.mmap(device.fileno(), 1 << 16, flags=flags), np.uint8))
    files = MappedFiles(mapped)
    files.check()
    assert not files._watched
    path = tmp_path / "x"
    path.write_bytes(bytes(100))
    file = np.memmap(path, np.uint8, "r")
    os.truncate(path, 0)
    with pytest.raises(OSError, match="got 0 bytes, expected the 100 that"):
        MappedFiles([file]).check()


def test_example() -> None:
    assert doctest.testmod(ktmoe_np.io.mapped, optionflags=doctest.ELLIPSIS).failed == 0
