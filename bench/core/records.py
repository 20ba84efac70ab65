"""Results as JSON lines: one record a measurement, self-contained."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DEFAULT_PATH", "Results", "machine"]

DEFAULT_PATH = Path(__file__).resolve().parents[1] / "results" / "bench.jsonl"


def machine(name: str | None = None) -> dict[str, Any]:
    """Describe the machine: `name` (default: its CPU model), CPU model, and CPUs that may be used."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = " ".join(line.split(":", 1)[1].split())
            break
    return {"machine": name or model, "cpu": model, "cpus": len(os.sched_getaffinity(0))}


class Results:
    """Records, written as they come: what was measured before a run is cut short is kept."""

    def __init__(self, path: str | os.PathLike[str] | None, machine_name: str | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self._common = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **machine(machine_name),
            "numpy": np.__version__,
            "kernel": platform.release().split("-")[0],
        }
        self.machine = f"{self._common['machine']}, {self._common['cpus']} CPUs"
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, **values: Any) -> dict[str, Any]:
        """Write a record and return it."""
        record = {"kind": kind, **self._common, **values}
        self.records.append(record)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return record
