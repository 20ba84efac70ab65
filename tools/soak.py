"""Use layers from many threads for a long time, with good and bad calls, and check every result to the bit.

    python tools/soak.py --threads 64 --seconds 3600

prints a line of counts now and then. It ends with status 1 at the first wrong result or unexpected exception.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import random
import resource
import sys
import threading
import time
from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np

from ktmoe_np import KTMoEWrapper

E, P, H, I = 8, 3, 96, 64  # noqa: E741
BATCHES = (0, 1, 2, 7, 33, 150)


def weights(rng: np.random.Generator) -> list[Any]:
    """Draw gate, up and down."""
    shapes = ((E, I, H), (E, I, H), (E, H, I))
    return [(rng.standard_normal(s) * s[-1] ** -0.5).astype(ml_dtypes.bfloat16) for s in shapes]


class Case:
    """A layer, its batches, and their results without other threads."""

    def __init__(self, method: str, mode: str, seed: int, **options: Any) -> None:
        rng = np.random.default_rng(seed)
        self.name = method
        self.lock = threading.Lock()  # a layer that trains keeps a stack of passes
        self.moe: Any = KTMoEWrapper(seed, E, P, H, I, method=method, mode=mode, **options)
        self.moe.load_weights_from_tensors(*weights(rng))
        self.trains = mode == "sft"
        if self.trains:
            self.moe.init_lora_weights()
            self.moe.update_lora_weights(down_lora_b=rng.standard_normal((E, H, 4)).astype(np.float32))
        self.batches = [self._batch(rng, num) for num in BATCHES]
        self.grads = [rng.standard_normal((num, H)).astype(ml_dtypes.bfloat16) for num in BATCHES]
        self.expected = [self.moe.forward(*batch).tobytes() for batch in self.batches]
        self.steps = [self._step(i) for i in range(len(BATCHES))] if self.trains else []

    @staticmethod
    def _batch(rng: np.random.Generator, num: int) -> tuple[Any, Any, Any]:
        x = rng.standard_normal((num, H)).astype(ml_dtypes.bfloat16)
        return x, rng.integers(-1, E, (num, P)), rng.random((num, P), np.float32)

    def _step(self, i: int) -> bytes:
        out = self.moe.forward_sft(*self.batches[i])
        g = self.moe.backward(self.grads[i])
        return b"".join(a.tobytes() for a in (out, g.grad_input, g.grad_weights, *g.matrices.values()))

    def forward(self, i: int) -> None:
        check(self.moe.forward(*self.batches[i]).tobytes() == self.expected[i], f"{self.name}: forward {i}")

    def submit(self, i: int) -> None:
        try:
            self.moe.submit_forward(*self.batches[i])
        except RuntimeError as error:
            check("is pending" in str(error), str(error))
            return
        with contextlib.suppress(RuntimeError):  # another thread may have taken it
            got = self.moe.sync_forward().tobytes()
            check(got in self.expected, f"{self.name}: sync_forward")

    def step(self, i: int) -> None:
        with self.lock:
            check(self._step(i) == self.steps[i], f"{self.name}: step {i}")

    def refuse(self, i: int) -> None:
        x, ids, routing = self.batches[i]
        wrong = ids.copy()
        if not wrong.size:
            return
        wrong.flat[random.randrange(wrong.size)] = E + random.randrange(5)
        try:
            self.moe.forward(x, wrong, routing)
        except IndexError:
            return
        check(False, f"{self.name}: an id of {wrong.max()} was not refused")

    def change_ids(self, i: int) -> None:
        """The ids change while they are used: any result will do, or a refusal."""
        x, ids, routing = self.batches[i]
        changing = ids.copy()
        stop = threading.Event()

        def change() -> None:
            while not stop.is_set():
                if changing.size:
                    changing.flat[random.randrange(changing.size)] = random.randrange(-1, E)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for _ in range(5):
                out = self.moe.forward(x, changing, routing)
                check(bool(np.isfinite(out.astype(np.float32)).all()), f"{self.name}: not finite")
        finally:
            stop.set()
            thread.join()

    def sync_engine(self, i: int) -> None:
        with contextlib.suppress(IndexError):
            self.moe.cpu_infer.sync()

    def collect(self, i: int) -> None:
        if random.random() < 0.02:
            gc.collect()


failed = threading.Event()
counts: Counter[str] = Counter()


def check(holds: bool, what: str) -> None:
    """Stop all threads when something does not hold."""
    if not holds:
        failed.set()
        raise AssertionError(what)


def work(cases: list[Case], end: float, seed: int) -> None:
    """Make random calls until the end."""
    draw = random.Random(seed)
    mine: Counter[str] = Counter()
    try:
        while time.monotonic() < end and not failed.is_set():
            case = draw.choice(cases)
            kinds = ["forward", "forward", "refuse", "change_ids", "sync_engine", "collect"]
            kinds += ["step", "step"] if case.trains else ["submit", "submit"]
            kind = draw.choice(kinds)
            getattr(case, kind)(draw.randrange(len(BATCHES)))
            mine[kind] += 1
            if sum(mine.values()) % 50 == 0:
                counts.update(mine)
                mine.clear()
    except BaseException:
        failed.set()
        raise
    finally:
        counts.update(mine)


def main() -> int:
    """Run the threads; 1 when anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    faulthandler.enable()
    inference = ("BF16", "AMXINT8", "AMXINT4", "MOE_INT8", "MOE_INT4")
    cases = [Case(method, "inference", i, chunked_prefill_size=64) for i, method in enumerate(inference)]
    for i, method in enumerate(("AMXBF16_SFT", "AMXINT8_SFT", "MOE_INT4_SFT")):
        cases.append(Case(method, "sft", 20 + i, lora_rank=4))
    begin = time.monotonic()
    end = begin + arguments.seconds
    threads = [threading.Thread(target=work, args=(cases, end, i)) for i in range(arguments.threads)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(60.0, arguments.seconds / 10))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(
            f"{time.monotonic() - begin:.0f} s, {sum(counts.values())} calls, {memory} MiB at most",
            flush=True,
        )
    print(dict(counts), "failed" if failed.is_set() else "all as expected")
    return int(failed.is_set())


if __name__ == "__main__":
    sys.exit(main())
