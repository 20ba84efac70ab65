"""Every input of the fuzzer's corpus, and mutations of each, is read or refused with the file's name."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz_mutations import mutate
from fuzz_targets import TARGETS, make_target

from ktmoe_np.io.converted.manifest import read_manifest
from ktmoe_np.io.inspect import inspect_checkpoint
from ktmoe_np.models.config import DecoderConfig

CORPUS = sorted(path for path in Path(__file__).with_name("corpus").glob("*/*") if path.is_file())

#: Mutations of an input, which a test has a moment for.
MUTATIONS = 40


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_replay(tmp_path: Path, path: Path) -> None:
    target, data = make_target(path.parent.name, tmp_path / "checkpoint"), path.read_bytes()
    target(data)
    rng = random.Random(zlib.crc32(data))
    for _ in range(MUTATIONS):
        target(mutate(path.parent.name, data, rng))


def test_every_target_has_seeds() -> None:
    assert {path.parent.name for path in CORPUS} == set(TARGETS)


def test_a_target_sees_a_message_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target("manifest", tmp_path / "checkpoint")

    def refuse(_: Path) -> None:
        raise ValueError("something is wrong")

    monkeypatch.setattr("fuzz_targets.read_manifest", refuse)
    with pytest.raises(AssertionError, match="a message names no file: ValueError: something is wrong"):
        target(b"{}")


@pytest.mark.parametrize(
    ("seed", "read"),
    [
        ("manifest/int4", read_manifest),
        ("index/one", inspect_checkpoint),
        ("config/qwen3_moe", inspect_checkpoint),
        ("config/decoder", DecoderConfig.from_pretrained),
        ("safetensors/per_expert", inspect_checkpoint),
        ("gguf/stacked", lambda folder: inspect_checkpoint(folder / "model.gguf")),
    ],
)
def test_seeds_are_read_to_their_end(tmp_path: Path, seed: str, read: Callable[[Path], object]) -> None:
    """A target that only refuses would find nothing."""
    target = make_target(seed.partition("/")[0], tmp_path / "checkpoint")
    target((Path(__file__).with_name("corpus") / seed).read_bytes())
    assert read(tmp_path / "checkpoint") is not None
