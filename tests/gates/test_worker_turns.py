"""Turns of pytest's workers: shared, exclusive, and no worker overtakes one that waits to be alone."""

from __future__ import annotations

import threading
from pathlib import Path

from worker_turns import WorkerTurns

_A_WHILE = 0.2


class _Worker(threading.Thread):
    """Takes a turn as soon as it may, and ends it when told; file locks are separate in threads too."""

    def __init__(self, folder: Path, *, alone: bool) -> None:
        super().__init__(daemon=True)
        self.turns, self._alone = WorkerTurns(folder), alone
        self.has_turn, self.end = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with self.turns.take(alone=self._alone):
            self.has_turn.set()
            self.end.wait(60)


def test_turns_beside_others_and_alone(tmp_path: Path) -> None:
    beside = [_Worker(tmp_path, alone=False) for _ in range(2)]
    assert all(worker.has_turn.wait(60) for worker in beside)
    alone = _Worker(tmp_path, alone=True)
    assert not alone.has_turn.wait(_A_WHILE)
    late = _Worker(tmp_path, alone=False)
    assert not late.has_turn.wait(_A_WHILE)  # it would go beside the first two, but one waits to be alone
    for worker in beside:
        worker.end.set()
    assert alone.has_turn.wait(60)
    assert not late.has_turn.wait(_A_WHILE)
    alone.end.set()
    assert late.has_turn.wait(60)
    late.end.set()
    for worker in (*beside, alone, late):
        worker.join(60)
        worker.turns.close()
