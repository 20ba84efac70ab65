"""`ktmoe doctor`: each check sees what it is for, and says what to do."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from cli_runs import only_error

from ktmoe_np.cli import doctor, main
from ktmoe_np.cli.doctor import CHECKS, Machine

#: A machine with nothing to say about.
_FILES = {
    "/proc/cpuinfo": "processor\t: 0\n\nprocessor\t: 1\n",
    "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
    "/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver": "acpi-cpufreq\n",
    "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "/proc/sys/kernel/numa_balancing": "1\n",
}
_ISAS = ["scalar", "avx2", "avx512", "amx", "amx_emu"]
_FINE = Machine(
    isa={
        "active": "avx512",
        "known": _ISAS,
        "on_request": ["amx_emu"],
        "compiled": _ISAS,
        "supported": ["scalar", "avx2", "avx512", "amx_emu"],
    },
    topology={"cpus": [0, 1], "cpu_quota": 2, "node_cpus": {0: [0, 1]}},
    memory={"total_bytes": 2**34, "available_bytes": 2**33, "limit_bytes": None},
    environment={},
    flags=frozenset({"sse2", "avx"}),
    system=lambda path: _FILES.get(path, ""),
)


def with_files(**files: str) -> Machine:
    """A machine some of whose files have another content, by the ends of their names."""

    def system(path: str) -> str:
        return next((text for name, text in files.items() if path.endswith(name)), _FILES.get(path, ""))

    return replace(_FINE, system=system)


def with_isa(**isa: Any) -> Machine:
    """A machine with other kernels."""
    return replace(_FINE, isa={**_FINE.isa, **isa})


def with_topology(**topology: Any) -> Machine:
    """A machine with other processors."""
    return replace(_FINE, topology={**_FINE.topology, **topology})


def with_memory(**memory: int | None) -> Machine:
    """A machine with other memory."""
    return replace(_FINE, memory={**_FINE.memory, **memory})


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())


@pytest.mark.usefixtures("quiet")
def test_a_machine_that_is_fine() -> None:
    findings = [check(_FINE) for check in CHECKS]
    assert [f.name for f in findings if f.state != "ok" or f.advice] == []
    assert len({f.name for f in findings}) == len(CHECKS)


@pytest.mark.parametrize(
    ("check", "machine", "state", "found", "advice"),
    [
        (
            "instruction_set",
            with_isa(active="avx2"),
            "note",
            "avx2, which KTMOE_ISA asks for",
            "unset KTMOE_ISA",
        ),
        (
            "instruction_set",
            with_isa(compiled=["scalar", "avx2", "avx512"]),
            "note",
            "built without amx",
            "install without KTMOE_ISAS",
        ),
        (
            "instruction_set",
            replace(_FINE, flags=frozenset({"amx_bf16"})),
            "problem",
            "avx512, though the processor has AMX",
            "Linux 5.16",
        ),
        ("instruction_set", with_isa(active="scalar", supported=["scalar"]), "note", "no AVX2", "may hide"),
        (
            "processors",
            with_topology(cpu_quota=1),
            "note",
            "a quota of 1, on 2 processors",
            "takes 1 thread;",
        ),
        ("processors", with_topology(cpus=[1], cpu_quota=1), "note", "1 of 2 (1)", "taskset"),
        ("clock", with_files(scaling_governor="powersave"), "note", "driver acpi-cpufreq", "cpupower"),
        ("memory", with_memory(available_bytes=2**30), "problem", "1.0 of 16.0 GiB", "again and again"),
        ("memory", with_memory(limit_bytes=2**32), "note", "may use 4.0 GiB", "raise the container's limit"),
        ("memory", with_memory(total_bytes=None), "note", "unknown", "mount /proc"),
        ("huge_pages", with_files(enabled="always madvise [never]"), "note", "small pages", "echo madvise"),
        ("numa", with_topology(node_cpus={0: [0], 1: [1]}), "note", "2 nodes", "numa_balancing"),
        ("blas_threads", with_topology(cpus=[0, 1, 2, 3]), "note", "as many", "OPENBLAS_NUM_THREADS=1"),
    ],
)
def test_what_is_in_the_way(check: str, machine: Machine, state: str, found: str, advice: str) -> None:
    finding = getattr(doctor, check)(machine)
    assert (finding.state, found in finding.found, advice in finding.advice) == (state, True, True), finding


@pytest.mark.parametrize(
    ("check", "machine"),
    [
        ("clock", with_files(scaling_governor="powersave", scaling_driver="intel_pstate")),
        ("clock", with_files(scaling_governor="")),
        ("huge_pages", with_files(enabled="")),
        ("numa", replace(with_topology(node_cpus={0: [0], 1: [1]}), system=lambda _: "0\n")),
        ("blas_threads", replace(with_topology(cpus=[0, 1, 2, 3]), environment={"OMP_NUM_THREADS": "1"})),
    ],
)
def test_what_is_fine(check: str, machine: Machine) -> None:
    finding = getattr(doctor, check)(machine)
    assert (finding.state, finding.advice) == ("ok", "")


def test_load_disk_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1e6, 0.0, 0.0))
    assert "load 1000000.0" in doctor.load(_FINE).found
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert doctor.temporary_files(_FINE).state == "problem"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    finding = doctor.packages(_FINE)
    assert (finding.found, finding.advice) == ("without gguf", "pip install '.[gguf]'")

    def nowhere() -> str:
        raise FileNotFoundError("no usable folder")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert doctor.temporary_files(_FINE).found == "no usable folder"


@pytest.mark.usefixtures("quiet")
def test_text_and_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Machine, "here", lambda: _FINE)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=2) == ["kernels", "ok", "avx512, the best of this processor"]
    assert lines[-2].startswith("0 problems, 0 notes.")
    monkeypatch.setattr(Machine, "here", lambda: with_memory(available_bytes=1))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "memory              PROBLEM  0.0 of 16.0 GiB are free\n" in text
    assert f"\n{'':<29}-> mapped weights are read" in text


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert status == int(any(f["state"] == "problem" for f in findings))
    assert len(findings) == len(CHECKS)
    assert all(f["found"] and (f["state"] == "ok") == (not f["advice"]) for f in findings)


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "more"]) == 2
    assert "unrecognized arguments: more" in only_error(capsys)
