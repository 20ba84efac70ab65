"""Fuzz the readers of checkpoints: ``python tests/fuzz/fuzz_run.py gguf -runs=200000``; see README.md."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ktmoe_np"]):
    from fuzz_mutations import mutate
    from fuzz_targets import TARGETS, make_target


def main() -> None:
    """Run one target until it fails, or as long as the options of libFuzzer say."""
    name, *options = sys.argv[1:] or ["?"]
    if name not in TARGETS:
        raise SystemExit(f"target: got {name!r}, expected one of {', '.join(TARGETS)}")
    corpus = Path(__file__).with_name("corpus") / name

    def custom(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = mutate(name, data, rng) if rng.random() < 0.7 else atheris.Mutate(data, max_size)
        return changed[:max_size]

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        limits = ["-timeout=10", "-rss_limit_mb=4096", "-max_len=16384"]
        # What is found goes to the first folder, and is not to be kept.
        found = Path(folder, "found")
        found.mkdir()
        arguments = [sys.argv[0], *limits, *options, str(found), str(corpus)]
        atheris.Setup(arguments, make_target(name, Path(folder, "checkpoint")), custom_mutator=custom)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
