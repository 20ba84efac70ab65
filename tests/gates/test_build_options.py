"""What builds leave out unless they are asked: emulators and, inside another project, the tests."""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from ktmoe_np import isa_info

from ._build import built_cores, cache_entry
from ._tree import ROOT

_EMULATORS = set(isa_info()["on_request"])
_WHEEL_TAG = re.compile(r"cp3\d+-(?:cp3\d+|abi3)-\w+")
# What the package consists of, beside its license and the like.
_PACKAGED = {".py", ".csv", ".pyi", ".so", ".typed", ".md", ".json", ".safetensors", ".txt"}


def test_a_project_that_includes_this_one(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no cmake or no compiler")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.26)\nproject(including LANGUAGES CXX)\n"
        f'add_subdirectory("{ROOT}" ktmoe)\n'
        "if(TARGET ktmoe_tests OR NOT TARGET ktmoe::core)\n  message(FATAL_ERROR targets)\nendif()\n"
    )
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert cache_entry(tmp_path / "build", "KTMOE_BUILD_TESTS") == "OFF"
    built_for = cache_entry(tmp_path / "build", "KTMOE_ISAS").split(";")
    assert not _EMULATORS & set(built_for)


def test_an_instruction_set_brings_the_one_that_it_is_based_on(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no cmake or no compiler")
    command = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path),
        "-DKTMOE_ISAS=avx_vnni",
        "-DKTMOE_BUILD_TESTS=OFF",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(cache_entry(tmp_path, "KTMOE_ISAS").split(";")) == {"avx2", "avx_vnni"}


def _symbols(library: Path) -> str:
    command = ["nm", "--defined-only", str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_only_builds_that_ask_for_it_have_an_emulator() -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    libraries = built_cores()
    if not libraries:
        pytest.skip("nothing is built")
    for library in libraries:
        symbols, asked = _symbols(library), cache_entry(library.parent, "KTMOE_ISAS").split(";")
        emulators = {isa for isa in _EMULATORS if f"{len(isa)}{isa}" in symbols}
        assert emulators == _EMULATORS & set(asked), library
        assert not (emulators and _WHEEL_TAG.fullmatch(library.parent.name)), f"{library}: of a wheel"


def test_wheels_hold_the_package_alone() -> None:
    wheels = sorted(ROOT.glob("dist/*.whl"))
    if not wheels:
        pytest.skip("no wheel in dist/")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            extensions = [name for name in names if re.search(r"^ktmoe_np/kt_kernel_ext\b.*\.so$", name)]
            assert len(extensions) == 1, names
            assert b"amx_emu: a palette" not in archive.read(extensions[0]), wheel  # an error of the emulator
        for name in names:
            if ".dist-info/" not in name:
                assert name.startswith("ktmoe_np/"), f"{wheel}: {name}"
                assert Path(name).suffix in _PACKAGED, f"{wheel}: {name}"
