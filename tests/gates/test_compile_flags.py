"""How sources are compiled: no fused products anywhere, -O3 for the core, no arithmetic outside the kernels.

A compiler that may contract `a * b + c` to an fma does so on some platforms and not on others, and the bits
of results differ. Looks at the builds of the libraries that KTMOE_GATE_LIB names, else at the newest build
below build/.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ktmoe_np import isa_info

from ._build import compile_commands
from ._tree import ROOT

# Kernels that are compiled fast instead: for tests alone, and for machines older than AVX2.
_ANY_OPTIMIZATION = re.compile(rf"targets/({'|'.join(['scalar', *isa_info()['on_request']])})\.h\b")
# Layers and bindings leave arithmetic on rows to the kernels. These sources compute single numbers: rates,
# the scale of the adapters, that scale times a routing weight.
_SINGLE_NUMBERS = {"cpp/moe/limits.cpp", "cpp/sft/config.cpp", "cpp/sft/backward_output.cpp"}
_COMPUTE_NOTHING = ("cpp/bindings/", "cpp/moe/", "cpp/sft/")
_FLOAT_ARITHMETIC = re.compile(r"\tv?(?:add|sub|mul|div|sqrt|fn?m(?:add|sub)(?:132|213|231))[sp][sd]\s")


def last_flag(arguments: list[str], prefix: str) -> str | None:
    """The flag that counts among those that begin alike."""
    return next((flag for flag in reversed(arguments) if flag.startswith(prefix)), None)


def flag_faults(entry: dict[str, Any], build_type: str, root: Path = ROOT) -> list[str]:
    """What is wrong with an entry of compile_commands.json; nothing for sources of others."""
    source = Path(entry["directory"], entry["file"])
    if not source.is_relative_to(root) or ".venv" in source.parts:
        return []
    name = source.relative_to(root).as_posix()
    arguments = entry.get("arguments") or shlex.split(entry["command"])
    faults = []
    if last_flag(arguments, "-ffp-contract=") != "-ffp-contract=off":
        faults.append(f"{name}: compiled without -ffp-contract=off")
    in_core = name.startswith("cpp/") and not name.startswith("cpp/bindings/")
    if build_type == "Release" and in_core and not any(map(_ANY_OPTIMIZATION.search, arguments)):
        optimization = last_flag(arguments, "-O")
        if optimization != "-O3":
            faults.append(f"{name}: compiled with {optimization}, expected -O3")
    return faults


def _builds() -> list[Path]:
    if named := os.environ.get("KTMOE_GATE_LIB"):
        return [
            folder
            for name in named.split(":")
            if (folder := Path(name).parent / "compile_commands.json").exists()
        ]
    found = list(ROOT.glob("build/*/compile_commands.json"))
    return [max(found, key=lambda path: path.stat().st_mtime)] if found else []


def _build_type(folder: Path) -> str:
    match = re.search(r"^CMAKE_BUILD_TYPE:\w+=(\w*)$", (folder / "CMakeCache.txt").read_text(), re.MULTILINE)
    return match[1] if match else ""


def test_flags_of_every_source() -> None:
    builds = _builds()
    if not builds:
        pytest.skip("no build with a compile_commands.json; KTMOE_GATE_LIB may name a library beside one")
    for path in builds:
        entries = compile_commands(path)
        faults = [fault for entry in entries for fault in flag_faults(entry, _build_type(path.parent))]
        assert not faults, f"{path}:\n" + "\n".join(faults)
        core = [entry for entry in entries if "/cpp/moe/layer/" in entry["file"]]
        assert core, f"{path}: no layer code among {len(entries)} sources"


def _objects_without_arithmetic() -> dict[Path, list[str]]:
    """Objects that are built and whose sources, by name, shall compute nothing."""
    found: dict[Path, list[str]] = {}
    for path in _builds():
        for entry in compile_commands(path):
            source = Path(entry["directory"], entry["file"])
            built = Path(entry["directory"], entry.get("output", ""))
            if not source.is_relative_to(ROOT) or not built.is_file():
                continue
            name = source.relative_to(ROOT).as_posix()
            if name.startswith(_COMPUTE_NOTHING) and name not in _SINGLE_NUMBERS:
                found.setdefault(built, []).append(name)
    return found


def test_arithmetic_stands_in_the_kernels() -> None:
    objects = _objects_without_arithmetic()
    if not objects or shutil.which("objdump") is None:
        pytest.skip("no objects of layers and bindings, or no objdump")
    faults = []
    for path, names in objects.items():
        command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if "x86-64" not in listing:
            pytest.skip("not objects for x86-64")
        if found := _FLOAT_ARITHMETIC.search(listing):
            faults.append(f"one of {', '.join(names)}: {found.group().strip()}")
    assert not faults, "\n".join(faults)


def _entry(file: str, flags: str) -> dict[str, Any]:
    return {"directory": "/src/build/dev", "file": f"/src/{file}", "command": f"g++ {flags} -c /src/{file}"}


@pytest.mark.parametrize(
    ("file", "flags", "fault"),
    [
        ("cpp/moe/layer/tp_moe.cpp", "-O3", "without -ffp-contract=off"),
        ("cpp/bindings/xla.cpp", "-O3 -ffp-contract=fast -Os", "without -ffp-contract=off"),
        ("tests/cpp/moe/test_moe.cpp", "-ffp-contract=off -ffp-contract=fast", "without -ffp-contract=off"),
        ("cpp/sft/lora.cpp", "-ffp-contract=off -O3 -Os", "compiled with -Os, expected -O3"),
        ("cpp/sft/lora.cpp", "-ffp-contract=off", "compiled with None, expected -O3"),
    ],
)
def test_the_gate_sees_a_wrong_flag(file: str, flags: str, fault: str) -> None:
    (found,) = flag_faults(_entry(file, flags), "Release", Path("/src"))
    assert found == f"{file}: {fault if fault.startswith('compiled') else 'compiled ' + fault}"


def test_sources_that_are_compiled_as_one(tmp_path: Path) -> None:
    batch = tmp_path / "Unity" / "unity_sft_cxx.cxx"
    batch.parent.mkdir()
    batch.write_text(
        '/* a comment */\n#include "/src/cpp/sft/lora.cpp"\n\n#include "/src/cpp/sft/interface.cpp"\n'
    )
    commands = tmp_path / "compile_commands.json"
    commands.write_text(
        json.dumps(
            [{"directory": str(tmp_path), "file": str(batch), "command": "g++ -O3"}, _entry("main.cpp", "")]
        )
    )
    entries = compile_commands(commands)
    assert [entry["file"] for entry in entries] == [
        "/src/cpp/sft/lora.cpp",
        "/src/cpp/sft/interface.cpp",
        "/src/main.cpp",
    ]
    assert flag_faults(entries[0], "Release", Path("/src")) == [
        "cpp/sft/lora.cpp: compiled without -ffp-contract=off"
    ]


@pytest.mark.parametrize(
    ("file", "flags", "build_type"),
    [
        ("cpp/moe/layer/tp_moe.cpp", "-O3 -ffp-contract=off", "Release"),
        ("cpp/bindings/xla.cpp", "-ffp-contract=off -Os", "Release"),
        ("cpp/kernels/targets/nt.cpp", "-DX=targets/amx_emu.h -O3 -ffp-contract=off -O1", "Release"),
        ("cpp/sft/lora.cpp", "-ffp-contract=off -O1", "RelWithDebInfo"),
        (".venv/lib/nanobind/src/nb_func.cpp", "-O3", "Release"),
        ("../elsewhere/nb_func.cpp", "-O3", "Release"),
    ],
)
def test_the_gate_leaves_other_flags_alone(file: str, flags: str, build_type: str) -> None:
    entry = _entry(file, flags)
    entry["file"] = os.path.normpath(entry["file"])
    assert not flag_faults(entry, build_type, Path("/src"))


@pytest.mark.parametrize(
    "instruction", ["mulss  %xmm0,%xmm1", "vaddps %ymm0,%ymm1,%ymm2", "vfmadd231ps %ymm0,%ymm1,%ymm2"]
)
def test_the_gate_sees_arithmetic(instruction: str) -> None:
    assert _FLOAT_ARITHMETIC.search(f"   0:\t{instruction}\n")
    assert not _FLOAT_ARITHMETIC.search("   0:\tadd    $0x8,%rsp\n   4:\tmulq   %rax\n   8:\tsubsd_helper\n")
